"""What can be wrong with one row in the internal form: each check yields codes of findings, with details."""

import re
from collections.abc import Iterator

from preftune.data.findings import RowFault
from preftune.data.kinds import ERROR, KINDS
from preftune.data.messages import is_learned, said
from preftune.data.shapes import ANSWERS

FOLLOWS = {  # which roles may follow a role; None is the beginning
    None: {"system", "user"},
    "system": {"user"},
    "user": {"assistant"},
    "assistant": {"user", "tool"},
    "tool": {"assistant", "tool"},
}
CHARACTERS = {  # code: what to look for, and what to say before the column; JSON may hold halves of surrogate pairs
    "null_byte": ("\x00", "in"),
    "not_utf8": ("[\ud800-\udfff]", "half a surrogate pair in"),
    "replacement_character": ("\ufffd", "in"),
    "rendered_text": (
        r"<\|im_start\|>|<\|start_header_id\|>|<start_of_turn>|\[/INST\]|\n\nHuman:[\s\S]*\n\nAssistant:",
        "the marks of turns in",
    ),
}
EMPTY = (None, "", [], {})

Faults = Iterator[tuple[str, str]]


def empty(row: dict, kind: str) -> Faults:
    if not any(message["role"] == "user" and said(message).strip() for message in row["prompt"]):
        yield "empty_prompt", "no user turn with a text" if row["prompt"] else "the prompt is empty"
    for column in ANSWERS[kind]:
        if not row[column]:
            yield "empty_answer", f"{column} has no message"
        elif not said(row[column][-1]).strip():
            yield "empty_answer", column


def role_order(row: dict, kind: str) -> Faults:
    """Dialogues must go system?, user, assistant, user, … and an answer begin and end with the assistant."""
    for column in ANSWERS[kind]:
        roles = [None, *(message["role"] for message in row["prompt"] + row[column])]
        for place, (before, role) in enumerate(zip(roles, roles[1:], strict=False), start=1):
            if role not in FOLLOWS[before]:
                begin = f"{role} after {before}" if before else f"begins with {role}"
                yield "role_order", f"message {place} of prompt + {column}: {begin}"
                return
        for verb, place in (("begins", 0), ("ends", -1)):
            if row[column] and (role := row[column][place]["role"]) != "assistant":
                yield "role_order", f"{column} {verb} with {role}"
                return


def teaching(row: dict, kind: str) -> Faults:
    """Pairs that teach nothing, and answers that hold turns of the user."""
    if row.get("chosen") == row.get("rejected", ...):
        yield "identical_pair", ""
    later = [column for column in ANSWERS[kind] if any(message["role"] == "user" for message in row[column])]
    if later:
        yield "user_turn_in_answer", later[0]


def encoding(row: dict, kind: str) -> Faults:
    """Characters that no UTF-8 file holds, or that an earlier decoding left; the first column with one."""
    for column in ("prompt", *ANSWERS[kind]):
        text = "\n".join(said(message) for message in row[column])
        for code, (pattern, before) in CHARACTERS.items():
            if re.search(pattern, text):
                yield code, f"{before} {column}"
                return


def check(row: dict, kind: str) -> list[tuple[str, str]]:
    """The warnings (code, detail) of a row. Raises RowFault for its first error."""
    found = []
    for faults in (empty, encoding, role_order, teaching):
        for code, detail in faults(row, kind):
            if KINDS[code].severity == ERROR:
                raise RowFault(code, detail)
            found.append((code, detail))
    return found


def fields(rows: list[dict], kind: str) -> set[str]:
    """The fields that the messages of rows have beside role and content and that say something to a template.

    A weight of 0 in an answer is listed as such: it does nothing where an answer is compared with another.
    """
    found = set()
    for row in rows:
        for turn in [turn for name in ("prompt", *ANSWERS[kind]) for turn in row[name]]:
            found |= {name for name, value in turn.items() if value not in EMPTY}
        if not all(is_learned(turn) for name in ANSWERS[kind] for turn in row[name]):
            found.add("weight: 0")
    return found - {"role", "content", "weight", "train"}
