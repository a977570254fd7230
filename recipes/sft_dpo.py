"""The main job: supervised fine-tuning on the chosen answers, then a preference stage on its result.

`python -m recipes.sft_dpo loss=ipo model=mistral7b`; keys under `sft.` belong to the SFT stage.
"""

import hydra

from preftune.config.command_line import command_line
from preftune.launch import start


@hydra.main(version_base="1.3", config_path="pkg://preftune.conf", config_name="sft_dpo")
def main(cfg):
    return start.run(cfg, "recipes.sft_dpo", "preftune.pipeline.run:run_stages")


if __name__ == "__main__":
    command_line("sft_dpo")
    main()
