"""What can be wrong with a set of rows as a whole: copies, contradictions, leakage, labels, prompts, length."""

import json
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
import xxhash
from datasets import Dataset
from tqdm.auto import tqdm

from preftune.data.findings import EXAMPLES, Findings
from preftune.data.messages import said
from preftune.data.shapes import ANSWERS, LABELLED, PAIRS
from preftune.data.views import key, keys

FEW_PROMPTS = 0.25  # prompts per row below which a set is called poor in prompts
BIASED, EXPLAINED = 0.6, 0.9  # accuracy of "the longer answer is better"; the mirror values count too
IMBALANCED = 4 / 3  # labels: the ratio up to which Ethayarajh et al. 2024 (arXiv:2402.01306) need no weights


@dataclass
class SetFigures:
    """Figures of one set: rows, prompts, characters of each column (arrays), label counts, what length alone tells.

    `longer_is_better` is (accuracy, standard error) of that rule; None where there is nothing to compare.
    """

    rows: int
    prompts: int
    characters: dict[str, np.ndarray] = field(repr=False)
    labels: dict[str, int] | None = None
    longer_is_better: tuple[float, float] | None = None


def check(rows: Dataset, kind: str, findings: Findings) -> SetFigures:
    """Look at a set of one kind as a whole; what is found goes into `findings`."""
    frame, characters = hashed(rows, kind)
    content = frame.drop(columns="origin")

    def add(code: str, where: pd.Series) -> None:
        if where.any():
            findings.add(code, frame["origin"][where], count=int(where.sum()), of=len(frame))

    add("duplicate_rows", content.duplicated())
    if kind == PAIRS:
        both = np.sort(frame[["chosen", "rejected"]], axis=1)
        sides = frame.assign(first=both[:, 0], second=both[:, 1], way=frame["chosen"] < frame["rejected"])
        add("contradictory_pairs", sides.groupby(["prompt", "first", "second"])["way"].transform("nunique") > 1)
    if kind == LABELLED:
        add("contradictory_labels", frame.groupby(["prompt", "completion"])["label"].transform("nunique") > 1)
        good, bad = labels = int(frame["label"].sum()), int((~frame["label"]).sum())
        if max(labels) > IMBALANCED * min(labels):
            code, says = "label_imbalance" if min(labels) else "one_label", f"{good:,} answers are good and {bad:,} bad"
            findings.add(code, count=max(labels), of=len(frame), says=says)
    counts = frame["prompt"].value_counts()
    if len(frame) >= 20 and len(counts) < FEW_PROMPTS * len(frame):
        first = frame.drop_duplicates("prompt").set_index("prompt")["origin"]
        says = f"{len(counts):,} prompts stand behind {len(frame):,} rows, the most frequent behind {counts.max():,}"
        findings.add("few_prompts", first[counts.index[:EXAMPLES]], count=len(counts), of=len(frame), says=says)
    figures = SetFigures(len(frame), len(counts), characters)
    if kind == LABELLED:
        figures.labels = {"good": good, "bad": bad}
    if kind in (PAIRS, LABELLED) and len(frame):
        length(figures, frame.get("label"), findings)
    return figures


def hashed(rows: Dataset, kind: str) -> tuple[pd.DataFrame, dict[str, np.ndarray]]:
    """Origins, labels, and a number for each prompt and answer, equal where these are; characters of each column."""
    parts, characters = [], {name: [] for name in ("prompt", *ANSWERS[kind])}
    for batch in tqdm(rows.iter(1000), desc="comparing", unit="row", unit_scale=1000, delay=3, leave=False):
        numbers = {"prompt": [key(prompt) for prompt in batch["prompt"]]}
        for column in ANSWERS[kind]:
            numbers[column] = [xxhash.xxh3_64_intdigest(json.dumps(answer).encode()) for answer in batch[column]]
        same = {name: batch[name] for name in ("origin", "label") if name in batch}
        parts.append(pd.DataFrame(same | {name: np.array(each, np.uint64) for name, each in numbers.items()}))
        for column, lengths in characters.items():
            lengths += [sum(len(said(message)) for message in dialogue) for dialogue in batch[column]]
    return pd.concat(parts, ignore_index=True), {name: np.array(lengths) for name, lengths in characters.items()}


def length(figures: SetFigures, labels: np.ndarray | None, findings: Findings) -> None:
    """How well length alone tells good from bad: by pair, or for labelled answers over all (good, bad) couples."""
    if labels is None:
        longer_by = figures.characters["chosen"] - figures.characters["rejected"]
        accuracy, error = share_right(longer_by)
    elif labels.all() or not labels.any():
        return
    else:
        accuracy, error = couples_in_order(figures.characters["completion"], labels)
    figures.longer_is_better = accuracy, error
    right = max(accuracy, 1 - accuracy)
    if figures.rows >= 20 and right > BIASED and right - 0.5 > 3 * error:
        code = "length_explains" if right >= EXPLAINED else "length_bias"
        says = f"the {'longer' if accuracy > 0.5 else 'shorter'} answer is the preferred one in {right:.0%} of cases"
        says += ", so length alone explains this set" if code == "length_explains" else ""
        findings.add(code, count=round(right * figures.rows), of=figures.rows, says=says)


def share_right(margins: np.ndarray) -> tuple[float, float]:
    """(share, standard error) of margins above 0; those of 0 count half."""
    share = float((margins > 0).mean() + (margins == 0).mean() / 2)
    return share, float(np.sqrt(max(share * (1 - share), 1e-9) / len(margins)))


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
        findings.add(
            "prompt_leakage", held_out.select(leaked[:EXAMPLES])["origin"], count=len(leaked), of=len(held_out)
        )
