"""A resumed run is the same run, whatever optimizer, schedule, adapter and evaluation; or it says that it is not."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from trl import DPOTrainer

from preftune.report.record import metrics
from preftune.runs.checkpoints import PARTS, SEAL, lacking
from preftune.runs.directory import RunError
from preftune.runs.training import train

pytestmark = pytest.mark.slow

STEPS = ("train.max_steps=4", "train.save_steps=2", "train.save_total_limit=null")


def letters(prompt, answer):
    return float(len(set(answer)))


def losses(run: Path) -> list[float]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if "loss" in row]


def broken_off(run: Path, step: int) -> None:
    """Leave of a finished run what a kill after `step` leaves."""
    (run / "summary.json").unlink()
    shutil.rmtree(run / "model")
    for path in run.glob("checkpoint-*"):
        if int(path.name.split("-")[1]) > step:
            shutil.rmtree(path)


@pytest.mark.parametrize(
    "how",
    [
        ("train.lr_scheduler_type=linear", "train.eval_strategy=no"),
        ("train.lr_scheduler_type=cosine_with_restarts", "hardware.optim=adafactor", "train.eval_strategy=epoch"),
        ("lora=dora", "hardware.optim=sgd", "train.eval_strategy=steps", "train.eval_steps=2"),
        ("lora=none", "hardware.optim=adamw_torch", "train.lr_scheduler_type=constant_with_warmup"),
        ("loss=orpo", "lora=qlora", "hardware.optim=rmsprop"),
        ("loss=reward",),
        ("loss=rloo", "loss.num_generations=2", "loss.max_completion_length=8", f"loss.rewards=[{__name__}.letters]"),
        ("loss=online_dpo", "loss.max_new_tokens=8", f"loss.rewards=[{__name__}.letters]"),
    ],
    ids=lambda how: " ".join(how),
)
def test_a_resumed_run_is_the_unbroken_one(composed, how, capsys):
    cfg = composed("dpo", *STEPS, *how)
    train(cfg)
    run = Path(cfg.output_dir)
    unbroken = losses(run)
    broken_off(run, 2)
    train(composed("dpo", *STEPS, *how, "resume=true"))
    assert "resume: checkpoint-2" in capsys.readouterr().out
    assert losses(run) == pytest.approx(unbroken, abs=1e-6)


def test_the_patience_of_early_stopping_goes_on_where_it_was(composed):
    each_step = ("train.eval_strategy=steps", "train.eval_steps=1", "train.save_steps=1", "train.save_total_limit=null")
    how = (
        "train.max_steps=8",
        "train.learning_rate=0",
        "health.early_stopping=3",
        *each_step,
    )  # nothing gets better
    cfg = composed("dpo", *how)
    train(cfg)
    run = Path(cfg.output_dir)
    unbroken = losses(run)
    assert 2 < len(unbroken) < 8  # nothing gets better
    broken_off(run, 2)
    train(composed("dpo", *how, "resume=true"))
    assert losses(run) == pytest.approx(unbroken, abs=1e-6)


def test_what_was_logged_is_what_the_unbroken_run_logs(composed):
    """A kill between the last checkpoint of an epoch and its evaluation."""
    how = ("train.num_train_epochs=2", "train.max_steps=-1", "train.save_steps=1", "train.save_total_limit=null")
    cfg = composed("dpo", *how, "train.eval_strategy=epoch")
    train(cfg)
    run = Path(cfg.output_dir)
    unbroken = metrics(run)
    first = next(row["step"] for row in unbroken if "eval_loss" in row)
    broken_off(run, first)
    (run / "metrics.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in unbroken if row["step"] <= first and "eval_loss" not in row)
    )
    train(composed("dpo", *how, "train.eval_strategy=epoch", "resume=true"))
    again = metrics(run)
    for name in ("loss", "num_tokens", "eval_loss", "eval_num_tokens", "eval_rewards/accuracies"):
        values = [[row[name] for row in rows if name in row] for rows in (unbroken, again)]
        assert values[1] == pytest.approx(values[0], abs=1e-6), name
    assert len([row for row in again if "eval_loss" in row]) == 2


def test_checkpoints_of_the_model_alone_are_named_at_the_start_and_cannot_be_resumed(composed, capsys):
    cfg = composed("dpo", *STEPS, "+train.save_only_model=true")
    train(cfg)
    assert "no resume=true from them" in capsys.readouterr().out
    run = Path(cfg.output_dir)
    broken_off(run, 2)
    with pytest.raises(RunError, match="without its optimizer, learning-rate schedule, random state") as refused:
        train(composed("dpo", *STEPS, "+train.save_only_model=true", "resume=true"))
    assert "output_dir=ANOTHER resume=false train.save_only_model=false" in str(refused.value)
    remedy = (f"output_dir={run}-again", "resume=false", "train.save_only_model=false")
    train(composed("dpo", *STEPS, "+train.save_only_model=true", *remedy))


def test_the_seal_knows_which_parts_a_checkpoint_must_have(composed):
    cfg = composed("dpo", *STEPS)
    train(cfg)
    folder = Path(cfg.output_dir) / "checkpoint-2"
    assert lacking(folder) == [] and SEAL in {path.name for path in folder.iterdir()}
    for part, names in PARTS.items():
        for name in names:
            for path in folder.glob(name):
                path.unlink()
        assert lacking(folder)[-1] == part or part in lacking(folder)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ("hardware.optim=sgd", "hardware.optim"),
        ("hardware.per_device_train_batch_size=2", "per_device_train_batch_size"),
        ("hardware.gradient_accumulation_steps=2", "gradient_accumulation_steps"),
    ],
)
def test_another_optimizer_or_batch_is_not_the_same_run(composed, change, named):
    cfg = composed("dpo", *STEPS)
    train(cfg)
    broken_off(Path(cfg.output_dir), 2)
    with pytest.raises(RunError, match=named):
        train(composed("dpo", *STEPS, change, "resume=true"))


def test_memory_that_runs_out_names_fewer_rows_at_a_time_and_the_run_goes_on_so(composed, monkeypatch, capsys):
    cfg = composed("dpo", *STEPS, "hardware.per_device_train_batch_size=4")
    step = DPOTrainer.training_step

    def full(trainer, *args, **kwargs):
        if trainer.state.global_step == 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return step(trainer, *args, **kwargs)

    monkeypatch.setattr(DPOTrainer, "training_step", full)
    with pytest.raises(RunError, match="out of memory") as ended:
        train(cfg)
    monkeypatch.undo()
    keys = [word.strip(",:") for word in str(ended.value).split() if "=" in word]
    assert "hardware.per_device_train_batch_size=2" in keys and "resume=true" in keys
    train(composed("dpo", *STEPS, *keys))
    said = capsys.readouterr().out
    assert "resume: checkpoint-2" in said and "2 rows at a time instead of 4" in said
    assert len(losses(Path(cfg.output_dir))) == 4
