"""What can be wrong with the tokens of a row: what the trainer will see, tokenized as TRL does it."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from datasets import Dataset
from jinja2 import TemplateError

from preftune.data.findings import Findings
from preftune.data.shapes import ANSWERS, PAIRS
from preftune.models.tokenizer import stop_tokens

BATCH = 256
TAIL = 4  # last tokens of an answer among which EOS must be: templates write a line break behind it
LONG = 3  # a row is far longer than the rest where it has more than this many times the 95th percentile's tokens


@dataclass(frozen=True)
class Row:
    """One row in tokens: the prompt, and each answer's own tokens (column: ids), as the trainer splits them."""

    origin: str
    prompt: list[int]
    answers: dict[str, list[int]]
    prefix: bool  # whether the prompt's tokens are how prompt + answer begins

    def lengths(self) -> list[int]:
        """Tokens of prompt + answer, for each answer."""
        return [len(self.prompt) + len(ids) for ids in self.answers.values()]


@dataclass
class TokenFigures:
    """Tokens of the rows that were looked at: arrays of shape (looked_at,) by column, and one row to be shown."""

    looked_at: int
    of: int
    columns: dict[str, np.ndarray] = field(repr=False)
    shown: Row | None


def tokenized(rows: Dataset, kind: str, tokenizer) -> Iterator[Row]:
    """Every row in tokens: the chat template on the prompt and on prompt + answer, as TRL's trainers do."""
    for batch in rows.iter(BATCH):
        prompts = ids_of(tokenizer, batch["prompt"], add_generation_prompt=True)
        wholes = {}
        for column in ANSWERS[kind]:
            dialogues = [prompt + answer for prompt, answer in zip(batch["prompt"], batch[column], strict=True)]
            wholes[column] = ids_of(tokenizer, dialogues)
        for place, prompt in enumerate(prompts):
            shared = min(common(prompt, whole[place]) for whole in wholes.values())
            answers = {column: whole[place][shared:] for column, whole in wholes.items()}
            origin = batch["origin"][place] if "origin" in batch else ""
            yield Row(origin, prompt[:shared], answers, shared == len(prompt))


def sequences(row: Row, max_length: int | None) -> list[tuple[list[int], int]]:
    """(prompt + answer, where the answer begins) for each answer, cut as the trainer cuts them."""
    return [((row.prompt + ids)[:max_length], len(row.prompt)) for ids in row.answers.values()]


def ids_of(tokenizer, dialogues: list[list[dict]], **options) -> list[list[int]]:
    return tokenizer.apply_chat_template(dialogues, tokenize=True, return_dict=True, **options)["input_ids"]


def common(prompt: list[int], whole: list[int]) -> int:
    """How many tokens two rows share from their start."""
    if whole[: len(prompt)] == prompt:
        return len(prompt)
    return next(
        (i for i, (a, b) in enumerate(zip(prompt, whole, strict=False)) if a != b), min(len(prompt), len(whole))
    )


def refused(rows: Dataset, kind: str, tokenizer, findings: Findings) -> list[int]:
    """The rows that the chat template refuses, found by rendering one row of each order of roles."""
    verdicts: dict[tuple[str, ...], str | None] = {}
    bad = []
    place = 0
    for batch in rows.iter(1000):
        for at, prompt in enumerate(batch["prompt"]):
            for column in ANSWERS[kind]:
                dialogue = prompt + batch[column][at]
                order = tuple(message["role"] for message in dialogue)
                if order not in verdicts:
                    verdicts[order] = refusal(tokenizer, dialogue)
                if verdicts[order] is not None:
                    findings.add("template_refuses", batch["origin"][at], verdicts[order])
                    bad.append(place)
                    break
            place += 1
    return bad


def refusal(tokenizer, dialogue: list[dict]) -> str | None:
    """What the chat template says against a dialogue; None where it takes it."""
    try:
        tokenizer.apply_chat_template(dialogue, tokenize=False)
    except (TemplateError, ValueError) as error:
        return str(error).splitlines()[0]
    return None


def check(
    rows: Dataset, kind: str, tokenizer, max_length: int | None, findings: Findings, limit: int | None
) -> TokenFigures:
    """Look at the tokens of `limit` rows spread over the set (None: all); what is found goes into `findings`."""
    picks = rows
    if limit is not None and limit < len(rows):
        picks = rows.select(np.linspace(0, len(rows) - 1, limit).round().astype(int))
    counts = {column: [] for column in ("prompt", *ANSWERS[kind])}
    marks, ends = special_marks(tokenizer), set(stop_tokens(tokenizer))
    shown, whole = None, max_length or np.iinfo(np.int64).max
    emptied = 0
    for row in tokenized(picks, kind, tokenizer):
        for code, detail in faults(row, kind, tokenizer, whole, ends):
            findings.add(code, row.origin, detail, of=len(picks))
            emptied += code == "loses_everything"
        for column, ids in {"prompt": row.prompt, **row.answers}.items():
            counts[column].append(len(ids))
        shown = row if shown is None or max(shown.lengths()) > 200 > max(row.lengths()) else shown
    if emptied == len(picks) > 0:
        findings.add("nothing_left", count=emptied, of=len(picks))
    if marks:
        marked(picks, kind, marks, findings)
    figures = TokenFigures(len(picks), len(rows), {name: np.array(values) for name, values in counts.items()}, shown)
    long_tail(picks, figures, whole, findings)
    return figures


def faults(row: Row, kind: str, tokenizer, max_length: int, ends: set[int]) -> Iterator[tuple[str, str]]:
    """What is wrong with one row's tokens: codes of findings, with details."""
    if not row.prefix:
        yield "prompt_not_prefix", f"they part after {len(row.prompt)} tokens"
    begin = (row.prompt + next(iter(row.answers.values())))[:2]
    if tokenizer.bos_token_id is not None and begin == [tokenizer.bos_token_id] * 2:
        yield "double_bos", ""
    for column, ids in row.answers.items():
        if not ends & set(ids[-TAIL:]):
            yield "missing_eos", column
            break
    if len(row.prompt) >= max_length:
        yield "loses_everything", f"prompt of {len(row.prompt)} tokens"
        return
    if max(row.lengths()) > max_length:
        yield "loses_end", f"{max(row.lengths())} tokens"
        kept = [ids[: max_length - len(row.prompt)] for ids in row.answers.values()]
        if kind == PAIRS and kept[0] == kept[1] and len(set(map(tuple, row.answers.values()))) == 2:
            yield "cut_alike", ""


def answered(rows: Dataset, kind: str, tokenizer, max_length: int | None, findings: Findings) -> Dataset:
    """The held-out rows that have an answer token left at `max_length`; the others go into `findings`."""
    if max_length is None:
        return rows
    kept, lost = [], []
    for place, row in enumerate(tokenized(rows, kind, tokenizer)):
        (kept if len(row.prompt) < max_length else lost).append((place, row.origin))
    if lost:
        findings.add("held_out_loses_everything", [origin for _, origin in lost], count=len(lost), of=len(rows))
    return rows.select([place for place, _ in kept]) if lost else rows


def special_marks(tokenizer) -> re.Pattern | None:
    """A pattern of the special tokens, written out as text."""
    tokens = sorted(filter(None, tokenizer.all_special_tokens), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, tokens))) if tokens else None


def marked(rows: Dataset, kind: str, marks: re.Pattern, findings: Findings) -> None:
    """Rows whose text holds a special token, which tokenizers turn into the token itself."""
    for batch in rows.iter(1000):
        for at, origin in enumerate(batch["origin"]):
            dialogues = [batch[column][at] for column in ("prompt", *ANSWERS[kind])]
            found = (marks.search(message["content"]) for dialogue in dialogues for message in dialogue)
            if hit := next(filter(None, found), None):
                findings.add("special_tokens_in_text", origin, repr(hit[0]), of=len(rows))


def long_tail(rows: Dataset, figures: TokenFigures, max_length: int, findings: Findings) -> None:
    """Rows that, cut at `max_length`, are still far longer than the rest: every batch must have room for them."""
    prompt, *answers = figures.columns.values()
    longest = np.minimum(prompt + np.maximum.reduce(answers), max_length) if len(prompt) else prompt
    if len(longest) < 20:
        return
    usual = np.quantile(longest, 0.95)
    far = np.flatnonzero(longest > LONG * usual)
    if len(far):
        far = far[np.argsort(-longest[far])]
        says = f"{len(far):,} rows have up to {longest.max():,} tokens, where 95% have at most {usual:,.0f}"
        findings.add("long_tail", list(rows.select(far[:3])["origin"]), count=len(far), of=len(longest), says=says)
