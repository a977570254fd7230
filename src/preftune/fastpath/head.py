"""Scoring chosen hidden states alone, with TRL's own fused head."""

import contextlib
from collections.abc import Iterator
from types import MethodType, SimpleNamespace

import torch
from transformers import PreTrainedModel
from trl.trainer import utils
from trl.trainer.utils import FusedCausalLMOutput

PER_TOKEN = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
# Tokens and words that are scored at once off GPUs. TRL's own tile of 4,096 × 32,768 takes up to 3.8 GB for a moment,
# and its many passes over a tile are slow where that is in no cache.
CPU_TOKENS, CPU_WORDS = 1024, 4096
TILE = "_CHUNKED_LOGPROB_CHUNK_SIZE"  # TRL's name of the words


class Picked:
    """Stands for a model whose backbone has already run and left these hidden states, of shape (N, hidden).

    TRL's fused forward asks of its model the backbone and the output embeddings, nothing else; so its head scores what
    was picked, with its chunks, soft-capping, logit scale, temperature, gathered weights and backward.
    """

    def __init__(self, model: PreTrainedModel, hidden: torch.Tensor, router_logits: tuple | None = None):
        self.get_output_embeddings = model.get_output_embeddings
        self.base_model = lambda **_: SimpleNamespace(last_hidden_state=hidden[None], router_logits=router_logits)


@torch.compiler.disable
def score(
    fused: MethodType, model: PreTrainedModel, hidden: torch.Tensor, targets: torch.Tensor
) -> FusedCausalLMOutput:
    """TRL's output per token, of shape (1, N), for hidden states (N, hidden), each predicting its target (N,)."""
    on_cpu = hidden.device.type == "cpu"
    size = CPU_TOKENS if on_cpu else max(1, len(hidden))
    with small_tiles() if on_cpu else contextlib.nullcontext():
        parts = [
            fused.__func__(Picked(model, some), shift_labels=wanted[None], fused_lm_head=True)
            for some, wanted in zip(hidden.split(size), targets.split(size), strict=True)
        ]
    found = {name: [getattr(part, name) for part in parts] for name in PER_TOKEN}
    return FusedCausalLMOutput(
        **{name: None if each[0] is None else torch.cat(each, dim=1) for name, each in found.items()}
    )


@contextlib.contextmanager
def small_tiles() -> Iterator[None]:
    """TRL's head takes CPU_WORDS words at once meanwhile; what it scores keeps that for its backward."""
    before = getattr(utils, TILE)
    setattr(utils, TILE, min(before, CPU_WORDS))
    try:
        yield
    finally:
        setattr(utils, TILE, before)


@torch.compiler.disable
def auxiliary_loss(
    fused: MethodType, model: PreTrainedModel, hidden: torch.Tensor, router_logits: tuple, counts: torch.Tensor
) -> torch.Tensor:
    """TRL's load-balancing loss of a mixture of experts, each of the N tokens that were run taken `counts` (N,) times.

    `router_logits` are (N, experts) per layer; of `hidden` one row is scored and thrown away.
    """
    stand_in, label = (
        Picked(model, hidden[:1], router_logits),
        torch.zeros(1, 1, dtype=torch.long, device=hidden.device),
    )
    options = {"output_router_logits": True, "attention_mask": counts}
    return fused.__func__(stand_in, shift_labels=label, fused_lm_head=True, **options).aux_loss
