"""Sweeps: a directory a job, one reference for all, what failed loses nothing else, what is finished is skipped."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time

import pytest

pytestmark = pytest.mark.slow

LINE = [
    *("model=tiny", "hardware=cpu", "hardware.bf16=false", "tracking=none", "samples=0", "train.eval_strategy=no"),
    "fit_check=false",
    *("train.max_steps=1", "data=file", "data.eval_fraction=0.25", "hardware.per_device_train_batch_size=4"),
    "fastpath.reference_cache=cache",
]
PARALLEL = pytest.mark.skipif(
    importlib.util.find_spec("hydra_plugins") is None
    or importlib.util.find_spec("hydra_plugins.hydra_submitit_launcher") is None,
    reason="hydra-submitit-launcher is not installed",
)


def test_nine_jobs_compute_one_reference_and_are_skipped_once_finished(typed, pairs_file, tmp_path):
    grid = ["loss=dpo,ipo,hinge", "loss.beta=0.05,0.1,0.2", "gate.on_fail=warn", f"data.path={pairs_file}"]
    done = typed("recipes.dpo", "-m", *grid, *LINE, "output_dir=sweep")
    assert done.returncode == 0, done.stderr
    jobs = sorted(path.parent for path in tmp_path.glob("sweep/*/summary.json"))
    assert len(jobs) == 9 and "loss.beta-0.05_loss-dpo" in {job.name for job in jobs}
    counts = [json.loads((job / "summary.json").read_text())["reference_forwards"] for job in jobs]
    assert sorted(counts)[:8] == [0] * 8 and max(counts) > 0
    again = typed("recipes.dpo", "-m", *grid, *LINE, "output_dir=sweep")
    assert again.returncode == 0 and again.stdout.count("finished before, skipped") == 9
    other = typed("recipes.dpo", "-m", *grid, *LINE, "output_dir=sweep", "train.max_steps=2")
    assert other.returncode == 1 and "train differ" in other.stderr


def test_a_job_that_fails_does_not_lose_the_others_and_each_is_a_wandb_run_of_one_group(typed, pairs_file, tmp_path):
    from wandb_runs import read_offline

    command = ["recipes.dpo", "-m", "gate.on_fail=stop,warn", f"data.path={pairs_file}", *LINE, "tracking=wandb"]
    done = typed(*command, "output_dir=sweep", WANDB_MODE="offline")
    assert done.returncode == 1 and "failed, the other jobs go on" in done.stderr
    states = {path.parent.name: json.loads(path.read_text())["state"] for path in tmp_path.glob("sweep/*/status.json")}
    assert states == {"gate.on_fail-stop": "stopped", "gate.on_fail-warn": "finished"}
    records = [record for folder in tmp_path.glob("sweep/*/wandb/offline-run-*") for record in read_offline(folder)]
    made = [record["run"] for record in records if record["type"] == "run"]
    assert len({each["run_id"] for each in made}) == 2
    assert {each["display_name"] for each in made} == states.keys()
    assert {each["run_group"] for each in made} == {"tiny-file"}


@pytest.mark.parametrize("launcher", ["basic", pytest.param("submitit_local", marks=PARALLEL)])
def test_a_killed_job_goes_on_from_its_checkpoint_and_the_others_stay(typed, pairs_file, tmp_path, launcher):
    grid = [f"hydra/launcher={launcher}", "loss=dpo,ipo", "gate.on_fail=warn", f"data.path={pairs_file}"]
    command = ["recipes.dpo", "-m", *grid, *LINE, "train.max_steps=60", "train.save_steps=5", "output_dir=sweep"]
    sweep = subprocess.Popen([sys.executable, "-m", *command], cwd=tmp_path, stderr=subprocess.DEVNULL)
    job, patience = tmp_path / "sweep" / "loss-ipo", time.monotonic() + 90
    while not any(job.glob("checkpoint-*/hashes.json")) and time.monotonic() < patience:
        time.sleep(0.02)
    os.kill(json.loads((job / "status.json").read_text())["process"], signal.SIGKILL)
    assert sweep.wait(90) != 0
    assert (job.parent / "loss-dpo" / "summary.json").exists() and not (job / "summary.json").exists()
    again = typed(*command)
    assert again.returncode == 0, again.stderr
    said = again.stdout + "".join(path.read_text() for path in tmp_path.glob(".submitit/*/*.out"))
    assert "loss-dpo: finished before, skipped" in said and "resume: checkpoint-" in said
    assert json.loads((job / "status.json").read_text())["state"] == "finished"
    steps = [json.loads(line)["step"] for line in (job / "metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(steps) and steps[-1] == 60


@PARALLEL
def test_jobs_beside_each_other_through_submitit(typed, pairs_file, tmp_path):
    grid = ["hydra/launcher=submitit_local", "gate.on_fail=stop,warn", f"data.path={pairs_file}"]
    done = typed("recipes.dpo", "-m", *grid, *LINE, "output_dir=sweep")
    assert done.returncode == 1
    states = {json.loads(path.read_text())["state"] for path in tmp_path.glob("sweep/*/status.json")}
    assert states == {"stopped", "finished"}
