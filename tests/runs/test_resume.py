"""A run that is ended by a signal, a kill or a full disk goes on to what the unbroken one would have been."""

import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

STEPS = 40
LINE = [
    *("model=tiny", "hardware=cpu", "hardware.bf16=false", "tracking=none", "gate.on_fail=warn", "samples=1"),
    "fit_check=false",
    *(f"train.max_steps={STEPS}", "train.save_steps=5", "train.logging_steps=1", "train.eval_strategy=no"),
    *("train.learning_rate=1e-3", "hardware.per_device_train_batch_size=4", "data.max_rows=32"),
]


def start(run: Path, *more: str, recipe="recipes.dpo", **options) -> subprocess.Popen:
    command = [sys.executable, "-m", recipe, *LINE, f"output_dir={run}", *more]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "cwd": run.parent}
    return subprocess.Popen(command, **pipes, **options)


def losses(run: Path) -> dict[int, float]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row["loss"] for row in rows if "loss" in row}


def wait_for(what, process: subprocess.Popen, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    run = tmp_path_factory.mktemp("unbroken") / "run"
    process = start(run)
    assert process.wait(240) == 0, process.stdout.read()
    return losses(run)


def finish(run: Path, unbroken: dict[int, float]) -> str:
    process = start(run, "resume=true")
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 0, output
    assert losses(run) == pytest.approx(unbroken, abs=1e-6)
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines() if '"loss"' in line]
    assert steps == list(range(1, STEPS + 1))  # each step once, in order
    assert not [path for path in run.rglob(".*")]
    return output


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_a_checkpoint_and_says_how_to_go_on(tmp_path, unbroken, number):
    run = tmp_path / "run"
    process = start(run)
    wait_for(lambda: (run / "metrics.jsonl").exists() and len(losses(run)) > 7, process)
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + number, output
    assert "resume=true" in output and json.loads((run / "status.json").read_text())["state"] == "interrupted"
    last = max(int(path.name.split("-")[1]) for path in run.glob("checkpoint-*"))
    assert last == max(losses(run))  # nothing is lost
    assert f"resume: checkpoint-{last}" in finish(run, unbroken)


def test_a_kill_loses_at_most_the_steps_since_the_last_checkpoint(tmp_path, unbroken):
    run = tmp_path / "run"
    process = start(run)
    wait_for(lambda: (run / "metrics.jsonl").exists() and len(losses(run)) > 12, process)
    process.kill()
    process.wait()
    whole = {path.parent.name for path in run.glob("checkpoint-*/hashes.json")}
    assert whole >= {"checkpoint-10"}
    assert "resume: checkpoint-" in finish(run, unbroken)


def test_a_run_killed_after_its_last_step_takes_no_step_more(tmp_path, unbroken):
    run = tmp_path / "run"
    process = start(run)
    wait_for((run / f"checkpoint-{STEPS}" / "hashes.json").exists, process)
    process.kill()
    process.wait()
    assert f"resume: checkpoint-{STEPS}" in finish(run, unbroken)


def test_a_second_run_on_one_directory_is_refused(tmp_path):
    run = tmp_path / "run"
    process = start(run)
    wait_for(lambda: (run / "manifest.json").exists(), process)
    second = start(run, "resume=true")
    output, _ = second.communicate(timeout=120)
    process.kill()
    assert second.returncode == 1 and "another process is training there" in output


def test_a_full_disk_is_said_and_loses_nothing(tmp_path, unbroken):
    def little_room():
        resource.setrlimit(resource.RLIMIT_FSIZE, (250_000, 250_000))  # bytes of one file: an optimizer state is more

    run = tmp_path / "run"
    process = start(run, preexec_fn=little_room)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 1 and "the disk is full" in output and "resume=true" in output
    assert len(losses(run)) >= 4
    finish(run, unbroken)


def test_no_key_or_token_is_written_or_printed(tmp_path):
    secrets = {
        "HF_TOKEN": "hf_secretsecretsecret",
        "WANDB_API_KEY": "f" * 39 + "0",
        "OPENAI_API_KEY": "sk-secretsecret",
    }
    run = tmp_path / "run"
    process = start(run, "tracking=wandb", "train.max_steps=2", env=os.environ | secrets | {"WANDB_MODE": "offline"})
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 0, output
    for secret in secrets.values():
        assert secret not in output
        for path in run.rglob("*"):
            assert not path.is_file() or secret.encode() not in path.read_bytes(), path
