"""Pairs from prompts and a scorer: answers drawn from a model, the best of each prompt against the worst.

`python -m recipes.make_pairs data=file data.path=prompts.jsonl pairs.rule=my_module.my_rule`; `--help` lists the keys.
"""

import hydra

from preftune.config.command_line import command_line
from preftune.config.errors import report_user_errors
from preftune.config.processes import imports


@hydra.main(version_base="1.3", config_path="pkg://preftune.conf", config_name="make_pairs")
def main(cfg):
    with imports():
        from preftune.pipeline.rounds import make_pairs  # imports torch: only after the checks

    with report_user_errors():
        print(make_pairs(cfg))


if __name__ == "__main__":
    command_line("make_pairs")
    main()
