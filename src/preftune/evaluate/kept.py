"""What a model says of held-out pairs, computed once: kept beside the reference log-probs, by the model's weights."""

from collections.abc import Mapping
from pathlib import Path

import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from preftune.config.processes import world_size
from preftune.data.shapes import PAIRS
from preftune.data.token_checks import sequences, tokenized
from preftune.evaluate.pairs import Lend, PairScores, log_probs
from preftune.fastpath.reference_cache import beyond_rounding, row_key
from preftune.fastpath.reference_identity import model_identity
from preftune.fastpath.reference_store import ReferenceStore, default_root

NOTHING: Mapping[bytes, float] = {}


def score(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Dataset,
    max_length: int | None,
    bf16: bool,
    lend: Lend = "form",
    root: str | None = None,
    just_now: Mapping[bytes, float] = NOTHING,
) -> PairScores:
    """`pairs.score` without what is known already: of these weights from `root`, or `just_now`, by `row_key`.

    One known pair is computed again, and all are where it differs by more than rounding. Several processes, among which
    weights may be shared out, keep nothing.
    """
    rows = [sequences(row, max_length) for row in tokenized(pairs, PAIRS, tokenizer)]
    keys = [[row_key(ids, start) for ids, start in row] for row in rows]
    identity = model_identity(model, "bf16" if bf16 else "no") if world_size() == 1 else None
    store = identity and ReferenceStore(Path(root).expanduser() if root else default_root(), *identity)
    kept = store.read() if store else {}
    known = {**kept, **just_now} if store else {}

    def compute(places: list[int]) -> dict[bytes, float]:
        if not places:
            return {}
        sums, _ = log_probs(model, tokenizer, [rows[i] for i in places], bf16, lend)
        return {key: value for i, each in zip(places, sums.T.tolist(), strict=True) for key, value in zip(keys[i], each)}

    missing = [i for i, each in enumerate(keys) if not known.keys() >= set(each)]
    proof = min(set(range(len(rows))) - set(missing), key=lambda i: len(rows[i][0][0]), default=None)
    again = compute([*missing, *([] if proof is None else [proof])])
    if proof is not None and any(beyond_rounding(known[key], again[key], model, bf16) for key in keys[proof]):
        known, again = {}, compute(list(range(len(rows))))
    known |= again
    if store:
        store.append({key: known[key] for each in keys for key in each if kept.get(key) != known[key]})
    sums = torch.tensor([[known[key] for key in each] for each in keys], dtype=torch.float64).T
    tokens = torch.tensor([[max(len(ids) - max(start, 1), 1) for ids, start in row] for row in rows]).double().T
    return PairScores(*sums, *tokens)
