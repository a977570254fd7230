"""Rows out of JSONL, JSON, CSV and Parquet files, one at a time, each with its file and line."""

import ast
import bz2
import codecs
import csv
import gzip
import io
import json
import lzma
import re
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from preftune.data.findings import RowFault


def open_zst(path: Path, mode: str) -> BinaryIO:
    """A file that zstd compressed."""
    return io.BufferedReader(pa.input_stream(str(path), compression="zstd"))


OPENERS: dict[str, Callable] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open, ".zst": open_zst}
BROKEN = (OSError, EOFError, zlib.error, lzma.LZMAError, pa.ArrowException, UnicodeError)
START = re.compile(r"\s*\[\s*")
COMMA = re.compile(r"\s*(?:,\s*|(?=\]))")  # between two items of a JSON list, or before its end


@dataclass(frozen=True, slots=True)
class Read:
    """One row as it was found: where (`file:line`), its columns or what is wrong with it, and its raw text."""

    origin: str
    row: dict | RowFault
    raw: str = ""
    folder: Path | None = None  # where its file lies


def read(path: Path, name: str) -> Iterator[Read]:
    """Every row of a file, good or bad, in order; `name` is what origins call the file.

    What breaks the whole file (an archive cut short, no Parquet at all) comes as a last Read with `unreadable_file`.
    """
    line = ""
    try:
        if path.stat().st_size == 0:
            raise EOFError("the file is empty")
        for found in READERS[ending(path)](path, name):
            line = found.origin.rpartition(":")[2]
            yield replace(found, folder=path.parent)
    except UnicodeDecodeError as error:  # in a file that is read whole
        number = error.object.count(b"\n", 0, error.start) + 1
        detail = f"line {number}: byte 0x{error.object[error.start]:02x} is not UTF-8"
        yield Read(name, RowFault("unreadable_file", detail))
    except BROKEN as error:
        detail = (str(error) or type(error).__name__).splitlines()[0] + (f" after line {line}" if line else "")
        yield Read(f"{name}:{line}" if line else name, RowFault("unreadable_file", detail))


def ending(path: Path) -> str:
    """The part of a file's name that tells its format, compression aside: .jsonl for a.jsonl.gz."""
    name = path.with_suffix("") if path.suffix.lower() in OPENERS else path
    return name.suffix.lower()


def opened(path: Path) -> BinaryIO:
    """The bytes of a file, uncompressed, without a byte order mark. Raises UnicodeError where they are UTF-16."""
    stream = OPENERS.get(path.suffix.lower(), open)(path, "rb")
    start = stream.peek(3)
    if start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        stream.close()
        raise UnicodeError("the file is UTF-16; write it as UTF-8: iconv -f UTF-16 -t UTF-8")
    stream.read(3 if start.startswith(codecs.BOM_UTF8) else 0)
    return stream


def converted(origin: str, raw: str, convert: Callable[..., dict], *given: object) -> Read:
    """The row that `convert` makes of what was read, or the RowFault that it raises."""
    try:
        return Read(origin, convert(*given), raw)
    except RowFault as fault:
        return Read(origin, fault, raw)


def jsonl(path: Path, name: str) -> Iterator[Read]:
    """A JSON object per line; blank lines are passed over."""
    with opened(path) as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                raw = line.decode("utf-8", "backslashreplace").rstrip("\r\n")
                yield converted(f"{name}:{number}", raw, json_row, line)


def json_row(line: bytes) -> dict:
    """The object that a line of JSON holds. Raises RowFault."""
    if b"\x00" in line:
        raise RowFault("null_byte", f"at byte {line.index(0) + 1}")
    try:
        value = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise RowFault("not_utf8", f"byte 0x{line[error.start]:02x} at byte {error.start + 1}") from None
    except (ValueError, RecursionError) as error:
        raise not_json(error) from None
    return as_row(value)


def not_json(error: Exception) -> RowFault:
    """What Python's JSON reader says against a text."""
    if isinstance(error, json.JSONDecodeError):
        return RowFault("malformed_line", f"{error.msg.removesuffix(' at')} at column {error.colno}")
    many, deep = "a whole number of more digits than Python reads", "nested too deeply"
    return RowFault("malformed_line", deep if isinstance(error, RecursionError) else many)


def as_row(value: object) -> dict:
    """A JSON value that is an object. Raises RowFault where it is none."""
    if not isinstance(value, dict):
        raise RowFault("wrong_type", f"a row is an object, this is {json_type(value)}")
    return value


def json_type(value: object) -> str:
    """What a value is called in JSON."""
    names = {dict: "an object", list: "a list", str: "a text", bool: "a boolean", bytes: "bytes", type(None): "null"}
    return names.get(type(value), "a number")


def json_file(path: Path, name: str) -> Iterator[Read]:
    """A list of objects, or an object that holds nothing but such a list, both read whole; or JSONL under this name."""
    with opened(path) as stream:
        first, second = (*islice(filter(bytes.strip, stream), 2), b"", b"")[:2]
    start, row = first.lstrip()[:1], converted("", "", json_row, first).row
    if start not in (b"[", b"{") or (second and isinstance(row, dict)):
        yield from jsonl(path, name)
        return
    with opened(path) as stream:
        text = stream.read().decode()
    if start == b"[":
        yield from json_items(text, name)
        return
    whole = converted(f"{name}:1", text, json_row, text.encode())
    items = next(iter(whole.row.values())) if isinstance(whole.row, dict) and len(whole.row) == 1 else None
    if isinstance(items, list) and all(isinstance(item, dict) for item in items):
        yield from (Read(f"{name}:item {number}", item) for number, item in enumerate(items, start=1))
    else:
        yield whole


def json_items(text: str, name: str) -> Iterator[Read]:
    """The items of a JSON list, each with the line that it begins on; behind a malformed one nothing is read."""
    decoder, line, counted = json.JSONDecoder(), 1, 0
    place = START.match(text).end()
    try:
        while not text.startswith("]", place):
            line, counted = line + text.count("\n", counted, place), place
            value, end = decoder.raw_decode(text, place)
            yield converted(f"{name}:{line}", text[place:end], as_row, value)
            if (gap := COMMA.match(text, end)) is None:
                wanted = "Expecting ','" if text[end:].strip() else "The list is not closed"
                raise json.JSONDecodeError(wanted, text, end)
            place = gap.end()
    except (ValueError, RecursionError) as error:
        yield Read(f"{name}:{getattr(error, 'lineno', line)}", not_json(error), text[place : place + 200])


def csv_file(path: Path, name: str) -> Iterator[Read]:
    """Rows under a header line; cells that are JSON (or Python) lists are read as lists."""
    csv.field_size_limit(sys.maxsize)
    with opened(path) as stream:
        lines = (line.decode("utf-8", "surrogateescape") for line in stream)
        header = next(lines, "")
        delimiter = "\t" if ".tsv" in path.suffixes else max(",;\t", key=header.count)
        names = next(csv.reader([header], delimiter=delimiter), [])
        records, values = csv.reader(lines, delimiter=delimiter, strict=True), []
        while values is not None:
            origin = f"{name}:{records.line_num + 2}"
            try:
                values = next(records, None)
            except csv.Error as error:
                yield Read(origin, RowFault("malformed_line", str(error)))
                continue
            if values:
                yield converted(origin, json.dumps(values), csv_row, names, values)


def csv_row(names: list[str], values: list[str]) -> dict:
    """One CSV record by the names of its columns. Raises RowFault."""
    if any("\udc80" <= char <= "\udcff" for value in values if not value.isascii() for char in value):
        raise RowFault("not_utf8", "a byte that is not UTF-8")
    if len(values) != len(names):
        raise RowFault("malformed_line", f"{len(values)} values under {len(names)} columns")
    try:
        return {name: cell(value) for name, value in zip(names, values, strict=True)}
    except (ValueError, SyntaxError):
        raise RowFault("wrong_type", "a cell begins like a list of messages but is none") from None


def cell(value: str) -> object:
    """The value of a CSV cell: a list where it is written as one (pandas writes Python's form), else its text."""
    if not value.startswith(("[{", "[[{", '["', "['")):
        return value
    try:
        return json.loads(value)
    except json.JSONDecodeError:
        return ast.literal_eval(value)


def parquet(path: Path, name: str) -> Iterator[Read]:
    """Rows of a Parquet file, by batches; the line in an origin is the row's number."""
    with pq.ParquetFile(path) as file:
        yield from of_batches(file.iter_batches(batch_size=500), name)


def arrow(path: Path, name: str) -> Iterator[Read]:
    """Rows of an Arrow file, as save_to_disk writes it."""
    with pa.memory_map(str(path)) as source, pa.ipc.open_stream(source) as batches:
        yield from of_batches(batches, name)


def of_batches(batches: Iterable[pa.RecordBatch], name: str) -> Iterator[Read]:
    """Rows without the nulls that columns add to objects that lack a key."""
    rows = (row for batch in batches for row in batch.to_pylist())
    for number, row in enumerate(rows, start=1):
        yield Read(f"{name}:{number}", {column: without_nulls(value) for column, value in row.items()})


def without_nulls(value: object) -> object:
    """Objects inside a value without the keys that hold nothing; a message's content stays."""
    if isinstance(value, list):
        return [without_nulls(each) for each in value]
    if not isinstance(value, dict):
        return value
    return {key: without_nulls(each) for key, each in value.items() if each is not None or key == "content"}


READERS: dict[str, Callable[[Path, str], Iterator[Read]]] = {".jsonl": jsonl, ".ndjson": jsonl, ".json": json_file}
READERS |= {".csv": csv_file, ".tsv": csv_file, ".parquet": parquet, ".arrow": arrow}
