"""Checkpoints that can be trusted: sealed with a hash of each file when whole, checked before they are resumed."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import xxhash
from omegaconf import DictConfig
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback, TrainerState
from transformers.trainer import TRAINING_ARGS_NAME

from preftune.config.errors import LaunchError
from preftune.config.files import write_json
from preftune.config.processes import main_process, world_size
from preftune.models import sharding
from preftune.report.record import MODEL_ONLY, metrics
from preftune.runs.directory import RunError

SEAL = "hashes.json"  # written last: a checkpoint without it is half a checkpoint
PARTS = {  # of a checkpoint that a run can go on from, as one process, DDP, FSDP and DeepSpeed write them
    "weights": ["*.safetensors*", "pytorch_model*", "adapter_model*", "global_step*"],
    "optimizer": ["optimizer.pt", "optimizer.bin", "optimizer_*", "global_step*"],
    "learning-rate schedule": ["scheduler.pt"],
    "random state": ["rng_state*.pth"],
    "step": ["trainer_state.json"],
}
TOKENS = "num_tokens.json"
BLOCK = 2**22


class Seal(TrainerCallback):
    """Seals each checkpoint once all ranks have written theirs, with the count of tokens that TRL keeps in memory."""

    def __init__(self, trainer: Trainer):
        self.trainer = trainer

    def on_save(self, args, state, control, **kwargs):
        wait_for_all()
        if state.is_world_process_zero:
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            write_json(folder / TOKENS, getattr(self.trainer, "_total_train_tokens", None))
            seal(folder)


def seal(folder: Path) -> None:
    """Write the seal of a folder; transformers' pickled arguments, which nothing reads, are taken out first."""
    (folder / TRAINING_ARGS_NAME).unlink(missing_ok=True)
    write_json(folder / SEAL, {str(path.relative_to(folder)): digest(path) for path in files(folder)})


def files(folder: Path) -> Iterator[Path]:
    """Every file below a folder but the seal, in order."""
    return (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != SEAL)


def digest(path: Path) -> str:
    """The xxh3 hash of a file."""
    state = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            state.update(block)
    return state.hexdigest()


def damage(folder: Path) -> str | None:
    """What is wrong with a sealed folder, in words; None where every file is what it was."""
    try:
        sealed = json.loads((folder / SEAL).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return "half written"
    except ValueError:
        return f"{SEAL} is damaged"
    for name, known in sealed.items():
        if not (folder / name).is_file():
            return f"{name} is missing"
        if digest(folder / name) != known:
            return f"{name} is damaged"
    return None


def newest(run: Path, before: float = float("inf")) -> Path | None:
    """The newest whole checkpoint of a run below step `before`; each that is skipped is named, with the reason."""
    found = {
        int(path.name.split("-")[1]): path for path in run.glob("checkpoint-*") if path.name.split("-")[1].isdigit()
    }
    for step in sorted((step for step in found if step < before), reverse=True):
        if (what := damage(found[step])) is None:
            return found[step]
        print(f"{found[step]}: {what}; skipped")
    return None


def lacking(folder: Path) -> list[str]:
    """The parts that a checkpoint was saved without, and no run can go on without."""
    return [part for part, names in PARTS.items() if not any(any(folder.glob(name)) for name in names)]


def require_resumable(run: Path) -> None:
    """Raise RunError where the newest sealed checkpoint of a run lacks a part: the run would not be the same."""
    sealed = {int(path.parent.name.split("-")[1]): path.parent for path in run.glob(f"checkpoint-*/{SEAL}")}
    if sealed and (parts := lacking(newest_sealed := sealed[max(sealed)])):
        raise RunError(
            f"resume=true: {newest_sealed} was saved without its {', '.join(parts)} ({MODEL_ONLY}), and going on "
            "from it would be another run. Start it again elsewhere: output_dir=ANOTHER resume=false "
            "train.save_only_model=false"
        )


def save_whole(target: Path, save: Callable[[str], None]) -> None:
    """Let `save` write a folder under another name, seal it, and move it into place; on every rank of a run."""
    scratch = target.with_name(f".{target.name}-in-writing")
    if main_process():
        shutil.rmtree(scratch, ignore_errors=True)
    wait_for_all()
    save(str(scratch))
    wait_for_all()
    if main_process():
        seal(scratch)
        shutil.rmtree(target, ignore_errors=True)
        scratch.rename(target)
    wait_for_all()


def restore(trainer: Trainer, checkpoint: Path) -> None:
    """Put a checkpoint's weights into the trainer's model."""
    with sharding.whole(trainer.model, changed=True):
        trainer._load_from_checkpoint(str(checkpoint))
    trainer.evaluated = {}  # of the weights before


def carry_on(trainer: Trainer, checkpoint: Path, state: TrainerState) -> None:
    """Give the trainer what transformers does not restore: patience, tokens so far, an evaluation that a kill cut off.

    An evaluation at the end of an epoch comes after the checkpoint of the same step.
    """
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, EarlyStoppingCallback):  # whose patience transformers counts from 0 again
            kept = state.stateful_callbacks.get(type(callback).__name__) or {}
            vars(callback).update(kept.get("attributes", {}))
    if (counted := checkpoint / TOKENS).exists() and hasattr(trainer, "_total_train_tokens"):
        trainer._total_train_tokens = json.loads(counted.read_text()) or 0
    rows = metrics(Path(trainer.args.output_dir))
    known = any(row["step"] == state.global_step and "eval_loss" in row for row in rows)
    if trainer.args.eval_strategy != "epoch" or not float(state.epoch or 0.5).is_integer() or known:
        return
    if trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled:  # whose engines are made by training alone
        print(f"resume: the evaluation of step {state.global_step} was cut off and is not made up")
    else:
        restore(trainer, checkpoint)
        trainer.state = state
        trainer.evaluate()


def wait_for_all() -> None:
    """Until every rank is here."""
    if torch.distributed.is_initialized():
        torch.distributed.barrier()


TRACES = {  # of an engine's optimizer in a checkpoint; the first that are found
    "zero3": ["global_step*/zero_pp_rank_*_model_states.pt"],
    "zero2": ["latest"],
    "fsdp": ["optimizer.bin", "optimizer_*", "pytorch_model_fsdp*"],
}
WITH = {"zero3": " with ZeRO-3", "zero2": " with ZeRO-2", "fsdp": " with FSDP", "plain": ""}


def require_readable(cfg: DictConfig, checkpoint: Path, rows: int) -> None:
    """Raise LaunchError where a checkpoint's optimizer cannot be read by this engine, or its batches would be others.

    `rows` are those that each process now takes at a time. One process and DDP read each other's checkpoints; DeepSpeed
    and FSDP read their own, written by as many processes.
    """
    saved = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    before, now = max(1, len(list(checkpoint.glob("rng_state_*.pth")))), world_size()
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
    if before == now and took != rows * now:
        print(
            f"resume: {rows} rows at a time instead of {saved['train_batch_size']}; what is left of this epoch is "
            "drawn anew"
        )
    elif took != rows * now:
        fitting = f"hardware.per_device_train_batch_size={took // now}" if took % now == 0 else f"nproc={before}"
        raise LaunchError(
            f"{checkpoint} comes from {before} × {saved['train_batch_size']} rows at a time, and now there are {now} × "
            f"{rows}: the batches would not be those that are left. Write {fitting}"
        )
