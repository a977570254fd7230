"""The three forms that trainers take, and the ways from one kind of data to another.

paired: {id, prompt, chosen, rejected}; unpaired: {id, prompt, completion, label}; demonstrations: {id, prompt,
completion}. Beside them every row keeps `origin`, the file and line that it came from.
"""

from collections.abc import Callable, Sequence

import numpy as np
import xxhash
from datasets import Dataset

from preftune.data.findings import DataError, Findings
from preftune.data.messages import Messages
from preftune.data.shapes import DEMONSTRATIONS, LABELLED, PAIRS

PAIRED, UNPAIRED, SHOWN = "paired", "unpaired", "demonstrations"
KINDS = {PAIRED: PAIRS, UNPAIRED: LABELLED, SHOWN: DEMONSTRATIONS}  # what the rows of a view are


def key(prompt: Messages) -> int:
    """A number for a prompt, whatever its letters' case and its white space: equal for prompts that are the same."""
    text = "\x1e".join(message["role"] + "\x1f" + " ".join(message["content"].lower().split()) for message in prompt)
    return xxhash.xxh3_64_intdigest(text.encode())


def keys(rows: Dataset, column: str = "prompt") -> np.ndarray:
    """`key` of every row, shape (rows,), read by batches."""
    found = [key(prompt) for batch in rows.select_columns([column]).iter(1000) for prompt in batch[column]]
    return np.array(found, dtype=np.uint64)


def same(rows: Dataset, _: Findings) -> Dataset:
    return rows


def unpair(rows: Dataset, _: Findings) -> Dataset:
    """Each pair as a good answer and a bad one, side by side: to be mixed by `ordered` before training."""

    def split(batch: dict[str, list]) -> dict[str, list]:
        sides = [("chosen", True), ("rejected", False)]
        return {
            "id": [f"{name}/{side}" for name in batch["id"] for side, _ in sides],
            "origin": [origin for origin in batch["origin"] for _ in sides],
            "prompt": [prompt for prompt in batch["prompt"] for _ in sides],
            "completion": [batch[side][place] for place in range(len(batch["id"])) for side, _ in sides],
            "label": [label for _ in batch["id"] for _, label in sides],
        }

    return rows.map(split, batched=True, remove_columns=rows.column_names)


def ordered(rows: Dataset, wanted: str, seed: int) -> Dataset:
    """Rows in an order fit for training: unpaired ones in that of `stratified`, others as they stand."""
    return rows.select(stratified(rows["label"], keys(rows), seed)) if wanted == UNPAIRED else rows


def stratified(labels: Sequence[bool], prompts: np.ndarray, seed: int) -> list[int]:
    """An order of all rows, shuffled, in which any run of rows has the labels in the proportion of the whole.

    KTO reads batches in order and scores each prompt beside its neighbour's answer: a batch of one label would leave it
    without contrast, and neighbours with one prompt would put an answer beside its own prompt. Row i of the n rows of a
    label stands at about i/n; a row whose neighbour has its prompt changes places with the nearest one of its label
    that may stand there. Only where one prompt has about half of all rows can neighbours share it.
    """
    rng = np.random.default_rng(seed)
    labels = np.asarray(labels, dtype=bool)
    place = np.empty(len(labels))
    for label in (True, False):
        mine = rng.permutation(np.flatnonzero(labels == label))
        place[mine] = (np.arange(len(mine)) + 0.5) / max(len(mine), 1)
    order = np.argsort(place, kind="stable")
    for at in range(1, len(order)):
        if prompts[order[at]] == prompts[order[at - 1]]:
            _part(order, at, labels, prompts)
    return order.tolist()


def _part(order: np.ndarray, at: int, labels: np.ndarray, prompts: np.ndarray) -> None:
    """Swap the row at `at` with the nearest one of its label, so that neither has a neighbour of its prompt."""

    def fits(place: int, row: int) -> bool:
        beside = [order[near] for near in (place - 1, place + 1) if 0 <= near < len(order)]
        return all(prompts[other] != prompts[row] for other in beside)

    for distance in range(2, len(order)):
        for other in (at + distance, at - distance):
            if not 0 <= other < len(order) or labels[order[other]] != labels[order[at]]:
                continue
            if fits(other, order[at]) and fits(at, order[other]):
                order[at], order[other] = order[other], order[at]
                return


def pair_up(rows: Dataset, findings: Findings) -> Dataset:
    """Pairs out of labelled answers: a prompt's first good one with its first bad one, the second with the second, …

    Answers left without an opposite make no pair; they are counted as `unmatched_labels`.
    """
    waiting: dict[int, tuple[list[int], list[int]]] = {}
    couples = []
    labels = rows["label"]
    for row, prompt in enumerate(keys(rows).tolist()):
        mine, theirs = waiting.setdefault(prompt, ([], []))[:: 1 if labels[row] else -1]
        if theirs:
            other = theirs.pop(0)
            couples.append((row, other) if labels[row] else (other, row))
        else:
            mine.append(row)
    left = sorted(row for both in waiting.values() for side in both for row in side)
    if left:
        origins = rows.select(left[:3])["origin"]
        findings.add("unmatched_labels", list(origins), count=len(left), of=len(rows))
    couples.sort(key=min)
    good, bad = (rows.select([couple[side] for couple in couples]) for side in (0, 1))
    pairs = good.remove_columns("label").rename_column("completion", "chosen")
    return pairs.add_column("rejected", bad["completion"][:], feature=rows.features["completion"])


def chosen_alone(rows: Dataset, _: Findings) -> Dataset:
    """Each pair's chosen answer as a demonstration."""
    return rows.remove_columns("rejected").rename_column("chosen", "completion")


def good_alone(rows: Dataset, _: Findings) -> Dataset:
    """The answers that are called good, as demonstrations."""
    return rows.select(np.flatnonzero(rows["label"])).remove_columns("label")


WAYS: dict[tuple[str, str], Callable[[Dataset, Findings], Dataset]] = {
    (PAIRS, PAIRED): same,
    (PAIRS, UNPAIRED): unpair,
    (PAIRS, SHOWN): chosen_alone,
    (LABELLED, PAIRED): pair_up,
    (LABELLED, UNPAIRED): same,
    (LABELLED, SHOWN): good_alone,
    (DEMONSTRATIONS, SHOWN): same,
}


def view(rows: Dataset, kind: str, wanted: str, findings: Findings) -> Dataset:
    """Rows of a kind in the form that a trainer takes. Raises DataError where there is no way from one to the other."""
    if (kind, wanted) not in WAYS:
        raise DataError(
            f"the data holds {kind}, and this loss wants {wanted} rows. Demonstrations teach SFT alone: "
            "python -m recipes.sft"
        )
    return WAYS[kind, wanted](rows, findings)


def kto_weights(good: int, bad: int, ratio: float = 1.0) -> dict[str, float]:
    """Loss weights with desirable_weight · good : undesirable_weight · bad = `ratio`, the rarer label weighed up.

    `ratio` between 1 and 4/3 (Ethayarajh et al. 2024, arXiv:2402.01306, eq. 8).
    """
    desirable = ratio * bad / good if good and bad else 1.0
    if desirable >= 1:
        return {"desirable_weight": round(desirable, 4), "undesirable_weight": 1.0}
    return {"desirable_weight": 1.0, "undesirable_weight": round(1 / desirable, 4)}
