"""Where rows come from: files, globs, folders, packaged files and hub data sets, one row at a time."""

import difflib
import glob
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, fields, replace
from importlib import resources
from itertools import islice
from pathlib import Path

import datasets
from huggingface_hub import constants
from huggingface_hub.errors import OfflineModeIsEnabled
from omegaconf import DictConfig, OmegaConf

from preftune.data.findings import DataError
from preftune.data.folders import of_split, splits
from preftune.data.formats import READERS, Read, ending, read
from preftune.data.shapes import COLUMNS, PAIRS_RULES
from preftune.models import hub

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
    verdict: str | None = None
    good_at: float | None = None
    chat_template_kwargs: dict = field(default_factory=dict)
    max_rows: int | None = None
    weight: float | None = None

    def rows(self, streaming: bool = False) -> Iterator[Read]:
        """Every row, or the first `max_rows`. Raises DataError where there is nothing to read."""
        if not self.is_local():
            return islice(hub_rows(self, streaming), self.max_rows)
        listed = self.chosen()[1] if self.is_folder() else files(self.path)
        return islice((each for path, name in listed for each in read(path, name)), self.max_rows)

    def is_folder(self) -> bool:
        """Whether the path is a folder, whose files are of splits."""
        return Path(self.path).expanduser().is_dir()

    def chosen(self) -> tuple[str, list[tuple[Path, str]]]:
        """The split of a folder that is read, and its files with the names that origins use. Raises DataError."""
        place = Path(self.path).expanduser()
        split, found = of_split(place, self.split, self.name)
        if not found:
            files(self.path)  # which says that there is none
        return split, [(file, str(file.relative_to(place))) for file in found]

    def is_local(self) -> bool:
        """Whether the path names files rather than a data set on the hub."""
        path = Path(self.path).expanduser()
        written = self.path.startswith((PACKAGED, "/", ".", "~")) or glob.has_magic(self.path) or path.exists()
        return written or ending(path) in READERS or not HUB_ID.fullmatch(self.path)

    def line(self) -> str:
        """What the run calls it."""
        if self.is_local() and not self.is_folder():
            return self.path
        return " ".join(filter(None, [self.path, self.name, f"({self.split})"]))


def files(path: str) -> list[tuple[Path, str]]:
    """The data files that a path stands for, with the names that origins use, in the order of their names.

    Raises DataError, with a suggestion, where there is none.
    """
    if path.startswith(PACKAGED):
        package, _, name = path.removeprefix(PACKAGED).partition("/")
        return [(Path(str(resources.files(package) / name)), name)]
    place, why = Path(path).expanduser(), ""
    found = [place]
    if place.is_dir():
        found = [file for file in sorted(place.rglob("*")) if file.is_file() and ending(file) in READERS]
        why = f"no {', '.join(READERS)} file in this folder"
    elif not place.exists() and glob.has_magic(path):
        found = [file for file in sorted(map(Path, glob.glob(str(place), recursive=True))) if file.is_file()]
        why = f"no file is named so (looked from {Path.cwd()})"
    elif place.is_symlink() and not place.exists():
        raise DataError(f"data.path={path} is a link to nowhere ({place.readlink()})")
    elif not place.exists():
        names = [each.name for each in place.parent.iterdir()] if place.parent.is_dir() else []
        near = difflib.get_close_matches(place.name, names, n=1)
        hint = f"; did you mean {place.parent / near[0]}?" if near else ""
        raise DataError(f"data.path={path}: there is no such file or folder (from {Path.cwd()}){hint}")
    if not found:
        raise DataError(f"data.path={path}: {why}")
    for file in found:
        if ending(file) not in READERS:
            known = f"known are {', '.join(READERS)}, with .gz, .bz2, .xz or .zst"
            raise DataError(f"data.path={file}: its ending names no format; {known}")
    return [(file, str(file.relative_to(place)) if place.is_dir() else file.name) for file in found]


def hub_rows(source: Source, streaming: bool) -> Iterator[Read]:
    """The rows of a split on the hub, or in its local cache; their lines are their places: `owner/name/train:12`.

    Raises DataError where the hub does not give the data set, or where it has no such configuration or split.
    """
    path, revision, split = source.path, source.revision, source.split
    hub.require(path, "data.path", revision, "dataset")
    try:
        found = datasets.load_dataset(path, source.name, revision=revision, split=split, streaming=streaming)
        if revision and constants.HF_HUB_OFFLINE and getattr(found, "cache_files", None):
            commit = hub.cached_commit(path, revision, "dataset")  # datasets would take its latest revision instead
            if not any(commit in Path(file["filename"]).parts for file in found.cache_files):
                raise OfflineModeIsEnabled("the local cache holds another revision")
        yield from (Read(f"{path}/{split}:{number}", row) for number, row in enumerate(found, start=1))
    except ValueError as error:  # no such configuration or split: datasets lists those that there are
        said = " ".join(str(error).split()).rstrip(".")
        raise DataError(
            f"data.path={path} (configuration {source.name}, split {split}): {said}. data.name names the "
            "configuration, data.train_split and data.eval_split the splits"
        ) from None
    except Exception as error:
        raise DataError(hub.why(error, path, "data.path", revision, "dataset")) from None


def one_of(key: str, value: str | None, choices: Iterable) -> None:
    """Raise DataError, with a suggestion, where a value is none of the choices."""
    if value not in choices:
        words = ["null" if choice is None else choice for choice in choices]
        near = difflib.get_close_matches(str(value), words, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise DataError(f"{key}: {value} is none of {', '.join(words)}{hint}")


def sources(data: DictConfig, key: str = "path") -> list[Source]:
    """The sources that a path, or a list of paths and mappings, names; what a mapping leaves out comes from `data`.

    Raises DataError for a key of a source or a name of a column that there is not.
    """
    keys = [each.name for each in fields(Source) if each.name in data] + [key, "train_split"]
    keys = [each for each in keys if each != "path" or key == "path"]
    given = OmegaConf.to_container(OmegaConf.create({each: data[each] for each in keys}), resolve=True)
    for name in given["columns"]:
        one_of("data.columns", name, COLUMNS)
    path, split = given.pop(key), given.pop("train_split")
    base = Source("", split=split, **given | ({} if key == "path" else {"columns": {}}))
    found = []
    for each in path if isinstance(path, list) else [path]:
        named = each if isinstance(each, dict) else {"path": each}
        for name in named:
            one_of(f"data.{key}", name, [each.name for each in fields(Source)])
        if "path" not in named:
            raise DataError(f"data.{key}: a source without a path: {named}")
        found.append(replace(base, **named))
        one_of("data.pairs_rule", found[-1].pairs_rule, PAIRS_RULES)
    return found


def unread(given: list[Source]) -> str:
    """What of the folders of some sources none of them reads: splits, and files of no split."""
    said = []
    for path in dict.fromkeys(source.path for source in given if source.is_local() and source.is_folder()):
        mine = [source for source in given if source.path == path]
        read = {split for split, _ in (source.chosen() for source in mine)}
        found = splits(Path(path).expanduser(), mine[0].name)
        rest = 0 if "dataset_dict.json" in os.listdir(path) else len(files(path)) - sum(map(len, found.values()))
        said += [f"the split {split}" for split in found if split not in read]
        said += [f"files of no split ({rest})"] if rest > 0 else []
    return ", ".join(said)


def eval_sources(data: DictConfig) -> list[Source]:
    """Where held-out rows are: nowhere, in a file of their own, or in another split of each hub data set or folder.

    Raises DataError where a split is named, and the data lies in single files.
    """
    split, given = data.eval_split, sources(data)
    if not split:
        return []
    alone = replace(given[0], path=split, weight=None, split="train")
    local = [source.path for source in given if source.is_local() and not source.is_folder()]
    if alone.is_local() or len(local) == len(given) and "/" in split:
        return [alone]
    if local:
        raise DataError(
            f"data.eval_split={split}: {local[0]} is no folder and no hub data set, and has no splits; name a file of "
            "held-out rows: data.eval_split=eval.jsonl"
        )
    return [replace(source, split=split, weight=None) for source in given]
