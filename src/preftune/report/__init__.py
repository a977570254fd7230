"""What a run did, told from its directory alone: a table in the terminal, a page, and a comparison of runs."""

from pathlib import Path

from preftune.report.terminal import table

__all__ = ["compare", "table", "write"]


def write(run: Path, output: Path | None = None) -> Path:
    """Write <run>/report.html (or `output`) from what the run directory holds, however far the run came.

    A pipeline's page shows every stage. Returns the page's path. Raises ReportError where `run` is no run directory or
    a file in it is broken.
    """
    from preftune.report import page, record  # matplotlib takes half a second, which a recipe's start is spared

    seen = record.read(Path(run))
    return record.write_text(output or seen.path / "report.html", page.html(seen))


def compare(runs: list[Path], output: Path) -> Path:
    """Write the page that compares `runs` (two or more; a sweep's folder stands for its runs). Returns its path."""
    from preftune.report import comparison, comparison_page, record

    found = comparison.compare(runs)
    return record.write_text(Path(output), comparison_page.html(found))
