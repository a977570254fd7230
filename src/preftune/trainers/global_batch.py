"""The global batch, held constant over any number of devices: gradient accumulation follows from it."""

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from preftune.config.errors import UserError

ACCUMULATION = "hardware.gradient_accumulation_steps"


class GlobalBatchError(UserError):
    """Why a global batch cannot be split over these devices, and what would."""


def accumulation(cfg: DictConfig, world_size: int) -> int:
    """gradient_accumulation_steps for `world_size` processes: that of the config, or what `global_batch` leads to.

    Raises GlobalBatchError where the global batch does not divide, where an accumulation typed beside it says something
    else, and where batches have no fixed number of rows.
    """
    hardware = cfg.hardware
    if cfg.global_batch is None:
        return hardware.gradient_accumulation_steps
    whole, rows = cfg.global_batch, hardware.per_device_train_batch_size
    if cfg.fastpath.tokens_per_batch is not None:
        raise GlobalBatchError(
            f"global_batch={whole} counts rows, and fastpath.tokens_per_batch has no fixed number; leave one out"
        )
    if whole % (rows * world_size):
        raise GlobalBatchError(indivisible(whole, rows, world_size))
    steps = whole // (rows * world_size)
    if typed(ACCUMULATION) and hardware.gradient_accumulation_steps != steps:
        given = hardware.gradient_accumulation_steps
        raise GlobalBatchError(
            f"{ACCUMULATION}={given} and global_batch={whole} do not agree: {rows} rows per device × {world_size} "
            f"{devices(world_size)} × {given} = {rows * world_size * given}. Leave {ACCUMULATION} out "
            f"({steps} follows), or write global_batch={rows * world_size * given}"
        )
    return steps


def indivisible(whole: int, rows: int, world_size: int) -> str:
    """What to write where a global batch is no multiple of the rows that one forward of all devices takes."""
    fitting = [n for n in range(1, rows + 1) if whole % (n * world_size) == 0]
    if fitting:
        remedy = f"write hardware.per_device_train_batch_size={fitting[-1]}"
    else:
        near = max(1, round(whole / (rows * world_size))) * rows * world_size
        remedy = f"{world_size} devices do not divide it; write global_batch={near}, or take fewer devices"
    return (
        f"global_batch={whole} is no multiple of {rows} rows per device × {world_size} {devices(world_size)} = "
        f"{rows * world_size}; {remedy}"
    )


def devices(count: int) -> str:
    return "device" if count == 1 else "devices"


def typed(key: str) -> bool:
    """Whether this key was typed on the command line; never so for a config that was composed in code."""
    if not HydraConfig.initialized():
        return False
    return any(each.lstrip("+").partition("=")[0] == key for each in HydraConfig.get().overrides.task)
