"""What is in a data set and what is wrong with it, before a model is loaded.

`python -m recipes.inspect_data data=file data.path=prefs.jsonl`; `format=json`; `--help` lists the keys.
"""

import sys

import hydra

from preftune import checks, errors


@hydra.main(version_base="1.3", config_path="pkg://preftune.conf", config_name="inspect_data")
def main(cfg):
    from preftune.data.review import review  # imports torch: only after the checks

    with errors.plainly():
        sys.exit(review(cfg))


if __name__ == "__main__":
    checks.command_line("inspect_data")
    main()
