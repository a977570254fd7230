"""Pairs whose labels may be swapped, ranked by how strongly a model disagrees with them."""

import json
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from preftune.data.shapes import PAIRS
from preftune.data.token_checks import sequences, tokenized

FOLDS = 5
BATCH = 16
WIDTH = 512  # features of a wider model are projected to this many


def swap_probabilities(features: np.ndarray) -> np.ndarray:
    """For each pair, how probable it is that its labels are swapped, shape (n,).

    `features` (n, d) are chosen less rejected: `reading` or `log_prob_features`. The judge is a logistic regression
    without intercept that has seen the other four fifths of the pairs and takes most of their labels to be right: a
    model alone knows what is likely, not what this data prefers. Swapped pairs stand out because the rest contradicts
    them (confident learning: Northcutt et al. 2021, arXiv:1911.00068).
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import cross_val_predict

    x = features / (np.sqrt((features**2).mean(axis=0)) + 1e-9)
    x = x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-9) * np.sqrt(min(x.shape[1], 25))
    turned = np.where(np.arange(len(x)) // FOLDS % 2, -1.0, 1.0)  # so that the judge sees both outcomes
    fold = np.arange(len(x)) % FOLDS
    folds = [(np.flatnonzero(fold != each), np.flatnonzero(fold == each)) for each in range(FOLDS)]
    judge = LogisticRegression(fit_intercept=False)
    margins = cross_val_predict(judge, x * turned[:, None], turned > 0, cv=folds, method="decision_function")
    return 1 / (1 + np.exp(turned * margins))


def log_prob_features(rows: Dataset, max_length: int | None) -> np.ndarray:
    """What a reference thinks of each pair, (n, 3): chosen less rejected, as log-probs, as means per token, in tokens.

    `rows` is the train_dataset of TRL's DPO trainer after it has computed its reference log-probs.
    """
    sums, tokens = [], []
    room = [(max_length or 1 << 62) - len(prompt) for prompt in rows["prompt_ids"]]
    for side in ("chosen", "rejected"):
        sums.append(np.array(rows[f"ref_{side}_logps"]))
        tokens.append(np.maximum(np.minimum([len(ids) for ids in rows[f"{side}_ids"]], room), 1))
    means = sums[0] / tokens[0] - sums[1] / tokens[1]
    return np.stack([sums[0] - sums[1], means, tokens[0] - tokens[1]], axis=1)


@torch.no_grad()
def reading(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, pairs: Dataset, max_length: int | None
) -> np.ndarray:
    """How a model reads each pair, (n, d): its last hidden states, their mean over chosen less that over rejected."""
    rows = [sequence for row in tokenized(pairs, PAIRS, tokenizer) for sequence in sequences(row, max_length)]
    order = sorted(range(len(rows)), key=lambda place: len(rows[place][0]))
    means = np.zeros((len(rows), model.config.get_text_config().hidden_size), dtype=np.float32)
    model.eval()
    for start in range(0, len(order), BATCH):
        picks = order[start : start + BATCH]
        length = max(len(rows[place][0]) for place in picks)
        ids = torch.zeros(len(picks), length, dtype=torch.long)
        mask, answer = torch.zeros_like(ids), torch.zeros(len(picks), length, 1)
        for at, place in enumerate(picks):
            tokens, begin = rows[place]
            ids[at, : len(tokens)] = torch.tensor(tokens)
            mask[at, : len(tokens)] = 1
            answer[at, begin : len(tokens)] = 1 / max(len(tokens) - begin, 1)
        states = model.base_model(
            input_ids=ids.to(model.device), attention_mask=mask.to(model.device)
        ).last_hidden_state
        means[picks] = (states.float() * answer.to(states.device)).sum(1).cpu().numpy()
    return narrowed(means[0::2] - means[1::2])


def narrowed(features: np.ndarray) -> np.ndarray:
    """Features of at most `WIDTH` dimensions: wider ones are projected at random, always alike; distances stay."""
    width = features.shape[1]
    if width <= WIDTH:
        return features
    return features @ np.random.default_rng(0).standard_normal((width, WIDTH), dtype=np.float32) / WIDTH**0.5


def write_suspects(path: Path, pairs: Dataset, doubts: np.ndarray, count: int) -> list[str]:
    """Write the `count` most doubtful pairs, the worst first, for a person to review; returns where they came from.

    A line each: rank, the probability that the labels are swapped, id, origin, and the pair as it stands.
    """
    worst = np.argsort(-doubts, kind="stable")[:count]
    rows = list(pairs.select(worst))
    with path.open("w", encoding="utf-8") as file:
        for rank, (place, row) in enumerate(zip(worst, rows, strict=True), start=1):
            told = {"rank": rank, "swapped": round(float(doubts[place]), 4)} | row
            file.write(json.dumps(told, ensure_ascii=False) + "\n")
    return [row["origin"] for row in rows]
