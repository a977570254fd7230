"""The processes of a run: which one this is, how many there are, how many are asked for; and how a process begins."""

import contextlib
import gc
import os
from collections.abc import Iterator

from omegaconf import DictConfig, OmegaConf

from preftune.config import hardware


@contextlib.contextmanager
def imports() -> Iterator[None]:
    """Around the imports of torch and its like: what they bring is never garbage, and is not searched for any.

    A third of a start is saved, and half a second of each full collection later.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


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
