"""What srun tells its tasks, in the words that torch reads."""

import os
import re
from collections.abc import MutableMapping


def is_rank(environ: MutableMapping[str, str] = os.environ) -> bool:
    """Whether this process has been given its place among others already."""
    return "RANK" in environ and "WORLD_SIZE" in environ


def take_place(environ: MutableMapping[str, str]) -> None:
    """Set what torch reads (RANK, …) from what srun sets, where it has started one task per process.

    One task per machine is left alone where it starts the ranks of its machine itself.
    """
    tasks, nodes = (int(environ.get(f"SLURM_STEP_NUM_{kind}", 1)) for kind in ("TASKS", "NODES"))
    if is_rank(environ) or tasks <= nodes:
        return
    own = environ.get("CUDA_VISIBLE_DEVICES", ",").isdecimal()  # --gpus-per-task=1: a task sees its GPU alone, as 0
    environ |= {
        "RANK": environ["SLURM_PROCID"],
        "LOCAL_RANK": "0" if own else environ["SLURM_LOCALID"],
        "WORLD_SIZE": str(tasks),
        "MASTER_ADDR": environ.get("MASTER_ADDR", first_machine(environ)),
        "MASTER_PORT": environ.get("MASTER_PORT", str(port(environ))),
    }


def first_machine(environ: MutableMapping[str, str]) -> str:
    """The first of the machines of a Slurm step, where all meet."""
    return re.sub(r"\[(\d+)[^]]*\]", r"\1", environ["SLURM_STEP_NODELIST"]).split(",")[0]


def port(environ: MutableMapping[str, str]) -> int:
    """A port that every task of a Slurm step comes to, and another step hardly ever does."""
    return 20000 + (int(environ["SLURM_JOB_ID"]) * 7 + int(environ.get("SLURM_STEP_ID", 0))) % 20000
