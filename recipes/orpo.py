"""ORPO, one stage without a reference.

`python -m recipes.orpo model=path model.path=my-base-model`; `python -m recipes.orpo --help` lists every choice.
"""

import hydra

from preftune import checks, launch


@hydra.main(version_base="1.3", config_path="pkg://preftune.conf", config_name="orpo")
def main(cfg):
    return launch.run(cfg, "recipes.orpo", "preftune.training:train")


if __name__ == "__main__":
    checks.command_line("orpo")
    main()
