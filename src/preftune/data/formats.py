"""Rows out of JSONL, JSON, CSV and Parquet files, one at a time, each with its file and line."""

import ast
import bz2
import codecs
import csv
import gzip
import json
import lzma
import re
import sys
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from preftune.data.findings import RowFault

OPENERS: dict[str, Callable] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
BROKEN = (OSError, EOFError, zlib.error, lzma.LZMAError)
CHUNK = 1 << 20
OPENING, COMMA = re.compile(r"\ufeff?\s*\[\s*"), re.compile(r"\s*(?:,\s*|(?=\]))")
UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


@dataclass(frozen=True, slots=True)
class Read:
    """One row as it was found: where (`file:line`), and its columns, or what is wrong with it and its raw text."""

    origin: str
    row: dict | None = None
    fault: RowFault | None = None
    raw: str = ""


def ending(path: Path) -> str:
    """The part of a file's name that tells its format, compression aside: .jsonl for a.jsonl.gz."""
    name = path.with_suffix("") if path.suffix.lower() in OPENERS else path
    return name.suffix.lower()


def read(path: Path, name: str) -> Iterator[Read]:
    """Every row of a file, good or bad, in order; `name` is what origins call the file.

    What breaks the whole file (an archive cut short, no Parquet at all) comes as a last Read with `unreadable_file`.
    """
    line = 0
    try:
        if path.stat().st_size == 0:
            yield Read(name, fault=RowFault("unreadable_file", "the file is empty"))
            return
        for found in READERS[ending(path)](path, name):
            line = found.origin.rpartition(":")[2]
            yield found
    except BROKEN as error:
        where = f"{name}:{line}" if line else name
        yield Read(where, fault=RowFault("unreadable_file", f"{error or type(error).__name__} after line {line}"))
    except (pa.ArrowException, UnicodeError) as error:
        yield Read(name, fault=RowFault("unreadable_file", str(error).splitlines()[0]))


def opened(path: Path) -> BinaryIO:
    """The bytes of a file, uncompressed. Raises UnicodeError where they are UTF-16."""
    stream = OPENERS.get(path.suffix.lower(), open)(path, "rb")
    start = stream.read(2)
    if start in UTF16:
        stream.close()
        raise UnicodeError("the file is UTF-16; write it as UTF-8: iconv -f UTF-16 -t UTF-8")
    stream.seek(0)
    return stream


def jsonl(path: Path, name: str) -> Iterator[Read]:
    """A JSON object per line; blank lines are passed over."""
    with opened(path) as lines:
        for number, line in enumerate(lines, start=1):
            if number == 1:
                line = line.removeprefix(codecs.BOM_UTF8)
            if line.strip():
                yield parsed(line, f"{name}:{number}")


DIGITS = "a whole number of more digits than Python reads"


def parsed(line: bytes, origin: str) -> Read:
    """One line of JSONL."""
    raw = line.decode("utf-8", "backslashreplace").rstrip("\r\n")
    if b"\x00" in line:
        return Read(origin, fault=RowFault("null_byte", f"at byte {line.index(0) + 1}"), raw=raw)
    try:
        return checked(json.loads(line.decode("utf-8")), origin, raw)
    except UnicodeDecodeError as error:
        detail = f"byte 0x{line[error.start]:02x} at byte {error.start + 1}"
        return Read(origin, fault=RowFault("not_utf8", detail), raw=raw)
    except json.JSONDecodeError as error:
        return Read(
            origin,
            fault=RowFault("malformed_line", f"{error.msg.removesuffix(' at')} at column {error.colno}"),
            raw=raw,
        )
    except ValueError:
        return Read(origin, fault=RowFault("malformed_line", DIGITS), raw=raw)
    except RecursionError:
        return Read(origin, fault=RowFault("malformed_line", "nested too deeply"), raw=raw)


def checked(value: object, origin: str, raw: str) -> Read:
    """A parsed JSON value as a row, which it is where it is an object."""
    if isinstance(value, dict):
        return Read(origin, value, raw=raw)
    return Read(origin, fault=RowFault("wrong_type", f"a row is an object, this is {json_type(value)}"), raw=raw)


def json_type(value: object) -> str:
    """What a value is called in JSON."""
    names = {dict: "an object", list: "a list", str: "a text", bool: "a boolean", bytes: "bytes", type(None): "null"}
    return names.get(type(value), "a number")


def json_file(path: Path, name: str) -> Iterator[Read]:
    """A list of objects, or an object that holds nothing but such a list, or JSONL under the wrong name."""
    with opened(path) as stream:
        start = stream.read(CHUNK).removeprefix(codecs.BOM_UTF8).lstrip()
    if start[:1] == b"[":
        yield from json_items(path, name)
        return
    first = start.split(b"\n", 1)[0]
    if parsed(first, "").fault is None and start[len(first) :].strip() or start[:1] != b"{":
        yield from jsonl(path, name)
        return
    with opened(path) as stream:
        whole = parsed(stream.read().removeprefix(codecs.BOM_UTF8), f"{name}:1")
    lists = [value for value in (whole.row or {}).values() if isinstance(value, list)]
    if whole.row and len(whole.row) == len(lists) == 1 and all(isinstance(item, dict) for item in lists[0]):
        yield from (Read(f"{name}:item {number}", item) for number, item in enumerate(lists[0], start=1))
    else:
        yield whole


def json_items(path: Path, name: str) -> Iterator[Read]:
    """The items of a JSON list, decoded as they come, so that memory holds one chunk and not the file."""
    decoder = json.JSONDecoder()
    with opened(path) as stream:
        chunks = decoded(stream)
        text = next(chunks)
        place, line, between = 0, 1, OPENING
        while True:
            try:
                if (gap := between.match(text, place)) is None:
                    raise json.JSONDecodeError("Expecting ','", text, place)
                if text.startswith("]", gap.end()):
                    return
                value, end = decoder.raw_decode(text, gap.end())
                if end == len(text):  # the list is not closed yet, and a number may go on in the next chunk
                    raise json.JSONDecodeError("The list is not closed", text, end)
            except json.JSONDecodeError as error:
                if chunk := next(chunks, None):
                    text, place = text[place:] + chunk, 0
                    continue
                begin = line + text.count("\n", place, gap.end() if gap else place)
                detail = f"{error.msg} (line {line + text.count(chr(10), place, error.pos)})"
                yield Read(f"{name}:{begin}", fault=RowFault("malformed_line", detail), raw=text[place : place + 200])
                return
            except (ValueError, RecursionError) as error:
                detail = DIGITS if isinstance(error, ValueError) else "nested too deeply"
                yield Read(f"{name}:{line}", fault=RowFault("malformed_line", detail), raw=text[place : place + 200])
                return
            line += text.count("\n", place, gap.end())
            yield checked(value, f"{name}:{line}", text[gap.end() : end])
            line += text.count("\n", gap.end(), end)
            place, between = end, COMMA


def decoded(stream: BinaryIO) -> Iterator[str]:
    """The text of a stream by chunks. Raises UnicodeError, with the line, where the bytes are not UTF-8."""
    decoder, line = codecs.getincrementaldecoder("utf-8")(), 1
    for chunk in iter(lambda: stream.read(CHUNK), b""):
        try:
            yield decoder.decode(chunk)
        except UnicodeDecodeError as error:
            line += error.object[: error.start].count(b"\n")
            raise UnicodeError(f"line {line}: byte 0x{error.object[error.start]:02x} is not UTF-8") from None
        line += chunk.count(b"\n")


def csv_file(path: Path, name: str) -> Iterator[Read]:
    """Rows under a header line; cells that are JSON (or Python) lists are read as lists."""
    csv.field_size_limit(sys.maxsize)
    with opened(path) as stream:
        lines = (line.decode("utf-8", "surrogateescape") for line in stream)
        header = next(lines, "").removeprefix("\ufeff")
        delimiter = "\t" if ".tsv" in path.suffixes else max(",;\t", key=header.count)
        names = next(csv.reader([header], delimiter=delimiter), [])
        rows, start = csv.reader(lines, delimiter=delimiter, strict=True), 2
        while True:
            origin = f"{name}:{start}"
            try:
                values = next(rows)
            except StopIteration:
                return
            except csv.Error as error:
                yield Read(origin, fault=RowFault("malformed_line", str(error)))
                start = rows.line_num + 2
                continue
            start = rows.line_num + 2
            if values:
                yield csv_row(names, values, origin)


def csv_row(names: list[str], values: list[str], origin: str) -> Read:
    """One CSV record."""
    raw = json.dumps(values, ensure_ascii=True)
    if any("\udc80" <= char <= "\udcff" for value in values if not value.isascii() for char in value):
        return Read(origin, fault=RowFault("not_utf8", "a byte that is not UTF-8"), raw=raw)
    if len(values) != len(names):
        detail = f"{len(values)} values under {len(names)} columns"
        return Read(origin, fault=RowFault("malformed_line", detail), raw=raw)
    try:
        return Read(origin, {key: cell(value) for key, value in zip(names, values, strict=True)}, raw=raw)
    except (ValueError, SyntaxError):
        return Read(origin, fault=RowFault("wrong_type", "a cell begins like a list of messages but is none"), raw=raw)


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
    number = 0
    with pq.ParquetFile(path) as file:
        for batch in file.iter_batches(batch_size=500):
            for row in batch.to_pylist():
                number += 1
                yield Read(f"{name}:{number}", row)


READERS: dict[str, Callable[[Path, str], Iterator[Read]]] = {
    ".jsonl": jsonl,
    ".ndjson": jsonl,
    ".json": json_file,
    ".csv": csv_file,
    ".tsv": csv_file,
    ".parquet": parquet,
}
