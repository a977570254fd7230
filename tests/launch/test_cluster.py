"""Several machines: two commands on loopback meet as one run; and a Slurm, where there is one, starts the same."""

import contextlib
import importlib.util
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time

import pytest

from preftune.runs.training import train

pytestmark = pytest.mark.slow

LINE = [
    *("model=tiny", "hardware.bf16=false", "tracking=none", "gate.on_fail=warn", "samples=0", "train.max_steps=4"),
    "fit_check=false",
    *("train.logging_steps=1", "train.eval_strategy=no", "train.learning_rate=3e-3", "data=file"),
    *("data.path=train.jsonl", "data.eval_split=eval.jsonl", "hardware.per_device_train_batch_size=4"),
    "fastpath.reference_cache=cache",
]


def slurm_answers() -> bool:
    """Whether a Slurm can be asked from here: `sinfo` is there and its controller lists a machine."""
    if not shutil.which("sinfo"):
        return False
    with contextlib.suppress(subprocess.TimeoutExpired):
        return bool(subprocess.run(["sinfo", "--noheader"], capture_output=True, timeout=10).stdout)
    return False


SLURM = pytest.mark.skipif(not slurm_answers(), reason="no Slurm controller answers to sinfo")
SUBMITIT = pytest.mark.skipif(importlib.util.find_spec("submitit") is None, reason="submitit is not installed")


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


def started(folder, *command: str) -> subprocess.Popen:
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "cwd": folder}
    environ = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([*command], env=environ, start_new_session=True, **pipes)


def ended(process: subprocess.Popen) -> str:
    output, _ = process.communicate(timeout=180)
    assert process.returncode == 0, output
    return output


@pytest.fixture
def folder(tmp_path, pairs_file, monkeypatch):
    """A folder with sixteen pairs to train on, two steps of eight, so that no batch is not full; and eight held out."""
    rows = pairs_file.read_text().splitlines(keepends=True)
    (tmp_path / "train.jsonl").write_text("".join(rows[:16]))
    (tmp_path / "eval.jsonl").write_text("".join(rows[16:]))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def require_equal(composed, folder):
    """require_equal(): the losses of folder/run are those of one process with a batch as large."""

    def losses(name: str) -> list[float]:
        rows = [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]
        return [row["loss"] for row in rows if "loss" in row]

    def require() -> None:
        train(composed("dpo", *LINE, "hardware.per_device_train_batch_size=8", f"output_dir={folder / 'one'}"))
        one = losses("one")
        assert len(one) == 4 and abs(one[0] - one[-1]) > 0.05
        assert losses("run") == pytest.approx(one, abs=1e-4)

    return require


def test_two_machines_meet_and_train_what_one_process_does(folder, require_equal):
    meeting = f"hardware.rendezvous=127.0.0.1:{free_port()}"
    command = [sys.executable, "-m", "recipes.dpo", *LINE, "hardware=ddp", "nproc=1", "hardware.nodes=2", meeting]
    machines = [started(folder, *command, "output_dir=run") for _ in range(2)]
    outputs = [ended(each) for each in machines]
    assert sum(output.count("\nRun   ") for output in outputs) == 1
    require_equal()


def test_a_machine_that_is_lost_ends_the_other(tmp_path):
    script = tmp_path / "work.py"
    script.write_text(
        "import pathlib, time, torch.distributed as d\nd.init_process_group('gloo')\nd.barrier()\n"
        "pathlib.Path(f'there-{d.get_rank()}').touch()\nif d.get_rank():\n    time.sleep(120)\nd.barrier()\n"
    )
    place = ["--nnodes=2", "--nproc-per-node=1", "--master-addr=127.0.0.1", f"--master-port={free_port()}"]
    command = [sys.executable, "-m", "preftune.launch.ranks", *place]
    machines = [started(tmp_path, *command, f"--node-rank={i}", str(script)) for i in range(2)]
    end = time.monotonic() + 90
    while len(list(tmp_path.glob("there-*"))) < 2:
        assert time.monotonic() < end and machines[0].poll() is None
        time.sleep(0.1)
    children = f"/proc/{machines[1].pid}/task/{machines[1].pid}/children"
    with open(children, encoding="utf-8") as listed:
        lost = [machines[1].pid, *map(int, listed.read().split())]
    for process in lost:
        os.kill(process, signal.SIGKILL)
    began = time.monotonic()
    output, _ = machines[0].communicate(timeout=90)
    machines[1].communicate()
    assert time.monotonic() - began < 60
    assert machines[0].returncode == 1 and "Connection closed by peer" in output, output


@SLURM
def test_srun_starts_one_task_a_process(folder, require_equal):
    command = ["srun", "-N", "1", "-n", "2", sys.executable, "-m", "recipes.dpo", *LINE, "hardware=ddp"]
    assert ended(started(folder, *command, "output_dir=run")).count("\nRun   ") == 1
    require_equal()


@SLURM
@SUBMITIT
def test_a_sweep_is_jobs_of_slurm(typed, folder):
    small = [f"hydra.launcher.{each}" for each in ("gpus_per_node=null", "cpus_per_task=1", "timeout_min=10")]
    grid = ["hydra/launcher=submitit_slurm", *small, "loss=dpo,ipo", *LINE, "output_dir=sweep"]
    done = typed("recipes.dpo", "-m", *grid)
    assert done.returncode == 0, done.stderr
    jobs = {path.parent.name for path in folder.glob("sweep/*/summary.json")}
    assert jobs == {"loss-dpo", "loss-ipo"}
    assert typed("recipes.dpo", "-m", *grid).returncode == 0
    said = "".join(path.read_text() for path in folder.glob(".submitit/*/*_log.out"))
    assert said.count("finished before, skipped") == 2
