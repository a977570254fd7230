"""Scoring chosen hidden states alone, with TRL's own fused head."""

from types import MethodType, SimpleNamespace

import torch
from transformers import PreTrainedModel
from trl.trainer.utils import FusedCausalLMOutput

PER_TOKEN = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
CPU_TOKENS = 256  # scored at once off GPUs, where TRL's own tile of 4,096 takes up to 3.8 GB for a moment


class Picked:
    """Stands for a model whose backbone has already run and left these hidden states, of shape (N, hidden).

    TRL's fused forward asks of its model the backbone and the output embeddings, nothing else; so its head scores what
    was picked, with its chunks, soft-capping, logit scale, temperature, gathered weights and backward.
    """

    def __init__(self, model: PreTrainedModel, hidden: torch.Tensor, router_logits: tuple | None = None):
        self.get_output_embeddings = model.get_output_embeddings
        self.base_model = lambda **_: SimpleNamespace(last_hidden_state=hidden[None], router_logits=router_logits)


def score(
    fused: MethodType, model: PreTrainedModel, hidden: torch.Tensor, targets: torch.Tensor
) -> FusedCausalLMOutput:
    """TRL's output per token, of shape (1, N), for hidden states (N, hidden), each predicting its target (N,)."""
    size = CPU_TOKENS if hidden.device.type == "cpu" else max(1, len(hidden))
    parts = [
        fused.__func__(Picked(model, some), shift_labels=wanted[None], fused_lm_head=True)
        for some, wanted in zip(hidden.split(size), targets.split(size), strict=True)
    ]
    found = {name: [getattr(part, name) for part in parts] for name in PER_TOKEN}
    return FusedCausalLMOutput(
        **{name: None if each[0] is None else torch.cat(each, dim=1) for name, each in found.items()}
    )


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
