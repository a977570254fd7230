"""The shapes of rows under our columns (forms.py gives them), and their way to one internal form."""

import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import combinations, pairwise

from preftune.data import messages
from preftune.data.columns import label_of, number
from preftune.data.findings import RowFault
from preftune.data.messages import Messages

PAIRS, LABELLED, DEMONSTRATIONS, PROMPTS = "pairs", "labelled answers", "demonstrations", "prompts"
ANSWERS = {PAIRS: ("chosen", "rejected"), LABELLED: ("completion",), DEMONSTRATIONS: ("completion",), PROMPTS: ()}
MISSING = (None, "", "N/A", "n/a", "nan", "null")  # scores that are none


@dataclass(frozen=True)
class Shape:
    """One shape: what the run calls it, the kind of rows that it gives, and the columns that it is recognised by.

    `convert(row, pairs_rule)` gives rows of the internal form (message lists) without ids; it raises RowFault.
    """

    name: str
    kind: str
    columns: tuple[str, ...]
    convert: Callable[[dict, str], list[dict]]


def has(row: dict, *columns: str) -> bool:
    return all(row.get(column) is not None for column in columns)


def pair(row: dict, _: str) -> list[dict]:
    """A pair out of answers, or out of whole dialogues, whose prompt is what they share."""
    if has(row, "prompt") and not messages.opens_dialogue(row["chosen"]):
        prompt = messages.as_prompt(row["prompt"])
        return [{"prompt": prompt} | {side: messages.as_answer(row[side], side) for side in ANSWERS[PAIRS]}]
    prompt, chosen, rejected = messages.split_pair(*(messages.as_dialogue(row[side], side) for side in ANSWERS[PAIRS]))
    if has(row, "prompt"):
        prompt = longer_prompt(messages.as_prompt(row["prompt"]), prompt, chosen)
    return [{"prompt": prompt, "chosen": chosen, "rejected": rejected}]


def unrepeated(row: dict) -> dict | None:
    """The row without the prompt at the start of both answers; None where it does not stand there."""
    prompt, *answers = (row.get(name) for name in ("prompt", *ANSWERS[PAIRS]))
    if not isinstance(prompt, str) or len(prompt.split()) < 3 or messages.format_of(prompt):
        return None
    if not all(isinstance(each, str) and each.startswith(prompt) and each != prompt for each in answers):
        return None
    return row | {side: each[len(prompt) :].lstrip() for side, each in zip(ANSWERS[PAIRS], answers, strict=True)}


def longer_prompt(column: Messages, prompt: Messages, chosen: Messages) -> Messages:
    """The dialogues' own prompt, or the column's where it holds more before the same turns (a system prompt, history).

    Raises RowFault where the column holds a turn that would be lost.
    """
    begins = turns(prompt)
    if len(column) > len(begins) and turns(column[len(column) - len(begins) :]) == begins:
        return column
    known = {content for _, content in turns(prompt + chosen)}
    lost = next((content for _, content in turns(column) if content not in known), None)
    if lost is not None:
        raise RowFault("prompt_mismatch", f"the prompt {lost[:40]!r} is no turn of chosen")
    return prompt


def turns(dialogue: Messages) -> list[tuple[str, str]]:
    """Roles and contents, without the white space around them."""
    return [(message["role"], messages.said(message).strip()) for message in dialogue]


def answer(row: dict, _: str) -> list[dict]:
    """A prompt and its answer, from columns of their own or from one dialogue."""
    if has(row, "prompt", "completion"):
        prompt, completion = messages.as_prompt(row["prompt"]), messages.as_answer(row["completion"], "completion")
    else:
        prompt, completion = messages.split_last(messages.as_dialogue(row["messages"], "messages"))
    return [{"prompt": prompt, "completion": completion}]


def alone(row: dict, _: str) -> list[dict]:
    """A prompt without an answer."""
    return [{"prompt": messages.as_prompt(row["asked"])}]


def labelled(row: dict, _: str) -> list[dict]:
    """An answer with its label as a bool. Raises RowFault for any other label."""
    (found,) = answer(row, _)
    if (label := label_of(row["label"])) is None:
        raise RowFault("unknown_label", f"label is {row['label']!r}")
    return [found | {"label": label}]


def rated(row: dict, rule: str) -> list[dict]:
    """The pairs that `rule` makes of rated answers; one without a score is left aside.

    Raises RowFault where answers and scores do not fit together.
    """
    answers, scores = row["completions"], row["scores"]
    if not isinstance(answers, list) or not isinstance(scores, list) or len(answers) != len(scores):
        raise RowFault("wrong_type", "completions and scores must be lists of one length")
    if not all(score in MISSING or number(score) is not None or score != score for score in scores):
        raise RowFault("wrong_type", f"scores must be numbers, they are {scores}")
    found = [(number(score), each) for score, each in zip(scores, answers, strict=True)]
    ranked = sorted([each for each in found if each[0] is not None], key=lambda rating: -rating[0])
    pairs = [(a, b) for (high, a), (low, b) in PAIRS_RULES[rule](ranked) if high > low]
    if row.get("prompt") is None:
        return [pair({"chosen": chosen, "rejected": rejected}, rule)[0] for chosen, rejected in pairs]
    prompt = messages.as_prompt(row["prompt"])
    sides = [[messages.as_answer(each, "completions") for each in both] for both in pairs]
    return [{"prompt": prompt, "chosen": chosen, "rejected": rejected} for chosen, rejected in sides]


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
SHAPES = (  # the first whose columns a row has
    Shape("rated answers", PAIRS, ("completions", "scores"), rated),
    Shape("pairs", PAIRS, ("chosen", "rejected"), pair),
    Shape("prompt, completion and label", LABELLED, ("prompt", "completion", "label"), labelled),
    Shape("messages and label", LABELLED, ("messages", "label"), labelled),
    Shape("prompt and completion", DEMONSTRATIONS, ("prompt", "completion"), answer),
    Shape("messages", DEMONSTRATIONS, ("messages",), answer),
    Shape("prompts alone", PROMPTS, ("asked",), alone),
)
COLUMNS = ["prompt", "chosen", "rejected", "completion", "label", "messages", "completions", "scores", "system", "id"]
COLUMNS += ["tools", "chat_template_kwargs", "images", "asked"]
WANTED = "prompt + chosen + rejected, chosen + rejected (whole dialogues), prompt + completion (+ label) or messages"


def shape_of(row: dict) -> Shape:
    """The shape of a row. Raises RowFault, with what is there and what is wanted, where it has none."""
    for shape in SHAPES:
        if has(row, *shape.columns):
            return replace(shape, name=name_of_pair(row)) if shape.convert is pair else shape
    empty = [column for column in COLUMNS if column in row and row[column] is None]
    given = ", ".join(empty) + (" is" if len(empty) == 1 else " are") + " null; " if empty else ""
    there = ", ".join(map(str, list(row)[:8])) or "none"
    raise RowFault("missing_column", f"{given}columns are {there}; wanted are {WANTED}")


def name_of_pair(row: dict) -> str:
    """What the run calls a pair. Raises RowFault where its answers have no turns and no prompt stands beside them."""
    prompt, chosen = row.get("prompt"), row["chosen"]
    if prompt is None:
        if not messages.is_messages(chosen) and messages.format_of(chosen) is None:
            raise RowFault("missing_column", "chosen and rejected hold no turns, so a prompt is needed beside them")
        form = "message lists" if messages.is_messages(chosen) else f"{messages.format_of(chosen)} texts"
        return f"whole dialogues in chosen and rejected, as {form}"
    if messages.opens_dialogue(chosen):
        return "a prompt beside whole dialogues"
    names = {
        (True, True): "prompt, chosen and rejected as message lists",
        (False, True): "a prompt text with answers as message lists",
        (True, False): "a prompt as a message list with answers as texts",
        (False, False): "prompt, chosen and rejected as texts",
    }
    return names[messages.is_messages(prompt), messages.is_messages(chosen)]
