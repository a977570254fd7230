"""What a model says of held-out pairs, computed once: kept beside the reference log-probs, by the model's weights."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from preftune.config.processes import world_size
from preftune.data.shapes import PAIRS
from preftune.data.token_checks import row_key, sequences, tokenized
from preftune.evaluate.pairs import Lend, PairScores, Row, log_probs
from preftune.fastpath.reference_cache import beyond_rounding
from preftune.fastpath.reference_identity import model_identity
from preftune.fastpath.reference_store import ReferenceStore, default_root

NOTHING: Mapping[bytes, float] = {}


@dataclass(frozen=True)
class Scorer:
    """Scores rows of message lists (prompt, chosen, rejected), but those that `root` knows of the same weights.

    Several processes, among which weights may be shared out, keep nothing.
    """

    tokenizer: PreTrainedTokenizerBase
    max_length: int | None
    bf16: bool
    lend: Lend = "form"  # see pairs.log_probs
    root: str | None = None  # the folder of the reference cache; None: its usual place
    keeps: bool = True

    def score(self, model: torch.nn.Module, pairs: Dataset, just_now: Mapping[bytes, float] = NOTHING) -> PairScores:
        """The PairScores of `model`. `just_now` are log-probs by `row_key` that it is known to give as it is now.

        One known pair is computed again, and all are where it differs by more than rounding.
        """
        rows = [sequences(row, self.max_length) for row in tokenized(pairs, PAIRS, self.tokenizer)]
        keys = [[row_key(*side) for side in row] for row in rows]
        store = None
        if self.keeps and world_size() == 1:
            root = Path(self.root).expanduser() if self.root else default_root()
            store = ReferenceStore(root, *model_identity(model, "bf16" if self.bf16 else "no"))
        before = store.read() if store else {}
        known = {**before, **just_now} if store else {}
        complete = {i for i, row in enumerate(keys) if known.keys() >= set(row)}
        proof = min(complete, key=lambda i: len(rows[i][0][0]), default=None)
        asked = [i for i in range(len(rows)) if i not in complete - {proof}]
        found = self._compute(model, [rows[i] for i in asked], [keys[i] for i in asked])
        if any(beyond_rounding(known[key], found[key], model, self.bf16) for key in found.keys() & known.keys()):
            known, found = {}, self._compute(model, rows, keys)
        known |= found
        if store:
            new = {key: known[key] for row in keys for key in row if before.get(key) != known[key]}
            store.append({key: value for key, value in new.items() if math.isfinite(value)})
        sums = torch.tensor([[known[key] for key in row] for row in keys], dtype=torch.float64)
        tokens = torch.tensor([[max(len(ids) - max(start, 1), 1) for ids, start in row] for row in rows]).double()
        return PairScores(*sums.T, *tokens.T)

    def _compute(self, model: torch.nn.Module, rows: list[list[Row]], keys: list[list[bytes]]) -> dict[bytes, float]:
        if not rows:
            return {}
        sums, _ = log_probs(model, self.tokenizer, rows, self.bf16, self.lend)
        return dict(zip(chain(*keys), chain(*sums.T.tolist()), strict=True))
