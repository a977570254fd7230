"""DPO and every other preference loss.

`python -m recipes.dpo loss=ipo model=mistral7b`; `python -m recipes.dpo --help` lists every choice.
"""

import hydra

from preftune import checks, launch


@hydra.main(version_base="1.3", config_path="pkg://preftune.conf", config_name="dpo")
def main(cfg):
    return launch.run(cfg, "recipes.dpo", "preftune.training:train")


if __name__ == "__main__":
    checks.command_line("dpo")
    main()
