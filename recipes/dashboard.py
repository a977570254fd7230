"""The W&B workspace for preftune's runs: saved online, or written as a spec offline.

`python -m recipes.dashboard project=preftune`; `--help` lists the keys.
"""

import hydra

from preftune.config.command_line import command_line
from preftune.config.errors import report_user_errors


@hydra.main(version_base="1.3", config_path="pkg://preftune.conf", config_name="dashboard")
def main(cfg):
    from preftune.report import dashboard

    with report_user_errors():
        print(dashboard.build(**cfg))


if __name__ == "__main__":
    command_line("dashboard")
    main()
