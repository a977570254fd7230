"""Pairs whose labels may be swapped, ranked by how strongly a model disagrees with them."""

from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from preftune.data.shapes import PAIRS
from preftune.data.token_checks import sequences, tokenized
from preftune.data.views import without_empty

FOLDS = 5
BATCH = 16
WIDTH = 512  # features of a wider model are projected to this many


def swap_probabilities(features: np.ndarray) -> np.ndarray:
    """For each pair, how probable it is that its labels are swapped, shape (n,).

    `features` (n, d) are chosen less rejected, as `reading` gives them. The judge is a logistic regression without
    intercept that has seen the other four fifths of the pairs and takes most of their labels to be right: a model alone
    knows what is likely, not what this data prefers. Swapped pairs stand out because the rest contradicts them
    (confident learning: Northcutt et al. 2021, arXiv:1911.00068).
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import PredefinedSplit, cross_val_predict

    x = features / (np.sqrt((features**2).mean(axis=0)) + 1e-9)
    x = x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-9) * np.sqrt(min(x.shape[1], 25))
    turned = np.where(np.arange(len(x)) // FOLDS % 2, -1.0, 1.0)  # so that the judge sees both outcomes
    judge, folds = LogisticRegression(fit_intercept=False), PredefinedSplit(np.arange(len(x)) % FOLDS)
    margins = cross_val_predict(judge, x * turned[:, None], turned > 0, cv=folds, method="decision_function")
    return 1 / (1 + np.exp(turned * margins))


@torch.no_grad()
def reading(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, pairs: Dataset, max_length: int | None
) -> np.ndarray:
    """How a model reads each pair, (n, d): its last hidden states, their mean over chosen less that over rejected.

    Wider models are projected to 512 dimensions at random, always alike; distances stay.
    """
    rows = [sequence for row in tokenized(pairs, PAIRS, tokenizer) for sequence in sequences(row, max_length)]
    order = sorted(range(len(rows)), key=lambda place: len(rows[place][0]))
    width = model.config.get_text_config().hidden_size
    means = np.zeros((len(rows), width), dtype=np.float32)
    model.eval()
    for start in range(0, len(order), BATCH):
        picks = order[start : start + BATCH]
        seen = [torch.ones(len(rows[place][0]), dtype=torch.long) for place in picks]
        answers = [torch.arange(len(ids)) >= begin for ids, begin in (rows[place] for place in picks)]
        ids = pad_sequence([torch.tensor(rows[place][0]) for place in picks], True).to(model.device)
        mask, answer = (pad_sequence(each, True).to(model.device) for each in (seen, answers))
        states = model.base_model(input_ids=ids, attention_mask=mask).last_hidden_state
        answer = answer.to(states.device)[:, :, None]
        means[picks] = ((states.float() * answer).sum(1) / answer.sum(1).clamp(min=1)).cpu().numpy()
    features = means[0::2] - means[1::2]
    if width <= WIDTH:
        return features
    return features @ np.random.default_rng(0).standard_normal((width, WIDTH), dtype=np.float32) / WIDTH**0.5


def write_suspects(path: Path, pairs: Dataset, doubts: np.ndarray, count: int) -> list[str]:
    """Write the `count` most doubtful pairs, the worst first, for a person to review; returns where they came from.

    A line each: rank, the probability that the labels are swapped, id, origin, and the pair as it stands.
    """
    worst = np.argsort(-doubts, kind="stable")[:count]
    rows = without_empty(pairs.select(worst)).add_column("rank", np.arange(1, len(worst) + 1))
    rows = rows.add_column("swapped", doubts[worst].astype(float).round(4))
    rows.select_columns(["rank", "swapped", *rows.column_names[:-2]]).to_json(path, force_ascii=False)
    return rows["origin"][:]
