"""RLHF by RLOO: answers drawn while it trains, each rewarded beside the others to its prompt.

`python -m recipes.rloo model=mistral7b`; `python -m recipes.rloo --help` lists every choice.
"""

import hydra

from preftune.config.command_line import command_line
from preftune.launch import start


@hydra.main(version_base="1.3", config_path="pkg://preftune.conf", config_name="rloo")
def main(cfg):
    return start.run(cfg, "recipes.rloo", "preftune.runs.training:train")


if __name__ == "__main__":
    command_line("rloo")
    main()
