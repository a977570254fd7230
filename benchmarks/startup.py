"""How long a user waits for --help and for a typo to be told: `python -m recipes.dpo` beside TRL's own command line.

python benchmarks/startup.py [rounds]      or: make bench-startup
Each round runs all four commands once, in turn, so that what else the machine does weighs on all of them alike.
"""

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

ROUNDS = 5
RESULT = Path(__file__).parent / "results" / "startup.json"
TRL = [str(Path(sys.executable).with_name("trl")), "dpo"]
COMMANDS = {
    "preftune --help": [sys.executable, "-m", "recipes.dpo", "--help"],
    "trl --help": [*TRL, "--help"],
    "preftune typo": [sys.executable, "-m", "recipes.dpo", "loss.betta=0.1"],
    "trl typo": [*TRL, "--model_name_or_path", "gpt2", "--dataset_name", "prefs", "--use_cpu", "--betta", "0.1"],
}


def seconds(command: list[str]) -> tuple[float, float, subprocess.CompletedProcess]:
    """Wall-clock and processor time of one process and its children, from start to exit; the latter is the same on a
    busy machine."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "WANDB_MODE": "disabled"}
    before, started = os.times(), time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    took, after = time.perf_counter() - started, os.times()
    busy = after.children_user + after.children_system - before.children_user - before.children_system
    return took, busy, done


def measure(rounds: int) -> dict[str, dict]:
    """Every command's times over so many rounds, its exit code and the last line that it said."""
    rows = {name: {"command": command, "seconds": [], "cpu_seconds": []} for name, command in COMMANDS.items()}
    for _ in range(rounds):
        for name, row in rows.items():
            took, busy, done = seconds(row["command"])
            row["seconds"].append(round(took, 3))
            row["cpu_seconds"].append(round(busy, 3))
            row["exit_code"] = done.returncode
            row["said"] = (done.stderr if "typo" in name else done.stdout).strip().splitlines()[-1][-200:]
    for row in rows.values():
        row["median"] = round(statistics.median(row["seconds"]), 3)
        row["cpu_median"] = round(statistics.median(row["cpu_seconds"]), 3)
        row["command"] = " ".join(["python" if part == sys.executable else Path(part).name for part in row["command"]])
    return rows


def write(rows: dict[str, dict]) -> None:
    """Put the result beside the others, whole or not at all."""
    machine = {"cores": os.cpu_count(), "processor": platform.machine(), "load_average": os.getloadavg()[0]}
    versions = {name: version(name) for name in ("torch", "trl", "transformers", "hydra-core")}
    RESULT.parent.mkdir(parents=True, exist_ok=True)
    unfinished = RESULT.with_suffix(".tmp")
    result = {"rows": rows, "machine": machine, "python": platform.python_version(), "versions": versions}
    unfinished.write_text(json.dumps(result, indent=1))
    os.replace(unfinished, RESULT)


def main() -> None:
    rows = measure(int(sys.argv[1]) if len(sys.argv) > 1 else ROUNDS)
    write(rows)
    print(f"{'':18}{'median s':>9}{'least':>9}{'most':>9}{'cpu s':>9}{'exit':>6}  last line")
    for name, row in rows.items():
        times = row["median"], min(row["seconds"]), max(row["seconds"]), row["cpu_median"]
        shown = "".join(f"{each:9.2f}" for each in times)
        print(f"{name:18}{shown}{row['exit_code']:6}  {row['said'][:65]}")
    for what in ("--help", "typo"):
        ours, theirs = rows[f"preftune {what}"], rows[f"trl {what}"]
        faster = theirs["median"] / ours["median"], theirs["cpu_median"] / ours["cpu_median"]
        print(f"{what}: {faster[0]:.1f} times as fast as trl (in processor time {faster[1]:.1f})")
    print(f"load average {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")


if __name__ == "__main__":
    main()
