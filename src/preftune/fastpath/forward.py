"""The fast forward: one of the forms in place of TRL's forward over padded rows.

TRL's DPO, KTO and SFT losses call `model(**inputs, labels=labels, fused_lm_head=True)` and read the fields of a
FusedCausalLMOutput; that call alone is replaced. What is scored, and how the losses use it, stays TRL's.
"""

import contextlib
import functools
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from types import MethodType, ModuleType, SimpleNamespace

import torch
from accelerate.utils import broadcast_object_list, is_peft_model
from datasets import Dataset
from peft import PeftType
from peft.helpers import disable_input_dtype_casting
from transformers import PreTrainedModel
from trl.trainer.utils import FusedCausalLMOutput

from preftune.config.errors import UserError
from preftune.fastpath.applies import FORMS, backbone, choose, longest_row, packed_by_trl, why_not_batch
from preftune.fastpath.head import PER_TOKEN, auxiliary_loss, score
from preftune.fastpath.host import BOX, IGNORED, Boxed, Host, on_device
from preftune.fastpath.layout import Layout, read_rows
from preftune.models import sharding


def output_of(
    form: ModuleType,
    fused: MethodType,
    model: PreTrainedModel,
    layout: Layout,
    mean_everywhere: bool = False,
    routed: bool = False,
) -> FusedCausalLMOutput:
    """What TRL's fused forward `fused` gives for the batch of `layout`, a CPU's; shapes (rows, columns − 1).

    `mean_everywhere` gives the `mean_logits` of every token kept, not of those scored alone; `label_mask` says which.
    `routed` gives the `aux_loss` of a mixture of experts.
    """
    others = layout.others() if mean_everywhere else None
    layout = layout.to(backbone(model).device)
    ran = form.run(backbone(model), layout, **({"output_router_logits": True} if routed else {}))
    scores = score(fused, model, ran.hidden[layout.picks], layout.targets)
    output = spread(scores, layout.scored, layout.slots)
    if mean_everywhere:
        output.mean_logits = mean_logits(fused, model, ran.hidden, layout, others, scores.mean_logits)
        output.label_mask = layout.source >= 0
    if routed:
        output.aux_loss = auxiliary_loss(fused, model, ran.hidden, ran.router_logits, layout.counts)
    return output


def side_by_side_output(
    fused: MethodType, model: PreTrainedModel, labels: torch.Tensor, picks: torch.Tensor, inputs: dict
) -> FusedCausalLMOutput:
    """The same for a batch that TRL itself has packed (SFT's `packing`): only the positions with a label are scored.

    `picks` are those, of labels (rows, columns − 1) laid out in one line.
    """
    outputs = model.base_model(**inputs)
    hidden, wanted = outputs.last_hidden_state[:, :-1], labels[:, 1:]
    scores = score(fused, model, hidden.flatten(0, 1)[picks], wanted.flatten()[picks])
    output = spread(scores, wanted != IGNORED, torch.arange(len(picks), device=picks.device))
    if inputs.get("output_router_logits"):
        counts = torch.ones_like(labels)
        output.aux_loss = auxiliary_loss(fused, model, hidden[0], outputs.router_logits, counts)
    return output


@torch.compiler.disable
def spread(scores: FusedCausalLMOutput, scored: torch.Tensor, slots: torch.Tensor) -> FusedCausalLMOutput:
    """Scores of shape (1, N) laid out where `scored` is True, which `slots` of them answers; zero elsewhere."""
    fields = {}
    for name in PER_TOKEN:
        values = getattr(scores, name)
        if values is not None:
            fields[name] = values.new_zeros(scored.shape).masked_scatter(scored, values[0, slots])
    return FusedCausalLMOutput(loss=-fields["log_probs"].sum() / scored.sum(), label_mask=scored, **fields)


@torch.compiler.disable
@torch.no_grad()
def mean_logits(
    fused: MethodType,
    model: PreTrainedModel,
    hidden: torch.Tensor,
    layout: Layout,
    others: torch.Tensor,
    known: torch.Tensor,
) -> torch.Tensor:
    """The mean logit at each token kept, (rows, columns − 1), zero elsewhere; `known` (1, N) are those of the picks."""
    means = known.new_zeros(hidden.shape[0])
    if len(others):
        others = on_device(others, hidden.device)
        means[others] = score(fused, model, hidden[others], torch.zeros_like(others)).mean_logits[0]
    means[layout.picks] = known[0]
    return means[layout.source.clamp(min=0)].masked_fill(layout.source < 0, 0)


def install(
    form: ModuleType,
    model: PreTrainedModel,
    autocast: Callable[[], AbstractContextManager],
    say: Callable[[str], None],
    mean_everywhere: bool = False,
    host: Host | None = None,
) -> None:
    """Lay `form` over `model`'s fused forward; a batch to which it does not apply takes that, and `say` is told why.

    `autocast` gives the context in which the trainer runs forwards: the fused forward may already be wrapped in it.
    `host` keeps what batches hold, so that no device is waited for. torch.compile leaves this to Python, and compiles
    what a form calls: the model's layers.
    """
    fused, longest, host = model.forward, longest_row(model), host or Host()

    @functools.wraps(type(model).forward)
    def forward(self, *args, fused_lm_head=False, labels=None, **kwargs):
        if not fused_lm_head:
            return fused(*args, **kwargs) if labels is None else fused(*args, labels=labels, **kwargs)
        routed = kwargs.get(
            "output_router_logits", getattr(self.config.get_text_config(), "output_router_logits", False)
        )
        if routed:
            kwargs["output_router_logits"] = True
        batch = host.copy({"labels": labels} | {name: kwargs.get(name) for name in ("input_ids", "attention_mask")})
        if packed_by_trl(kwargs, batch.get("labels")):
            self.tokens_run = (0, kwargs["input_ids"].numel())
            picks = on_device((batch["labels"][:, 1:] != IGNORED).flatten().nonzero()[:, 0], labels.device)
            with autocast():
                return side_by_side_output(fused, self, labels, picks, kwargs)
        reason = "batches given by position" if args else why_not_batch(kwargs, batch, longest)
        if reason is not None:
            say(reason)
            self.tokens_run = None
            return fused(*args, labels=labels, fused_lm_head=True, **kwargs)
        text, mask = backbone(self), batch["attention_mask"] if routed else None
        layout = form.lay_out_for(text, read_rows(batch["input_ids"], batch["labels"], text.config.hidden_size, mask))
        self.tokens_run = layout.tokens_run()  # (padding, all), from which `padding_fraction` is logged
        with autocast():
            return output_of(form, fused, self, layout, mean_everywhere, routed)

    model.forward = MethodType(forward, model)


def install_for_scoring(model: PreTrainedModel) -> None:
    """Lay the form that applies, if one does, over `model`'s fused forward; whoever lent it that takes both off."""
    plain = SimpleNamespace(accelerator=None, is_fsdp_enabled=False, args=SimpleNamespace(gradient_checkpointing=False))
    with torch.enable_grad():  # its probe compares gradients too
        form, _ = choose(model, plain)
    if form is not None:
        install(FORMS[form], model, contextlib.nullcontext, lambda reason: None)


class FormError(UserError):
    """A form was asked for that does not apply."""


class FastForward:
    """Mixin for a TRL trainer whose loss calls the fused forward: no padding, scores of what is learned alone, and
    what rows begin with in common once (the prompt of a pair).

    `form` on the class names the form to take ("packed" or "forked", "off" for none); None takes the first that
    applies. On a trainer it is the name of the one taken, None where the model keeps TRL's own.
    """

    form: str | None = None

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.install_form()

    def _precompute_ref_logps(self, *args, **kwargs):
        self.install_form()  # TRL computes the reference within its own __init__
        return super()._precompute_ref_logps(*args, **kwargs)

    def install_form(self) -> None:
        """Give the policy, and a separate reference model, the fast path's forward, once; or say why not."""
        if "said" in vars(self):
            return
        self.said: set[str] = set()
        self.host = Host()
        wanted, self.form = self.form, None
        if wanted == "off":
            return
        unwrapped = partial(self.accelerator.unwrap_model, keep_torch_compile=False)
        model = unwrapped(self.model)
        # One process decides for all: the weights of others may not be loaded yet, and forms differ in their calls
        chosen = [(None, "ZeRO-3 shards weights that no device holds whole, so that no form can be tried")]
        if broadcast_object_list([sharding.fits_whole(model)])[0]:
            with sharding.whole(model):
                chosen = [choose(model, self, wanted) if self.accelerator.is_main_process else (None, "")]
        form, reason = broadcast_object_list(chosen)[0]
        if form is None:
            if wanted is not None:
                raise FormError(f"fastpath.form={wanted} does not apply: {reason}. Leave fastpath.form out")
            self._say(reason)
            return
        self.form = form
        model = model.get_base_model() if is_peft_model(model) else model
        self._install(FORMS[form], model)
        reference = getattr(self, "ref_model", None)
        if reference is not None and isinstance(unwrapped(reference), type(model)):  # or FSDP2's class over that
            self._install(FORMS[form], unwrapped(reference))
        self.accelerator.print(f"Fast forward: {form}", flush=True)

    def training_step(self, model, inputs, num_items_in_batch=None):
        with disable_input_dtype_casting(self.model, active=self._autocast_casts()):
            return super().training_step(model, inputs, num_items_in_batch)

    def _autocast_casts(self) -> bool:
        """Whether autocast casts what LoRA's products take, so that PEFT's own cast to float32 before it is in vain.

        Forward and backward must agree: with checkpointing the backward runs the layers again.
        """
        engine = self.is_deepspeed_enabled or self.is_fsdp_enabled
        if self.accelerator.mixed_precision not in ("bf16", "fp16") or engine or not is_peft_model(self.model):
            return False
        return all(
            each.peft_type == PeftType.LORA and not each.use_dora
            for each in self.accelerator.unwrap_model(self.model).peft_config.values()
        )

    def _install(self, form: ModuleType, model: PreTrainedModel) -> None:
        install(form, model, self.accelerator.autocast, self._say, host=self.host)

    def _get_dataloader(self, dataset, *args, **kwargs):
        collate = self.data_collator
        sent = self.accelerator.dispatch_batches or not isinstance(dataset, Dataset)  # by rank 0, as tensors alone
        if self.form is not None and not sent:
            self.data_collator = Boxed(collate)
        try:
            return super()._get_dataloader(dataset, *args, **kwargs)
        finally:
            self.data_collator = collate

    def _prepare_inputs(self, inputs):
        if self.form is None:
            return super()._prepare_inputs(inputs)
        kept = inputs[BOX].batch if BOX in inputs else inputs
        inputs = super()._prepare_inputs({name: each for name, each in inputs.items() if name != BOX})
        self.host.keep(inputs, kept)
        return inputs

    def _say(self, reason: str) -> None:
        if reason in self.said:
            return
        self.said.add(reason)
        self.accelerator.print(f"Fast forward off, TRL's own instead: {reason}", flush=True)
