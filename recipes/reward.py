"""A reward model: which of two answers is the better one, as a number for each.

`python -m recipes.reward model=mistral7b`; `python -m recipes.reward --help` lists every choice.
"""

import hydra

from preftune.config.command_line import command_line
from preftune.launch import start


@hydra.main(version_base="1.3", config_path="pkg://preftune.conf", config_name="reward")
def main(cfg):
    return start.run(cfg, "recipes.reward", "preftune.runs.training:train")


if __name__ == "__main__":
    command_line("reward")
    main()
