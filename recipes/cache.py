"""Show or clear the reference cache.

`python -m recipes.cache`; `python -m recipes.cache clear=true identity=r3f2a9c`; `--help` lists the keys.
"""

import hydra

from preftune.config.command_line import command_line
from preftune.fastpath import reference_store


@hydra.main(version_base="1.3", config_path="pkg://preftune.conf", config_name="cache")
def main(cfg):
    print(reference_store.report(**cfg))


if __name__ == "__main__":
    command_line("cache")
    main()
