"""A bag of words as a judge: how well the mere presence of words tells the better answer, on pairs not seen."""

from dataclasses import dataclass

import numpy as np
from datasets import Dataset

from preftune.data.findings import Findings
from preftune.data.messages import Messages, said
from preftune.data.set_checks import couples_in_order, share_right
from preftune.data.shapes import PAIRS
from preftune.data.views import keys

FOLDS, ROWS, SHOWN = 5, 4000, 12
VOCABULARY, RARE = 20_000, 2
WORD = r"\w+(?:['’]\w+)?"
TELLS = 0.9  # accuracy from which the finding `words_explain` is made


@dataclass
class WordFigures:
    """(accuracy, standard error) on pairs that were held out, and the words that speak for good and bad answers."""

    accuracy: tuple[float, float]
    good: list[str]
    bad: list[str]


def check(rows: Dataset, kind: str, findings: Findings) -> WordFigures | None:
    """Judge up to 4,000 rows by five-fold cross-validation, no prompt on both sides; None where there are too few."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GroupKFold, cross_val_predict

    rows = rows.select(range(0, len(rows), max(1, -(-len(rows) // ROWS))))
    # of pairs every second is turned round, so that the judge sees both outcomes
    better = np.arange(len(rows)) % 2 == 0 if kind == PAIRS else np.array(rows["label"][:], dtype=bool)
    groups = keys(rows)
    if len(rows) < 50 or better.all() or not better.any() or len(np.unique(groups)) < FOLDS:
        return None
    features, vocabulary = word_features(rows, kind, better)
    judge, folds = LogisticRegression(C=3.0, fit_intercept=kind != PAIRS), GroupKFold(FOLDS)
    scores = cross_val_predict(judge, features, better, groups=groups, cv=folds, method="decision_function")
    found = share_right(np.where(better, scores, -scores)) if kind == PAIRS else couples_in_order(scores, better)
    if found[0] >= TELLS:
        says = f"a bag of words finds the better answer in {found[0]:.0%} of pairs that it has not seen"
        findings.add("words_explain", count=round(found[0] * len(rows)), of=len(rows), says=says)
    # the most telling words: weight times the root of how often they decide
    said = judge.fit(features, better).coef_[0] * np.sqrt(features.getnnz(axis=0))
    order = np.argsort(said)
    good = [str(vocabulary[place]) for place in order[::-1][:SHOWN] if said[place] > 0]
    return WordFigures(found, good, [str(vocabulary[place]) for place in order[:SHOWN] if said[place] < 0])


def word_features(rows: Dataset, kind: str, better: np.ndarray) -> tuple:
    """A sparse matrix (rows, words) and its words: those of the first answer alone +1, of the second alone −1."""
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.preprocessing import normalize

    counter = CountVectorizer(binary=True, token_pattern=WORD, max_features=VOCABULARY, min_df=RARE, dtype=float)
    if kind != PAIRS:
        return normalize(counter.fit_transform(map(text, rows["completion"][:]))), counter.get_feature_names_out()
    chosen, rejected = ([text(answer) for answer in rows[side][:]] for side in ("chosen", "rejected"))
    counter.fit(chosen + rejected)
    found = counter.transform(chosen) - counter.transform(rejected)
    return normalize(found.multiply(np.where(better, 1, -1)[:, None]).tocsr()), counter.get_feature_names_out()


def text(answer: Messages) -> str:
    return "\n".join(map(said, answer))
