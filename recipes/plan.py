"""Plan a run: memory, whether it fits, steps, tokens and time, without reading weights.

`python -m recipes.plan model=mistral7b lora=qlora hardware=gpu24gb`; `format=json`; `--help` lists the keys.
"""

import hydra

from preftune.config.command_line import command_line
from preftune.config.errors import report_user_errors
from preftune.config.processes import imports


@hydra.main(version_base="1.3", config_path="pkg://preftune.conf", config_name="plan")
def main(cfg):
    with imports():
        from preftune.plan.command import report  # imports torch: only after the checks

    with report_user_errors():
        print(report(cfg))


if __name__ == "__main__":
    command_line("plan", here=False)
    main()
