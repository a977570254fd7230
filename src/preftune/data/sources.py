"""Where rows come from: files, globs, folders, packaged files and hub data sets, one row at a time."""

import difflib
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib import resources
from itertools import islice
from pathlib import Path

from preftune.data import hub
from preftune.data.findings import DataError
from preftune.data.formats import READERS, Read, ending, read

PACKAGED = "pkg://"
HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


@dataclass(frozen=True)
class Source:
    """One place that rows come from, and how its columns are called; `weight` is its share of a mixture."""

    path: str
    name: str | None = None
    revision: str | None = None
    split: str | None = "train"
    columns: dict[str, str | None] = field(default_factory=dict)
    pairs_rule: str = "best_worst"
    max_rows: int | None = None
    weight: float | None = None

    def rows(self, streaming: bool = False) -> Iterator[Read]:
        """Every row, or the first `max_rows`. Raises DataError where there is nothing to read."""
        return islice(self._all(streaming), self.max_rows)

    def _all(self, streaming: bool) -> Iterator[Read]:
        if not self.is_local():
            yield from hub.rows(self.path, self.name, self.revision, self.split, streaming)
            return
        for path, name in files(self.path):
            yield from read(path, name)

    def is_local(self) -> bool:
        """Whether the path names files rather than a data set on the hub."""
        path = Path(self.path).expanduser()
        return (
            self.path.startswith((PACKAGED, "/", ".", "~"))
            or path.exists()
            or any(char in self.path for char in "*?[")
            or ending(path) in READERS
            or not HUB_ID.fullmatch(self.path)
        )

    def line(self) -> str:
        """What the run calls it."""
        if self.is_local():
            return self.path
        return " ".join(filter(None, [self.path, self.name, f"({self.split})"]))


def files(path: str) -> list[tuple[Path, str]]:
    """The data files that a path stands for, with the names that origins use, in the order of their names.

    Raises DataError, with a suggestion, where there is none.
    """
    if path.startswith(PACKAGED):
        package, _, name = path.removeprefix(PACKAGED).partition("/")
        return [(Path(str(resources.files(package) / name)), name)]
    place = Path(path).expanduser()
    if place.is_dir():
        found = [file for file in sorted(place.rglob("*")) if file.is_file() and ending(file) in READERS]
        if not found:
            raise DataError(f"data.path={path}: no {', '.join(READERS)} file in this folder")
        return [(file, str(file.relative_to(place))) for file in found]
    if any(char in path for char in "*?[") and not place.exists():
        start = Path(place.anchor) if place.is_absolute() else Path()
        found = sorted(start.glob(str(place.relative_to(place.anchor) if place.is_absolute() else place)))
        found = [file for file in found if file.is_file()]
        if not found:
            raise DataError(f"data.path={path}: no file is named so (looked from {Path.cwd()})")
        return [(known(file), file.name) for file in found]
    if place.is_symlink() and not place.exists():
        raise DataError(f"data.path={path} is a link to nowhere ({place.readlink()})")
    if not place.exists():
        folder = place.parent
        names = [file.name for file in folder.iterdir()] if folder.is_dir() else []
        near = difflib.get_close_matches(place.name, names, n=1)
        hint = f"; did you mean {folder / near[0]}?" if near else ""
        raise DataError(f"data.path={path}: there is no such file or folder (from {Path.cwd()}){hint}")
    return [(known(place), place.name)]


def known(file: Path) -> Path:
    """The file, if its ending names a format. Raises DataError where it does not."""
    if ending(file) not in READERS:
        listed = ", ".join(READERS)
        raise DataError(f"data.path={file}: its ending names no format; known are {listed}, with .gz, .bz2 or .xz")
    return file
