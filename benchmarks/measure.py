"""What a benchmark's process says and hears, and the memory that it takes."""

import ctypes
import json
import sys
from pathlib import Path


def say(**what) -> None:
    print("BENCH", json.dumps(what), flush=True)


def hear() -> None:
    """Wait for the turn; end where nobody gives one any more."""
    if not sys.stdin.readline():
        sys.exit(1)


def memory(field: str) -> float:
    """GB of this process: VmRSS now, VmHWM at most since `reset_peak`."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024 / 1e9


def give_memory_back() -> None:
    ctypes.CDLL("libc.so.6").malloc_trim(0)


def reset_peak() -> None:
    give_memory_back()  # what earlier steps freed is not this step's
    Path("/proc/self/clear_refs").write_text("5")


def collate(trainer, rows: list[int]) -> dict:
    return trainer.data_collator([trainer.train_dataset[row] for row in rows])
