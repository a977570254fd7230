"""One recipe on any number of processes: it starts torchrun for its own command line, or takes the place it is given.

`run` is what a recipe calls. It decides without torch whether this process trains: as the only one, as a rank that
torchrun, accelerate or srun has started, or not at all, because it starts the ranks and waits for them. What the ranks
then are to each other, and whether that is what was asked for, is engine.py's.
"""

import contextlib
import importlib
import os
import re
import sys
import time
import warnings
from collections.abc import Iterator

from omegaconf import DictConfig

from preftune.config import errors, hardware
from preftune.config.errors import Interrupted, LaunchError, UserError
from preftune.config.processes import imports, world_size
from preftune.launch import slurm, sweep
from preftune.launch.sweep import beside_others, finished_before, in_sweep
from preftune.launch.torchrun import start
from preftune.report.record import way_on

# conf/hydra/launcher has files of the names that submitit's plugin registers, which Hydra remarks upon
warnings.filterwarnings("ignore", message=r"(?s).*is validated against ConfigStore schema")
ENGINES = ("ddp", "fsdp", "zero2", "zero3")
ACCELERATES_SEVERAL = {"ACCELERATE_MIXED_PRECISION", "MASTER_PORT"}  # set by it for more than one process alone
PATIENCE = 3  # seconds that the other ranks leave to rank 0, which most often fails of the same thing
# What gloo and NCCL say of a peer that has ended
LOST = re.compile(r"Connection (closed|reset) by peer|remote process exited|Broken pipe")


def run(cfg: DictConfig, recipe: str, task: str) -> float | None:
    """Run `task` ("module:function" of the config) as `cfg.hardware` says; the objective of a sweep: held-out accuracy.

    `recipe` is the module to start once per rank. A UserError ends the program with its message alone; within a sweep
    it is printed and raised, so that Hydra goes on with the other jobs. Imports torch only where this process trains.
    """
    slurm.take_place(os.environ)
    with report_job_errors(cfg):
        if finished_before(cfg):
            return sweep.objective(cfg.output_dir)
        require_possible(cfg)
        if starts_others(cfg):
            start(cfg, recipe)
            return sweep.objective(cfg.output_dir)
        with as_rank(cfg):
            module, _, name = task.partition(":")
            with imports():
                function = getattr(importlib.import_module(module), name)
            function(cfg)
        return sweep.objective(cfg.output_dir)


@contextlib.contextmanager
def report_job_errors(cfg: DictConfig) -> Iterator[None]:
    """`errors.report_user_errors`, except that a failed job of a sweep says what it was and lets the next one begin."""
    if not in_sweep():
        with errors.report_user_errors():
            yield
        return
    try:
        yield
    except Interrupted as error:  # whoever ends a job by a signal means the sweep
        print(error, file=sys.stderr)
        raise SystemExit(error.exit_code) from None
    except Exception as error:
        print(f"{cfg.output_dir}: failed, the other jobs go on. {error}", file=sys.stderr, flush=True)
        raise


def require_possible(cfg: DictConfig) -> None:
    """Raise LaunchError where hardware.* asks for what cannot run; before torch, and before anything is started."""
    if problems := [*engine_problems(cfg), *machine_problems(cfg), *process_problems(cfg)]:
        raise LaunchError("\n".join(problems))


def engine_problems(cfg: DictConfig) -> Iterator[str]:
    """What is wrong with the engine asked for."""
    engine, on_cpu = cfg.hardware.engine, cfg.hardware.use_cpu
    if engine not in (None, *ENGINES):
        yield f"hardware.engine={engine}: there is {', '.join(ENGINES)}"
    if engine == "fsdp" and on_cpu:
        yield "hardware=fsdp: accelerate shards on GPUs alone and would train unsharded. Write hardware=ddp"
    if engine in ("zero2", "zero3") and importlib.util.find_spec("deepspeed") is None:
        yield f"hardware.engine={engine}: DeepSpeed is not installed: pip install 'preftune[deepspeed]'"


def machine_problems(cfg: DictConfig) -> Iterator[str]:
    """What is wrong with the machines asked for, where this process is to start their ranks."""
    asked = cfg.hardware
    if slurm.is_rank() or asked.rendezvous:
        return
    if asked.nodes != 1 and "SLURM_STEP_NODELIST" not in os.environ:
        yield (
            f"hardware.nodes={asked.nodes}: write where they meet, hardware.rendezvous=ADDRESS:PORT of the first "
            "machine, on each of them; under Slurm, start it by srun --ntasks-per-node=1"
        )
    machines = int(os.environ.get("SLURM_STEP_NUM_NODES", asked.nodes))
    if machines != asked.nodes:
        yield (
            f"hardware.nodes={asked.nodes}, and this Slurm step has {machines}, each of which would wait for others or "
            f"train by itself. Write hardware.nodes={machines}, or srun --nodes={asked.nodes}"
        )


def process_problems(cfg: DictConfig) -> Iterator[str]:
    """What is wrong with the number of processes asked for, of preftune or of the program that started this one."""
    asked, size = cfg.hardware, world_size()
    for key, value in (("nproc", cfg.nproc), ("hardware.nodes", asked.nodes)):
        if value is not None and not (isinstance(value, int) and value >= 1):
            yield f"{key}={value}: wants 1 or more"
    if slurm.is_rank():
        if cfg.nproc and size != cfg.nproc * asked.nodes:
            yield (
                f"{size} processes were started, and nproc={cfg.nproc} on {asked.nodes} machine"
                f"{'s' * (asked.nodes > 1)} was asked for; leave nproc out, or start as many"
            )
    elif asked.engine == "ddp" and asked.use_cpu and not cfg.nproc and asked.nodes == 1:
        yield "hardware=ddp: without a GPU, say how many processes: nproc=2"
    elif os.environ.keys() >= ACCELERATES_SEVERAL and processes_asked(cfg) == 1:
        yield (
            "`accelerate launch` was told to start several processes, and on CPU it starts one, which would train "
            "alone. Write python -m RECIPE hardware=ddp nproc=2 in its place"
        )


def starts_others(cfg: DictConfig) -> bool:
    """Whether this process trains in others: several, an engine's, or one of its own for a job beside other jobs."""
    if slurm.is_rank():
        return False
    return cfg.hardware.engine is not None or processes_asked(cfg) > 1 or beside_others()


def processes_asked(cfg: DictConfig) -> int:
    """All processes that were asked for by number; 1 where none was, however many GPUs there are."""
    return (cfg.nproc or 1) * cfg.hardware.nodes


@contextlib.contextmanager
def as_rank(cfg: DictConfig) -> Iterator[None]:
    """Join the other ranks, if there are any; an error of this one is printed under its number."""
    if not slurm.is_rank():
        one_device(cfg)
        yield
        return
    rank = os.environ["RANK"]
    if rank != "0":
        os.environ["TQDM_DISABLE"] = "1"  # read by tqdm when it is imported
    from preftune.launch import join

    try:
        join.join(cfg)
        yield
        join.leave()
    except UserError:
        if rank != "0":
            time.sleep(PATIENCE)
            print(f"rank {rank}:", end=" ", file=sys.stderr, flush=True)
        raise
    except Exception as error:
        if lost := LOST.search(str(error)):
            raise LaunchError(
                f"rank {rank}: another rank is gone ({lost[0]}), and this one ends too. Its own words say why. "
                f"{way_on(cfg)}"
            ) from error
        if rank != "0":  # whose traceback is enough
            print(f"rank {rank} failed: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
        raise


def one_device(cfg: DictConfig) -> None:
    """Leave one GPU visible to one process: of several, Trainer would take all by DataParallel, and other batches."""
    cards = hardware.nvidia()
    if len(cards) > 1 and not cfg.hardware.use_cpu and "torch" not in sys.modules:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
        os.environ["CUDA_VISIBLE_DEVICES"] = visible
        print(f"hardware: 1 of {len(cards)} GPUs; hardware=ddp takes all")
