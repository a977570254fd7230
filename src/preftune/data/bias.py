"""A bag of words as a judge: how well the mere presence of words tells the better answer, on pairs not seen."""

import re
from collections import Counter
from dataclasses import dataclass, field

import numpy as np
from datasets import Dataset

from preftune.data.findings import Findings
from preftune.data.messages import Messages
from preftune.data.set_checks import couples_in_order
from preftune.data.shapes import PAIRS
from preftune.data.views import keys

FOLDS, STEPS, ROWS = 5, 80, 4000
VOCABULARY, RARE = 20_000, 2
WORD = re.compile(r"\w+(?:['’]\w+)?")
TELLS = 0.9  # accuracy from which the finding `words_explain` is made


@dataclass
class WordFigures:
    """Accuracy on pairs that were held out, its standard error, and the words that speak for good and bad answers."""

    accuracy: float
    error: float
    of: int
    good: list[str] = field(default_factory=list)
    bad: list[str] = field(default_factory=list)


@dataclass
class Entries:
    """A sparse matrix (rows, words) by its entries, each row of length 1."""

    row: np.ndarray
    word: np.ndarray
    value: np.ndarray
    shape: tuple[int, int]

    def times(self, weights: np.ndarray) -> np.ndarray:
        return np.bincount(self.row, self.value * weights[self.word], self.shape[0])

    def transposed_times(self, values: np.ndarray) -> np.ndarray:
        return np.bincount(self.word, self.value * values[self.row], self.shape[1])


def words(answer: Messages) -> set[str]:
    return {word for message in answer for word in WORD.findall(message["content"].lower())}


def check(rows: Dataset, kind: str, findings: Findings) -> WordFigures | None:
    """Judge up to 4,000 rows by five-fold cross-validation, no prompt on both sides; None where there are too few."""
    step = max(1, -(-len(rows) // ROWS))
    rows = rows.select(range(0, len(rows), step))
    if kind == PAIRS:
        sides = [(words(a), words(b)) for a, b in zip(rows["chosen"][:], rows["rejected"][:], strict=True)]
        signs = np.ones(len(sides))
    else:
        sides = [(words(answer), set()) for answer in rows["completion"][:]]
        signs = np.where(rows["label"][:], 1.0, -1.0)
    if len(sides) < 50 or kind != PAIRS and abs(signs.mean()) == 1:
        return None
    matrix, vocabulary = entries(sides, constant=kind != PAIRS)
    scores = held_out_scores(matrix, signs, keys(rows) % np.uint64(FOLDS))
    if kind == PAIRS:
        accuracy = float((scores > 0).mean() + (scores == 0).mean() / 2)
        error = float(np.sqrt(max(accuracy * (1 - accuracy), 1e-9) / len(scores)))
    else:
        accuracy, error = couples_in_order(scores, signs > 0)
    figures = WordFigures(accuracy, error, len(sides), *telling(matrix, signs, vocabulary))
    if accuracy >= TELLS:
        says = f"a bag of words finds the better answer in {accuracy:.0%} of pairs that it has not seen"
        findings.add("words_explain", count=round(accuracy * len(sides)), of=len(sides), says=says)
    return figures


def entries(sides: list[tuple[set[str], set[str]]], constant: bool) -> tuple[Entries, list[str]]:
    """Words that only the first answer of a row has as +1, those of the second alone as −1; rows scaled to length 1.

    `constant` adds a column of ones, which stands for how frequent each label is.
    """
    counts = Counter(word for pair in sides for word in pair[0] ^ pair[1])
    vocabulary = [""] + [word for word, count in counts.most_common(VOCABULARY) if count >= RARE]
    number = {word: place for place, word in enumerate(vocabulary)}
    row, word, value = [], [], []
    for at, (mine, theirs) in enumerate(sides):
        told = [(number[each], 1.0 if each in mine else -1.0) for each in sorted(mine ^ theirs) if each in number]
        told += [(0, 1.0)] if constant else []
        row += [at] * len(told)
        word += [each for each, _ in told]
        value += [sign / len(told) ** 0.5 for _, sign in told]
    arrays = np.array(row, dtype=np.int64), np.array(word, dtype=np.int64), np.array(value)
    return Entries(*arrays, (len(sides), len(vocabulary))), vocabulary


def fitted(matrix: Entries, signs: np.ndarray, seen: np.ndarray) -> np.ndarray:
    """Logistic regression's weights on the rows that are `seen`, L2-regularised, by Adam from zero."""
    weights = np.zeros(matrix.shape[1])
    mean, square = np.zeros_like(weights), np.zeros_like(weights)
    for step in range(1, STEPS + 1):
        margins = signs * matrix.times(weights)
        pull = -signs * seen / (1 + np.exp(np.clip(margins, -30, 30))) / max(seen.sum(), 1)
        slope = matrix.transposed_times(pull) + 1e-5 * weights
        mean = 0.9 * mean + 0.1 * slope
        square = 0.99 * square + 0.01 * slope**2
        weights -= 0.1 * (mean / (1 - 0.9**step)) / (np.sqrt(square / (1 - 0.99**step)) + 1e-8)
    return weights


def held_out_scores(matrix: Entries, signs: np.ndarray, folds: np.ndarray) -> np.ndarray:
    """Each row's score by a judge that has not seen its fold."""
    scores = np.zeros(matrix.shape[0])
    for fold in range(FOLDS):
        mine = folds == fold
        scores[mine] = matrix.times(fitted(matrix, signs, ~mine))[mine]
    return scores


def telling(matrix: Entries, signs: np.ndarray, vocabulary: list[str], count: int = 12) -> tuple[list[str], list[str]]:
    """The words that speak most for a good answer and for a bad one: weight times the root of how often they decide."""
    weights = fitted(matrix, signs, np.ones(len(signs)))
    said = weights * np.sqrt(np.bincount(matrix.word, minlength=len(weights)))
    said[0] = 0
    order = np.argsort(said)
    good = [vocabulary[place] for place in order[::-1][:count] if said[place] > 0]
    return good, [vocabulary[place] for place in order[:count] if said[place] < 0]
