"""The columns of one row by our names: their own, those that `data.columns` gives, or others that are often used."""

import json
import re
from contextlib import suppress
from dataclasses import dataclass, field

from preftune.data import messages
from preftune.data.findings import RowFault

NAMES = {  # a column of ours: other names of it, the first that is there; `a.b` is the key b of the object a
    "prompt": "instruction question query input.messages input conversations conversation messages history context",
    "chosen": "preferred_output chosen_response",
    "rejected": "non_preferred_output rejected_response",
    "completion": "response answer output reply solution",
    "label": "kto_tag thumbs thumb feedback liked is_good",
    "messages": "conversations conversation",
    "completions": "generations responses answers outputs candidates output",
    "scores": "ratings rewards",
    "system": "system_prompt",
    "tools": "input.tools",
    "images": "image",
}
VERDICT = re.compile(r"(^|_)(winner|preference|preferred|labels?|better|safer|chosen|choice|verdict)(_|$)")
ALIASES = {name: others.split() for name, others in NAMES.items()}


WORDS = {
    True: "1 true yes good up thumbs_up thumbsup like liked positive desirable chosen 👍",
    False: "0 -1 false no bad down thumbs_down thumbsdown dislike disliked negative undesirable rejected 👎",
}
LABELS = {word: label for label, words in WORDS.items() for word in words.split()}


def label_of(value: object) -> bool | None:
    """A label as a bool: true, 1, "thumbs_up" and the like; None for any other value."""
    return LABELS.get(str(value).strip().lower().replace(" ", "_").replace("-1.0", "-1").removesuffix(".0"))


@dataclass
class Reading:
    """How the rows of a source are read: what the config says, and what its first rows show.

    `signed` are verdicts with numbers below 0, which stand for the first answer; `scaled` those with numbers above 2,
    which are grades and name no answer; `graded` is true where labels are more than two numbers.
    """

    columns: dict[str, str | None] = field(default_factory=dict)
    verdict: str | None = None
    good_at: float | None = None
    prompts: bool = False  # whether prompts alone are rows
    margins: bool = False  # whether a pair's margin is read
    signed: set[str] = field(default_factory=set)
    scaled: set[str] = field(default_factory=set)
    graded: bool = False

    def learn(self, rows: list[dict]) -> None:
        """Take in what the first rows show."""
        for row in rows:
            told = {name: number(value) or 0 for name, value in row.items() if VERDICT.search(name)}
            self.signed |= {name for name, size in told.items() if size < 0}
            self.scaled |= {name for name, size in told.items() if size > 2}
            with suppress(RowFault):
                label = number(Columns(row, self.columns).find("label"))
                self.graded |= label is not None and label not in (-1, 0, 1)


@dataclass
class Columns:
    """The columns of one row by our names, from `data.columns` or ALIASES; `read`: those of which something is made."""

    row: dict
    given: dict[str, str | None]
    read: dict[str, str] = field(default_factory=dict)  # a column of the row: our name of it

    def __post_init__(self):
        absent = [name for name in self.given.values() if name and self.at(name) is None and name not in self.row]
        if absent:
            there = ", ".join(map(str, list(self.row)[:12]))
            raise RowFault("missing_column", f"data.columns names {', '.join(absent)}; there are {there}")

    def at(self, name: str) -> object:
        """The value of a column, or of a key inside one: `input.messages`."""
        if name in self.row or "." not in name:
            return self.row.get(name)
        outer, _, inner = name.partition(".")
        found = self.row.get(outer)
        return found.get(inner) if isinstance(found, dict) else None

    def find(self, name: str, *kinds: type) -> object:
        """The value of our column `name`, None where there is none; `kinds` are those that another name may have."""
        taken = self.given.values()
        for each in [self.given[name]] if name in self.given else (name, *ALIASES.get(name, ())):
            named = each == name or name in self.given
            if each is None or (value := self.at(each)) is None or (each in taken and name not in self.given):
                continue
            value = from_json(value, each)
            if not named and (value == "" or (kinds and not isinstance(value, kinds))):
                continue
            if not named and name == "label" and isinstance(value, str) and label_of(value) is None:
                continue  # feedback in words, not a label
            plain = isinstance(value, str) and each != "context"
            if named or name != "prompt" or plain or messages.is_messages(value):
                self.read[each] = name
                return value
        return None

    def prompt(self) -> object:
        """The prompt, with Alpaca's `input` behind its instruction and its `history` before it."""
        value = self.find("prompt")
        if self.read.get("instruction") != "prompt":
            return value
        if isinstance(extra := self.row.get("input"), str) and isinstance(value, str):
            self.read["input"] = "prompt"
            value = f"{value}\n{extra}" if extra.strip() else value
        before = self.row.get("history")
        if isinstance(before, list) and all(isinstance(turn, list) and len(turn) == 2 for turn in before):
            self.read["history"] = "prompt"
            roles = ("user", "assistant") * len(before)
            turns = [{"role": role, "content": said} for role, said in zip(roles, sum(before, []), strict=True)]
            value = [*turns, *messages.as_prompt(value)] if turns else value
        return value

    def unread(self) -> list[str]:
        """The columns with a value, and the keys beside those that are read, of which nothing is made."""
        found = []
        for name, value in self.row.items():
            if name not in self.read and value not in (None, "", [], {}):
                inner = [each.partition(".")[2] for each in self.read if each.startswith(f"{name}.")]
                rest = [f"{name}.{key}" for key in value if key not in inner] if inner else [name]
                found += [each for each in rest if self.at(each) not in (None, "", [], {})]
        return found


def from_json(value: object, column: str) -> object:
    """The messages or answers that a text holds as JSON, else the value. Raises RowFault for JSON text inside that."""
    if not isinstance(value, str) or not value.startswith(("[{", '["', '{"role"', '{"from"', '"[{', '"{\\"')):
        return value
    try:
        found = json.loads(value)
    except ValueError:
        return value
    if isinstance(found, str):
        raise RowFault("wrong_type", f"{column} is JSON text inside JSON text: write the value itself")
    return found if isinstance(found, list) or messages.is_messages(found) else value


def number(value: object) -> float | None:
    """A number, also one that is written as a text; None for anything else, and for NaN."""
    try:
        found = float(value) if isinstance(value, int | float | str) else float("nan")
    except ValueError:
        return None
    return found if found == found else None
