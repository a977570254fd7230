"""Scoring chosen hidden states alone, with TRL's own fused head."""

from types import MethodType, SimpleNamespace

import torch
from transformers import PreTrainedModel
from transformers.utils import ModelOutput


class Picked:
    """Stands for a model whose backbone has already run and left these hidden states, of shape (N, hidden).

    TRL's fused forward asks of its model the backbone and the output embeddings, nothing else; so its head scores what
    was picked, with its chunks, soft-capping, logit scale, temperature, gathered weights and backward.
    """

    def __init__(self, model: PreTrainedModel, hidden: torch.Tensor):
        self.get_output_embeddings = model.get_output_embeddings
        self.base_model = lambda **_: SimpleNamespace(last_hidden_state=hidden[None])


def score(fused: MethodType, model: PreTrainedModel, hidden: torch.Tensor, targets: torch.Tensor) -> ModelOutput:
    """TRL's FusedCausalLMOutput of shape (1, N) for hidden states (N, hidden), each predicting its target (N,)."""
    return fused.__func__(Picked(model, hidden), shift_labels=targets[None], fused_lm_head=True)
