"""The shapes that preference data comes in, recognised by a row, and their conversion to one internal form."""

import random
from collections.abc import Callable
from dataclasses import dataclass
from itertools import combinations, pairwise

from preftune.data.findings import RowFault
from preftune.data.messages import (
    as_answer,
    as_dialogue,
    as_prompt,
    is_dialogue_text,
    is_messages,
    message,
    split_last,
    split_pair,
)

PAIRS, LABELLED, DEMONSTRATIONS = "pairs", "labelled answers", "demonstrations"
ANSWERS = {PAIRS: ("chosen", "rejected"), LABELLED: ("completion",), DEMONSTRATIONS: ("completion",)}
GOOD = {
    "1",
    "true",
    "yes",
    "good",
    "up",
    "thumbs_up",
    "thumbsup",
    "like",
    "liked",
    "positive",
    "desirable",
    "chosen",
    "👍",
}
BAD = {"0", "-1", "false", "no", "bad", "down", "thumbs_down", "thumbsdown", "dislike", "disliked", "negative"} | {
    "undesirable",
    "rejected",
    "👎",
}


@dataclass(frozen=True)
class Shape:
    """One shape: what the run calls it, the kind of rows that it gives, which rows have it, and their conversion.

    `convert(row, pairs_rule)` gives the rows of the internal form (message lists) without ids; it raises RowFault.
    """

    name: str
    kind: str
    matches: Callable[[dict], bool]
    convert: Callable[[dict, str], list[dict]]


def has(row: dict, *columns: str) -> bool:
    return all(row.get(column) is not None for column in columns)


def opens_dialogue(value: object) -> bool:
    """Whether a value is a dialogue from its start, and not an answer alone."""
    if not is_messages(value):
        return is_dialogue_text(value)
    first = value if isinstance(value, dict) else value[0]
    return message(first, "chosen")["role"] != "assistant"


def is_pair(row: dict) -> bool:
    return has(row, "chosen", "rejected")


def explicit_pair(row: dict, _: str) -> list[dict]:
    prompt = as_prompt(row["prompt"], row.get("system"))
    return [{"prompt": prompt} | {side: as_answer(row[side], side) for side in ("chosen", "rejected")}]


def whole_pair(row: dict, _: str) -> list[dict]:
    prompt, chosen, rejected = split_pair(*(as_dialogue(row[side], side) for side in ("chosen", "rejected")))
    return [{"prompt": as_prompt(prompt, row.get("system")), "chosen": chosen, "rejected": rejected}]


def prompt_beside_dialogues(row: dict, rule: str) -> list[dict]:
    """The dialogues' own prompt, or the column's where it holds more before the same turns (a system prompt, history).

    Raises RowFault where the column holds a turn that would be lost.
    """
    (pair,) = whole_pair(row, rule)
    said, begins = as_prompt(row["prompt"]), pair["prompt"]
    if len(said) > len(begins) and turns(said[len(said) - len(begins) :]) == turns(begins):
        return [pair | {"prompt": said}]
    known = [content for _, content in turns(begins + pair["chosen"])]
    lost = next((content for _, content in turns(said) if content not in known), None)
    if lost is not None:
        raise RowFault("prompt_mismatch", f"the prompt {lost[:40]!r} is no turn of chosen")
    return [pair]


def turns(dialogue: list[dict]) -> list[tuple[str, str]]:
    """Roles and contents, without the white space around them."""
    return [(message["role"], message["content"].strip()) for message in dialogue]


def labelled(row: dict, _: str) -> list[dict]:
    prompt = as_prompt(row["prompt"], row.get("system"))
    return [
        {"prompt": prompt, "completion": as_answer(row["completion"], "completion"), "label": as_label(row["label"])}
    ]


def labelled_dialogue(row: dict, _: str) -> list[dict]:
    (demonstration,) = whole_demonstration(row, _)
    return [demonstration | {"label": as_label(row["label"])}]


def as_label(value: object) -> bool:
    """A label as a bool: true, 1, "thumbs_up" and the like. Raises RowFault for what is neither good nor bad."""
    text = str(value).strip().lower().replace(" ", "_").replace("-1.0", "-1").removesuffix(".0")
    if text not in GOOD | BAD:
        raise RowFault("unknown_label", f"label is {value!r}")
    return text in GOOD


def demonstration(row: dict, _: str) -> list[dict]:
    prompt = as_prompt(row["prompt"], row.get("system"))
    return [{"prompt": prompt, "completion": as_answer(row["completion"], "completion")}]


def whole_demonstration(row: dict, _: str) -> list[dict]:
    prompt, answer = split_last(as_dialogue(row["messages"], "messages"))
    return [{"prompt": as_prompt(prompt, row.get("system")), "completion": answer}]


def rated(row: dict, rule: str) -> list[dict]:
    """The pairs that `rule` makes of rated answers. Raises RowFault where answers and scores do not fit together."""
    answers, scores = row["completions"], row["scores"]
    if not isinstance(answers, list) or not isinstance(scores, list) or len(answers) != len(scores):
        raise RowFault("wrong_type", "completions and scores must be lists of one length")
    if not all(isinstance(score, int | float) and score == score for score in scores):
        raise RowFault("wrong_type", f"scores must be numbers, they are {scores}")
    prompt = as_prompt(row["prompt"], row.get("system"))
    ranked = sorted(zip(scores, answers, strict=True), key=lambda rating: -rating[0])
    pairs = [(a, b) for a, b in PAIRS_RULES[rule](ranked) if a[0] > b[0]]
    return [
        {"prompt": prompt, "chosen": as_answer(a, "completions"), "rejected": as_answer(b, "completions")}
        for (_, a), (_, b) in pairs
    ]


def best_random(ranked: list[tuple]) -> list[tuple]:
    """The best answer with one of the others, drawn by what the answers are: the same one in every run."""
    worse = [rating for rating in ranked if rating[0] < ranked[0][0]]
    return [(ranked[0], random.Random(repr(ranked)).choice(worse))] if worse else []


PAIRS_RULES: dict[str, Callable[[list[tuple]], list[tuple]]] = {
    "best_worst": lambda ranked: [(ranked[0], ranked[-1])] if ranked else [],
    "best_random": best_random,
    "best_rest": lambda ranked: [(ranked[0], other) for other in ranked[1:]],
    "neighbours": lambda ranked: list(pairwise(ranked)),
    "all": lambda ranked: list(combinations(ranked, 2)),
}

SHAPES = (
    Shape("rated answers", PAIRS, lambda row: has(row, "prompt", "completions", "scores"), rated),
    Shape(
        "a prompt beside whole dialogues",
        PAIRS,
        lambda row: is_pair(row) and has(row, "prompt") and opens_dialogue(row["chosen"]),
        prompt_beside_dialogues,
    ),
    Shape(
        "prompt, chosen and rejected as message lists",
        PAIRS,
        lambda row: is_pair(row) and is_messages(row.get("prompt")) and is_messages(row["chosen"]),
        explicit_pair,
    ),
    Shape(
        "a prompt text with answers as message lists",
        PAIRS,
        lambda row: is_pair(row) and isinstance(row.get("prompt"), str) and is_messages(row["chosen"]),
        explicit_pair,
    ),
    Shape(
        "a prompt as a message list with answers as texts",
        PAIRS,
        lambda row: is_pair(row) and is_messages(row.get("prompt")) and isinstance(row["chosen"], str),
        explicit_pair,
    ),
    Shape(
        "prompt, chosen and rejected as texts", PAIRS, lambda row: is_pair(row) and has(row, "prompt"), explicit_pair
    ),
    Shape(
        "whole dialogues in chosen and rejected, as Human/Assistant texts",
        PAIRS,
        lambda row: is_pair(row) and is_dialogue_text(row["chosen"]),
        whole_pair,
    ),
    Shape(
        "whole dialogues in chosen and rejected, as message lists",
        PAIRS,
        lambda row: is_pair(row) and is_messages(row["chosen"]),
        whole_pair,
    ),
    Shape("prompt, completion and label", LABELLED, lambda row: has(row, "prompt", "completion", "label"), labelled),
    Shape("messages and label", LABELLED, lambda row: has(row, "messages", "label"), labelled_dialogue),
    Shape("prompt and completion", DEMONSTRATIONS, lambda row: has(row, "prompt", "completion"), demonstration),
    Shape("messages", DEMONSTRATIONS, lambda row: has(row, "messages"), whole_demonstration),
)
COLUMNS = ("prompt", "chosen", "rejected", "completion", "label", "messages", "completions", "scores", "system", "id")


def shape_of(row: dict) -> Shape:
    """The first shape that a row has. Raises RowFault, with what is there and what is wanted, where it has none."""
    for shape in SHAPES:
        if shape.matches(row):
            return shape
    if is_pair(row) and all(isinstance(row[side], str) for side in ("chosen", "rejected")):
        raise RowFault(
            "missing_column", "chosen and rejected are texts without turns, so a prompt is needed beside them"
        )
    empty = [column for column in COLUMNS if column in row and row[column] is None]
    given = ", ".join(empty) + (" is" if len(empty) == 1 else " are") + " null; " if empty else ""
    there = ", ".join(map(str, list(row)[:8])) or "none"
    raise RowFault("missing_column", f"{given}columns are {there}; wanted are {WANTED}")


WANTED = "prompt + chosen + rejected, chosen + rejected (whole dialogues), prompt + completion (+ label) or messages"


def renamed(row: dict, columns: dict[str, str | None]) -> dict:
    """The row under preftune's column names; `columns` maps them to the data's, and null leaves a column unread.

    Raises RowFault where a column that is named is not there.
    """
    if not columns:
        return row
    absent = [theirs for theirs in columns.values() if theirs is not None and theirs not in row]
    if absent:
        there = ", ".join(map(str, list(row)[:12]))
        raise RowFault("missing_column", f"data.columns names {', '.join(absent)}; there are {there}")
    taken = set(columns.values())
    kept = {name: value for name, value in row.items() if name not in columns and name not in taken}
    return kept | {ours: row[theirs] for ours, theirs in columns.items() if theirs is not None}
