"""KTO, thumbs up or down.

`python -m recipes.kto data=file data.path=thumbs.jsonl`; `python -m recipes.kto --help` lists every choice.
"""

import hydra

from preftune.config.command_line import command_line
from preftune.launch import start


@hydra.main(version_base="1.3", config_path="pkg://preftune.conf", config_name="kto")
def main(cfg):
    return start.run(cfg, "recipes.kto", "preftune.runs.training:train")


if __name__ == "__main__":
    command_line("kto")
    main()
