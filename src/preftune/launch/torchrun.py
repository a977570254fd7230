"""torchrun for the recipe that was typed: how its ranks are started, signalled, and waited for."""

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from preftune.config.errors import LaunchError
from preftune.config.processes import processes
from preftune.launch import slurm
from preftune.launch.sweep import beside_others, in_sweep

SHUTDOWN_SECONDS = 45  # between the signal to the other ranks, after which they may save a checkpoint, and their end
PREEMPTING = (signal.SIGUSR1, signal.SIGUSR2)  # one of them is submitit's, by the cluster's habit


def start(cfg: DictConfig, recipe: str) -> None:
    """Start this machine's ranks, wait, and end as they do: raises SystemExit with the first failing one's code."""
    count = processes(cfg)
    environ = dict(os.environ)
    environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // count)))
    if (total := count * cfg.hardware.nodes) > 1:
        print(f"launch: {total} processes ({cfg.hardware.engine or 'ddp'}) for {cfg.output_dir}", flush=True)
    command = [
        sys.executable,
        "-m",
        "preftune.launch.ranks",
        *torchrun_options(cfg, count),
        "-m",
        recipe,
        *command_line(cfg),
    ]
    exit_like_ranks(wait_for_ranks(subprocess.Popen(command, env=environ, start_new_session=True)), cfg.output_dir)


def wait_for_ranks(ranks: subprocess.Popen) -> int:
    """The exit code of the ranks, to whom SIGINT and SIGTERM are passed on; they may then save a checkpoint.

    Where submitit listens for the signal of a Slurm job whose time is up or which makes room, they save first, and
    submitit, which ends this process or asks for the job to be queued again, hears of it afterwards.
    """
    postponed, before = [], {}
    handlers: dict[int, Callable]

    def pass_on(number, frame):
        ranks.send_signal(number)

    def postpone(number, frame):
        if not postponed:
            ranks.terminate()
        postponed[:] = [(before[number], number, frame)]

    handlers = dict.fromkeys((signal.SIGINT, signal.SIGTERM), pass_on)
    handlers |= {each: postpone for each in PREEMPTING if callable(signal.getsignal(each))}
    with contextlib.suppress(ValueError):  # outside the main thread there are no signals to pass on
        for number, handler in handlers.items():
            before[number] = signal.signal(number, handler)
    try:
        code = ranks.wait()
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)
    for earlier, number, frame in postponed if code else ():
        earlier(number, frame)
    return code


def exit_like_ranks(code: int, output_dir: str) -> None:
    """Raise what the exit code of the ranks means for this process; their own words were printed by them."""
    signalled = code - 128 if code > 128 else None
    if signalled == signal.SIGTERM and beside_others():  # scancel means this job; whoever waits for it must hear
        raise LaunchError("it was stopped by SIGTERM; the same command once more goes on with it")
    if signalled in (signal.SIGINT, signal.SIGTERM):
        raise SystemExit(code)
    if code and in_sweep():
        raise LaunchError(f"its process ended with exit code {code}; what it said is above, and in {output_dir}")
    if code:
        raise SystemExit(code)


def torchrun_options(cfg: DictConfig, count: int) -> list[str]:
    """What torch.distributed.run is told: how many processes here, how many machines, where they meet."""
    asked = cfg.hardware
    options = [f"--nproc-per-node={count}", "--max-restarts=0", f"--shutdown-timeout={SHUTDOWN_SECONDS}"]
    if asked.nodes == 1:
        return [*options, "--standalone"]
    meeting, node_rank = asked.rendezvous, asked.node_rank
    if not meeting:  # one task of srun per machine
        meeting = f"{slurm.first_machine(os.environ)}:{slurm.port(os.environ)}"
        node_rank = int(os.environ["SLURM_NODEID"])
    options += [f"--nnodes={asked.nodes}"]
    if node_rank is None:
        return [*options, "--rdzv-backend=c10d", f"--rdzv-endpoint={meeting}", f"--rdzv-id={meeting}"]
    address, _, port = meeting.rpartition(":")
    return [*options, f"--node-rank={node_rank}", f"--master-addr={address}", f"--master-port={port}"]


def command_line(cfg: DictConfig) -> list[str]:
    """The recipe's arguments for each rank: this job's, with the run directory that was made out here."""
    composed = HydraConfig.get()
    folders = [source.path for source in composed.runtime.config_sources if source.provider == "command-line"]
    settled = {"output_dir", "resume"}
    overrides = [each for each in composed.overrides.task if each.lstrip("+").partition("=")[0] not in settled]
    return [
        *(part for folder in folders for part in ("--config-dir", folder.removeprefix("file://"))),
        f"--config-name={composed.job.config_name}",
        *overrides,
        f'output_dir="{cfg.output_dir}"',
        f"resume={str(cfg.resume).lower()}",
    ]
