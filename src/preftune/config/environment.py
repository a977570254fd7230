"""`preftune env`: what a bug report needs, over what `trl env` prints."""

import importlib.util
import os
import shutil
from importlib.metadata import PackageNotFoundError, version

import torch
from huggingface_hub import constants, get_session, get_token

from preftune.config import hardware
from preftune.config.errors import brief
from preftune.config.hardware import wandb_mode

KERNELS = (
    "bitsandbytes",
    "triton",
    "flash_attn",
    "liger_kernel",
    "kernels",
    "causal_conv1d",
    "mamba_ssm",
    "deepspeed",
    "vllm",
)


def report() -> str:
    """Versions, devices, kernels and the reach of hub and W&B, one `name: value` per line."""
    from trl.scripts.env import print_env

    print_env()
    lines = {
        "preftune": version("preftune"),
        "Device": hardware.describe(),
        "bf16": "yes" if torch.cuda.is_available() and torch.cuda.is_bf16_supported() else "on CPU",
        "Kernels": ", ".join(f"{name} {installed(name)}" for name in KERNELS if importlib.util.find_spec(name))
        or "none",
        "bitsandbytes in 4 bits": four_bits(),
        "Hub": reach_of_hub(),
        "Hub token": "found" if get_token() else "none",
        "W&B": wandb_mode()[1],
        "Free disk here": f"{shutil.disk_usage('.').free / 1e9:,.0f} GB",
        "Cache": os.environ.get("PREFTUNE_CACHE", "~/.cache/preftune"),
    }
    return "\n".join(f"- {name}: {value}" for name, value in lines.items())


def installed(package: str) -> str:
    """The version of a package, empty where its distribution has another name."""
    try:
        return version(package.replace("_", "-"))
    except PackageNotFoundError:
        return ""


def four_bits() -> str:
    """Whether a 4-bit layer computes on this machine's device."""
    try:
        import bitsandbytes

        device = "cuda" if torch.cuda.is_available() else "cpu"
        layer = bitsandbytes.nn.Linear4bit(64, 64, quant_type="nf4").to(device)
        return "works" if layer(torch.ones(1, 64, device=device)).isfinite().all() else "gives no numbers"
    except Exception as error:
        return f"does not work ({brief(error)})"


def reach_of_hub() -> str:
    """Whether the hub answers within five seconds."""
    if constants.HF_HUB_OFFLINE:
        return "not asked (HF_HUB_OFFLINE)"
    try:
        get_session().get(constants.ENDPOINT, timeout=5)
        return f"{constants.ENDPOINT} answers"
    except Exception as error:
        return f"{constants.ENDPOINT} does not answer ({brief(error)})"
