"""Ranks among each other: they join, agree on the run directory, and prove that the engine is the one asked for."""

from accelerate import Accelerator
from accelerate.utils import DistributedType
from omegaconf import DictConfig
from transformers import Trainer

from preftune.config.errors import LaunchError
from preftune.config.processes import world_size


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
    if count != world_size():
        raise LaunchError(
            f"{world_size()} processes were started, and accelerate reports {count}: they would train apart, each "
            "on all of the data. Without a GPU write hardware.use_cpu=true"
        )


def require(cfg: DictConfig, accelerator: Accelerator) -> None:
    """Raise LaunchError where accelerate runs another engine, precision or number of processes than was asked for."""
    require_processes(accelerator.num_processes)
    asked = cfg.hardware.engine or ("ddp" if world_size() > 1 else None)
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


def running(accelerator: Accelerator) -> str:
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


def release(trainer: Trainer) -> None:
    """Let go of what computed the reference log-probs beforehand: ZeRO-3's engine of TRL's, FSDP's copy of the policy.

    The engine's hooks would count the forwards of the training as its own, and fail where these are others. A reference
    that is another model stays, as TRL keeps it.
    """
    if trainer.is_fsdp_enabled and trainer.starts_as_reference and getattr(trainer, "precompute_ref_logps", False):
        trainer.ref_model = None
    made = getattr(trainer, "_precompute_engine", None)
    if hasattr(getattr(made, "optimizer", None), "destroy"):
        made.optimizer.destroy()
        trainer._precompute_engine = None
