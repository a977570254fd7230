"""Ranks among each other: they join, agree on the run directory, and prove that the engine is the one asked for."""

import contextlib
import datetime
import json
import os
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from omegaconf import DictConfig

from preftune import runs
from preftune.launch import LaunchError

TIMEOUT = datetime.timedelta(hours=2)  # of one rank for another: rank 0 hashes weights, merges models, waits for caches

TRACES = {"DeepSpeed": ["latest"], "FSDP": ["optimizer.bin", "optimizer_*", "pytorch_model_fsdp*"]}  # in a checkpoint
WITH = {"DeepSpeed": " with DeepSpeed", "FSDP": " with FSDP", "plain": ""}


def join(cfg: DictConfig) -> None:
    """Connect this rank with the others, on its device, and give all of them rank 0's run directory.

    The process group stands from here on, for CPU and GPU tensors alike; accelerate and DeepSpeed take it as it is.
    """
    if not cfg.hardware.use_cpu and torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        torch.distributed.init_process_group("cpu:gloo,cuda:nccl", timeout=TIMEOUT)
    else:
        torch.distributed.init_process_group("gloo", timeout=TIMEOUT)
    told = [cfg.output_dir, cfg.resume]
    torch.distributed.broadcast_object_list(told, src=0, device=torch.device("cpu"))
    cfg.output_dir, cfg.resume = told
    if on_cpu(cfg):
        os.environ |= {"DS_ACCELERATOR": "cpu", "ACCELERATE_USE_DEEPSPEED": "true"}
        PartialState(backend="gloo")


def leave() -> None:
    """Take the process group down in order, so that no rank complains of another that has left."""
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


def on_cpu(cfg: DictConfig) -> bool:
    """Whether this is DeepSpeed without a GPU, which accelerate takes only where its state is made beforehand."""
    return bool(cfg.hardware.use_cpu) and cfg.hardware.engine in ("zero2", "zero3")


def arguments(cfg: DictConfig) -> dict:
    """What the engine needs of the trainer's arguments beside conf/hardware; nothing but for DeepSpeed on CPU."""
    if not on_cpu(cfg):
        return {}
    return {"use_cpu": False, "accelerator_config": {"use_configured_state": True}}


def require_processes(count: int) -> None:
    """Raise LaunchError where accelerate counts `count` processes and there are others: they would train apart."""
    if count != runs.world_size():
        raise LaunchError(
            f"{runs.world_size()} processes were started, and accelerate reports {count}: they would train apart, each "
            "on all of the data. Without a GPU write hardware.use_cpu=true"
        )


def require(cfg: DictConfig, accelerator) -> None:
    """Raise LaunchError where accelerate runs another engine, sharding or number of processes than was asked for."""
    require_processes(accelerator.num_processes)
    asked = cfg.hardware.engine or ("ddp" if runs.world_size() > 1 else None)
    found = running(accelerator)
    if asked is not None and found != asked:
        raise LaunchError(
            f"hardware.engine={asked} was asked for, and accelerate runs {found} ({accelerator.distributed_type}); "
            f"nothing was trained. Write hardware.engine={found} if that is meant, and look at hardware.fsdp_config or "
            "hardware.deepspeed if it is not"
        )


def running(accelerator) -> str:
    """The engine by what accelerate reports: none, ddp, fsdp (version 2), fsdp1, zero1 to zero3, or its own word."""
    kind = accelerator.distributed_type
    if kind == DistributedType.NO:
        return "none"
    if kind == DistributedType.FSDP:
        version = accelerator.state.fsdp_plugin.fsdp_version
        return "fsdp" if version == 2 else f"fsdp{version}"
    if kind == DistributedType.DEEPSPEED:
        return f"zero{accelerator.state.deepspeed_plugin.zero_stage}"
    return "ddp" if kind.value.startswith("MULTI_") else kind.value.lower()


def require_readable(cfg: DictConfig, checkpoint: Path, rows: int) -> None:
    """Raise LaunchError where a checkpoint's optimizer cannot be read by this engine, or its batches would be others.

    `rows` are those that each process now takes at a time. One process and DDP read each other's checkpoints; DeepSpeed
    and FSDP read their own, written by as many processes.
    """
    saved = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    before, now = max(1, len(list(checkpoint.glob("rng_state_*.pth")))), runs.world_size()
    theirs = next(
        (name for name, traces in TRACES.items() if any(any(checkpoint.glob(each)) for each in traces)), "plain"
    )
    ours = {"f": "FSDP", "z": "DeepSpeed"}.get((cfg.hardware.engine or "ddp")[0], "plain")
    if theirs != ours or (theirs != "plain" and before != now):
        raise LaunchError(
            f"{checkpoint} was saved by {before} process{'es' * (before > 1)}{WITH[theirs]}, and cannot be read by "
            f"{now}{WITH[ours]}: resume with the same hardware=… and nproc, or start anew elsewhere: output_dir=ANOTHER"
        )
    took = saved["train_batch_size"] * before
    if before != now and took != rows * now:
        fitting = f"hardware.per_device_train_batch_size={took // now}" if took % now == 0 else f"nproc={before}"
        raise LaunchError(
            f"{checkpoint} comes from {before} × {saved['train_batch_size']} rows at a time, and now there are {now} × "
            f"{rows}: the batches would not be those that are left. Write {fitting}"
        )


@contextlib.contextmanager
def whole(model: torch.nn.Module):
    """The model with its weights here: gathered from the other ranks under ZeRO-3, as it is otherwise."""
    sharded = [each for each in model.parameters() if hasattr(each, "ds_id")]
    if not sharded:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(sharded):
        yield


def release(trainer) -> None:
    """Take TRL's inference engine, which computed ZeRO-3's reference log-probs, off the model again.

    Its hooks would count the forwards of the training as its own, and fail where these are others.
    """
    made = getattr(trainer, "_precompute_engine", None)
    if hasattr(getattr(made, "optimizer", None), "destroy"):
        made.optimizer.destroy()
        trainer._precompute_engine = None
