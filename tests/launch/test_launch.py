"""Which processes a command leads to, decided without torch; and what they are is what was asked for."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest
from accelerate import Accelerator

from preftune.config.errors import LaunchError
from preftune.launch import slurm
from preftune.launch.start import require_possible
from preftune.launch.torchrun import torchrun_options, wait_for_ranks
from preftune.trainers import engine

SRUN = {
    "SLURM_JOB_ID": "77",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_NODELIST": "gpu[07-08]",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
}


@pytest.mark.slow
def test_a_process_that_trains_draws_nothing_at_its_start_and_leaves_its_imports_out_of_collection():
    code = """if True:
        import gc, sys
        from preftune.config.processes import imports
        with imports():
            import preftune.pipeline.run
        print("matplotlib" in sys.modules, gc.isenabled(), gc.get_freeze_count() > 100_000)
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "False True True", done.stderr


def test_the_launching_process_imports_no_torch():
    code = "import sys, recipes.dpo, recipes.sft_dpo; print({'torch', 'transformers', 'accelerate'} & set(sys.modules))"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert shown.stdout.strip() == "set()", shown.stderr


def test_a_task_of_srun_takes_its_place_among_the_ranks():
    environ = dict(SRUN)
    slurm.take_place(environ)
    place = {key: environ[key] for key in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR")}
    assert place == {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "MASTER_ADDR": "gpu07"}
    other = dict(SRUN) | {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"}
    slurm.take_place(other)
    assert other["MASTER_PORT"] == environ["MASTER_PORT"]


def test_a_task_that_sees_one_gpu_alone_takes_that():
    environ = dict(SRUN) | {"CUDA_VISIBLE_DEVICES": "1"}
    slurm.take_place(environ)
    assert environ["LOCAL_RANK"] == "0" and environ["RANK"] == "3"
    shared = dict(SRUN) | {"CUDA_VISIBLE_DEVICES": "0,1"}
    slurm.take_place(shared)
    assert shared["LOCAL_RANK"] == "1"


@pytest.mark.parametrize(
    "nodes, first",
    [
        ("gpu07", "gpu07"),
        ("gpu[07-08]", "gpu07"),
        ("a,b[1-2]", "a"),
        ("n[1,3],m", "n1"),
        ("r[1-2]n[03-04]-ib", "r1n03-ib"),
    ],
)
def test_the_first_machine_of_a_step(nodes, first):
    assert slurm.first_machine({"SLURM_STEP_NODELIST": nodes}) == first


def test_as_many_machines_as_the_step_of_slurm_has(composed, monkeypatch):
    for key, value in (dict(SRUN) | {"SLURM_STEP_NUM_TASKS": "2"}).items():
        monkeypatch.setenv(key, value)
    with pytest.raises(LaunchError, match="hardware.nodes=1, and this Slurm step has 2.*Write hardware.nodes=2"):
        require_possible(composed("dpo", "hardware=ddp", "nproc=1"))


def test_accelerate_launch_on_cpu_starts_one_process_whatever_it_was_told(composed, monkeypatch):
    for key, value in {"ACCELERATE_MIXED_PRECISION": "no", "MASTER_PORT": "29500"}.items():  # as it sets them for two
        monkeypatch.setenv(key, value)
    with pytest.raises(LaunchError, match="hardware=ddp nproc=2 in its place"):
        require_possible(composed("dpo"))
    require_possible(composed("dpo", "hardware=ddp", "hardware.use_cpu=true", "nproc=2"))


def test_a_job_that_makes_room_saves_before_submitit_hears_of_it(tmp_path):
    saving = "import pathlib, signal, sys, time\nsignal.signal(signal.SIGTERM, lambda *_: (time.sleep(0.3), "
    saving += "pathlib.Path('saved').touch(), sys.exit(143)))\npathlib.Path('ready').touch()\ntime.sleep(60)"
    heard = []
    before = signal.signal(signal.SIGUSR2, lambda *_: heard.append((tmp_path / "saved").exists()))

    def preempt():
        while not (tmp_path / "ready").exists():
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGUSR2)

    try:
        ranks = subprocess.Popen([sys.executable, "-c", saving], cwd=tmp_path)
        threading.Thread(target=preempt).start()
        assert wait_for_ranks(ranks) == 143
    finally:
        signal.signal(signal.SIGUSR2, before)
    assert heard == [True]


def test_one_task_a_machine_starts_its_machines_ranks(composed, monkeypatch):
    environ = dict(SRUN) | {"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1", "SLURM_LOCALID": "0"}
    before = dict(environ)
    slurm.take_place(environ)
    assert environ == before
    for key, value in environ.items():
        monkeypatch.setenv(key, value)
    cfg = composed("dpo", "hardware=ddp", "nproc=8", "hardware.nodes=2")
    require_possible(cfg)
    options = torchrun_options(cfg, 8)
    assert {"--nproc-per-node=8", "--nnodes=2", "--node-rank=1", "--master-addr=gpu07"} <= set(options)


def test_machines_meet_where_they_are_told(composed):
    cfg = composed("dpo", "hardware=ddp", "nproc=8", "hardware.nodes=2", "hardware.rendezvous=10.0.0.1:29500")
    options = torchrun_options(cfg, 8)
    assert {"--nnodes=2", "--rdzv-backend=c10d", "--rdzv-endpoint=10.0.0.1:29500"} <= set(options)


@pytest.mark.parametrize(
    "overrides, remedy",
    [
        (["hardware=fsdp", "hardware.use_cpu=true"], "Write hardware=ddp"),
        (["hardware=ddp", "hardware.use_cpu=true"], "nproc=2"),
        (["hardware=ddp", "nproc=0"], "wants 1 or more"),
        (["hardware=ddp", "nproc=2", "hardware.nodes=2"], "hardware.rendezvous=ADDRESS:PORT"),
        (["hardware=ddp", "hardware.engine=megatron"], "there is ddp, fsdp, zero2, zero3"),
    ],
)
def test_what_cannot_run_is_refused_before_anything_is_started(composed, overrides, remedy):
    with pytest.raises(LaunchError, match=remedy):
        require_possible(composed("dpo", *overrides))


def test_as_many_processes_as_were_asked_for(composed, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(LaunchError, match="4 processes were started, and nproc=2"):
        require_possible(composed("dpo", "hardware=ddp", "nproc=2"))


def test_an_engine_that_was_asked_for_and_does_not_run_stops_the_run(composed, monkeypatch):
    accelerator = Accelerator(cpu=True)
    engine.require(composed("dpo"), accelerator)
    with pytest.raises(LaunchError, match="hardware.engine=fsdp was asked for, and accelerate runs none"):
        engine.require(composed("dpo", "hardware.engine=fsdp"), accelerator)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(LaunchError, match="accelerate reports 1: they would train apart"):
        engine.require(composed("dpo"), accelerator)


@pytest.mark.parametrize("death, said", [("os.kill(os.getpid(), 9)", "killed by SIGKILL"), ("1 / 0", "exit code 1")])
def test_a_rank_that_dies_ends_all_and_its_own_error_is_shown(tmp_path, death, said):
    script = tmp_path / "work.py"
    script.write_text(f"import os, time\nif os.environ['RANK'] == '1':\n    {death}\ntime.sleep(120)\n")
    command = [sys.executable, "-m", "preftune.launch.ranks", "--standalone", "--nproc-per-node=2", str(script)]
    began = time.monotonic()
    ended = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert time.monotonic() - began < 60
    assert ended.returncode == (137 if "SIGKILL" in said else 1)
    assert f"rank 1 ended first ({said})" in ended.stderr
    assert "ChildFailedError" not in ended.stderr
    assert ("ZeroDivisionError" in ended.stderr) == (death == "1 / 0")
