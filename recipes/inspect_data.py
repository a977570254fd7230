"""Check a data set before a model is loaded: contents, errors, biases.

`python -m recipes.inspect_data data=file data.path=prefs.jsonl`; `format=json`; `--help` lists the keys.
"""

import sys

import hydra

from preftune.config.command_line import command_line
from preftune.config.errors import report_user_errors
from preftune.config.processes import imports


@hydra.main(version_base="1.3", config_path="pkg://preftune.conf", config_name="inspect_data")
def main(cfg):
    with imports():
        from preftune.report.data_report import review  # imports torch: only after the checks

    with report_user_errors():
        sys.exit(review(cfg))


if __name__ == "__main__":
    command_line("inspect_data")
    main()
