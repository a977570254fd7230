"""What can be wrong with one row in the internal form: each check yields codes of findings, with details."""

import re
from collections.abc import Iterator

from preftune.data.findings import RowFault
from preftune.data.kinds import ERROR, KINDS
from preftune.data.shapes import ANSWERS

FOLLOWS = {  # which roles may follow a role; None is the beginning
    None: {"system", "user"},
    "system": {"user"},
    "user": {"assistant"},
    "assistant": {"user", "tool"},
    "tool": {"assistant", "tool"},
}
READ = ("role", "from", "content", "value")
UNSAID = {"weight": (None, 1), "train": (None, True)}  # fields and the values of them that change nothing

CHARACTERS = {  # code: what to look for, and what to say before the column; JSON may hold halves of surrogate pairs
    "null_byte": ("\x00", "in"),
    "not_utf8": ("[\ud800-\udfff]", "half a surrogate pair in"),
    "replacement_character": ("\ufffd", "in"),
}

Faults = Iterator[tuple[str, str]]


def empty(row: dict, kind: str) -> Faults:
    if not any(message["role"] == "user" and message["content"].strip() for message in row["prompt"]):
        yield "empty_prompt", "no user turn with a text" if row["prompt"] else "the prompt is empty"
    for column in ANSWERS[kind]:
        if not row[column]:
            yield "empty_answer", f"{column} has no message"
        elif not row[column][-1]["content"].strip():
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
        text = "".join(message["content"] for message in row[column])
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


def extra_fields(row: dict) -> list[str]:
    """Fields of messages, in a row as it was read, that the internal form does not keep."""
    lists = [value for value in row.values() if isinstance(value, list)]
    messages = [
        each for listed in lists for each in listed if isinstance(each, dict) and {"role", "from"} & each.keys()
    ]
    fields = [(field, content) for message in messages for field, content in message.items() if field not in READ]
    return sorted({field for field, content in fields if content not in UNSAID.get(field, (None, "", [], {}))})
