"""Selective gradient checkpointing: what is costly to compute is kept for the backward, what is cheap is recomputed.

Plain checkpointing keeps a layer's input and runs the layer again in the backward. Most of what a layer would keep
otherwise comes of cheap work: norms, activation functions, rotary embeddings, casts, LoRA's second product. Recomputed
alone they cost about a percent (Korthikanti et al. 2022, "Reducing Activation Recomputation in Large Transformer
Models"; here the choice is the other way round, since fused attention keeps no square: all products are kept).
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import cache, partial

import torch
from peft import PeftModel
from torch.utils.checkpoint import CheckpointPolicy, SelectiveCheckpointContext, create_selective_checkpoint_contexts
from transformers import PreTrainedModel

PRODUCTS = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
NARROW = 256  # a product over no more than this is cheap for what it gives: LoRA's second
KERNELS = ("attention", "gemm_4bit", "int8_linear_matmul", "scaled_mm", "grouped_mm")  # fused, quantized, of experts


def policy(
    context: SelectiveCheckpointContext, op: object, *args: object, biased: bool = False, **kwargs: object
) -> CheckpointPolicy:
    """Keep products of matrices and fused attention, recompute the rest.

    `biased`: experts add a bias to their product in place (transformers' `_grouped_linear`), so that it cannot be kept.
    """
    costly = args[-1].shape[0] > NARROW if op in PRODUCTS else is_kernel(op) and not drops(op, args, kwargs)
    costly = costly and not (biased and "grouped_mm" in op.name())
    return CheckpointPolicy.MUST_SAVE if costly else CheckpointPolicy.PREFER_RECOMPUTE


@cache
def is_kernel(op: object) -> bool:
    """Whether an operation is one of KERNELS; asked of every operation of every layer, so the answer is kept."""
    return isinstance(op, torch._ops.OpOverload) and any(kernel in op.name() for kernel in KERNELS)


def drops(op: torch._ops.OpOverload, args: tuple, kwargs: dict) -> bool:
    """Whether an attention draws random numbers: were its result kept, what draws after it would draw others."""
    named = dict(zip((argument.name for argument in op._schema.arguments), args, strict=False)) | kwargs
    return named.get("dropout_p", 0.0) > 0


def keep_products(model: PreTrainedModel | PeftModel) -> None:
    """Make `model`'s gradient checkpointing, whenever it is turned on, a selective one.

    The model's method is wrapped as TRL's SFTTrainer wraps it for its own selection (attention alone): a function among
    the trainer's arguments could not be written to JSON.
    """
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    biased = any(getattr(module, "has_bias", False) for module in base.modules())
    chosen = partial(policy, biased=biased)
    enable, contexts = base.gradient_checkpointing_enable, partial(contexts_of, chosen)

    def gradient_checkpointing_enable(gradient_checkpointing_kwargs: dict | None = None, **kwargs: object) -> None:
        given = dict(gradient_checkpointing_kwargs or {}) | {"use_reentrant": False, "context_fn": contexts}
        return enable(gradient_checkpointing_kwargs=given, **kwargs)

    base.gradient_checkpointing_enable = gradient_checkpointing_enable


def contexts_of(chosen: partial) -> tuple[AbstractContextManager, ...]:
    """What a layer runs in, at first and in the backward; torch.compile wants PyTorch's own of them."""
    modes = create_selective_checkpoint_contexts(chosen)
    return modes if torch.compiler.is_compiling() else tuple(map(casting_anew, modes))


@contextmanager
def casting_anew(mode: AbstractContextManager) -> Iterator[None]:
    """`mode` without autocast's cache of weights: the second run of a layer would not cast what the backward casts."""
    before = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        with mode:
            yield
    finally:
        torch.set_autocast_cache_enabled(before)
