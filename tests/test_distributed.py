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

from preftune import launch
from preftune.training import train

STEPS = 20
LINE = [
    *("model=tiny", "hardware.bf16=false", "tracking=none", "gate.on_fail=warn", "samples=1"),
    *(f"train.max_steps={STEPS}", "train.save_steps=10", "train.logging_steps=1", "train.eval_strategy=no"),
    *("train.learning_rate=3e-3", "hardware.per_device_train_batch_size=4", "train.num_train_epochs=2"),
    *("data=file", "data.path=train.jsonl", "data.eval_split=eval.jsonl", "data.eval_fraction=0.05"),
]
DEEPSPEED = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed")


def start(run: Path, *more: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "recipes.dpo", *LINE, f"fastpath.reference_cache={run.parent}/cache", *more]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "cwd": run.parent}
    return subprocess.Popen([*command, f"output_dir={run}"], **pipes)


def finished(run: Path, *more: str) -> str:
    process = start(run, *more)
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


def test_rank_0_alone_writes_and_speaks(two):
    run, output = two
    for line in ("model: ", "data: ", "Run   "):
        assert sum(each.startswith(line) for each in output.splitlines()) == 1
    assert not [path for path in run.rglob(".*")]
    assert json.loads((run / "status.json").read_text())["state"] == "finished"


def test_a_checkpoint_of_two_processes_is_resumed_by_one(two, alone, folder):
    for name in ("resumed", "refused"):
        shutil.copytree(two[0], folder / name)
        (folder / name / "summary.json").unlink()
        shutil.rmtree(folder / name / f"checkpoint-{STEPS}")
        config = (folder / name / "config.yaml").read_text()
        (folder / name / "config.yaml").write_text(config.replace(str(two[0]), str(folder / name)))
    train(alone("resumed", "resume=true"))
    assert losses(folder / "resumed") == pytest.approx(losses(two[0]), abs=1e-4)
    with pytest.raises(launch.LaunchError, match="2 × 4 rows at a time.*per_device_train_batch_size=8"):
        train(alone("refused", "resume=true", "hardware.per_device_train_batch_size=4"))


@DEEPSPEED
@pytest.mark.parametrize("engine", ["zero2_offload", "zero3"])
def test_zero_trains_what_ddp_does(two, folder, engine):
    finished(folder / engine, f"hardware={engine}", "nproc=2")
    assert losses(folder / engine) == pytest.approx(losses(two[0]), abs=1e-4)


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
