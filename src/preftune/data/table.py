"""One pass over a source: recognise, convert and check each row, and keep the good ones in an Arrow file.

The file is memory-mapped, so a data set of any size takes little memory; it is named by its content and found again.
"""

import json
import os
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain, islice
from pathlib import Path

import xxhash
from datasets import Dataset, Features, Json, Value
from datasets.arrow_writer import ArrowWriter
from tqdm.auto import tqdm

from preftune.config.files import cache_dir
from preftune.data import images, row_checks
from preftune.data.columns import Reading, number
from preftune.data.findings import Findings, RowFault
from preftune.data.formats import Read
from preftune.data.forms import standard
from preftune.data.shapes import COLUMNS, DEMONSTRATIONS, LABELLED, PAIRS, PROMPTS, shape_of, unrepeated
from preftune.data.sources import Source
from preftune.data.views import ASKED, MARGINS

MESSAGES = Json()  # a list of messages, each with the fields that it was given: Arrow's structs would add nulls
COMMON = {"id": Value("string"), "origin": Value("string"), "prompt": MESSAGES}
# what the chat template is given with the messages
BESIDE = {"tools": Json(), "chat_template_kwargs": Json(), "images": images.COLUMN}
FEATURES = {
    PAIRS: Features(COMMON | {"chosen": MESSAGES, "rejected": MESSAGES} | BESIDE),
    LABELLED: Features(COMMON | {"completion": MESSAGES, "label": Value("bool")} | BESIDE),
    DEMONSTRATIONS: Features(COMMON | {"completion": MESSAGES} | BESIDE),
    PROMPTS: Features(COMMON | BESIDE),
}
MARGIN = {"margin": Value("float32")}
NAMES = ("id", "origin")  # what does not change what a row teaches
PEEK = 50  # rows that decide of which kind a source is


@dataclass
class Table:
    """The good rows of a source, of one kind, with `id` and `origin` (file:line); the shapes that its rows had.

    What is wrong goes into `findings`.
    """

    source: Source
    findings: Findings
    view: str | None = None  # what a loss takes, where that decides what a row is
    rows: Dataset | None = None
    kind: str | None = None  # None where no row was good
    read: int = 0
    shapes: Counter[str] = field(default_factory=Counter)
    unread: Counter[str] = field(default_factory=Counter)  # columns with a value of which nothing was made
    fields: Counter[str] = field(default_factory=Counter)  # of messages, beside role and content, by rows
    fingerprint: str = ""

    def __post_init__(self):
        how = {"prompts": self.view == ASKED, "margins": self.view == MARGINS}
        self.reading = Reading(self.source.columns, self.source.verdict, self.source.good_at, **how)

    def each(self, streaming: bool = False) -> Iterator[dict]:
        """The good rows, in order, with ids: the data's own, else where the row stood. Sets `kind` before the first."""
        reads = self.source.rows(streaming)
        peeked = list(islice(reads, PEEK))
        self.reading.learn([read.row for read in peeked if isinstance(read.row, dict)])
        kinds = Counter(kind for read in peeked if (kind := self.kind_of(read)))
        self.kind = next((kind for kind, _ in kinds.most_common(1)), None)
        for read in tqdm(chain(peeked, reads), desc="reading", unit="row", delay=3, leave=False):
            self.read += 1
            try:
                yield from self.converted(read)
            except RowFault as fault:
                self.findings.leave_out(read.origin, fault, read.raw or repr(read.row))

    def kind_of(self, read: Read) -> str | None:
        try:
            return shape_of(standard(read.row, self.reading)[0]).kind if isinstance(read.row, dict) else None
        except RowFault:
            return None

    def converted(self, read: Read) -> list[dict]:
        """The rows that one row gives, checked. Raises RowFault."""
        if isinstance(read.row, RowFault):
            raise read.row
        row, columns = standard(read.row, self.reading)
        if cut := unrepeated(row):
            row = cut
            self.findings.add("repeated_prompt", [read.origin])
        shape = shape_of(row)
        self.kind = self.kind or shape.kind
        if shape.kind != self.kind:
            raise RowFault("mixed_shapes", f"{shape.name}, among {self.kind}")
        beside = self.beside(row) | self.margin(row)
        found = [each | beside for each in shape.convert(row, self.source.pairs_rule)]
        found = [
            each | images.placed(each, row.get("images"), shape.kind, partial(self.folders, read)) for each in found
        ]
        if isinstance(system := row.get("system"), str) and system.strip():
            found = [each | {"prompt": [{"role": "system", "content": system}, *each["prompt"]]} for each in found]
        for code, detail in [fault for each in found for fault in row_checks.check(each, shape.kind)]:
            self.findings.add(code, [read.origin], detail)
        if not found:
            self.findings.add("tied_scores", [read.origin])
        self.fields.update(row_checks.fields(found, shape.kind))
        others = [name for name in sorted(columns.read) if name not in COLUMNS and columns.read[name] in shape.columns]
        self.shapes[f"{shape.name} ({', '.join(others)})" if others else shape.name] += 1
        self.unread.update(columns.unread())
        name = read.origin if row.get("id") is None else str(row["id"])
        names = [f"{name}/{place}" for place in range(1, len(found) + 1)] if len(found) > 1 else [name]
        return [{"id": own, "origin": read.origin} | each for own, each in zip(names, found, strict=False)]

    def beside(self, row: dict) -> dict:
        """What the chat template is given beside the messages: the row's tools, its arguments and the run's."""
        tools, given = row.get("tools"), row.get("chat_template_kwargs")
        try:
            tools = json.loads(tools) if isinstance(tools, str) and tools.strip() else tools or None
            given = json.loads(given) if isinstance(given, str) and given.strip() else given or {}
        except ValueError as error:
            raise RowFault("wrong_type", f"tools or chat_template_kwargs is no JSON: {error}") from None
        if not isinstance(tools, list | None) or not isinstance(given, dict):
            raise RowFault("wrong_type", "tools must be a list of JSON schemas, chat_template_kwargs an object")
        return {"tools": tools, "chat_template_kwargs": self.source.chat_template_kwargs | given}

    def folders(self, read: Read) -> list[Path]:
        """Where the files that a row names may lie: beside its own, in the folder of data.path, or here."""
        place = Path(self.source.path).expanduser()
        found = (read.folder, place if place.is_dir() else None, Path.cwd())
        return [folder for folder in found if folder]

    def margin(self, row: dict) -> dict[str, float]:
        """By how much the chosen answer is better, where that is read; 0 where the row does not say."""
        if not self.reading.margins:
            return {}
        if row.get("margin") in (None, ""):
            return {"margin": 0.0}
        if (margin := number(row["margin"])) is None:
            raise RowFault("wrong_type", f"margin is {row['margin']!r}, which is no number")
        return {"margin": margin}

    def line(self) -> str:
        """The shape, or the shapes with their counts where there are several."""
        if len(self.shapes) == 1:
            return next(iter(self.shapes))
        return "; ".join(f"{name} ({count:,})" for name, count in self.shapes.most_common()) or "no rows"


def columns_of(kind: str, view: str | None) -> Features:
    """The columns of rows of a kind, as they are kept."""
    return Features(FEATURES[kind] | (MARGIN if kind == PAIRS and view == MARGINS else {}))


def table(source: Source, findings: Findings, first: int | None = None, view: str | None = None) -> Table:
    """Read a source once and keep its good rows on disk, or as a stream its `first` ones."""
    read = Table(source, findings, view)
    folder = cache_dir() / "data"
    folder.mkdir(parents=True, exist_ok=True)
    content, whole = xxhash.xxh3_128(), xxhash.xxh3_128()
    with tempfile.TemporaryDirectory(prefix=".rows-", dir=folder) as scratch:
        rows = islice(read.each(streaming=first is not None), first)
        batch = list(islice(rows, 500))  # from here on the kind is known
        features = columns_of(read.kind or DEMONSTRATIONS, view)
        with ArrowWriter(path=f"{scratch}/rows.arrow", features=features, writer_batch_size=500) as writer:
            while batch:
                content.update(text([name for name in features if name not in NAMES], batch))
                whole.update(text(NAMES, batch))
                writer.write_batch({name: [row[name] for row in batch] for name in features})
                batch = list(islice(rows, 500))
            writer.finalize()
        read.fingerprint = content.hexdigest()
        target = folder / f"{read.fingerprint}-{whole.hexdigest()[:8]}.arrow"
        if not target.exists():
            os.replace(f"{scratch}/rows.arrow", target)
    if read.unread:
        says = ", ".join(f"{name} ({count:,})" for name, count in read.unread.most_common())
        findings.add("unread_columns", count=max(read.unread.values()), of=read.read, says=f"not read: {says}")
    read.rows = Dataset.from_file(str(target))
    return read


def text(columns: Sequence[str], batch: Sequence[dict]) -> bytes:
    """Columns of a batch, written out."""
    return json.dumps([[row[name] for name in columns] for row in batch], default=xxhash.xxh3_64_hexdigest).encode()
