"""Chat with a run's model in the terminal, with --compare beside its reference.

`python -m recipes.chat run=runs/demo --compare`; `python -m recipes.chat --help` lists the keys.
"""

import sys

import hydra

from preftune.config.command_line import command_line
from preftune.config.errors import report_user_errors
from preftune.config.processes import imports


@hydra.main(version_base="1.3", config_path="pkg://preftune.conf", config_name="chat")
def main(cfg):
    with imports():
        from preftune.evaluate.chat import chat  # imports torch: only after the checks

    with report_user_errors():
        chat(cfg)


if __name__ == "__main__":
    sys.argv[1:] = ["compare=true" if argument == "--compare" else argument for argument in sys.argv[1:]]
    command_line("chat")
    main()
