"""The processes of a run: which one this is, how many there are, and how many are asked for."""

import os

from omegaconf import DictConfig, OmegaConf

from preftune.config import hardware


def main_process() -> bool:
    """Whether this process is the one of its run that writes."""
    return int(os.environ.get("RANK", 0)) == 0


def world_size() -> int:
    """How many processes this run has."""
    return int(os.environ.get("WORLD_SIZE", 1))


def processes(cfg: DictConfig) -> int:
    """How many processes each machine is asked for: nproc; without it one, and with an engine one per visible GPU."""
    if cfg.nproc or not cfg.hardware.engine or cfg.hardware.use_cpu:
        return cfg.nproc or 1
    return max(1, len(hardware.nvidia() or hardware.rocm()))


def sharding_engine(cfg: DictConfig) -> str:
    """What the planner is to count with: none, fsdp, zero2, zero3, or one of the last with `_offload`."""
    asked = OmegaConf.to_container(cfg.hardware, resolve=True)
    engine = asked["engine"]
    if engine in (None, "ddp"):
        return "none"
    offload = (asked.get("deepspeed") or {}).get("zero_optimization", {}).get("offload_optimizer")
    return f"{engine}_offload" if offload else engine
