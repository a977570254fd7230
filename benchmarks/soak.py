"""Pipelines that are killed at random, again and again, and must come out as if nothing had happened: make soak

Each of the runs is SFT → DPO → evaluation → export on the tiny model. SIGKILL comes at a random moment, or just while a
checkpoint, the reference cache or a manifest is written; then the same command goes on with resume=true, until it ends
by itself. In the end its losses, its exported weights and its files must be those of a run that was left alone.
"""

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from safetensors.torch import load_file
from tqdm import tqdm

LINE = [
    *("model=tiny", "hardware=cpu", "hardware.bf16=false", "tracking=none", "gate.on_fail=warn", "samples=1"),
    *("train.max_steps=30", "train.save_steps=5", "train.logging_steps=1", "train.eval_strategy=no"),
    *("train.learning_rate=1e-3", "hardware.per_device_train_batch_size=4", "data.max_rows=64"),
    "pipeline.stages=[sft,preference,evaluate,export]",
    *("pipeline.evaluate.kl_prompts=2", "pipeline.evaluate.max_new_tokens=8", "fastpath.reference_batch_tokens=256"),
]
TOLERANCE = 1e-6


def start(run: Path, *more: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "recipes.sft_dpo", *LINE, f"output_dir={run}", *more]
    command.append(f"fastpath.reference_cache={run.parent / 'cache'}")
    output = (run.parent / "output.txt").open("a")
    return subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=os.environ | {"HF_HUB_OFFLINE": "1"})


def half_checkpoint(run: Path) -> bool:
    return any(not (path / "hashes.json").exists() for path in run.glob("*/checkpoint-*"))


def cache_in_writing(run: Path) -> bool:
    folder = run.parent / "cache"
    return folder.exists() and any(folder.rglob("*")) and not any(run.glob("preference/manifest.json"))


def manifest_in_writing(run: Path) -> bool:
    return any(run.glob("*/.manifest.json.*")) or any(run.glob("*/.summary.json.*")) or any(run.glob(".merge-*"))


MOMENTS = {"checkpoint": half_checkpoint, "cache": cache_in_writing, "manifest": manifest_in_writing}


def kill_once(run: Path, draw: random.Random, whole_seconds: float, *more: str) -> str | None:
    """Start the pipeline and kill it. Returns at which moment; None where it had ended before."""
    moment = draw.choice(["any", *MOMENTS])
    until = time.monotonic() + draw.uniform(0.2, 1.0) * whole_seconds
    process = start(run, *more)
    while process.poll() is None:
        if (moment == "any" and time.monotonic() > until) or (moment != "any" and MOMENTS[moment](run)):
            process.kill()
            process.wait()
            return moment
        time.sleep(0.0005)
    return None


def losses(run: Path) -> dict[str, list[float]]:
    files = {path.parent.name: path for path in run.glob("*/metrics.jsonl")}
    rows = {name: map(json.loads, path.read_text().splitlines()) for name, path in files.items()}
    return {name: [row["loss"] for row in each if "loss" in row] for name, each in rows.items()}


def differences(run: Path, alone: Path) -> list[str]:
    """How the result of a killed run differs from that of one left alone."""
    found = []
    mine, wanted = ({str(path.relative_to(each)) for path in each.rglob("*")} for each in (run, alone))
    found += [f"stray {name}" for name in sorted(mine - wanted)] + [f"missing {name}" for name in sorted(wanted - mine)]
    mine, wanted = losses(run), losses(alone)
    for stage, values in wanted.items():
        if len(mine.get(stage, [])) != len(values):
            found.append(f"{stage}: {len(mine.get(stage, []))} logged steps instead of {len(values)}")
        elif (worst := max(abs(a - b) for a, b in zip(mine[stage], values, strict=True))) > TOLERANCE:
            found.append(f"{stage}: losses differ by {worst:.2g}")
    mine, wanted = (load_file(each / "exported" / "model.safetensors") for each in (run, alone))
    worst = max((mine[name] - wanted[name]).abs().max().item() for name in wanted)
    return found + ([f"weights differ by {worst:.2g}"] if worst > TOLERANCE else [])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--kills", type=int, default=2, help="of each run")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    draw, killed, wrong = random.Random(args.seed), Counter(), []
    with tempfile.TemporaryDirectory() as folder:
        alone = Path(folder) / "alone" / "run"
        alone.parent.mkdir()
        began = time.monotonic()
        if start(alone).wait():
            sys.exit((alone.parent / "output.txt").read_text())
        whole = time.monotonic() - began
        for number in tqdm(range(args.runs), desc="pipelines", unit="run"):
            run = Path(folder) / str(number) / "run"
            run.parent.mkdir()
            for _ in range(args.kills):
                moment = kill_once(run, draw, whole, *resume(run))
                killed[moment or "ended before"] += 1
            if start(run, *resume(run)).wait():
                sys.exit(f"run {number} does not go on:\n{(run.parent / 'output.txt').read_text()[-3000:]}")
            wrong += [f"run {number}: {each}" for each in differences(run, alone)]
            shutil.rmtree(run.parent)
    print(f"{args.runs} pipelines, kills by moment: {dict(killed)}; {len(wrong)} differences")
    sys.exit("\n".join(wrong) if wrong else 0)


def resume(run: Path) -> list[str]:
    """`resume=true` once there is something to resume."""
    return ["resume=true"] if any(run.glob("*/manifest.json")) else []


if __name__ == "__main__":
    main()
