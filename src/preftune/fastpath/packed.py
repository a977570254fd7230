"""The packed forward: one run of the backbone over each pair's unique tokens, in place of TRL's over padded rows.

TRL's DPO, KTO and SFT losses call `model(**inputs, labels=labels, fused_lm_head=True)` and read the fields of a
FusedCausalLMOutput; that call alone is replaced. What is scored, and how the losses use it, stays TRL's.
"""

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager
from types import MethodType

import torch
from accelerate.utils import is_peft_model
from transformers import PreTrainedModel
from trl.trainer.utils import FusedCausalLMOutput

from preftune.fastpath.applies import longest_row, packed_by_trl, run_backbone, why_not, why_not_batch
from preftune.fastpath.attention import row_multiple
from preftune.fastpath.head import PER_TOKEN, score
from preftune.fastpath.layout import IGNORED, Layout, lay_out


def packed_output(
    fused: MethodType, model: PreTrainedModel, layout: Layout, mean_everywhere: bool = False
) -> FusedCausalLMOutput:
    """What TRL's fused forward `fused` gives for the batch that `layout` packs, shapes (rows, columns − 1).

    `mean_everywhere` gives the `mean_logits` of every token kept, not of those scored alone; `label_mask` says which.
    """
    hidden = run_backbone(model, layout)
    scores = score(fused, model, hidden[layout.picks], layout.targets)
    output = spread(scores, layout.scored, layout.slots)
    if mean_everywhere:
        output.mean_logits = mean_logits(fused, model, hidden, layout, scores.mean_logits)
        output.label_mask = layout.source >= 0
    return output


def side_by_side_output(
    fused: MethodType, model: PreTrainedModel, labels: torch.Tensor, inputs: dict
) -> FusedCausalLMOutput:
    """The same for a batch that TRL itself has packed (SFT's `packing`): only the positions with a label are scored."""
    hidden = model.base_model(**inputs).last_hidden_state[:, :-1]
    scored = labels[:, 1:] != IGNORED
    scores = score(fused, model, hidden[scored], labels[:, 1:][scored])
    return spread(scores, scored, torch.arange(scores.log_probs.numel(), device=scored.device))


def spread(scores: FusedCausalLMOutput, scored: torch.Tensor, slots: torch.Tensor) -> FusedCausalLMOutput:
    """Scores of shape (1, N) laid out where `scored` is True, which `slots` of them answers; zero elsewhere."""
    fields = {}
    for name in PER_TOKEN:
        values = getattr(scores, name)
        if values is not None:
            fields[name] = values.new_zeros(scored.shape).masked_scatter(scored, values[0, slots])
    return FusedCausalLMOutput(loss=-fields["log_probs"].sum() / scored.sum(), label_mask=scored, **fields)


@torch.no_grad()
def mean_logits(
    fused: MethodType, model: PreTrainedModel, hidden: torch.Tensor, layout: Layout, known: torch.Tensor
) -> torch.Tensor:
    """The mean logit at each token kept, (rows, columns − 1), zero elsewhere; `known` (1, N) are those of the picks."""
    means = known.new_zeros(hidden.shape[0])
    rest = layout.tree.flatten() >= 0
    rest[layout.picks] = False
    if rest.any():
        others = hidden[rest]
        means[rest] = score(fused, model, others, others.new_zeros(len(others), dtype=torch.long)).mean_logits[0]
    means[layout.picks] = known[0]
    return means[layout.source.clamp(min=0)].masked_fill(layout.source < 0, 0)


def install(
    model: PreTrainedModel,
    pairs: bool,
    autocast: Callable[[], AbstractContextManager],
    say: Callable[[str], None],
    mean_everywhere: bool = False,
) -> None:
    """Lay the packed forward over `model`'s fused one; a batch that cannot be packed takes that, and `say` is told why.

    `autocast` gives the context in which the trainer runs forwards: the fused forward may already be wrapped in it.
    """
    fused, longest = model.forward, longest_row(model)

    @functools.wraps(type(model).forward)
    def forward(self, *args, fused_lm_head=False, labels=None, **kwargs):
        if not fused_lm_head:
            return fused(*args, **kwargs) if labels is None else fused(*args, labels=labels, **kwargs)
        if packed_by_trl(kwargs, labels):
            self.tokens_run = (0, kwargs["input_ids"].numel())
            with autocast():
                return side_by_side_output(fused, self, labels, kwargs)
        reason = "batches given by position" if args else why_not_batch(kwargs, labels, pairs, longest)
        if reason is not None:
            say(reason)
            self.tokens_run = None
            return fused(*args, labels=labels, fused_lm_head=True, **kwargs)
        ids = kwargs["input_ids"]
        layout = lay_out(ids, labels, pairs, self.config.hidden_size, row_multiple(self.config, ids.device))
        self.tokens_run = layout.tokens_run()  # (padding, all), from which `padding_fraction` is logged
        with autocast():
            return packed_output(fused, self, layout.to(ids.device), mean_everywhere)

    model.forward = MethodType(forward, model)


class PackedForward:
    """Mixin for a TRL trainer whose loss calls the fused forward: rows side by side instead of padded (KTO, SFT)."""

    pairs = False

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.install_packed()

    def _precompute_ref_logps(self, *args, **kwargs):
        self.install_packed()  # TRL computes the reference within its own __init__
        return super()._precompute_ref_logps(*args, **kwargs)

    def install_packed(self) -> None:
        """Give the policy, and a separate reference model, the packed forward, once; or say why not."""
        if "packed" in vars(self):
            return
        self.said: set[str] = set()
        self.packed = self._pack(self.model)
        if getattr(self, "ref_model", None) is not None:
            self._pack(self.ref_model)

    def _pack(self, model: PreTrainedModel) -> bool:
        model = self.accelerator.unwrap_model(model)
        reason = why_not(model, self)
        if reason is not None:
            self._say(reason)
            return False
        self._install(model.get_base_model() if is_peft_model(model) else model)
        return True

    def _install(self, model: PreTrainedModel) -> None:
        install(model, self.pairs, self.accelerator.autocast, self._say)

    def _say(self, reason: str) -> None:
        if reason in self.said:
            return
        self.said.add(reason)
        self.accelerator.print(f"Packed forward off, TRL's own instead: {reason}", flush=True)


class PackedPairs(PackedForward):
    """The same for paired data: the two rows of a pair share their prompt as well (DPO and its relatives)."""

    pairs = True
