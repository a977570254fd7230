"""The recipes as they come, each without an argument: `python -m benchmarks.defaults`, some ten minutes on two cores.

Each is a process in an empty folder, with its exit code and seconds, and of each of its trainings what was planned and
what was measured. Writes benchmarks/results/defaults.json and the table of docs/plan.md.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.memory import PAGE, publish

RECIPES = ("dpo", "kto", "orpo", "sft", "sft_dpo")
RESULTS = Path(__file__).parent / "results" / "defaults.json"
MARKS = ("<!-- table: python -m benchmarks.defaults -->", "<!-- end of table -->")
MEASURED = ("perplexity", "logp_accuracy", "reward_accuracy")  # of held-out pairs, before and after


def run(recipe: str, folder: Path) -> dict:
    """One recipe's exit code, its seconds, and each training that it planned and measured."""
    started = time.perf_counter()
    command = [sys.executable, "-m", f"recipes.{recipe}"]
    done = subprocess.run(command, cwd=folder, env=os.environ | {"HF_HUB_OFFLINE": "1"}, capture_output=True, text=True)
    seconds = time.perf_counter() - started
    trainings = []
    for path in sorted(folder.rglob("summary.json"), key=lambda path: path.stat().st_mtime):
        summary = json.loads(path.read_text())
        if summary.get("measured") and not (path.parent / "sft").exists():  # a pipeline repeats its last stage's
            kept = {name: summary[name] for name in ("plan", "measured", "seconds")}
            shots = [{name: shot.get(name) for name in MEASURED} for shot in summary["snapshots"]]
            trainings.append(kept | {"stage": path.parent.name if recipe == "sft_dpo" else "", "held_out": shots})
    found = {"recipe": recipe, "exit_code": done.returncode, "seconds": round(seconds, 1), "trainings": trainings}
    if done.returncode:
        print(done.stdout[-2000:], done.stderr[-2000:], sep="\n")
    return found


def beside(planned: float, measured: float, digits: int) -> str:
    """Two numbers and how far the first is from the second."""
    return f"{planned:.{digits}f} | {measured:.{digits}f} | {planned / measured - 1:+.0%}"


def table(found: list[dict]) -> list[str]:
    """The table of docs/plan.md: a line per training."""
    heads = ["recipe", "exit", "in all, s", "planned, GB", "measured", "", "by its first steps, s", "measured", ""]
    heads += ["perplexity", "accuracy by log-prob", "of rewards"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for row in found:
        for training in row["trainings"]:
            plan, measured, shots = training["plan"], training["measured"], training["held_out"]
            memory = beside(plan["memory_gb"]["total"], measured["memory_gb"], 1)
            ahead = measured["seconds_by_first_steps"]
            pace = beside(ahead, measured["seconds"], 0) if ahead else f"– | {measured['seconds']:.0f} | "
            perplexity = " → ".join(f"{shot['perplexity']:.1f}" for shot in shots)
            accuracy = " → ".join(f"{shot['logp_accuracy']:.0%}" for shot in shots)
            rewards = shots[-1]["reward_accuracy"]
            accuracy += f" | {'–' if rewards is None else f'{rewards:.0%}'}"
            first = f"{row['recipe']} {training['stage']}".strip() + f" | {row['exit_code']} | {row['seconds']:.0f}"
            lines.append(f"| {first} | {memory} | {pace} | {perplexity} | {accuracy} |")
    return lines


def main() -> None:
    found = []
    for recipe in RECIPES:
        with tempfile.TemporaryDirectory() as folder:
            found.append(run(recipe, Path(folder)))
        print(*table(found[-1:])[2:], sep="\n", flush=True)
    RESULTS.write_text(json.dumps(found, indent=1) + "\n")
    publish(PAGE, MARKS, table(found))


if __name__ == "__main__":
    main()
