"""What machine this is, found out without torch, and the resolvers through which conf/hardware/auto.yaml asks."""

import contextlib
import ctypes
import functools
import gc
import netrc
import os
import platform
import re
import resource
import shutil
import subprocess
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from urllib.parse import urlparse

from omegaconf import DictConfig, OmegaConf

GIB = 2**30
STATUS = Path("/proc/self/status")


@dataclass(frozen=True)
class Accelerator:
    """One accelerator: its name, its memory in bytes (0 where unknown), and whether it multiplies bfloat16."""

    name: str
    memory: int
    bf16: bool


@functools.cache
def accelerator() -> Accelerator | None:
    """The smallest visible accelerator, for settings that fit it fit the others; None without one."""
    found = nvidia() or rocm() or apple()
    return min(found, key=lambda each: each.memory) if found else None


def detect() -> str:
    """The file of conf/hardware that fits this machine: cpu, gpu, gpu24gb or gpu80gb."""
    card = accelerator()
    if card is None:
        return "cpu"
    return "gpu80gb" if card.memory >= 70 * GIB else "gpu24gb" if card.memory >= 20 * GIB else "gpu"


def describe() -> str:
    """One line for the start of a run: what hardware=auto picked, and why."""
    card = accelerator()
    if card is None:
        precision = "bfloat16 in hardware" if cpu_has_bf16() else "no bfloat16 in hardware"
        return f"hardware: cpu (no GPU found; {os.cpu_count()} cores, {precision})"
    memory = f", {card.memory / GIB:.0f} GiB" if card.memory else ""
    return f"hardware: {detect()} ({card.name}{memory}{'' if card.bf16 else ', no bfloat16'})"


def nvidia() -> list[Accelerator]:
    """What nvidia-smi lists, less what CUDA_VISIBLE_DEVICES hides."""
    query = "--query-gpu=index,uuid,name,memory.total,compute_cap"
    rows = [line.split(", ") for line in _output("nvidia-smi", query, "--format=csv,noheader,nounits").splitlines()]
    visible = _visible("CUDA_VISIBLE_DEVICES")
    if visible is not None and any(device.startswith("MIG-") for device in visible):
        return [Accelerator("MIG slice", 0, True)]  # nvidia-smi gives the whole card's memory, not the slice's
    return [
        Accelerator(name, int(memory) * 2**20 if memory.isdigit() else 0, float(capability) >= 8)
        for index, uuid, name, memory, capability in (row for row in rows if len(row) == 5)
        if visible is None or index in visible or any(uuid.startswith(device) for device in visible)
    ]


def rocm() -> list[Accelerator]:
    """What rocm-smi lists, less what the visibility variables hide (PyTorch for ROCm heeds all three)."""
    lists = [_visible(f"{name}_VISIBLE_DEVICES") for name in ("HIP", "ROCR", "CUDA")]
    visible = next((each for each in lists if each is not None), None)
    rows = [line.split(",") for line in _output("rocm-smi", "--showmeminfo", "vram", "--csv").splitlines()]
    return [
        Accelerator(f"ROCm {row[0]}", int(row[1]), True)
        for row in rows
        if len(row) > 1 and row[1].isdigit() and (visible is None or row[0].removeprefix("card") in visible)
    ]


def apple() -> list[Accelerator]:
    """Apple silicon shares its memory with the system, so none is promised."""
    arm = platform.system() == "Darwin" and platform.machine() == "arm64"
    return [Accelerator("Apple silicon", 0, True)] if arm else []


def forget_peak() -> None:
    """Let `peak_memory_gb` begin anew: a pipeline's stages share a process. Without a GPU only Linux can.

    What an earlier stage left to the allocator goes back first, so that this one does not use it uncounted.
    """
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    elif STATUS.exists():
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)  # glibc's
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")


def peak_memory_gb() -> float:
    """The most memory of this process since `forget_peak`: of its accelerator, or resident without one."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    if STATUS.exists() and (found := re.search(r"VmHWM:\s+(\d+) kB", STATUS.read_text())):
        return int(found[1]) * 1024 / 1e9
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e9 if platform.system() == "Darwin" else peak * 1024 / 1e9


def resident_gb() -> float:
    """The memory that this process holds now: of its accelerator, or resident without one."""
    import psutil
    import torch

    return (torch.cuda.memory_allocated() if torch.cuda.is_available() else psutil.Process().memory_info().rss) / 1e9


@functools.cache
def cpu_flags() -> frozenset[str]:
    """What /proc/cpuinfo says that the processor can do; empty where there is none."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return frozenset(word for line in lines if line[:5] in ("flags", "Featu") for word in line.split())


def cpu_has_bf16() -> bool:
    """Whether the processor multiplies bfloat16 itself (AVX512_BF16, AMX, Arm BF16); elsewhere float32 is faster."""
    return bool(cpu_flags() & {"avx512_bf16", "amx_bf16", "bf16"})


def cpu_tflops() -> float:
    """What these cores sustain in training, in TFLOP per second: measured on SmolLM2-135M, two cores at a time.

    The first steps of a run correct it (runs.tracking.Pace).
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
    each = 0.15 if "amx_bf16" in cpu_flags() else 0.055 if cpu_has_bf16() else 0.04
    return round(cores * each, 2)


@functools.cache
def settings(choice: str) -> DictConfig:
    """conf/hardware/<choice>.yaml with the files that it builds on."""
    own = OmegaConf.load(resources.files("preftune.conf") / "hardware" / f"{choice}.yaml")
    below = [settings(name) for name in own.pop("defaults", []) if name != "_self_"]
    return OmegaConf.merge(*below, own)


def _output(*command: str) -> str:
    """What a command prints; nothing where it is absent, fails or hangs, as nvidia-smi does on a broken driver."""
    if shutil.which(command[0]) is None:
        return ""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""


def _visible(variable: str) -> list[str] | None:
    """The devices that an environment variable leaves visible; None where it is not set."""
    value = os.environ.get(variable)
    if value is None:
        return None
    return [device.strip() for device in value.split(",") if device.strip() not in ("", "-1")]


def of_machine(key: str, *, _root_: DictConfig) -> object:
    """A key of the file that fits this machine, or of the one that `machine` names (recipes.plan)."""
    return settings(OmegaConf.select(_root_, "machine", default=None) or detect())[key]


OmegaConf.register_new_resolver("auto", of_machine, replace=True)
OmegaConf.register_new_resolver("cpu_bf16", cpu_has_bf16, replace=True)
OmegaConf.register_new_resolver("cpu_tflops", cpu_tflops, replace=True)


def wandb_mode() -> tuple[str, str]:
    """(mode, why) for wandb.init: WANDB_MODE if set, online where a key is found, else offline. Never asks."""
    import wandb

    if mode := os.environ.get("WANDB_MODE"):
        return mode, f"W&B {mode} (WANDB_MODE)"
    host = urlparse(os.environ.get("WANDB_BASE_URL") or wandb.Settings().base_url).hostname
    try:
        known = netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        known = False
    if os.environ.get("WANDB_API_KEY") or known:
        return "online", "W&B online"
    return "offline", "W&B offline: no API key found (WANDB_API_KEY, or `wandb login`)"
