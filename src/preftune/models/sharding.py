"""Models whose weights are sharded over processes: gathered for a while, and let go after training."""

import contextlib
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager

import torch
from accelerate.state import AcceleratorState
from transformers.integrations.deepspeed import unset_hf_deepspeed_config


def whole(model: torch.nn.Module, changed: bool = False) -> AbstractContextManager[None]:
    """All weights of the model here for a while."""
    return gathered(model.parameters(), changed)


@contextlib.contextmanager
def gathered(weights: Iterable[torch.Tensor], changed: bool = False) -> Iterator[None]:
    """These weights of a model here for a while: gathered from the other ranks under ZeRO-3, as they are otherwise.

    `changed`: whether they are set meanwhile; every rank then goes on with what rank 0 has set.
    """
    sharded = [each for each in weights if hasattr(each, "ds_id")]
    if not sharded:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(sharded, modifier_rank=0 if changed else None):
        yield


def is_sharded(model: torch.nn.Module) -> bool:
    """Whether a process holds but a part of some weight, by ZeRO-3 or FSDP2."""
    return any(hasattr(each, "ds_id") or hasattr(each, "full_tensor") for each in model.parameters())


def whole_tensor(weight: torch.Tensor) -> torch.Tensor:
    """A weight, gathered where FSDP2 has sharded it (every rank must take part)."""
    return (weight.full_tensor() if hasattr(weight, "full_tensor") else weight).detach()


@contextlib.contextmanager
def placed(model: torch.nn.Module, device: torch.device) -> Iterator[None]:
    """The model on `device` for a while: FSDP leaves it on the CPU until training shards it."""
    before = next(model.parameters()).device
    if before.type == device.type or is_sharded(model):
        yield
        return
    model.to(device)
    try:
        yield
    finally:
        model.to(before)


def fits_whole(model: torch.nn.Module) -> bool:
    """Whether this device can hold all weights at once; of a model that is not sharded it does."""
    missing = sum(each.ds_numel * each.element_size() for each in model.parameters() if hasattr(each, "ds_numel"))
    return not missing or not torch.cuda.is_available() or missing < torch.cuda.mem_get_info()[0]


def forget() -> None:
    """Let go of a DeepSpeed training's settings, so that models are loaded whole again and another training can follow.

    transformers shards every model that is loaded while they are alive: rank 0, which merges and evaluates alone, would
    wait for ranks that wait for it. And accelerate takes the settings of a second training only over an empty state.
    """
    unset_hf_deepspeed_config()
    AcceleratorState._reset_state()
