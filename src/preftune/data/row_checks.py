"""What can be wrong with one row in the internal form: each check yields codes of findings, with details."""

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

Faults = Iterator[tuple[str, str]]


def texts(row: dict, kind: str) -> Iterator[tuple[str, str]]:
    """(column, content) of every message of a row."""
    for column in ("prompt", *ANSWERS[kind]):
        for message in row[column]:
            yield column, message["content"]


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
        before, dialogue = None, row["prompt"] + row[column]
        for place, message in enumerate(dialogue):
            if message["role"] not in FOLLOWS[before]:
                begin = f"{message['role']} after {before}" if before else f"begins with {message['role']}"
                yield "role_order", f"message {place + 1} of prompt + {column}: {begin}"
                return
            before = message["role"]
        if row[column] and row[column][0]["role"] != "assistant":
            yield "role_order", f"{column} begins with {row[column][0]['role']}"
            return
        if row[column] and before != "assistant":
            yield "role_order", f"{column} ends with {before}"
            return


def identical(row: dict, kind: str) -> Faults:
    if kind == "pairs" and row["chosen"] == row["rejected"]:
        yield "identical_pair", ""


def later_user_turns(row: dict, kind: str) -> Faults:
    for column in ANSWERS[kind]:
        if any(message["role"] == "user" for message in row[column]):
            yield "user_turn_in_answer", column
            return


def encoding(row: dict, kind: str) -> Faults:
    for column, text in texts(row, kind):
        if "\x00" in text:
            yield "null_byte", f"in {column}"
            return
        if text.isascii():
            continue
        if not encodable(text):
            yield "not_utf8", f"half a surrogate pair in {column}"
            return
        if "\ufffd" in text:
            yield "replacement_character", f"in {column}"
            return


def encodable(text: str) -> bool:
    """Whether a text can be written as UTF-8: JSON may hold halves of surrogate pairs, which cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


CHECKS = (empty, encoding, role_order, identical, later_user_turns)


def check(row: dict, kind: str) -> list[tuple[str, str]]:
    """The warnings (code, detail) of a row. Raises RowFault for its first error."""
    found = []
    for look in CHECKS:
        for code, detail in look(row, kind):
            if KINDS[code].severity == ERROR:
                raise RowFault(code, detail)
            found.append((code, detail))
    return found


READ = ("role", "from", "content", "value")
UNSAID = {"weight": (None, 1), "train": (None, True)}  # fields and the values of them that change nothing


def extra_fields(row: dict) -> list[str]:
    """Fields of messages, in a row as it was read, that the internal form does not keep."""
    return sorted(
        {
            field
            for value in row.values()
            if isinstance(value, list)
            for message in value
            if isinstance(message, dict) and {"role", "from"} & message.keys()
            for field, content in message.items()
            if field not in READ and content not in UNSAID.get(field, (None, "", [], {}))
        }
    )
