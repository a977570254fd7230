"""The forms that trainers take, the ways from one kind of data to another, and mixtures.

paired: {id, prompt, chosen, rejected}; margins: the same with `margin`, by how much chosen is better, 0 where no row
says; unpaired: {id, prompt, completion, label}; demonstrations: {id, prompt,
completion}; prompts: {id, prompt, solution}, each prompt once, with the text of a good answer where there is one, for
rewards that compare with it. Beside them every row keeps `origin`, the file and line that it came from, `tools` and
`chat_template_kwargs`.
"""

from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd
import xxhash
from datasets import Dataset, Features, Value, concatenate_datasets

from preftune.data.findings import DataError, Findings
from preftune.data.images import held
from preftune.data.messages import Messages, said
from preftune.data.shapes import ANSWERS, DEMONSTRATIONS, LABELLED, PAIRS, PROMPTS

PAIRED, MARGINS, UNPAIRED, SHOWN, ASKED = "paired", "margins", "unpaired", "demonstrations", "prompts"
ONCE = ("id", "origin", "prompt", "solution")  # the columns of prompts
BESIDE = ("tools", "chat_template_kwargs", "images")  # what the chat template is given beside the messages
# what the rows of a view are
KINDS = {PAIRED: PAIRS, MARGINS: PAIRS, UNPAIRED: LABELLED, SHOWN: DEMONSTRATIONS, ASKED: PROMPTS}


def key(prompt: Messages) -> int:
    """A number for a prompt, whatever its letters' case and its white space: equal for prompts that are the same."""
    text = "\x1e".join(message["role"] + "\x1f" + " ".join(said(message).lower().split()) for message in prompt)
    return xxhash.xxh3_64_intdigest(text.encode())


def keys(rows: Dataset) -> np.ndarray:
    """`key` of every row's prompt, shape (rows,), read by batches."""
    found = [key(prompt) for batch in rows.select_columns(["prompt"]).iter(1000) for prompt in batch["prompt"]]
    return np.array(found, dtype=np.uint64)


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
        } | {name: [each for each in batch[name] for _ in sides] for name in BESIDE if name in batch}

    features = {name: rows.features[name] for name in rows.column_names if name not in ANSWERS[PAIRS]}
    features |= {"completion": rows.features["chosen"], "label": Value("bool")}
    return rows.map(split, batched=True, remove_columns=rows.column_names, features=Features(features))


def without_empty(rows: Dataset, keep: Sequence[str] = ()) -> Dataset:
    """The rows without the columns, but those to `keep`, that no row has a value in: most have no tools or images."""
    given = {name: any(rows[name]) for name in ("tools", "chat_template_kwargs", "margin") if name in rows.features}
    given |= {"images": held(rows).any()} if "images" in rows.features else {}
    return rows.remove_columns([name for name, there in given.items() if not there and name not in keep])


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

    for other in (at + side * distance for distance in range(2, len(order)) for side in (1, -1)):
        alike = 0 <= other < len(order) and labels[order[other]] == labels[order[at]]
        if alike and fits(other, order[at]) and fits(at, order[other]):
            order[at], order[other] = order[other], order[at]
            return


def pair_up(rows: Dataset, findings: Findings) -> Dataset:
    """Pairs out of labelled answers: a prompt's first good one with its first bad one, the second with the second, …

    Answers left without an opposite make no pair; they are counted as `unmatched_labels`.
    """
    good = np.array(rows["label"], dtype=bool)
    frame = pd.DataFrame({"prompt": keys(rows), "good": good, "row": np.arange(len(rows))})
    frame["turn"] = frame.groupby(["prompt", "good"]).cumcount()
    both = frame[good].merge(frame[~good], on=["prompt", "turn"])[["row_x", "row_y"]].to_numpy()
    chosen, rejected = both[both.min(axis=1).argsort()].T
    left = np.setdiff1d(frame["row"], both)
    if len(left):
        findings.add("unmatched_labels", rows.select(left[:3])["origin"], count=len(left), of=len(rows))
    pairs = rows.select(chosen).remove_columns("label").rename_column("completion", "chosen")
    worse = rows.select(rejected).select_columns(["completion"]).rename_column("completion", "rejected")
    return concatenate_datasets([pairs, worse], axis=1)


def no_margin(pairs: Dataset) -> Dataset:
    """Pairs of which no row says by how much, beside such as do."""
    return pairs.add_column("margin", [0.0] * len(pairs), feature=Value("float32"))


def prompts(rows: Dataset, _: Findings) -> Dataset:
    """Each prompt once; a good answer's text stands beside it as `solution`, where rewards of TRL's look for it."""
    once = rows.select(np.sort(np.unique(keys(rows), return_index=True)[1]))
    good = "chosen" if "chosen" in rows.features else "completion"
    if good in rows.features and "label" not in rows.features:
        features = Features(once.features | {"solution": Value("string")})
        once = once.map(
            lambda batch: {"solution": [said(answer[-1]) for answer in batch[good]]}, batched=True, features=features
        )
    return once.select_columns([name for name in once.column_names if name in (*ONCE, *BESIDE)])


WAYS: dict[tuple[str, str], Callable[[Dataset, Findings], Dataset]] = {
    (PAIRS, UNPAIRED): unpair,
    (PAIRS, SHOWN): lambda rows, _: rows.remove_columns("rejected").rename_column("chosen", "completion"),
    (PAIRS, ASKED): prompts,
    (LABELLED, ASKED): prompts,
    (DEMONSTRATIONS, ASKED): prompts,
    (PROMPTS, ASKED): prompts,
    (LABELLED, PAIRED): pair_up,
    (LABELLED, MARGINS): lambda rows, findings: no_margin(pair_up(rows, findings)),
    (LABELLED, SHOWN): lambda rows, _: rows.select(np.flatnonzero(rows["label"])).remove_columns("label"),
}


def view(rows: Dataset, kind: str, wanted: str, findings: Findings) -> Dataset:
    """Rows of a kind in the form that a trainer takes. Raises DataError where there is no way from one to the other."""
    if (kind, wanted) in WAYS:
        return WAYS[kind, wanted](rows, findings)
    if KINDS[wanted] != kind:
        raise DataError(
            f"the data holds {kind}, and this loss wants {wanted} rows. Demonstrations teach SFT alone: "
            "python -m recipes.sft; a column of grades (stars) labels answers with data.good_at=4"
        )
    return rows


def kto_weights(good: int, bad: int, ratio: float = 1.0) -> dict[str, float]:
    """Loss weights with desirable_weight · good : undesirable_weight · bad = `ratio`, the rarer label weighed up.

    `ratio` between 1 and 4/3 (Ethayarajh et al. 2024, arXiv:2402.01306, eq. 8).
    """
    desirable = ratio * bad / good if good and bad else 1.0
    if desirable >= 1:
        return {"desirable_weight": round(desirable, 4), "undesirable_weight": 1.0}
    return {"desirable_weight": 1.0, "undesirable_weight": round(1 / desirable, 4)}


def spread(sizes: list[int]) -> np.ndarray:
    """An order of the rows of several sets laid end to end that spreads each evenly: row i of n stands at i/n."""
    place = np.concatenate([(np.arange(size) + 0.5) / max(size, 1) for size in sizes])
    return np.argsort(place, kind="stable")


def shares(sizes: list[int], weights: list[float]) -> list[int]:
    """How many rows of each set make a mixture in proportion to `weights`, as large as it can be with no row twice."""
    total = min(size * sum(weights) / weight for size, weight in zip(sizes, weights, strict=True))
    return [min(size, round(total * weight / sum(weights))) for size, weight in zip(sizes, weights, strict=True)]


def mixture(sets: list[Dataset], weights: list[float | None], seed: int) -> Dataset:
    """Several sets as one: all rows one after the other, or with weights, in their proportion, drawn and spread evenly.

    Raises DataError where some have a weight and others none, or where a weight is not above 0.
    """
    if len(sets) == 1:
        return sets[0]
    if all(weight is None for weight in weights):
        return concatenate_datasets(sets)
    if any(weight is None or weight <= 0 for weight in weights):
        raise DataError("data.path: each source of a mixture needs a weight above 0, or none of them has one")
    rng = np.random.default_rng(seed)
    counts = shares([len(rows) for rows in sets], weights)
    drawn = [rows.select(np.sort(rng.permutation(len(rows))[:count])) for rows, count in zip(sets, counts, strict=True)]
    return concatenate_datasets(drawn).select(spread(counts))


def with_demonstrations(pairs: Dataset, shown: Dataset, fraction: float, seed: int) -> Dataset:
    """Pairs, with demonstrations spread among them so that they are `fraction` of all rows; ids begin with `sft:`.

    A demonstration stands there as the pair (answer, the same answer). Every loss that depends on the difference of the
    two answers alone is constant on it: the difference is 0 by identity and its gradients cancel exactly, so what is
    left is the gradient of the loss's SFT term on the answer. TRL's DPO has that term as loss type `sft`, ORPO and CPO
    have it always. Where there are too few demonstrations they come again.
    """
    count = round(len(pairs) * fraction / (1 - fraction))
    rng = np.random.default_rng(seed)
    drawn = shown.select(np.concatenate([rng.permutation(len(shown)) for _ in range(-(-count // len(shown)))])[:count])

    def as_pairs(batch: dict[str, list]) -> dict[str, list]:
        names, answers = [f"sft:{name}" for name in batch["id"]], batch["completion"]
        return {"id": names, "chosen": answers, "rejected": answers}

    drawn = drawn.map(as_pairs, batched=True, remove_columns=["completion"], features=pairs.features)
    return concatenate_datasets([pairs, drawn]).select(spread([len(pairs), len(drawn)]))
