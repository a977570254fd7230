"""What can be wrong with the tokens of a row: what the trainer will see, tokenized as TRL does it."""

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from os.path import commonprefix
from typing import NamedTuple

import numpy as np
from datasets import Dataset
from jinja2 import TemplateError
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from preftune.data.findings import Findings
from preftune.data.messages import Messages, said
from preftune.data.shapes import ANSWERS, PAIRS
from preftune.models.tokenizer import stop_tokens, token_ids

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
    differ: bool  # whether the answers differ as messages

    @property
    def longest(self) -> int:
        """Tokens of prompt + answer, of the longer answer."""
        return len(self.prompt) + max(map(len, self.answers.values()))


class Token(NamedTuple):
    """One token of the row that is shown; `state`: read, scored, or cut by train.max_length."""

    text: str
    state: str


@dataclass
class TokenFigures:
    """Tokens of the rows that were looked at: arrays of shape (looked_at,) by column, and one row to be shown."""

    looked_at: int
    of: int
    max_length: int | None
    columns: dict[str, np.ndarray] = field(repr=False)
    origin: str
    example: dict[str, list[Token]] = field(repr=False)


def tokenized(rows: Dataset, kind: str, tokenizer: PreTrainedTokenizerBase) -> Iterator[Row]:
    """Every row in tokens: the chat template on the prompt and on prompt + answer, as TRL's trainers do."""
    for batch in rows.iter(BATCH):
        given, columns = options(batch), [batch[column] for column in ANSWERS[kind]]
        prompts = ids_of(tokenizer, batch["prompt"], given, add_generation_prompt=True)
        wholes = {}
        for column in ANSWERS[kind]:
            dialogues = [prompt + answer for prompt, answer in zip(batch["prompt"], batch[column], strict=True)]
            wholes[column] = ids_of(tokenizer, dialogues, given)
        for place, prompt in enumerate(prompts):
            shared = len(commonprefix([prompt, *(whole[place] for whole in wholes.values())]))
            answers = {column: whole[place][shared:] for column, whole in wholes.items()}
            origin = batch["origin"][place] if "origin" in batch else ""
            differ = columns[0][place] != columns[-1][place]
            yield Row(origin, prompt[:shared], answers, shared == len(prompt), differ)


def options(batch: dict[str, list]) -> list[dict]:
    """What the chat template is given beside the messages of each row of a batch, as TRL gives it."""
    none = [None] * len(next(iter(batch.values())))
    both = zip(batch.get("tools", none), batch.get("chat_template_kwargs", none), strict=True)
    return [({"tools": tools} if tools else {}) | (given or {}) for tools, given in both]


def sequences(row: Row, max_length: int | None) -> list[tuple[list[int], int]]:
    """(prompt + answer, where the answer begins) for each answer, cut as the trainer cuts them."""
    return [((row.prompt + ids)[:max_length], len(row.prompt)) for ids in row.answers.values()]


def row_key(ids: list[int], start: int, lengths_that_count: tuple = ()) -> bytes:
    """The key of a completion: `ids` are prompt and completion as they are scored (truncated), it begins at `start`."""
    content = np.asarray([start, *ids], "<i4").tobytes() + repr(lengths_that_count).encode()
    return hashlib.blake2b(content, digest_size=16).digest()


def ids_of(
    tokenizer: PreTrainedTokenizerBase, dialogues: list[Messages], given: list[dict], **more: object
) -> list[list[int]]:
    """The token ids of each dialogue under the chat template, which is given the `options` of its row."""
    if any(given):
        return [token_ids(tokenizer, each, **own, **more) for each, own in zip(dialogues, given, strict=True)]
    return tokenizer.apply_chat_template(dialogues, tokenize=True, return_dict=True, **more)["input_ids"]


def accepted(rows: Dataset, kind: str, tokenizer: PreTrainedTokenizerBase, findings: Findings) -> Dataset:
    """The rows that the chat template takes, found by rendering one row of each order of turns."""
    verdicts: dict[tuple, str | None] = {}
    kept = []
    for place, (origin, dialogues, given) in enumerate(dialogues_of(rows, kind)):
        orders = [(*map(looks, dialogue), *sorted(given)) for dialogue in dialogues]
        for order, dialogue in zip(orders, dialogues, strict=True):
            if order not in verdicts:
                verdicts[order] = refusal(tokenizer, dialogue, given)
        refused = [verdicts[order] for order in orders if verdicts[order] is not None]
        if refused:
            findings.add("template_refuses", [origin], refused[0])
        else:
            kept.append(place)
    return rows.select(kept) if len(kept) < len(rows) else rows


def looks(turn: dict) -> str | tuple:
    """What of a turn a template may refuse: its role, the fields that it has, how many tools it calls."""
    if len(turn) == 2 and turn.get("content") is not None:
        return turn["role"]
    calls = turn.get("tool_calls")
    return turn["role"], *sorted(turn), turn.get("content") is None, len(calls) if isinstance(calls, list) else 0


def dialogues_of(rows: Dataset, kind: str) -> Iterator[tuple[str, list[Messages], dict]]:
    """(origin, prompt + answer for each answer or the prompt alone, options) of every row, read by batches."""
    for batch in tqdm(rows.iter(1000), desc="trying the template", unit="row", unit_scale=1000, delay=3, leave=False):
        columns = [batch[name] for name in ("prompt", *ANSWERS[kind])]
        origins = batch.get("origin", [""] * len(batch["prompt"]))
        for origin, given, prompt, *answers in zip(origins, options(batch), *columns, strict=True):
            yield origin, [prompt + answer for answer in answers] or [prompt], given


def refusal(tokenizer: PreTrainedTokenizerBase, dialogue: Messages, given: dict) -> str | None:
    """What the chat template says against a dialogue; None where it takes it."""
    try:
        tokenizer.apply_chat_template(dialogue, tokenize=False, **given)
        return None
    except (TemplateError, ValueError, TypeError, AttributeError, KeyError) as error:
        return str(error).splitlines()[0] or type(error).__name__


def answered(
    rows: Dataset, kind: str, tokenizer: PreTrainedTokenizerBase, max_length: int | None, findings: Findings
) -> Dataset:
    """The held-out rows that the template takes and that have an answer token left; the others go into `findings`."""
    rows = accepted(rows, kind, tokenizer, Findings())
    if max_length is None:
        return rows
    found = list(enumerate(tokenized(rows, kind, tokenizer)))
    lost = [row.origin for _, row in found if len(row.prompt) >= max_length]
    if lost:
        findings.add("held_out_loses_everything", lost, count=len(lost), of=len(rows))
    return rows.select([place for place, row in found if len(row.prompt) < max_length]) if lost else rows


def with_room(rows: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int | None, findings: Findings) -> Dataset:
    """The prompts that leave room for an answer; the others are left out and go into `findings`."""
    fits, lost = [], []
    for batch in rows.iter(BATCH):
        ids = ids_of(tokenizer, batch["prompt"], options(batch), add_generation_prompt=True)
        fits += [max_length is None or len(each) < max_length for each in ids]
        lost += [origin for origin, each in zip(batch["origin"], fits[-len(ids) :], strict=True) if not each]
    if lost:
        findings.add("loses_everything", lost, count=len(lost), of=len(rows))
    return rows.select([place for place, each in enumerate(fits) if each]) if lost else rows


def spread_over(rows: Dataset, limit: int | None) -> Dataset:
    """Up to `limit` rows, spread over the set; None: all."""
    if limit is None or limit >= len(rows):
        return rows
    return rows.select(np.linspace(0, len(rows) - 1, limit).round().astype(int))


def check(
    picks: Dataset, kind: str, tokenizer: PreTrainedTokenizerBase, max_length: int | None, findings: Findings
) -> TokenFigures:
    """Look at the tokens of some rows; what is found goes into `findings`."""
    names, counts = ("prompt", *ANSWERS[kind]), []
    ends, shown, most = set(stop_tokens(tokenizer)), None, max_length or np.iinfo(np.int64).max
    looked_at = tqdm(tokenized(picks, kind, tokenizer), "counting tokens", len(picks), unit="row", delay=3, leave=False)
    for row in looked_at:
        for code, detail in faults(row, kind, tokenizer, most, ends):
            findings.add(code, [row.origin], detail, of=len(picks))
        counts.append([len(row.prompt), *map(len, row.answers.values())])
        shown = row if shown is None or shown.longest > 200 > row.longest else shown
    columns = dict(zip(names, np.array(counts, dtype=int).reshape(-1, len(names)).T, strict=True))
    alike = findings.found.get("alike_in_template")
    if alike and alike.count == len(picks):
        findings.add("nothing_differs", count=len(picks), of=len(picks))
    if len(picks) and (columns["prompt"] >= most).all():
        findings.add("nothing_left", count=len(picks), of=len(picks))
    special_tokens(picks, kind, tokenizer, findings)
    long_tail(picks, columns, most, findings)
    example = decoded(shown, tokenizer, most) if shown else {}
    return TokenFigures(len(picks), len(picks), max_length, columns, shown.origin if shown else "", example)


def faults(
    row: Row, kind: str, tokenizer: PreTrainedTokenizerBase, max_length: int, ends: set[int]
) -> Iterator[tuple[str, str]]:
    """What is wrong with one row's tokens: codes of findings, with details."""
    if not row.prefix:
        yield "prompt_not_prefix", f"they part after {len(row.prompt)} tokens"
    begin = (row.prompt + next(iter(row.answers.values())))[:2]
    if tokenizer.bos_token_id is not None and begin == [tokenizer.bos_token_id] * 2:
        yield "double_bos", ""
    if kind == PAIRS and row.differ and len(set(map(tuple, row.answers.values()))) == 1:
        yield "alike_in_template", ""
    open_ended = [column for column, ids in row.answers.items() if not ends & set(ids[-TAIL:])]
    if open_ended:
        yield "missing_eos", open_ended[0]
    if len(row.prompt) >= max_length:
        yield "loses_everything", f"prompt of {len(row.prompt)} tokens"
    elif row.longest > max_length:
        yield "loses_end", f"{row.longest} tokens"
        kept = [tuple(ids[: max_length - len(row.prompt)]) for ids in row.answers.values()]
        if kind == PAIRS and len(set(kept)) == 1 < len(set(map(tuple, row.answers.values()))):
            yield "cut_alike", ""


def special_tokens(rows: Dataset, kind: str, tokenizer: PreTrainedTokenizerBase, findings: Findings) -> None:
    """Rows whose text holds a special token, which tokenizers turn into the token itself."""
    tokens = sorted(filter(None, tokenizer.all_special_tokens), key=len, reverse=True)
    marks = re.compile("|".join(map(re.escape, tokens)) or "(?!)")
    for origin, dialogues, _ in dialogues_of(rows, kind):
        found = (marks.search(said(message)) for dialogue in dialogues for message in dialogue)
        if hit := next(filter(None, found), None):
            findings.add("special_tokens_in_text", [origin], repr(hit[0]), of=len(rows))


def long_tail(rows: Dataset, columns: dict[str, np.ndarray], max_length: int, findings: Findings) -> None:
    """Rows that, cut at `max_length`, are still far longer than the rest: every batch must have room for them."""
    prompt, *answers = columns.values()
    longest = np.minimum(prompt + np.maximum.reduce(answers), max_length)
    usual = np.quantile(longest, 0.95) if len(longest) >= 20 else np.inf
    far = np.argsort(-longest)[: (longest > LONG * usual).sum()]
    if len(far):
        says = f"{len(far):,} rows have up to {longest.max():,} tokens, where 95% have at most {usual:,.0f}"
        findings.add("long_tail", rows.select(far[:3])["origin"], count=len(far), of=len(longest), says=says)


def decoded(row: Row, tokenizer: PreTrainedTokenizerBase, max_length: int) -> dict[str, list[Token]]:
    """A row token by token: its prompt, which no trainer scores, and its answers, which it does."""
    parts = {}
    for column, ids in {"prompt": row.prompt, **row.answers}.items():
        before, state = (0, "read") if column == "prompt" else (len(row.prompt), "scored")
        states = ["cut" if before + at >= max_length else state for at in range(len(ids))]
        parts[column] = [Token(tokenizer.decode([token]), each) for token, each in zip(ids, states, strict=True)]
    return parts
