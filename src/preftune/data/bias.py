"""A bag of words as a judge: how well the mere presence of words tells the better answer, on pairs not seen."""

from dataclasses import dataclass, field

import numpy as np
from datasets import Dataset

from preftune.data.findings import Findings
from preftune.data.messages import Messages
from preftune.data.set_checks import couples_in_order
from preftune.data.shapes import PAIRS
from preftune.data.views import keys

FOLDS, ROWS, SHOWN = 5, 4000, 12
VOCABULARY, RARE = 20_000, 2
WORD = r"\w+(?:['’]\w+)?"
TELLS = 0.9  # accuracy from which the finding `words_explain` is made


@dataclass
class WordFigures:
    """Accuracy on pairs that were held out, its standard error, and the words that speak for good and bad answers."""

    accuracy: float
    error: float
    of: int
    good: list[str] = field(default_factory=list)
    bad: list[str] = field(default_factory=list)


def check(rows: Dataset, kind: str, findings: Findings) -> WordFigures | None:
    """Judge up to 4,000 rows by five-fold cross-validation, no prompt on both sides; None where there are too few."""
    rows = rows.select(range(0, len(rows), max(1, -(-len(rows) // ROWS))))
    # of pairs every second is turned round, so that the judge sees both outcomes
    better = np.arange(len(rows)) % 2 == 0 if kind == PAIRS else np.array(rows["label"][:], dtype=bool)
    groups = keys(rows)
    if len(rows) < 50 or better.all() or not better.any() or len(np.unique(groups)) < FOLDS:
        return None
    features, vocabulary = word_features(rows, kind, better)
    scores, weights = judged(features, better, groups, kind)
    if kind == PAIRS:
        signed = np.where(better, scores, -scores)
        accuracy = float((signed > 0).mean() + (signed == 0).mean() / 2)
        error = float(np.sqrt(max(accuracy * (1 - accuracy), 1e-9) / len(scores)))
    else:
        accuracy, error = couples_in_order(scores, better)
    figures = WordFigures(accuracy, error, len(rows), *telling(features, weights, vocabulary))
    if accuracy >= TELLS:
        says = f"a bag of words finds the better answer in {accuracy:.0%} of pairs that it has not seen"
        findings.add("words_explain", count=round(accuracy * len(rows)), of=len(rows), says=says)
    return figures


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
    return "\n".join(message["content"] or "" for message in answer)


def judged(features, better: np.ndarray, groups: np.ndarray, kind: str) -> tuple[np.ndarray, np.ndarray]:
    """Each row's score by a logistic regression that has not seen its prompt, and the weights of one that saw all."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GroupKFold, cross_val_predict

    judge = LogisticRegression(C=3.0, fit_intercept=kind != PAIRS)
    folds = GroupKFold(FOLDS)
    scores = cross_val_predict(judge, features, better, groups=groups, cv=folds, method="decision_function")
    return scores, judge.fit(features, better).coef_[0]


def telling(features, weights: np.ndarray, vocabulary: np.ndarray) -> tuple[list[str], list[str]]:
    """The words that speak most for a good answer and for a bad one: weight times the root of how often they decide."""
    said = weights * np.sqrt(features.getnnz(axis=0))
    order = np.argsort(said)
    good = [str(vocabulary[place]) for place in order[::-1][:SHOWN] if said[place] > 0]
    return good, [str(vocabulary[place]) for place in order[:SHOWN] if said[place] < 0]
