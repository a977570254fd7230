"""Forty files with one fault each, made on the spot: `files()` gives names, bytes, and what is to be found where."""

import gzip
import json
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.parquet as pq

GOOD = {"prompt": "Why is the sky blue?", "chosen": "Air scatters blue light most.", "rejected": "Nobody knows."}
ASKED = [{"role": "user", "content": "Why?"}]
TOLD = [{"role": "assistant", "content": "Because."}]
OTHER = [{"role": "assistant", "content": "No."}]


@dataclass(frozen=True)
class Malformed:
    """A file, the code of its finding, the line that the finding names (None: the file alone), a word of its detail."""

    name: str
    content: bytes
    code: str
    line: int | None
    word: str


def line(row: object) -> bytes:
    return json.dumps(row).encode() + b"\n"


def among(bad: bytes, before: int = 2) -> bytes:
    """A bad line between good ones."""
    return line(GOOD) * before + bad.rstrip(b"\n") + b"\n" + line(GOOD)


def rows(name: str, changes: dict, code: str, word: str = "") -> Malformed:
    """A JSONL file whose third row is the good one with `changes`; a change to ... takes the column out."""
    changed = {key: value for key, value in (GOOD | changes).items() if value is not ...}
    return Malformed(f"{name}.jsonl", among(line(changed)), code, 3, word)


def parquet(values: list[dict]) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(values), sink)
    return sink.getvalue().to_pybytes()


def bad_files() -> list[Malformed]:
    """Files of which no row, or not all, can be read."""
    cut = gzip.compress(line(GOOD) * 400)
    listed = json.dumps([GOOD, GOOD], indent=1).encode()
    return [
        Malformed("empty.jsonl", b"", "unreadable_file", None, "empty"),
        Malformed("blank.jsonl", b"\n  \n\n", "no_rows", None, ""),
        Malformed("utf16.jsonl", line(GOOD).decode().encode("utf-16"), "unreadable_file", None, "iconv -f UTF-16"),
        Malformed("cut.jsonl.gz", cut[:-12], "unreadable_file", None, ""),
        Malformed("not_gzip.jsonl.gz", line(GOOD), "unreadable_file", None, ""),
        Malformed("not_parquet.parquet", line(GOOD), "unreadable_file", None, "Parquet"),
        Malformed("cut.parquet", parquet([GOOD])[:-8], "unreadable_file", None, "Parquet"),
        Malformed("empty_list.json", b"[]", "no_rows", None, ""),
        Malformed("not_closed.json", listed[:-2], "malformed_line", None, "not closed"),
        Malformed("no_comma.json", listed.replace(b"},\n", b"}\n"), "malformed_line", 6, "','"),
        Malformed(
            "latin1.json", listed.replace(b"Nobody", "Möbius".encode("latin1")), "unreadable_file", None, "line 5"
        ),
    ]


def bad_lines() -> list[Malformed]:
    """Lines that are no rows."""
    whole = line(GOOD)
    return [
        Malformed("cut_line.jsonl", among(whole[:40]), "malformed_line", 3, "column"),
        Malformed("single_quotes.jsonl", among(repr(GOOD).encode()), "malformed_line", 3, "double quotes"),
        Malformed("trailing_comma.jsonl", among(whole.replace(b"}", b",}")), "malformed_line", 3, "column"),
        Malformed("two_in_a_line.jsonl", among(whole.strip() + whole), "malformed_line", 3, "Extra data"),
        Malformed(
            "raw_newline.jsonl",
            among(whole.replace(b"blue?", b"blue?\n")),
            "malformed_line",
            3,
            "control character at column",
        ),
        Malformed("tabs.jsonl", among(whole.replace(b"sky", b"s\tky")), "malformed_line", 3, "control character"),
        Malformed("a_list.jsonl", among(b'["Why?", "Because.", "No."]'), "wrong_type", 3, "this is a list"),
        Malformed("a_number.jsonl", among(b"7"), "wrong_type", 3, "this is a number"),
        Malformed("null_row.jsonl", among(b"null"), "wrong_type", 3, "this is null"),
        Malformed("latin1.jsonl", among(whole.replace(b"sky", "Öl".encode("latin1"))), "not_utf8", 3, "0xd6"),
        Malformed("null_byte.jsonl", among(whole.replace(b"sky", b"s\x00y")), "null_byte", 3, "byte"),
        Malformed("deep.jsonl", among(b"[" * 100_000), "malformed_line", 3, ""),
        Malformed(
            "short.csv", b"prompt,chosen,rejected\na,b,c\na,b\n", "malformed_line", 3, "2 values under 3 columns"
        ),
        Malformed("long.csv", b"prompt,chosen,rejected\na,b,c\na,b,c,d\n", "malformed_line", 3, "4 values"),
        Malformed("open_quote.csv", b'prompt,chosen,rejected\na,b,c\na,"b,c\n', "malformed_line", 3, "end of data"),
        Malformed("latin1.csv", "prompt,chosen,rejected\na,b,c\nÖl,b,c\n".encode("latin1"), "not_utf8", 3, ""),
        Malformed("broken_list.csv", b"prompt,chosen,rejected\na,[{role: user}],c\n", "wrong_type", 2, "a cell"),
    ]


def bad_rows() -> list[Malformed]:
    """Rows that are read and cannot be trained on."""
    surrogate = line(GOOD).replace(b"sky", b"\\ud83d")
    return [
        rows("no_rejected", {"rejected": ...}, "missing_column", "columns are prompt, chosen"),
        rows("null_chosen", {"chosen": None}, "missing_column", "chosen is null"),
        rows("number_prompt", {"prompt": 5}, "wrong_type", "prompt is a number"),
        rows("object_answer", {"rejected": {"text": "No."}}, "wrong_type", "rejected is an object"),
        rows("bad_role", {"chosen": [{"role": "robot", "content": "x"}]}, "wrong_type", "robot"),
        rows("null_content", {"chosen": [{"role": "assistant", "content": None}]}, "wrong_type", "null as its content"),
        rows("empty_answer", {"chosen": " \n"}, "empty_answer", "chosen"),
        rows("empty_prompt", {"prompt": ""}, "empty_prompt", ""),
        rows("null_in_text", {"chosen": "a\x00b"}, "null_byte", "chosen"),
        rows("two_answers", {"prompt": ASKED + TOLD, "chosen": TOLD, "rejected": OTHER}, "role_order", "assistant"),
        rows("other_prompt", {"chosen": ASKED + TOLD, "rejected": ASKED + OTHER}, "prompt_mismatch", "sky"),
        Malformed("surrogate.jsonl", among(surrogate), "not_utf8", 3, "surrogate"),
    ]


def files() -> list[Malformed]:
    """All forty."""
    return [*bad_files(), *bad_lines(), *bad_rows()]
