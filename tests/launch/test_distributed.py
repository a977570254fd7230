"""Several processes train what one does: losses, checkpoints, files; and they end together."""

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from preftune.config.errors import LaunchError
from preftune.launch.join import ACCELERATES, require_fitting
from preftune.runs.checkpoints import require_readable
from preftune.runs.training import train

pytestmark = pytest.mark.slow

STEPS = 20
LINE = [
    *("model=tiny", "hardware.bf16=false", "tracking=none", "gate.on_fail=warn", "samples=1", "fit_check=false"),
    *(f"train.max_steps={STEPS}", "train.save_steps=10", "train.logging_steps=1", "train.eval_strategy=no"),
    *("train.learning_rate=3e-3", "hardware.per_device_train_batch_size=4", "train.num_train_epochs=2"),
    *("data=file", "data.path=train.jsonl", "data.eval_split=eval.jsonl", "data.eval_fraction=0.05"),
]
DEEPSPEED = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed")


def start(run: Path, *more: str, recipe: str = "recipes.dpo", by: tuple = ()) -> subprocess.Popen:
    command = [sys.executable, *by, "-m", recipe, *LINE, f"fastpath.reference_cache={run.parent}/cache", *more]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "cwd": run.parent}
    return subprocess.Popen([*command, f"output_dir={run}"], **pipes)


def finished(run: Path, *more: str, **how) -> str:
    process = start(run, *more, **how)
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 0, output
    return output


def losses(run: Path) -> list[float]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    rows = {row["step"]: row["loss"] for row in rows if "loss" in row}
    assert sorted(rows) == list(range(1, STEPS + 1))
    return list(rows.values())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Eighty pairs of many lengths, ten steps of eight: so two epochs have no batch that is not full."""
    folder = tmp_path_factory.mktemp("distributed")
    rows = [
        {"prompt": f"Say {i}.", "chosen": "Yes, " * (1 + i * 7 % 20) + f"{i}.", "rejected": "No! " * (1 + i * 5 % 13)}
        for i in range(96)
    ]
    for name, part in (("train", rows[:80]), ("eval", rows[80:])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    return folder


@pytest.fixture(scope="module")
def two(folder):
    output = finished(folder / "two", "hardware=ddp", "nproc=2")
    return folder / "two", output


@pytest.fixture
def alone(folder, composed, monkeypatch):
    """alone("one"): the config of the same run in one process, with a batch as large."""
    monkeypatch.chdir(folder)
    larger = "hardware.per_device_train_batch_size=8"
    cache = f"fastpath.reference_cache={folder}/cache"
    return lambda name, *more: composed("dpo", *LINE, cache, f"output_dir={folder / name}", larger, *more)


def test_two_processes_train_what_one_does_with_a_batch_as_large(two, alone, folder):
    summary = train(alone("one"))
    one = losses(folder / "one")
    assert abs(one[0] - one[-1]) > 0.05
    assert losses(two[0]) == pytest.approx(one, abs=1e-4)
    first = json.loads((two[0] / "summary.json").read_text())
    assert first["reference_forwards"] > 0 and summary["reference_forwards"] == 0  # one cache for both


@pytest.mark.parametrize("loss", ["dpo", "orpo"])
def test_two_processes_evaluate_what_one_does_and_no_row_twice(alone, folder, loss):
    rows = (folder / "eval.jsonl").read_text().splitlines(keepends=True)
    (folder / "odd.jsonl").write_text("".join(rows[:13]))
    more = (f"loss={loss}", "data.eval_split=odd.jsonl", "train.eval_strategy=epoch", "train.max_steps=2",
            "hardware.per_device_eval_batch_size=4")  # fmt: skip
    finished(folder / f"two-{loss}", "hardware=ddp", "nproc=2", *more)
    one = train(alone(f"one-{loss}", *more))["held_out"]
    two = json.loads((folder / f"two-{loss}" / "summary.json").read_text())["held_out"]
    names = [name for name in one if name.startswith("eval_") and "second" not in name and "time" not in name]
    assert {"eval_loss", "eval_rewards/accuracies"} <= set(names)
    assert {name: two[name] for name in names} == pytest.approx({name: one[name] for name in names}, rel=1e-3, abs=1e-4)


def test_rank_0_alone_writes_and_speaks(two):
    run, output = two
    for line in ("model: ", "data: ", "Run   "):
        assert sum(each.startswith(line) for each in output.splitlines()) == 1
    assert not [path for path in run.rglob(".*")]
    assert json.loads((run / "status.json").read_text())["state"] == "finished"


def half_of(run: Path, name: str) -> Path:
    """A copy of a finished run as it was at its checkpoint in the middle."""
    copy = run.parent / name
    shutil.copytree(run, copy)
    (copy / "summary.json").unlink()
    shutil.rmtree(copy / f"checkpoint-{STEPS}")
    (copy / "config.yaml").write_text((copy / "config.yaml").read_text().replace(str(run), str(copy)))
    return copy


def test_a_checkpoint_of_two_processes_is_resumed_by_one(two, alone):
    resumed = half_of(two[0], "resumed")
    half_of(two[0], "refused")
    train(alone("resumed", "resume=true"))
    assert losses(resumed) == pytest.approx(losses(two[0]), abs=1e-4)
    with pytest.raises(LaunchError, match="2 × 4 rows at a time.*per_device_train_batch_size=8"):
        train(alone("refused", "resume=true", "hardware.per_device_train_batch_size=4"))


def test_accelerate_launch_starts_the_same_run(two, folder):
    by = ("-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes=2")
    output = finished(folder / "accelerated", "hardware=ddp", "hardware.use_cpu=true", by=by)
    assert losses(folder / "accelerated") == losses(two[0])
    assert sum(line.startswith("Run   ") for line in output.splitlines()) == 1


@DEEPSPEED
@pytest.mark.parametrize("hardware", ["zero2_offload", "zero3"])
def test_zero_trains_what_ddp_does_and_resumes(two, alone, folder, hardware):
    assert "Fast forward: packed" in finished(folder / hardware, f"hardware={hardware}", "nproc=2")
    assert losses(folder / hardware) == pytest.approx(losses(two[0]), abs=1e-4)
    summary = json.loads((folder / hardware / "summary.json").read_text())
    assert summary["reference_forwards"] == 0  # the cache that DDP has filled serves sharded weights too
    resumed = half_of(folder / hardware, f"{hardware}-resumed")
    with pytest.raises(LaunchError, match="saved by 2 processes with ZeRO-"):
        other = "zero3" if hardware == "zero2_offload" else "zero2_offload"
        require_readable(alone("other", f"hardware={other}"), resumed / "checkpoint-10", 4)
    finished(resumed, f"hardware={hardware}", "nproc=2", "resume=true")
    assert losses(resumed) == pytest.approx(losses(folder / hardware), abs=1e-6)


@pytest.mark.parametrize("hardware", ["ddp", pytest.param("zero3", marks=DEEPSPEED)])
def test_a_pipeline_runs_to_its_end(folder, hardware):
    run = folder / f"pipeline-{hardware}"
    stages = ["pipeline.stages=[sft,preference,export,evaluate]", "pipeline.evaluate.kl_prompts=0", "train.max_steps=2"]
    output = finished(run, f"hardware={hardware}", "nproc=2", *stages, recipe="recipes.sft_dpo")
    made = {path.parent.name: json.loads(path.read_text()) for path in run.glob("*/lineage.json")}
    assert all(each["finished"] for each in made.values())
    assert made["preference"]["inputs"]["parent"] == made["sft-model"]["output"]
    assert output.count("Stage 2 of 4") == 1 and (run / "report.html").exists()
    model = AutoModelForCausalLM.from_pretrained(run / "exported")
    assert model(torch.arange(9)[None]).logits.isfinite().all()


def test_quantized_weights_are_not_sharded(composed):
    with pytest.raises(LaunchError, match="lora=qlora write hardware=ddp"):
        require_fitting(composed("dpo", "hardware=zero3", "lora=qlora"))


def test_deepspeeds_settings_are_given_once(composed, monkeypatch):
    monkeypatch.setenv(ACCELERATES, "zero_stage")
    with pytest.raises(LaunchError, match="hardware.engine=zero2 in the place"):
        require_fitting(composed("dpo", "hardware=zero2_offload"))


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_processes_end_together(folder, how):
    run = folder / how.name
    process = start(run, "hardware=ddp", "nproc=2", "train.max_steps=2000", "train.save_steps=1000")
    end = time.monotonic() + 120
    while not (run / "metrics.jsonl").exists() or len((run / "metrics.jsonl").read_text().splitlines()) < 3:
        assert process.poll() is None and time.monotonic() < end, process.stdout.read()
        time.sleep(0.1)
    if how == signal.SIGKILL:
        os.kill(rank(1, of=run), how)
    else:
        process.send_signal(how)
    began = time.monotonic()
    output, _ = process.communicate(timeout=120)
    assert time.monotonic() - began < 60
    if how == signal.SIGKILL:
        assert process.returncode == 137 and "rank 1 ended first (killed by SIGKILL)" in output, output
    else:
        assert process.returncode == 128 + how, output
        assert json.loads((run / "status.json").read_text())["state"] == "interrupted"
        assert list(run.glob("checkpoint-*/hashes.json"))


def rank(number: int, of: Path) -> int:
    """The process of a rank, found by its environment and its command line."""
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            there = (entry / "environ").read_bytes().split(b"\0"), (entry / "cmdline").read_bytes()
        except OSError:
            continue
        if f"RANK={number}".encode() in there[0] and str(of).encode() in there[1]:
            return int(entry.name)
    raise AssertionError("no such rank")
