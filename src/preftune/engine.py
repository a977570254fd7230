"""Ranks among each other: they join, agree on the run directory, and prove that the engine is the one asked for."""

import contextlib
import datetime
import json
import os
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from omegaconf import DictConfig
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from preftune import runs
from preftune.launch import LaunchError

TIMEOUT = datetime.timedelta(hours=2)  # of one rank for another: rank 0 hashes weights, merges models, waits for caches

TRACES = {  # of an engine's optimizer in a checkpoint; the first that are found
    "zero3": ["global_step*/zero_pp_rank_*_model_states.pt"],
    "zero2": ["latest"],
    "fsdp": ["optimizer.bin", "optimizer_*", "pytorch_model_fsdp*"],
}
ACCELERATES = "ACCELERATE_CONFIG_DS_FIELDS"  # set by `accelerate launch` where its configuration speaks of DeepSpeed
WITH = {"zero3": " with ZeRO-3", "zero2": " with ZeRO-2", "fsdp": " with FSDP", "plain": ""}


def join(cfg: DictConfig) -> None:
    """Connect this rank with the others, on its device, and give all of them rank 0's run directory.

    The process group stands from here on, for CPU and GPU tensors alike; accelerate and DeepSpeed take it as it is.
    """
    if not cfg.hardware.use_cpu and torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        torch.distributed.init_process_group("cpu:gloo,cuda:nccl", timeout=TIMEOUT)
    else:
        torch.distributed.init_process_group("gloo", timeout=TIMEOUT)
    require_fitting(cfg)
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


def require_fitting(cfg: DictConfig) -> None:
    """Raise LaunchError where the engine's settings are given twice, or the model cannot be sharded by it."""
    if os.environ.get(ACCELERATES) and cfg.hardware.get("deepspeed"):
        raise LaunchError(
            "`accelerate launch` was given DeepSpeed's settings, and hardware.deepspeed gives them too. Launch without "
            f"them (--multi_gpu), or write hardware.engine={cfg.hardware.engine} in the place of hardware=…, if its "
            "stage is this"
        )
    if cfg.hardware.engine == "zero3" and "quantization" in cfg.lora:
        raise LaunchError(
            "hardware=zero3 cannot shard quantized weights: with lora=qlora write hardware=ddp or "
            "hardware=zero2_offload, or with hardware=zero3 write lora=lora"
        )


def require_processes(count: int) -> None:
    """Raise LaunchError where accelerate counts `count` processes and there are others: they would train apart."""
    if count != runs.world_size():
        raise LaunchError(
            f"{runs.world_size()} processes were started, and accelerate reports {count}: they would train apart, each "
            "on all of the data. Without a GPU write hardware.use_cpu=true"
        )


def require(cfg: DictConfig, accelerator) -> None:
    """Raise LaunchError where accelerate runs another engine, precision or number of processes than was asked for."""
    require_processes(accelerator.num_processes)
    asked = cfg.hardware.engine or ("ddp" if runs.world_size() > 1 else None)
    found = running(accelerator)
    if asked is not None and found != asked:
        raise LaunchError(
            f"hardware.engine={asked} was asked for, and accelerate runs {found} ({accelerator.distributed_type}); "
            f"nothing was trained. Write hardware.engine={found} if that is meant, and look at hardware.fsdp_config or "
            "hardware.deepspeed if it is not"
        )
    require_precision(cfg, accelerator.mixed_precision)


def require_precision(cfg: DictConfig, found: str) -> None:
    """Raise LaunchError where accelerate's own configuration, or its environment, has brought in another precision."""
    asked = next((name for name in ("bf16", "fp16") if cfg.hardware.get(name)), "no")
    if asked != found:
        raise LaunchError(
            f"accelerate trains in mixed precision {found}, as its own configuration or ACCELERATE_MIXED_PRECISION "
            f"says, and {asked} was asked for: `accelerate launch --mixed_precision={asked}`, or hardware.{found}=true"
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
    ours = cfg.hardware.engine if cfg.hardware.engine in TRACES else "plain"
    if theirs != ours or (theirs != "plain" and before != now):
        raise LaunchError(
            f"{checkpoint} was saved by {before} process{'es' * (before > 1)}{WITH[theirs]}, and cannot be read by "
            f"{now}{WITH[ours]}: resume with the same hardware=… and nproc, or start anew elsewhere: output_dir=ANOTHER"
        )
    took = saved["train_batch_size"] * before
    if took != rows * now:
        fitting = f"hardware.per_device_train_batch_size={took // now}" if took % now == 0 else f"nproc={before}"
        raise LaunchError(
            f"{checkpoint} comes from {before} × {saved['train_batch_size']} rows at a time, and now there are {now} × "
            f"{rows}: the batches would not be those that are left. Write {fitting}"
        )


@contextlib.contextmanager
def whole(model: torch.nn.Module, changed: bool = False):
    """The model with its weights here: gathered from the other ranks under ZeRO-3, as it is otherwise.

    `changed`: whether they are set meanwhile; every rank then goes on with what rank 0 has set.
    """
    sharded = [each for each in model.parameters() if hasattr(each, "ds_id")]
    if not sharded:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(sharded, modifier_rank=0 if changed else None):
        yield


def release(trainer) -> None:
    """Take TRL's inference engine, which computed ZeRO-3's reference log-probs, off the model again.

    Its hooks would count the forwards of the training as its own, and fail where these are others.
    """
    made = getattr(trainer, "_precompute_engine", None)
    if hasattr(getattr(made, "optimizer", None), "destroy"):
        made.optimizer.destroy()
        trainer._precompute_engine = None


def forget() -> None:
    """Let go of a DeepSpeed training's settings, so that models are loaded whole again and another training can follow.

    transformers shards every model that is loaded while they are alive: rank 0, which merges and evaluates alone, would
    wait for ranks that wait for it. And accelerate takes the settings of a second training only over an empty state.
    """
    unset_hf_deepspeed_config()
    AcceleratorState._reset_state()
