"""Export a run as one merged model: weights, tokenizer, chat template, model card.

`python -m recipes.export run=runs/demo output=exported/demo`; `--help` lists the keys.
"""

import hydra

from preftune.config.command_line import command_line
from preftune.config.errors import report_user_errors


@hydra.main(version_base="1.3", config_path="pkg://preftune.conf", config_name="export")
def main(cfg):
    from preftune.pipeline.export import export  # imports torch: only after the checks

    with report_user_errors():
        print(export(**cfg))


if __name__ == "__main__":
    command_line("export")
    main()
