"""Write the page of a run from its directory, or a page that compares several runs.

`python -m recipes.report RUN`; `python -m recipes.report RUN RUN --output comparison.html`.
"""

import argparse
from pathlib import Path

from preftune.config.errors import report_user_errors


def main():
    parser = argparse.ArgumentParser(
        prog="python -m recipes.report", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", type=Path, help="a run directory (output_dir)")
    parser.add_argument("--output", type=Path, help="default: RUN/report.html, comparison.html for several")
    given = parser.parse_args()
    from preftune.report import comparison_report, page  # matplotlib takes half a second

    with report_user_errors():
        if len(given.runs) == 1:
            print(page.write(given.runs[0], given.output))
        else:
            print(comparison_report.compare(given.runs, given.output or Path("comparison.html")))


if __name__ == "__main__":
    main()
