"""Versions, devices, kernels, access to hub and W&B, for a bug report.

`python -m recipes.env`
"""

import sys

if __name__ == "__main__":
    if sys.argv[1:]:
        sys.exit(f"{__doc__}\nIt takes no arguments." if sys.argv[1] not in ("--help", "-h") else print(__doc__))
    from preftune.config.environment import report  # imports torch

    print(report())
