"""The main job: supervised fine-tuning on the chosen answers, then a preference stage on its result.

`python -m recipes.sft_dpo loss=ipo model=mistral7b`; keys under `sft.` are the first stage's own.
"""

import hydra

from preftune import checks, launch


@hydra.main(version_base="1.3", config_path="pkg://preftune.conf", config_name="sft_dpo")
def main(cfg):
    return launch.run(cfg, "recipes.sft_dpo", "preftune.pipeline:run_stages")


if __name__ == "__main__":
    checks.command_line("sft_dpo")
    main()
