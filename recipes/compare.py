"""Runs ranked by held-out accuracy at matched KL, with length controlled for, and the page that compares them.

`python -m recipes.compare RUN RUN …`; a sweep's folder stands for its runs; `format=json` for the ranked table as JSON.
"""

import argparse
import sys
from pathlib import Path

from preftune.config.errors import report_user_errors

FORMATS = ("format=table", "format=json")  # written as everywhere else in preftune


def main():
    parser = argparse.ArgumentParser(
        prog="python -m recipes.compare", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run directories, or folders of them; and format=json")
    parser.add_argument("--output", type=Path, default=Path("comparison.html"), help="the page (comparison.html)")
    given = parser.parse_args()
    form = next((each for each in given.runs if each.startswith("format=")), FORMATS[0])
    if form not in FORMATS:
        parser.error(f"{form}: wants {' or '.join(FORMATS)}")
    runs = [Path(each) for each in given.runs if not each.startswith("format=")]
    from preftune.report import comparison
    from preftune.report.comparison_report import as_json, as_text, html
    from preftune.report.record import write_text

    with report_user_errors():
        found = comparison.compare(runs)
        page = write_text(given.output, html(found))
    print(as_json(found) if form == "format=json" else as_text(found))
    print(f"Page  {page}", file=sys.stderr if form == "format=json" else sys.stdout)


if __name__ == "__main__":
    main()
