"""Supervised fine-tuning on the chosen answers.

`python -m recipes.sft`; `python -m recipes.sft --help` lists every choice.
"""

import hydra

from preftune import checks, launch


@hydra.main(version_base="1.3", config_path="pkg://preftune.conf", config_name="sft")
def main(cfg):
    return launch.run(cfg, "recipes.sft", "preftune.training:train")


if __name__ == "__main__":
    checks.command_line("sft")
    main()
