"""The main job: supervised fine-tuning on the chosen answers, then a preference stage on its result.

`python -m recipes.sft_dpo loss=ipo model=mistral7b`; keys under `sft.` are the first stage's own.
"""

import hydra

from preftune import checks, errors


@hydra.main(version_base="1.3", config_path="pkg://preftune.conf", config_name="sft_dpo")
def main(cfg):
    from preftune.pipeline import run_stages  # imports torch: only after the checks

    with errors.plainly():
        run_stages(cfg)


if __name__ == "__main__":
    checks.command_line("sft_dpo")
    main()
