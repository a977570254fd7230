"""The run directory: opened once, never overwritten, and able to say what made it."""

import json
import os
import platform
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from omegaconf import DictConfig, OmegaConf
from transformers.trainer_utils import get_last_checkpoint

from preftune.errors import UserError

PACKAGES = ["preftune", "torch", "trl", "transformers", "datasets", "peft", "accelerate", "bitsandbytes", "wandb"]
MAY_CHANGE = {"resume", "tracking", "hardware"}  # what a resumed run may set anew without becoming another run


class RunError(UserError):
    """Why a run directory cannot be used, and the ways on."""


def write_text(path: Path, text: str) -> None:
    """Write under a temporary name and move into place, so that a reader or a crash never meets half a file."""
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    scratch.write_text(text, encoding="utf-8")
    os.replace(scratch, path)


def write_json(path: Path, value: object) -> None:
    """`write_text` for a JSON value, indented for people."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def open_run(cfg: DictConfig) -> Path:
    """The run directory of `cfg`, new, or with `resume=true` an unfinished one of the same config.

    Raises RunError where the directory holds a run already, or where there is nothing to resume.
    """
    run = Path(cfg.output_dir)
    config = OmegaConf.to_container(cfg, resolve=True)
    if begun(run):
        if not cfg.resume:
            state = "a finished run" if (run / "summary.json").exists() else "an unfinished run"
            raise RunError(
                f"output_dir={run} holds {state}, and nothing is overwritten. Go on with it: resume=true. Or start "
                "another: output_dir=ANOTHER"
            )
        if (run / "summary.json").exists():
            raise RunError(f"output_dir={run} holds a finished run; there is nothing to resume. See {run}/summary.json")
        before = OmegaConf.to_container(OmegaConf.load(run / "config.yaml"))
        changed = sorted(k for k in config | before if k not in MAY_CHANGE and config.get(k) != before.get(k))
        if changed:
            raise RunError(
                f"resume=true: {', '.join(changed)} differ from {run}/config.yaml, and the run would not be the same. "
                "Give the same settings, or start another run: output_dir=ANOTHER"
            )
    elif cfg.resume:
        raise RunError(f"resume=true: there is no run in output_dir={run}. Leave resume out to start one there")
    elif run.exists() and any(run.iterdir()) and not (run / "config.yaml").exists():
        raise RunError(
            f"output_dir={run} is not empty and holds no run of preftune's. Name another: output_dir=ANOTHER"
        )
    run.mkdir(parents=True, exist_ok=True)
    write_text(run / "config.yaml", OmegaConf.to_yaml(OmegaConf.create(config)))
    return run


def begun(run: Path) -> bool:
    """Whether there is anything to lose: a run, or a stage of one, that got as far as its manifest.

    What failed before that (no model, bad data) left its config alone, and may be started again in its place.
    """
    return any(run.glob("manifest.json")) or any(run.glob("*/manifest.json"))


def checkpoint_to_resume(run: Path, cfg: DictConfig) -> str | None:
    """The newest checkpoint of an unfinished run, or None where it starts from the beginning."""
    return get_last_checkpoint(str(run)) if cfg.resume else None


def manifest(cfg: DictConfig, **identities: object) -> dict:
    """What made this run: versions, code, command line, seed, machine, and the identities that the caller knows."""
    return {
        "created": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "seed": cfg.train.seed,
        "git_commit": _git_commit(),
        "versions": {name: _version(name) for name in PACKAGES} | {"python": platform.python_version()},
        "hardware": {"machine": platform.machine(), "system": platform.platform(), "cores": os.cpu_count()} | _device(),
        **identities,
    }


def _device() -> dict:
    import torch

    if not torch.cuda.is_available():
        return {"device": "cpu", "threads": torch.get_num_threads()}
    return {"device": torch.cuda.get_device_name(0), "devices": torch.cuda.device_count()}


def _git_commit() -> str | None:
    """The commit of the user's checkout that the run was started in, with `-dirty` where it has local changes."""
    try:
        head = subprocess.run(["git", "describe", "--always", "--dirty", "--abbrev=40"], capture_output=True, text=True)
    except FileNotFoundError:
        return None
    return head.stdout.strip() or None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
