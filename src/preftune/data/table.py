"""One pass over a source: recognise, convert and check each row, and keep the good ones in an Arrow file.

The file is memory-mapped, so a data set of any size takes little memory; it is named by its content and found again.
"""

import contextlib
import json
import os
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import xxhash
from datasets import Dataset, Features, List, Value
from datasets.arrow_writer import ArrowWriter

from preftune.config.files import cache_dir
from preftune.data import row_checks
from preftune.data.findings import Findings, RowFault
from preftune.data.formats import Read
from preftune.data.row_checks import extra_fields
from preftune.data.shapes import DEMONSTRATIONS, LABELLED, PAIRS, Shape, renamed, shape_of
from preftune.data.sources import Source

MESSAGES = List({"role": Value("string"), "content": Value("string")})
COMMON = {"id": Value("string"), "origin": Value("string"), "prompt": MESSAGES}
FEATURES = {
    PAIRS: Features(COMMON | {"chosen": MESSAGES, "rejected": MESSAGES}),
    LABELLED: Features(COMMON | {"completion": MESSAGES, "label": Value("bool")}),
    DEMONSTRATIONS: Features(COMMON | {"completion": MESSAGES}),
}
NAMES = ("id", "origin")  # what does not change what a row teaches
PEEK = 50  # rows that decide of which kind a source is


class Skipped:
    """The file of rows that are left out; it is begun anew at the first one. Of several processes the first writes."""

    def __init__(self, path: str | Path | None):
        self.path = Path(path) if path and os.environ.get("RANK", "0") == "0" else None
        self.count = 0

    def add(self, read: Read, fault: RowFault) -> None:
        """Write one row with where it stood and what is wrong with it."""
        self.count += 1
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        told = {"origin": read.origin, "code": fault.code, "detail": str(fault), "row": read.raw or repr(read.row)}
        with self.path.open("w" if self.count == 1 else "a", encoding="utf-8") as file:
            file.write(json.dumps(told) + "\n")


@dataclass
class Table:
    """The good rows of a source with `id` and `origin` (file:line), of one kind, and the shapes that they had."""

    rows: Dataset
    kind: str
    shapes: Counter[str]
    read: int
    fingerprint: str

    def line(self) -> str:
        """The shape, or the shapes with their counts where there are several."""
        if len(self.shapes) == 1:
            return next(iter(self.shapes))
        return "; ".join(f"{name} ({count:,})" for name, count in self.shapes.most_common()) or "no rows"


@dataclass
class Reader:
    """Turns what a source reads into rows of the internal form; findings and skipped rows go where they are told."""

    source: Source
    findings: Findings
    skipped: Skipped
    streaming: bool = False
    kind: str | None = None
    read: int = 0
    shapes: Counter[str] = field(default_factory=Counter)
    unread: Counter[str] = field(default_factory=Counter)  # columns with a value that no shape looked at

    def rows(self) -> Iterator[dict]:
        """The good rows, in order, with ids: the data's own, else where the row stood."""
        reads = self.source.rows(self.streaming)
        peeked = list(islice(reads, PEEK))
        self.kind = majority([kind for read in peeked if (kind := self.kind_of(read))])
        for batch in (peeked, reads):
            for read in batch:
                self.read += 1
                try:
                    yield from self.converted(read)
                except RowFault as fault:
                    self.findings.add(fault.code, read.origin, str(fault))
                    self.skipped.add(read, fault)

    def kind_of(self, read: Read) -> str | None:
        try:
            return shape_of(renamed(read.row, self.source.columns)).kind if read.row is not None else None
        except RowFault:
            return None

    def converted(self, read: Read) -> list[dict]:
        """The rows that one row gives, checked. Raises RowFault."""
        if read.fault:
            raise read.fault
        row = renamed(read.row, self.source.columns)
        shape: Shape = shape_of(row)
        if self.kind and shape.kind != self.kind:
            raise RowFault("mixed_shapes", f"{shape.name}, among {self.kind}")
        noted = Noted(row)
        found = shape.convert(noted, self.source.pairs_rule)
        self.unread.update(
            name for name in row.keys() - noted.looked_at - {"id"} if row[name] not in (None, "", [], {})
        )
        warnings = [warning for each in found for warning in row_checks.check(each, shape.kind)]
        for code, detail in warnings:
            self.findings.add(code, read.origin, detail)
        if not found:
            self.findings.add("tied_scores", read.origin)
        if fields := extra_fields(row):
            self.findings.add("extra_message_fields", read.origin, ", ".join(fields))
        self.shapes[shape.name] += 1
        name = read.origin if row.get("id") is None else str(row["id"])
        several = len(found) > 1
        return [
            {"id": f"{name}/{place}" if several else name, "origin": read.origin} | each
            for place, each in enumerate(found, start=1)
        ]


class Noted(dict):
    """A row that knows which of its columns were looked at."""

    def __init__(self, row: dict):
        super().__init__(row)
        self.looked_at: set[str] = set()

    def __getitem__(self, name):
        self.looked_at.add(name)
        return super().__getitem__(name)

    def get(self, name, default=None):
        self.looked_at.add(name)
        return super().get(name, default)


def majority(kinds: list[str]) -> str | None:
    return Counter(kinds).most_common(1)[0][0] if kinds else None


def table(source: Source, findings: Findings, skipped: Skipped) -> Table:
    """Read a source once and keep its good rows. Raises DataError where there is none."""
    reader = Reader(source, findings, skipped)
    folder = cache_dir() / "data"
    folder.mkdir(parents=True, exist_ok=True)
    handle, scratch = tempfile.mkstemp(prefix=".rows-", dir=folder)
    os.close(handle)
    content, whole = xxhash.xxh3_128(), xxhash.xxh3_128()
    try:
        with contextlib.closing(reader.rows()) as rows:
            first = next(rows, None)
            kind = reader.kind or DEMONSTRATIONS
            with ArrowWriter(path=scratch, features=FEATURES[kind], writer_batch_size=500) as writer:
                batch = [] if first is None else [first]
                while batch:
                    content.update(text([name for name in FEATURES[kind] if name not in NAMES], batch))
                    whole.update(text(NAMES, batch))
                    writer.write_batch({name: [row[name] for row in batch] for name in FEATURES[kind]})
                    batch = list(islice(rows, 500))
                writer.finalize()
        if reader.unread:
            says = ", ".join(f"{name} ({count:,})" for name, count in reader.unread.most_common())
            findings.add("unread_columns", count=max(reader.unread.values()), of=reader.read, says=f"not read: {says}")
        fingerprint = content.hexdigest()
        target = folder / f"{fingerprint}-{whole.hexdigest()[:8]}.arrow"
        if not target.exists():
            os.replace(scratch, target)
    finally:
        Path(scratch).unlink(missing_ok=True)
    return Table(Dataset.from_file(str(target)), kind, reader.shapes, reader.read, fingerprint)


def text(columns: Sequence[str], batch: list[dict]) -> bytes:
    """Columns of a batch, written out."""
    return json.dumps([[row[name] for name in columns] for row in batch]).encode()
