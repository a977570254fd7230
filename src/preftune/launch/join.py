"""Ranks among each other: they join on their devices, agree on the run directory, and leave in order."""

import datetime
import os

import torch
from accelerate import PartialState
from omegaconf import DictConfig

from preftune.config.errors import LaunchError
from preftune.trainers.engine import on_cpu

TIMEOUT = datetime.timedelta(hours=2)  # of one rank for another: rank 0 hashes weights, merges models, waits for caches
ACCELERATES = "ACCELERATE_CONFIG_DS_FIELDS"  # set by `accelerate launch` where its configuration speaks of DeepSpeed


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
