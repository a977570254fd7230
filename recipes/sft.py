"""Supervised fine-tuning on the chosen answers.

`python -m recipes.sft`; `python -m recipes.sft --help` lists every choice.
"""

import hydra

from preftune.config.command_line import command_line
from preftune.launch import start


@hydra.main(version_base="1.3", config_path="pkg://preftune.conf", config_name="sft")
def main(cfg):
    return start.run(cfg, "recipes.sft", "preftune.runs.training:train")


if __name__ == "__main__":
    command_line("sft")
    main()
