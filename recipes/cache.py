"""The reference cache, seen and cleared.

`python -m recipes.cache`; `python -m recipes.cache clear=true identity=3f2a9c`; `--help` lists the keys.
"""

import hydra

from preftune import checks
from preftune.fastpath import cache_store


@hydra.main(version_base="1.3", config_path="pkg://preftune.conf", config_name="cache")
def main(cfg):
    print(cache_store.report(**cfg))


if __name__ == "__main__":
    checks.command_line("cache")
    main()
