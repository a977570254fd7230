"""What can be wrong with a set of rows as a whole: copies, contradictions, leakage, labels, prompts, length."""

import json
from dataclasses import dataclass, field

import numpy as np
import xxhash
from datasets import Dataset

from preftune.data.findings import EXAMPLES, Findings
from preftune.data.shapes import ANSWERS, DEMONSTRATIONS, LABELLED, PAIRS
from preftune.data.views import key, keys

FEW_PROMPTS = 0.25  # prompts per row below which a set is called poor in prompts
BIASED, EXPLAINED = 0.6, 0.9  # accuracy of "the longer answer is better"; the mirror values count too
IMBALANCED = 4 / 3  # labels: the ratio up to which Ethayarajh et al. 2024 (arXiv:2402.01306) need no weights


@dataclass
class SetFigures:
    """Figures of one set: rows, prompts, characters of each column (arrays), label counts, what length alone tells."""

    rows: int
    prompts: int
    characters: dict[str, np.ndarray] = field(repr=False)
    labels: dict[str, int] | None = None
    longer_is_better: float | None = (
        None  # accuracy, ties count half; for labelled answers the same over all pairs of them
    )
    longer_error: float | None = None  # its standard error


@dataclass
class Hashes:
    """What the checks compare: a number for each prompt and each answer, arrays of shape (rows,)."""

    prompt: np.ndarray
    answers: dict[str, np.ndarray]
    characters: dict[str, np.ndarray]


def hashes(rows: Dataset, kind: str) -> Hashes:
    """Read a set once, by batches, and keep 8 bytes a prompt and answer."""
    columns = ANSWERS[kind]
    prompts, answers = [], {column: [] for column in columns}
    characters = {column: [] for column in ("prompt", *columns)}
    for batch in rows.select_columns(["prompt", *columns]).iter(1000):
        prompts += [key(prompt) for prompt in batch["prompt"]]
        for column in columns:
            answers[column] += [xxhash.xxh3_64_intdigest(json.dumps(answer).encode()) for answer in batch[column]]
        for column, lengths in characters.items():
            lengths += [sum(len(message["content"]) for message in dialogue) for dialogue in batch[column]]
    return Hashes(
        np.array(prompts, dtype=np.uint64),
        {column: np.array(numbers, dtype=np.uint64) for column, numbers in answers.items()},
        {column: np.array(lengths) for column, lengths in characters.items()},
    )


def check(rows: Dataset, kind: str, findings: Findings) -> SetFigures:
    """Look at a set of one kind as a whole; what is found goes into `findings`."""
    found = hashes(rows, kind)
    labels = np.array(rows["label"], dtype=bool) if kind == LABELLED else None
    figures = SetFigures(len(rows), len(np.unique(found.prompt)), found.characters)
    copies(rows, found, labels, findings)
    if kind == PAIRS:
        contradictory_pairs(rows, found, findings)
    if labels is not None:
        figures.labels = {"good": int(labels.sum()), "bad": int((~labels).sum())}
        contradictory_labels(rows, found, labels, findings)
        imbalance(figures.labels, findings)
    diversity(rows, found, findings)
    if kind != DEMONSTRATIONS and len(rows):
        length(figures, labels, findings)
    return figures


def examples(rows: Dataset, places: np.ndarray) -> list[str]:
    """Where the first few of the rows at `places` came from."""
    return list(rows.select(places[:EXAMPLES])["origin"])


def row_numbers(*parts: np.ndarray) -> np.ndarray:
    """One number for each row, equal where all parts are equal (up to chance, 1 in 2^64)."""
    mixed = np.zeros(len(parts[0]), dtype=np.uint64)
    for part in parts:
        mixed = (mixed ^ part) * np.uint64(0x9E3779B97F4A7C15)
        mixed ^= mixed >> np.uint64(29)
    return mixed


def copies(rows: Dataset, found: Hashes, labels: np.ndarray | None, findings: Findings) -> None:
    parts = [found.prompt, *found.answers.values()] + ([] if labels is None else [labels.astype(np.uint64)])
    _, first = np.unique(row_numbers(*parts), return_index=True)
    again = np.setdiff1d(np.arange(len(rows)), first)
    if len(again):
        findings.add("duplicate_rows", examples(rows, again), count=len(again), of=len(rows))


def contradictory_pairs(rows: Dataset, found: Hashes, findings: Findings) -> None:
    chosen, rejected = found.answers["chosen"], found.answers["rejected"]
    forward = row_numbers(found.prompt, chosen, rejected)
    other_way = row_numbers(found.prompt, rejected, chosen)
    against = np.flatnonzero(np.isin(other_way, forward) & (chosen != rejected))
    if len(against):
        findings.add("contradictory_pairs", examples(rows, against), count=len(against), of=len(rows))


def contradictory_labels(rows: Dataset, found: Hashes, labels: np.ndarray, findings: Findings) -> None:
    answers = row_numbers(found.prompt, found.answers["completion"])
    both = np.intersect1d(answers[labels], answers[~labels])
    against = np.flatnonzero(np.isin(answers, both))
    if len(against):
        findings.add("contradictory_labels", examples(rows, against), count=len(against), of=len(rows))


def imbalance(labels: dict[str, int], findings: Findings) -> None:
    good, bad = labels["good"], labels["bad"]
    says = f"{good:,} answers are good and {bad:,} bad"
    if not min(good, bad):
        findings.add("one_label", count=good + bad, of=good + bad, says=says)
    elif max(good, bad) > IMBALANCED * min(good, bad):
        findings.add("label_imbalance", count=max(good, bad), of=good + bad, says=says)


def diversity(rows: Dataset, found: Hashes, findings: Findings) -> None:
    prompts, first, counts = np.unique(found.prompt, return_index=True, return_counts=True)
    if len(rows) >= 20 and len(prompts) < FEW_PROMPTS * len(rows):
        often = first[np.argsort(-counts, kind="stable")]
        says = f"{len(prompts):,} prompts stand behind {len(rows):,} rows, the most frequent behind {counts.max():,}"
        findings.add("few_prompts", examples(rows, often), count=len(prompts), of=len(rows), says=says)


def length(figures: SetFigures, labels: np.ndarray | None, findings: Findings) -> None:
    """How well length alone tells good from bad: by pair, or for labelled answers over all (good, bad) couples."""
    if labels is None:
        more = np.sign(figures.characters["chosen"] - figures.characters["rejected"])
        accuracy, looked_at = float((more > 0).mean() + (more == 0).mean() / 2), len(more)
        error = np.sqrt(max(accuracy * (1 - accuracy), 1e-9) / looked_at)
    elif labels.all() or not labels.any():
        return
    else:
        accuracy, error = couples_in_order(figures.characters["completion"], labels)
        looked_at = len(labels)
    figures.longer_is_better, figures.longer_error = accuracy, float(error)
    right = max(accuracy, 1 - accuracy)
    if looked_at >= 20 and right > BIASED and right - 0.5 > 3 * error:
        which = "longer" if accuracy > 0.5 else "shorter"
        code = "length_explains" if right >= EXPLAINED else "length_bias"
        says = f"the {which} answer is the preferred one in {right:.0%} of cases"
        says += ", so length alone explains this set" if code == "length_explains" else ""
        findings.add(code, count=round(right * looked_at), of=looked_at, says=says)


def couples_in_order(values: np.ndarray, labels: np.ndarray) -> tuple[float, float]:
    """(P, standard error): P that a good answer has the greater value than a bad one, ties half (Mann and Whitney's U).

    The error is Hanley and McNeil's (1982).
    """
    from sklearn.metrics import roc_auc_score

    good, bad = int(labels.sum()), int((~labels).sum())
    p = roc_auc_score(labels, values)
    q1, q2 = p / (2 - p), 2 * p * p / (1 + p)
    variance = (p * (1 - p) + (good - 1) * (q1 - p * p) + (bad - 1) * (q2 - p * p)) / (good * bad)
    return float(p), float(np.sqrt(max(variance, 0)))


def leakage(train: Dataset, held_out: Dataset, findings: Findings) -> None:
    """Held-out rows whose prompt, case and white space aside, stands in the training rows."""
    leaked = np.flatnonzero(np.isin(keys(held_out), keys(train)))
    if len(leaked):
        findings.add("prompt_leakage", examples(held_out, leaked), count=len(leaked), of=len(held_out))
