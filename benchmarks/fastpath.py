"""Speed, work and memory of preftune beside TRL with its defaults, TRL tuned by hand, and the limit.

python -m benchmarks.fastpath --quick        or: make bench-quick    one case
python -m benchmarks.fastpath                or: make bench          every case of CASES

Every path is a process of its own with the same model, data, batch size and seed. Its first epoch is planned as its
trainer would draw it. Steps at even quantiles of what its batches cost are run, the paths taking turns, and timed;
GFLOP are counted for all batches (benchmarks/flops.py). Seconds per pair are those of the timed steps for the GFLOP of
the whole epoch: what a batch costs differs much more than the speed at which it is computed. A first run adds the
reference's log-probs of every pair, computed beforehand where the path does so. Peak memory is that of the largest
timed step above the process at rest, with its model and data.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

from benchmarks.data import HH
from benchmarks.paths import Case
from preftune.config.hardware import cpu_has_bf16
from preftune.config.stages import SELECTIVE

PATHS = ("trl_default", "trl_tuned", "preftune", "limit")
STEPS = {"trl_default": 3, "trl_tuned": 4, "preftune": 8, "limit": 6}
QUICK_STEPS = {"trl_default": 1, "trl_tuned": 2, "preftune": 4, "limit": 3}
QUICK = Case(dtype="bfloat16" if cpu_has_bf16() else "float32", checkpointing=SELECTIVE)  # as conf/hardware/cpu.yaml
BATCHES = (2, 4, 8, 16)
GROWTH = [(64, 64), (256, 64), (768, 64), (256, 16), (256, 256)]  # prompt and answer tokens
CASES = {  # shorter where TRL tuned, four processes beside each other, would outgrow 24 GB
    "dpo-lora-bf16": Case(checkpointing=SELECTIVE),
    "kto-lora-bf16": Case("kto", checkpointing=SELECTIVE),
    "orpo-lora-bf16": Case("orpo", max_length=384, checkpointing=SELECTIVE),
    "dpo-lora-bf16-checkpointing": Case(checkpointing=True),
    "dpo-lora-fp32": Case(dtype="float32", max_length=384),
    "dpo-full-bf16": Case(tuning="full", max_length=256, checkpointing=SELECTIVE),
    "dpo-lora-bf16-gpt2": Case(model="gpt2"),
    **{
        f"dpo-lora-{model}": Case(model=model, dtype=QUICK.dtype, max_length=384, checkpointing=SELECTIVE)
        for model in ("moe", "hybrid", "gemma3")
    },
    **{f"dpo-lora-bf16-demo-batch{size}": Case(source="demo", batch=size) for size in BATCHES},
    **{
        f"dpo-lora-bf16-{p}-{a}": Case(source=f"synthetic-{p}-{a}", rows=256, batch=4, max_length=1280)
        for p, a in GROWTH
    },
}
RESULTS = Path(__file__).parent / "results"


class Child:
    """One path in its process."""

    def __init__(self, case: Case, path: str, steps: int, log, what: str = "timed"):
        command = [sys.executable, "-m", "benchmarks.paths", json.dumps(asdict(case)), path, str(steps), what]
        pages = {"THP_MEM_ALLOC_ENABLE": str(int(path == "preftune"))}  # which preftune's import would set for all
        environment = os.environ | {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1", "CI": "1"} | pages
        self.path, self.left, self.seconds, self.peaks = path, steps, [], []
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, env=environment,
            cwd=Path(__file__).parents[1],
        )  # fmt: skip

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.stdin.close()  # a child that waits for its turn ends
        self.process.wait()

    def heard(self, key: str) -> dict:
        """The next finding that has this key."""
        for line in self.process.stdout:
            if line.startswith("BENCH ") and key in (found := json.loads(line[6:])):
                return found
        raise RuntimeError(f"{self.path} ended without saying {key}: see {RESULTS / 'log.txt'}")

    def go(self) -> None:
        self.process.stdin.write("go\n")
        self.process.stdin.flush()

    def step(self) -> dict:
        self.go()
        return self.heard("step")


def run(case: Case, steps: dict[str, int]) -> dict[str, dict]:
    """Every path of a case, in turns: what each needs per pair."""
    RESULTS.mkdir(exist_ok=True)
    with (RESULTS / "log.txt").open("w") as log, ExitStack() as stack:
        children = [stack.enter_context(Child(case, path, steps[path], log)) for path in PATHS]
        ready = {child.path: child.heard("ready") for child in children}
        told = progress("built")
        for child in children:
            child.go()
            ready[child.path] |= child.heard("reference")
            child.step()  # the first step warms up
        told(f"warm; {sum(child.left for child in children)} steps to time")
        while waiting := [child for child in children if child.left]:
            for child in waiting:
                found = child.step()
                child.left -= 1
                child.seconds.append(found["seconds"])
                child.peaks.append(found["peak"] - ready[child.path]["idle"])
                told(f"{child.path} {found['seconds']:.1f} s, {child.left} left")
        told("counting")
        done = counted(children)
        return {child.path: summary(child, ready[child.path], done[child.path]) for child in children}


def counted(children: list[Child]) -> dict[str, dict]:
    """What each path counted; two at a time, since nothing is timed any more, and four may outgrow the memory."""
    done = {}
    for some in (children[::2], children[1::2]):  # TRL tuned holds the most, the limit the least
        for child in some:
            child.go()
        done |= {child.path: child.heard("done")["done"] for child in some}
    return done


def recount(case: Case, old: dict) -> dict:
    """A result with its GFLOP counted anew; the seconds and peaks of its steps, and its reference pass, stay."""
    new = {name: dict(values) for name, values in old.items()}
    with (RESULTS / "log.txt").open("w") as log, ExitStack() as stack:
        steps = old["steps_timed"]
        children = [stack.enter_context(Child(case, path, int(steps[path]), log, "counted")) for path in PATHS]
        for child in children:
            child.heard("ready")
        for path, done in counted(children).items():
            gflop = done["gflop"] / old["pairs"][path]
            seconds = sum(old["step_seconds"][path]) / sum(done["picked_gflop"]) * gflop
            for name, value in (("gflop_per_pair", gflop), ("seconds_per_pair", seconds)):
                new[f"{name}_first_run"][path] += value - new[name][path]
                new[name][path] = value
            new["step_gflop"][path] = done["picked_gflop"]
    return new


def progress(first: str) -> Callable[[str], None]:
    """Tell what is done, on stderr, with the seconds since the last word."""
    last = [time.perf_counter()]

    def tell(what: str) -> None:
        now = time.perf_counter()
        print(f"{time.strftime('%H:%M:%S')} +{now - last[0]:.0f} s: {what}", file=sys.stderr, flush=True)
        last[0] = now

    tell(first)
    return tell


def summary(child: Child, ready: dict, done: dict) -> dict:
    pairs, gflop = ready["pairs"], done["gflop"]
    seconds = sum(child.seconds) / sum(done["picked_gflop"]) * gflop
    reference = done.get("reference_gflop", 0) / ready["all_pairs"]
    speed = ready["reference"] / done["sample_gflop"] if reference else 0
    return {
        "gflop_per_pair": gflop / pairs,
        "seconds_per_pair": seconds / pairs,
        "peak_gb": max(child.peaks),
        "gflop_per_pair_first_run": gflop / pairs + reference,
        "seconds_per_pair_first_run": seconds / pairs + speed * reference,
        "pairs": pairs,
        "steps_timed": len(child.seconds),
        "step_seconds": child.seconds,
        "step_gflop": done["picked_gflop"],
        "step_peak_gb": child.peaks,
        "flop_fit_error": done["fit_error"],
    }


def by_measure(found: dict[str, dict]) -> dict[str, dict]:
    """The same with each measure an object of paths."""
    return {measure: {path: found[path][measure] for path in found} for measure in next(iter(found.values()))}


def machine() -> dict:
    model = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return {
        "cores": os.cpu_count(),
        "processor": model[0].split(":")[1].strip() if model else platform.processor(),
        "versions": {name: version(name) for name in ("torch", "trl", "transformers", "peft")},
        "measured": time.strftime("%Y-%m-%d"),
    }


def table(case: Case, result: dict[str, dict]) -> str:
    names = ("gflop_per_pair", "seconds_per_pair", "peak_gb", "gflop_per_pair_first_run", "seconds_per_pair_first_run")
    lines = [
        f"| {' '.join(map(str, asdict(case).values()))} | " + " | ".join(PATHS) + " |",
        "|---" * (len(PATHS) + 1) + "|",
    ]
    lines += [f"| {name} | " + " | ".join(f"{result[name][path]:.3g}" for path in PATHS) + " |" for name in names]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one case, into results/quick.json")
    parser.add_argument("--only", nargs="*", default=list(CASES), choices=list(CASES), help="of all cases")
    parser.add_argument("--few", action="store_true", help="time as few steps of each path as --quick does")
    parser.add_argument("--recount", action="store_true", help="count GFLOP anew in the results at hand, time nothing")
    args = parser.parse_args()
    cases = {"quick": QUICK} if args.quick else {name: CASES[name] for name in args.only}
    for name, case in cases.items():
        if case.source == "hh" and not HH.exists():
            print(f"{name}: {HH} is not there; the shipped demo data instead", flush=True)
            case = Case(**asdict(case) | {"source": "demo"})
        file = RESULTS / f"{name}.json"
        if args.recount:
            result = recount(case, json.loads(file.read_text()))
        else:
            found = run(case, QUICK_STEPS if args.quick or args.few else STEPS)
            result = by_measure(found) | {"case": asdict(case), "machine": machine()}
        file.write_text(json.dumps(result, indent=2) + "\n")
        print(table(case, result), flush=True)


if __name__ == "__main__":
    main()
