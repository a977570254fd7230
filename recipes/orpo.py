"""ORPO, one stage without a reference.

`python -m recipes.orpo model=path model.path=my-base-model`; `python -m recipes.orpo --help` lists every choice.
"""

import hydra

from preftune.config.command_line import command_line
from preftune.launch import start


@hydra.main(version_base="1.3", config_path="pkg://preftune.conf", config_name="orpo")
def main(cfg):
    return start.run(cfg, "recipes.orpo", "preftune.runs.training:train")


if __name__ == "__main__":
    command_line("orpo")
    main()
