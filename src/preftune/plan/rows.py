"""The rows that a run trains on, in tokens: counted where the data can be read, else as `data.assumed` says."""

from dataclasses import dataclass

import numpy as np
import pyarrow.compute as pc
from datasets import Dataset
from omegaconf import DictConfig
from transformers import PreTrainedTokenizerBase

from preftune.data.messages import said
from preftune.data.shapes import ANSWERS
from preftune.data.token_checks import tokenized
from preftune.data.views import KINDS
from preftune.fastpath.packed import place

LOOKED_AT = 192  # rows that are tokenized, spread over the set, beside the longest by their characters
LONGEST = 16
CHARACTERS = 4.0  # a token, where there is no tokenizer; measured on no particular text
TEMPLATE = 8  # tokens that a chat template adds to a prompt, where there is no tokenizer


@dataclass(frozen=True)
class Rows:
    """Tokens of some rows: `prompt` of shape (n,), `answers` (n, 1 or 2), and the longest rows in the same form.

    `count` is how many rows there are in all, `source` how the lengths are known.
    """

    count: int
    prompt: np.ndarray
    answers: np.ndarray
    longest_prompt: np.ndarray
    longest_answers: np.ndarray
    source: str


@dataclass(frozen=True)
class Batch:
    """What one forward runs over: rows × columns tokens, those of them that are padding, and those that are scored."""

    rows: int
    columns: int
    padding: int
    scored: int

    @property
    def tokens(self) -> int:
        return self.rows * self.columns


def of_data(train: Dataset, view: str, tokenizer: PreTrainedTokenizerBase) -> Rows:
    """Tokens of the rows of a data set in the form of `view`; without a tokenizer, of their characters."""
    count = len(train)
    spread = np.unique(np.linspace(0, count - 1, min(count, LOOKED_AT)).astype(int))
    size = _characters(train, view)
    longest = np.argsort(-size, kind="stable")[:LONGEST]
    prompt, answers = _lengths(train.select(np.concatenate([spread, longest])), view, tokenizer)
    cut = len(spread)
    source = "counted" if tokenizer else f"counted, {CHARACTERS:g} characters taken for a token"
    return Rows(count, prompt[:cut], answers[:cut], prompt[cut:], answers[cut:], source)


def assumed(data: DictConfig, view: str, max_length: int) -> Rows:
    """Rows as `data.assumed` has them: all of the mean length, and the longest as long as `max_length` allows."""
    given = data.assumed
    count = given.rows if data.max_rows is None else min(given.rows, data.max_rows)
    columns = len(ANSWERS[KINDS[view]])
    prompt, answers = np.array([given.prompt_tokens]), np.full((1, columns), given.answer_tokens)
    share = given.prompt_tokens / (given.prompt_tokens + given.answer_tokens)
    longest = np.full(LONGEST, round(max_length * share))
    rest = np.full((LONGEST, columns), max_length - longest[0])
    count *= 2 if view == "unpaired" and given.pairs else 1
    return Rows(count, prompt, answers, longest, rest, "assumed (data.assumed)")


def _characters(train: Dataset, view: str) -> np.ndarray:
    """Bytes of every row's messages as they are stored, shape (rows,), without a Python object per message."""
    size = np.zeros(len(train), dtype=np.int64)
    for name in ("prompt", *ANSWERS[KINDS[view]]):
        tables = train.select_columns([name]).with_format("arrow").iter(10_000)
        parts = [pc.binary_length(table[name].combine_chunks().storage).to_numpy() for table in tables]
        size += np.concatenate(parts).astype(np.int64)
    return size


def _lengths(rows: Dataset, view: str, tokenizer: PreTrainedTokenizerBase) -> tuple[np.ndarray, np.ndarray]:
    if tokenizer is None:
        columns = ("prompt", *ANSWERS[KINDS[view]])
        told = [[sum(len(said(message)) for message in row[name]) for name in columns] for row in rows]
        found = np.ceil(np.array(told) / CHARACTERS).astype(int)
        return found[:, 0] + TEMPLATE, found[:, 1:] + 2
    seen = tokenized(rows, KINDS[view], tokenizer)
    found = np.array([[len(row.prompt), *map(len, row.answers.values())] for row in seen])
    return found[:, 0], np.maximum(found[:, 1:], 1)


def batch(prompt: np.ndarray, answers: np.ndarray, max_length: int, packed: bool, width: int, multiple: int) -> Batch:
    """The forward over these rows (n,) and (n, k): packed into trees that share prompts, or padded to the longest."""
    prompt = np.minimum(prompt, max_length - 1)
    answers = np.minimum(answers, max_length - prompt[:, None])
    scored = int(answers.sum())
    if packed:
        sizes = prompt + answers.sum(axis=1) - answers.shape[1]  # no row's last token is run
        sizes = np.maximum(sizes, 1)
        _, (rows, columns) = place(sizes, width, multiple)
        return Batch(rows, columns, int(rows * columns - sizes.sum()), scored)
    lengths = prompt[:, None] + answers
    columns = int(lengths.max())
    return Batch(lengths.size, columns, int(lengths.size * columns - lengths.sum()), scored)


def largest(rows: Rows, size: int, **how: object) -> Batch:
    """The batch of the longest rows: sorting by length brings them together."""
    pick = np.resize(np.argsort(-(rows.longest_prompt + rows.longest_answers.sum(axis=1)), kind="stable"), size)
    pick = pick[: min(size, rows.count)]
    return batch(rows.longest_prompt[pick], rows.longest_answers[pick], **how)


def typical(rows: Rows, size: int, sort: bool, **how: object) -> list[Batch]:
    """Batches as an epoch has them, over the rows that were looked at: of similar length where they are sorted."""
    order = np.argsort(rows.prompt + rows.answers.sum(axis=1), kind="stable") if sort else np.arange(len(rows.prompt))
    order = np.resize(order, max(len(order), size)) if len(order) < size else order
    starts = range(0, len(order) - size + 1, size)
    return [batch(rows.prompt[order[i : i + size]], rows.answers[order[i : i + size]], **how) for i in starts]
