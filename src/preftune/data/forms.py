"""The forms that rows are found in, brought to the columns that shapes.py converts: by structure, not by data set."""

import json
import re
from statistics import fmean
from typing import Any

from preftune.data import messages
from preftune.data.columns import VERDICT, Columns, Reading, from_json, number
from preftune.data.findings import RowFault

ANSWERS = "conversation response answer completion human_ref output reply text model"  # of two, the most telling first
SIDES = (("a", "b"), ("A", "B"), ("0", "1"), ("1", "2"))
SCORE = re.compile(r"((overall|quality|preference|human)_)?(scores?|ratings?|rewards?|votes|winner(_model)?)")
TIE = re.compile(r"tie\b.*|both.*|neither|equal|same|draw|0\.5")
SEEN = ("image", "image_url", "input_image", "video", "audio", "input_audio")  # parts of messages that are no text
GRADES = ("stars", "rating", "score")  # labels where `data.good_at` says what is good
TEXT_OF = "response text content answer output completion generation"  # fields of an answer that is an object
SCORE_OF = "fine-grained_score overall_score score rating reward annotations rank"


def standard(row: dict, how: Reading) -> tuple[dict, Columns]:
    """A row under the columns of shapes.py, and what was read of it. Raises RowFault.

    A row of no known form that holds an object as a JSON text is that object.
    """
    row = texts_alone(row) if how.columns.get("images", "") is None else row
    columns, found = Columns(row, how.columns), None
    for form in FORMS:
        columns.read.clear()
        if (found := form(columns, how)) is not None:
            break
    inner = [value for value in row.values() if isinstance(value, str) and value.lstrip().startswith('{"')]
    if found is None and len(inner) == 1:
        try:
            return standard(json.loads(inner[0]), how)
        except ValueError as error:
            if isinstance(error, RowFault):
                raise
    names = ("id", "system", "tools", "chat_template_kwargs", "images") + (("margin",) if how.margins else ())
    beside = {name: value for name in names if (value := columns.find(name)) is not None}
    return (row if found is None else found) | beside, columns


def texts_alone(value: Any) -> Any:
    """A row without the parts of messages that are images or sound."""
    if isinstance(value, dict):
        return {name: texts_alone(each) for name, each in value.items()}
    if not isinstance(value, list):
        return value
    return [texts_alone(each) for each in value if not (isinstance(each, dict) and each.get("type") in SEEN)]


def rated(columns: Columns, how: Reading) -> dict | None:
    """Several answers with scores: lists side by side, answers that are objects, or a list that is in order."""
    own = columns.row.keys() >= {"completions", "scores"}
    listed = None if {"chosen", "rejected"} <= columns.row.keys() and not own else columns.find("completions", list)
    if listed is None or (isinstance(listed, list) and messages.is_messages(listed)):
        return None
    scores = columns.find("scores", list)
    objects = isinstance(listed, list) and listed and all(isinstance(each, dict) for each in listed)
    if objects and scores is None:
        texts = [next((each[name] for name in TEXT_OF.split() if each.get(name)), None) for each in listed]
        both = zip(texts, (score_of(each, how.verdict) for each in listed), strict=True)
        known = [each for each in both if None not in each]
        listed, scores = [text for text, _ in known], [score for _, score in known]
    for name in ("rank", "ranks"):  # 1 is the best
        if scores is None and isinstance(ranks := columns.row.get(name), list):
            columns.read[name] = "scores"
            scores = [None if (place := number(rank)) is None else -place for rank in ranks]
    if scores is None and columns.read.get("output") == "completions":
        scores = list(range(len(listed), 0, -1))
    if scores is None:
        return None
    return {"prompt": prompt_of(listed, columns), "completions": listed, "scores": scores}


def prompt_of(answers: list, columns: Columns) -> object:
    """The prompt of several answers; None where these are whole dialogues. Raises RowFault where it is missing."""
    if all(map(messages.opens_dialogue, answers)):
        return None
    if (found := columns.prompt()) is None:
        raise RowFault("missing_column", "no prompt beside the answers: data.columns={prompt: THEIR_NAME}")
    return found


def score_of(answer: dict, verdict: str | None) -> float | None:
    """The score of an answer that is an object: by `data.verdict`, else the first that there is."""
    for name in [verdict] if verdict else SCORE_OF.split():
        value = answer.get(name)
        if name == "annotations" and isinstance(value, dict):  # UltraFeedback's: {aspect: {"Rating": "4", …}}
            aspects = [each for one in value.values() for each in (one if isinstance(one, list) else [one])]
            ratings = [number(each.get("Rating")) for each in aspects if isinstance(each, dict)]
            value = fmean(known) if (known := [each for each in ratings if each is not None]) else None
        if (found := number(value)) is not None:
            return -found if name == "rank" else found
    return None


def pair(columns: Columns, how: Reading) -> dict | None:
    """A better and a worse answer."""
    chosen, rejected = columns.find("chosen"), columns.find("rejected")
    if chosen is None or rejected is None:
        return None
    asked = not messages.opens_dialogue(chosen) or "prompt" in columns.row or "prompt" in how.columns
    prompt = columns.prompt() if asked else None
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def two_answers(columns: Columns, how: Reading) -> dict | None:
    """Two answers and a verdict, as two scores: those that are equal make no pair."""
    couples = sided(columns.row)
    answers = [
        couples[stem]
        for word in ANSWERS.split()
        for stem in sorted(couples, key=len)  # response_0 before response_0_source
        if word in stem.lower() and all(is_answer(columns.row[name]) for name in couples[stem][0])
    ]
    if not answers:
        return None
    names, sides = answers[0]
    said = verdicts(columns, how, couples, (names, sides))
    if not said and {"completion", "messages"} & columns.row.keys():
        return None
    if not said:
        what = f"data.verdict={how.verdict} has no value" if how.verdict else "no column tells the better one"
        raise RowFault("missing_column", f"two answers ({', '.join(names)}), and {what}: data.verdict=COLUMN")
    if len(set(said.values())) > 1:
        ways = {1: names[0], -1: names[1], 0: "a tie"}
        found = ", ".join(f"{name} says {ways[way]}" for name, way in said.items())
        raise RowFault("two_verdicts", f"{found}; data.verdict={next(iter(said))}")
    columns.read |= dict.fromkeys(names, "completions") | dict.fromkeys(said, "scores")
    (way,) = set(said.values())
    completions = [from_json(columns.row[name], name) for name in names]
    return {"prompt": prompt_of(completions, columns), "completions": completions, "scores": [way, 0]}


def is_answer(value: object) -> bool:
    return isinstance(value, str) or messages.is_messages(value)


def sided(row: dict) -> dict[str, tuple[tuple[str, str], tuple[str, str]]]:
    """Columns that differ in their side alone, by what they share: {"response_": (names, sides)}."""
    found = {}
    for first, second in SIDES:
        before = "(?:^|(?<=_))" if first == "a" else "(?:^|(?<=[_a-z]))"
        for name in row:
            for match in re.finditer(f"{before}{first}(?=_|$)", str(name)):
                start, end = name[: match.start()], name[match.end() :]
                if (other := f"{start}{second}{end}") in row:
                    found.setdefault(start + end, ((name, other), (first, second)))
    return found


def verdicts(columns: Columns, how: Reading, couples: dict, answers: tuple) -> dict[str, int]:
    """What each column that judges says: 1 for the first answer, −1 for the second, 0 for a tie. Raises RowFault."""
    row, found = columns.row, {}
    for stem, (names, _) in couples.items():
        first, second = (number(row[name]) for name in names)
        judges = how.verdict in (*names, stem.strip("_")) if how.verdict else SCORE.fullmatch(stem.strip("_"))
        if judges and first is not None and second is not None:
            found[names[0]] = (first > second) - (first < second)
            columns.read[names[1]] = "scores"
    of_sides = {name for names, _ in couples.values() for name in names}
    named = {row[name]: name for names, _ in couples.values() for name in names if isinstance(row[name], str)}
    for name, value in row.items():
        judges = name == how.verdict if how.verdict else VERDICT.search(name) and not name.endswith("tie")
        if not judges or name in of_sides or not isinstance(value, str | int | float):
            continue
        value = named.get(value, value)  # the winner by what its side holds: the name of a model, an answer
        if name == how.verdict or not isinstance(value, str) or len(value.split()) <= 3:  # else a reason, not a verdict
            found[name] = way(value, name, how, answers)
    columns.read |= {name: "scores" for name in row if name.endswith("_tie")}
    return found


def way(value: str | float, name: str, how: Reading, answers: tuple) -> int:
    """What one verdict says. Raises RowFault where it names neither answer."""
    (column, _), sides = answers
    text, size = str(value).strip().lower(), number(value)
    if size is not None and sides == ("1", "2") and (name in how.signed or "strength" in name):
        return (size < 0) - (size > 0)  # HelpSteer: below 0 where the first is preferred
    if size is not None and name in how.scaled - how.signed:
        raise RowFault("unknown_label", f"{name} is {value!r}, one of several grades, which name no answer")
    if TIE.fullmatch(text) or not text:
        return 0
    if "label" in name and column.startswith("human_ref") and size in (0, 1):
        return 1 if size else -1  # SHP: 1 where the first is preferred
    last = re.split(r"[\s_]|\b-", text if size is None else f"{size:g}")[-1]
    for side, says in zip(sides, (1, -1), strict=True):
        if last == side.lower():
            return says
    raise RowFault("unknown_label", f"{name} is {value!r}; it names {sides[0]}, {sides[1]} or a tie")


def answered(columns: Columns, how: Reading) -> dict | None:
    """An answer, with a label or without one: of a prompt, or at the end of a dialogue."""
    listed, text = columns.find("messages", list, str), columns.row.get("text")
    if listed is not None and is_answer(listed) and columns.row.get("completion") is None:
        found = {"messages": listed}
    else:
        found = {"prompt": columns.prompt(), "completion": columns.find("completion", str, list, dict)}
    if None in found.values():
        if not isinstance(text, str):
            return None
        if not messages.opens_dialogue(text):
            raise RowFault("missing_column", "text holds no turns (user, assistant), and plain text trains no answers")
        found, columns.read = {"messages": text}, {"text": "messages"}
    grades = [name for name in GRADES if number(columns.row.get(name)) is not None] if how.good_at is not None else []
    if (label := columns.find("label")) is None and grades:
        label, columns.read[grades[0]] = columns.row[grades[0]], "label"
    return found if label is None else found | {"label": graded(label, columns, how)}


def graded(label: object, columns: Columns, how: Reading) -> object:
    """A label that is a grade as true or false, by `data.good_at`; others as they are. Raises RowFault without it."""
    size = number(label)
    if size is None or isinstance(label, bool):
        return label
    if how.good_at is not None:
        return size >= how.good_at
    if how.graded:
        says = f"label is {label!r}: say from which number on an answer is good, data.good_at=4, or "
        raise RowFault("unknown_label", says + "leave it unread, data.columns={label: null}")
    return label


def prompt_alone(columns: Columns, how: Reading) -> dict | None:
    """A prompt and nothing else, where that is enough."""
    return {"asked": asked} if how.prompts and (asked := columns.prompt()) is not None else None


FORMS = (rated, pair, two_answers, answered, prompt_alone)
