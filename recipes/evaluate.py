"""Models on held-out data: accuracy, margin, log-ratios, KL, perplexity, answers, win rate; several in one table.

`python -m recipes.evaluate models=[runs/demo]`; `format=json`; `--help` lists the keys.
"""

import contextlib
import sys

import hydra

from preftune.config.command_line import command_line
from preftune.config.errors import report_user_errors
from preftune.config.processes import imports


@hydra.main(version_base="1.3", config_path="pkg://preftune.conf", config_name="evaluate")
def main(cfg):
    with report_user_errors():
        with contextlib.redirect_stdout(sys.stderr):  # libraries announce themselves there, and JSON must stand alone
            with imports():
                from preftune.evaluate import evaluation  # imports torch: only after the checks
            told = evaluation.run(cfg)
        print(told)


if __name__ == "__main__":
    command_line("evaluate")
    main()
