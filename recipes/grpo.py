"""RLHF by GRPO: as RLOO, with rewards normalised in the group and clipped steps.

`python -m recipes.grpo model=mistral7b`; `python -m recipes.grpo --help` lists every choice.
"""

import hydra

from preftune.config.command_line import command_line
from preftune.launch import start


@hydra.main(version_base="1.3", config_path="pkg://preftune.conf", config_name="grpo")
def main(cfg):
    return start.run(cfg, "recipes.grpo", "preftune.runs.training:train")


if __name__ == "__main__":
    command_line("grpo")
    main()
