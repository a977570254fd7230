"""Which form of the fast path gives what TRL's forward gives: for a model, once; for a batch, each time."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import ModuleType

import torch
from accelerate.utils import is_peft_model
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel, Trainer
from transformers.modeling_layers import GradientCheckpointingLayer

import preftune.fastpath.forked as forked
import preftune.fastpath.packed as packed
import preftune.fastpath.rows as rows
from preftune.config.errors import brief
from preftune.fastpath.host import IGNORED
from preftune.fastpath.layout import Layout, read_rows

# In the order tried; each has why_not, lay_out_for and run
FORMS: dict[str, ModuleType] = {"packed": packed, "forked": forked, "rows": rows}
# What TRL's text trainers give to the model's forward; anything else (images, token types, positions) keeps TRL's own
INPUTS = {
    *("input_ids", "attention_mask", "use_cache", "return_dict", "output_attentions", "output_hidden_states"),
    "output_router_logits",
}
PACKED_BY_TRL = {"position_ids", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx"}
CHECKPOINT = "_gradient_checkpointing_func"  # what transformers calls a layer's way to checkpoint
LENGTH_BOUND_ROPES = ("dynamic", "longrope")  # rotary frequencies that change with the length of the row


def choose(model: PreTrainedModel, trainer: Trainer, wanted: str | None = None) -> tuple[str | None, str]:
    """The name of the form for `model`, which `trainer` runs; or None and why it keeps TRL's own forward, in one line.

    `wanted` names the only form to try.
    """
    try:
        if is_peft_model(model):
            if getattr(model.active_peft_config, "is_prompt_learning", False):
                return None, "prompt-learning adapters put tokens before every row"
            model = model.get_base_model()
        if reason := _why_not_trainer(trainer) or _why_not_model(model):
            return None, reason
        reasons = []
        for name, form in FORMS.items():
            if wanted in (None, name):
                reason = form.why_not(model, backbone(model)) or _why_not_probe(model, form, trainer)
                if reason is None:
                    return name, ""
                reasons.append(f"{name}: {reason}")
        return None, "; ".join(reasons)
    except Exception as error:  # whatever a model of unknown code raises, TRL's path remains
        return None, f"{type(model).__name__} could not be tried ({brief(error)})"


def backbone(model: PreTrainedModel) -> PreTrainedModel:
    """What turns tokens into hidden states; of a model of more than text, the text model within."""
    return model.base_model if model.config.get_text_config() is model.config else model.get_decoder()


def _why_not_trainer(trainer: Trainer) -> str | None:
    parallel = getattr(trainer.accelerator, "parallelism_config", None)
    if getattr(trainer, "_is_vision_dataset", False):
        return "the data holds images"
    if trainer.is_fsdp_enabled and trainer.accelerator.state.fsdp_plugin.fsdp_version != 2:
        return "FSDP 1 flattens the model's weights"
    if parallel is not None and (parallel.tp_enabled or parallel.cp_enabled or parallel.sp_enabled):
        return "rows or weights are split among devices"
    return None


def _why_not_model(model: PreTrainedModel) -> str | None:
    if model.config.is_encoder_decoder:
        return "an encoder-decoder model"
    if model.device.type == "meta":
        return "the model has no weights yet"
    if backbone(model) is model:
        return f"{type(model).__name__} has no text model within"
    return None


def _why_not_probe(model: PreTrainedModel, form: ModuleType, trainer: Trainer) -> str | None:
    """Run two short pairs both ways, forward and backward: an architecture that reads masks, positions or its cache in
    a way of its own shows here.
    """
    if form is forked and trainer.is_fsdp_enabled and trainer.accelerator.state.fsdp_plugin.activation_checkpointing:
        return "FSDP's activation checkpointing fills a cache twice; take gradient_checkpointing"
    if form is forked and trainer.args.gradient_checkpointing:
        if (trainer.args.gradient_checkpointing_kwargs or {}).get("use_reentrant"):
            return "reentrant checkpointing keeps no cache"
        if not any(isinstance(each, GradientCheckpointingLayer) for each in model.modules()):
            return f"{type(model).__name__} checkpoints in a way of its own"
    pairs = [[1, 2, 3, 4, 5], [5, 1, 2, 3, 4, 6, 7], [1, 2, 3, 6, 7, 4], [5, 1, 2, 3, 4, 7, 1]]
    ids, seen = torch.zeros(2, 4, 7, dtype=torch.long, device=model.device)
    for row, tokens in enumerate(pairs):
        ids[row, : len(tokens)], seen[row, : len(tokens)] = torch.tensor(tokens), 1
    ids = ids % model.config.get_text_config().vocab_size
    batch = read_rows(ids, ids.masked_fill(seen == 0, IGNORED), width=model.config.get_text_config().hidden_size)

    def theirs(layout: Layout) -> torch.Tensor:
        outputs = model.base_model(input_ids=ids, attention_mask=seen, use_cache=False)
        return outputs.last_hidden_state[:, :-1][layout.scored]

    def ours(layout: Layout) -> torch.Tensor:
        return form.run(backbone(model), layout).hidden[layout.source[layout.scored]]

    try:
        layout = form.lay_out_for(backbone(model), batch).to(model.device)
        with probing(model, checkpointed=trainer.args.gradient_checkpointing):
            expected, found = (with_gradients(model, partial(run, layout)) for run in (theirs, ours))
    except Exception as error:  # whatever a model of unknown code raises, TRL's path remains
        return f"{type(model).__name__} cannot be run so ({type(error).__name__}: {str(error).splitlines()[0]})"
    coarse = any(weight.dtype in (torch.bfloat16, torch.float16) for weight in model.parameters())
    for what, first, second, loose in zip(("hidden states", "gradients"), expected, found, (1, 2), strict=True):
        tolerance = loose * (5e-2 if coarse else 1e-4)
        if not (second - first).norm() <= tolerance * first.norm():
            return f"{type(model).__name__} gives other {what} so"
    return None


def with_gradients(model: PreTrainedModel, run: Callable[[], torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """The hidden states (tokens, width) that `run` gives, and their gradients by token id, (8, width)."""
    inputs = []

    def leaf(module: torch.nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor:
        inputs.append((args[0], output.detach().requires_grad_()))
        return inputs[-1][1].clone()  # some models multiply it in place

    handle = model.get_input_embeddings().register_forward_hook(leaf)
    try:
        with torch.enable_grad():
            hidden = run()
    finally:
        handle.remove()
    weights = torch.linspace(-1, 1, hidden.numel(), device=hidden.device).view_as(hidden)
    gradients = torch.autograd.grad((hidden.float() * weights).sum(), [output for _, output in inputs])
    total = hidden.new_zeros(8, gradients[0].shape[-1], dtype=torch.float32)
    for (ids, _), gradient in zip(inputs, gradients, strict=True):
        total.index_add_(0, ids.flatten(), gradient.flatten(0, -2).float())
    return hidden.detach().float(), total


@contextmanager
def probing(model: PreTrainedModel, checkpointed: bool) -> Iterator[None]:
    """Evaluation mode for a moment, but with checkpoints where the run will have them, and except for 4-bit layers.

    In that mode, on a CPU with AVX-512-BF16, bitsandbytes repacks their weights for good, and no gradient passes them
    again.
    """
    modes = [(module, module.training) for module in model.modules()]
    for module, _ in modes:
        module.training = hasattr(getattr(module, "weight", None), "quant_state")
    layers = [module for module, _ in modes if checkpointed and isinstance(module, GradientCheckpointingLayer)]
    before = [(each.gradient_checkpointing, getattr(each, CHECKPOINT, None)) for each in layers]
    for layer in layers:
        layer.training = layer.gradient_checkpointing = True
        setattr(layer, CHECKPOINT, partial(checkpoint, use_reentrant=False))
    try:
        yield
    finally:
        for layer, (checkpointing, way) in zip(layers, before, strict=True):
            layer.gradient_checkpointing = checkpointing
            setattr(layer, CHECKPOINT, way)
        for module, training in modes:
            module.training = training


def longest_row(model: PreTrainedModel) -> int | None:
    """The longest row of the fast path: beyond it the model changes in ways that it would not repeat."""
    config, code = backbone(model).config, sys.modules[type(backbone(model)).__module__]
    rope = getattr(config, "rope_parameters", None) or {}
    limits = []
    for kind in [rope, *rope.values()]:  # one, or one for each type of layer
        if isinstance(kind, dict) and kind.get("rope_type") in LENGTH_BOUND_ROPES:
            limits.append(kind.get("original_max_position_embeddings") or config.max_position_embeddings)
    if not getattr(config, "layer_types", None) and not hasattr(code, "create_sliding_window_causal_mask"):
        limits.append(getattr(config, "sliding_window", None))
    return min((limit for limit in limits if limit), default=None)


def names(inputs: dict) -> set[str]:
    """The inputs that say something."""
    return {name for name, value in inputs.items() if value is not None and value is not False}


@torch.compiler.disable
def packed_by_trl(inputs: dict, labels: torch.Tensor | None) -> bool:
    """Whether the batch is SFT's own packing: rows side by side already, with position ids and no mask.

    `labels` are in host memory.
    """
    given = names(inputs)
    if labels is None or not {"input_ids", "position_ids"} <= given <= (INPUTS | PACKED_BY_TRL) - {"attention_mask"}:
        return False
    return bool((labels[:, 1:] != IGNORED).any())


@torch.compiler.disable
def why_not_batch(inputs: dict, host: dict[str, torch.Tensor], longest: int | None) -> str | None:
    """Why this batch keeps TRL's own forward, in one line; None where the fast path runs it.

    `host` has its ids, mask and labels in host memory.
    """
    given = names(inputs)
    if given - INPUTS or not {"input_ids", "attention_mask", "labels"} <= host.keys():
        return f"batches with {', '.join(sorted(given - INPUTS)) or 'neither mask nor labels'}"
    seen, labels = host["attention_mask"], host["labels"]
    if longest is not None and seen.shape[1] > longest:
        return f"rows longer than {longest} tokens"
    padded_right = (seen[:, 1:] <= seen[:, :-1]).all()
    scored = labels[:, 1:] != IGNORED
    if not bool(padded_right & (scored <= seen[:, 1:].bool()).all()):
        return "rows that are not padded on the right"
    if not bool(scored.any()):
        return "batches without a token to score"
    return None
