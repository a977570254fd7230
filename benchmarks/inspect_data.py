"""Inspecting a data set beside TRL's own tokenization of it: seconds, rows per second, peak memory.

`python -m benchmarks.inspect_data [rows]`: the HH dialogues of ../shared/data, repeated; SmolLM2's tokenizer.
"""

import gzip
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

from benchmarks.data import HH, messages

INSPECT = ["recipes.inspect_data", "data=file", "model=smollm2", "data.on_bad_rows=skip", "format=json"]


def write(folder: Path, rows: int) -> None:
    """The dialogues as they come, and as the columns that TRL takes, which it cannot make of them itself."""
    with gzip.open(HH, "rt", encoding="utf-8") as file:
        lines = file.readlines()
    with (folder / "hh.jsonl").open("w") as raw, (folder / "trl.jsonl").open("w") as ready:
        for place in range(rows):
            row = json.loads(lines[place % len(lines)])
            raw.write(json.dumps(row) + "\n")
            chosen, rejected = (messages(row[side]) for side in ("chosen", "rejected"))
            if len(chosen) > 1 and chosen[:-1] == rejected[:-1]:
                ready.write(
                    json.dumps({"prompt": chosen[:-1], "chosen": chosen[-1:], "rejected": rejected[-1:]}) + "\n"
                )


def tokenize(path: str) -> None:
    """What DPOTrainer does to rows before it trains."""
    from datasets import load_dataset
    from omegaconf import OmegaConf
    from trl import DPOTrainer

    from preftune.models.load import load_tokenizer

    base = OmegaConf.load("conf/base.yaml")
    tokenizer = load_tokenizer(OmegaConf.merge(base.model, {"path": "embedded://smollm2"}))
    args = SimpleNamespace(max_length=1024, truncation_mode="keep_start", dataset_num_proc=None)
    rows = load_dataset("json", data_files=path, split="train", cache_dir=tempfile.mkdtemp())
    DPOTrainer._prepare_dataset(SimpleNamespace(_tokenizer=tokenizer), rows, tokenizer, args, "train")


def measured(name: str, rows: int, command: list[str]) -> None:
    """Print what a process takes."""
    started = time.perf_counter()
    child = os.posix_spawn(sys.executable, [sys.executable, *command], os.environ, file_actions=[
        (os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0), (os.POSIX_SPAWN_OPEN, 2, os.devnull, os.O_WRONLY, 0),
    ])  # fmt: skip
    _, status, used = os.wait4(child, 0)
    took = time.perf_counter() - started
    code = os.waitstatus_to_exitcode(status)
    print(
        f"{name:30} {took:7.0f} s {rows / took:8,.0f} rows/s {used.ru_maxrss / 2**20:6.2f} GB   exit {code}", flush=True
    )


def main(rows: str = "20000") -> None:
    with tempfile.TemporaryDirectory() as scratch:
        write(Path(scratch), int(rows))
        given = [f"data.path={scratch}/hh.jsonl", f"output_dir={scratch}/run"]
        measured("recipes.inspect_data", int(rows), ["-m", *INSPECT, *given])
        command = f"from benchmarks.inspect_data import tokenize; tokenize('{scratch}/trl.jsonl')"
        measured("datasets.map, TRL's tokens", int(rows), ["-c", command])


if __name__ == "__main__":
    main(*sys.argv[1:])
