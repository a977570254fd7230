"""KTO, thumbs up or down.

`python -m recipes.kto data=file data.path=thumbs.jsonl`; `python -m recipes.kto --help` lists every choice.
"""

import hydra

from preftune import checks, launch


@hydra.main(version_base="1.3", config_path="pkg://preftune.conf", config_name="kto")
def main(cfg):
    return launch.run(cfg, "recipes.kto", "preftune.training:train")


if __name__ == "__main__":
    checks.command_line("kto")
    main()
