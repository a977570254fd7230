"""DPO and every other preference loss.

`python -m recipes.dpo loss=ipo model=mistral7b`; `python -m recipes.dpo --help` lists every choice.
"""

import hydra

from preftune.config.command_line import command_line
from preftune.launch import start


@hydra.main(version_base="1.3", config_path="pkg://preftune.conf", config_name="dpo")
def main(cfg):
    return start.run(cfg, "recipes.dpo", "preftune.runs.training:train")


if __name__ == "__main__":
    command_line("dpo")
    main()
