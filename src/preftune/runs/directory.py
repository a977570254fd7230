"""The run directory: opened once, never overwritten, and able to say what made it."""

import contextlib
import math
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from filelock import FileLock, Timeout
from omegaconf import DictConfig, OmegaConf

from preftune.config.errors import Interrupted, Stopped, UserError, brief, disk_is_full, out_of_memory
from preftune.config.files import write_json, write_text
from preftune.config.processes import main_process
from preftune.report.record import begun, way_on

PACKAGES = ["preftune", "torch", "trl", "transformers", "datasets", "peft", "accelerate", "bitsandbytes", "wandb"]
# What a resumed run may set anew and be the same run
MAY_CHANGE = {"resume", "tracking", "hardware", "nproc", "health", "gate", "fit_check"}
# Of hardware, which may change: what gives each step its rows, the product of both on the same number of processes
ROWS_OF_A_STEP = ("per_device_train_batch_size", "gradient_accumulation_steps")


class RunError(UserError):
    """Why a run directory cannot be used, and the ways on."""


@contextlib.contextmanager
def opened(cfg: DictConfig, at_end: Callable[[Path], object], stages: bool = False) -> Iterator[Path]:
    """The run directory of `cfg`, held by this process alone; status.json says how the run ended, then comes `at_end`.

    `stages`: whether it is a pipeline's, whose stages know by themselves what is finished and what has changed. Raises
    RunError where another process holds it, where `open_run` does, and where the disk is full.
    """
    run = Path(cfg.output_dir)
    if not main_process():
        yield run
        return
    try:
        run.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(
            f"output_dir={run}: no folder can be made there ({error.strerror}): output_dir=ANOTHER"
        ) from None
    lock = FileLock(run / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise RunError(
            f"output_dir={run}: another process is training there. Name another: output_dir=ANOTHER"
        ) from None
    try:
        _clear(run, but=".lock")
        open_run(cfg, stages)
        try:
            with _ending(run, cfg):
                yield run
        finally:
            at_end(run)
    finally:
        with contextlib.suppress(OSError):
            (run / ".lock").unlink()
            run.rmdir()  # only where nothing was written into it
        lock.release()


@contextlib.contextmanager
def _ending(run: Path, cfg: DictConfig) -> Iterator[None]:
    """Keep status.json true: running, finished, stopped (by a guard), interrupted (by a signal) or failed."""
    state, why = "failed", None
    try:
        write_json(run / "status.json", {"state": "running", "process": os.getpid(), "machine": platform.node()})
        yield
        state = "finished"
    except (Stopped, Interrupted) as error:
        state, why = "stopped" if isinstance(error, Stopped) else "interrupted", str(error)
        raise
    except Exception as error:
        why = f"{type(error).__name__}: {error}"
        if out_of_memory(error):
            why = f"out of memory ({run}): {brief(error)}. {less_at_a_time(cfg)}"
            raise RunError(why) from error
        if disk_is_full(error):
            why = f"the disk is full ({run}): nothing that was there is lost. Make room. {way_on(cfg)}"
            raise RunError(why) from error
        raise
    finally:
        with contextlib.suppress(OSError):
            write_json(run / "status.json", {"state": state, "why": why})


def less_at_a_time(cfg: DictConfig) -> str:
    """How to go on with fewer rows at a time and as many per step."""
    rows, steps = cfg.hardware.per_device_train_batch_size, cfg.hardware.gradient_accumulation_steps
    parts = next((n for n in (2, 3, 5, rows) if rows % n == 0), 1)
    if parts == 1 or (cfg.loss.get("view") == "unpaired" and rows == parts):  # KTO's KL term is a mean over the batch
        return (
            "It takes one batch of rows at a time already: shorten the rows (train.max_length), or take "
            f"hardware.gradient_checkpointing=true, lora=qlora. {way_on(cfg)}"
        )
    fewer = f"hardware.per_device_train_batch_size={rows // parts}"
    if cfg.global_batch is None:
        fewer += f" hardware.gradient_accumulation_steps={steps * parts}"
    return f"{way_on(cfg)}, and with {fewer}: fewer rows at a time, and as many per step"


def mark_finished(run: Path) -> None:
    """Say of a run whose process was killed in its last moments that it is finished."""
    write_json(run / "status.json", {"state": "finished", "why": None})
    _clear(run)


def _clear(run: Path, but: str | None = None) -> None:
    """Delete what a process left that was killed while it wrote; nothing else in a run has a name with a dot."""
    for path in run.glob(".*"):
        if path.name != but:
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def open_run(cfg: DictConfig, stages: bool = False) -> Path:
    """The run directory of `cfg`, new, or with `resume=true` an unfinished one of the same config.

    Raises RunError where the directory holds a run already, or where there is nothing to resume.
    """
    run = Path(cfg.output_dir)
    config = OmegaConf.to_container(cfg, resolve=True)
    if begun(run):
        if not cfg.resume:
            state = "a finished run" if (run / "summary.json").exists() else "an unfinished run"
            go_on = "" if cfg.train.get("save_only_model") else "Go on with it: resume=true. Or start"
            raise RunError(
                f"output_dir={run} holds {state}, and nothing is overwritten. {go_on or 'Start'} another: "
                "output_dir=ANOTHER"
            )
        differing = changed(cfg, run)
        if (run / "summary.json").exists() and not stages:
            told = f"output_dir={run} holds a finished run; there is nothing to resume. See {run}/summary.json"
            other = f". It had other settings ({', '.join(differing)}): output_dir=ANOTHER resume=false"
            raise RunError(told + (other if differing else ""))
        if differing and not stages:
            raise RunError(
                f"resume=true: {', '.join(differing)} differ from {run}/config.yaml, and the run would not be the "
                "same. Give the same settings, or start another run: output_dir=ANOTHER"
            )
    elif cfg.resume:
        raise RunError(f"resume=true: there is no run in output_dir={run}. Leave resume out to start one there")
    elif (
        run.exists()
        and any(path.name not in (".lock", "lineage.json") for path in run.iterdir())
        and not (run / "config.yaml").exists()
    ):
        raise RunError(
            f"output_dir={run} is not empty and holds no run of preftune's. Name another: output_dir=ANOTHER"
        )
    run.mkdir(parents=True, exist_ok=True)
    write_text(run / "config.yaml", OmegaConf.to_yaml(OmegaConf.create(config)))
    return run


def changed(cfg: DictConfig, run: Path) -> list[str]:
    """The sections of `cfg` that differ from those which the run was begun with, and may not."""
    config = OmegaConf.to_container(cfg, resolve=True)
    before = OmegaConf.to_container(OmegaConf.load(run / "config.yaml"))
    keys = sorted(k for k in config | before if k not in MAY_CHANGE and config.get(k) != before.get(k))
    now, then = (each.get("hardware") or {} for each in (config, before))
    if kind_of_optimizer(now) != kind_of_optimizer(then):
        keys.append(f"hardware.optim (it was {then.get('optim')})")
    apart = [key for key in ROWS_OF_A_STEP if now.get(key) != then.get(key)]
    rows = [math.prod(each.get(key) or 1 for key in ROWS_OF_A_STEP) for each in (now, then)]
    if rows[0] != rows[1] and config.get("nproc") == before.get("nproc") and now.get("nodes") == then.get("nodes"):
        keys += [f"hardware.{key} (it was {then.get(key)})" for key in apart]
    return keys


def kind_of_optimizer(hardware: dict) -> str:
    """The optimizer whatever its kernel: AdamW's state is one, fused or not."""
    name = str(hardware.get("optim"))
    return "adamw_torch" if name in ("adamw_torch", "adamw_torch_fused") else name


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
