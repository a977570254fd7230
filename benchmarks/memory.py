"""Peak memory of real runs beside what the plan says of them: `python -m benchmarks.memory`, a few minutes on a CPU.

Each run is a process of its own: rows of one length are loaded, the plan is made, then the model is loaded and trained
for two steps, the reference pass included. Measured is the highest resident memory above that of the process before the
model. Writes benchmarks/results/memory.json and the table of docs/plan.md.
"""

import argparse
import dataclasses
import json
import random
import subprocess
import sys
import tempfile
from pathlib import Path

RESULTS = Path(__file__).parent / "results" / "memory.json"
PAGE = Path(__file__).parents[1] / "docs" / "plan.md"
MARKS = ("<!-- table: python -m benchmarks.memory -->", "<!-- end of table -->")
FIXED = ["hardware=cpu", "tracking=none", "data=file", "data.eval_fraction=0", "train.max_steps=2", "samples=0"]
ROWS = 8
BIG, GPT2, TINY = "model=smollm2", "model=path", "model=tiny"
BATCH_2, BATCH_4 = "hardware.per_device_train_batch_size=2", "hardware.per_device_train_batch_size=4"
FLOAT32, CHECKPOINTED = "hardware.bf16=false", "hardware.gradient_checkpointing=true"
NOT_CHECKPOINTED = "hardware.gradient_checkpointing=false"  # else it is selective
ONLINE, TWICE = "loss.precompute_ref_log_probs=false", "hardware.gradient_accumulation_steps=2"
CASES = [  # (recipe, prompt tokens, answer tokens, overrides)
    ("dpo", 150, 100, [BIG, "lora=lora", BATCH_4]),
    ("dpo", 150, 100, [BIG, "lora=lora", BATCH_4, NOT_CHECKPOINTED]),
    ("dpo", 150, 100, [BIG, "lora=lora", BATCH_4, FLOAT32]),
    ("dpo", 150, 100, [BIG, "lora=lora", BATCH_4, CHECKPOINTED]),
    ("dpo", 100, 100, [BIG, "lora=none", BATCH_4]),
    ("dpo", 100, 100, [BIG, "lora=none", BATCH_4, NOT_CHECKPOINTED, ONLINE]),
    ("dpo", 150, 80, [BIG, "lora=qlora", BATCH_2]),
    ("dpo", 150, 80, [BIG, "lora=lora", "model.dtype=bfloat16", BATCH_4]),
    ("kto", 150, 100, [BIG, "lora=lora", BATCH_4]),
    ("kto", 100, 60, [BIG, "lora=none", CHECKPOINTED, BATCH_4]),
    ("orpo", 150, 100, [BIG, "lora=lora", BATCH_4]),
    ("orpo", 100, 60, [BIG, "lora=none", FLOAT32, BATCH_2]),
    ("sft", 150, 150, [BIG, "lora=lora", BATCH_4, NOT_CHECKPOINTED]),
    ("sft", 100, 200, [BIG, "lora=none", BATCH_2, TWICE]),
    ("dpo", 100, 100, [GPT2, "lora=none", FLOAT32, BATCH_4]),
    ("dpo", 100, 100, [GPT2, "lora=lora", CHECKPOINTED, BATCH_4]),
    ("dpo", 250, 250, [TINY, "lora=none", FLOAT32, "train.max_length=4096"]),
]


def rows(folder: Path, prompt: int, answer: int) -> Path:
    """A file of pairs that all have about these many tokens, each a word."""
    words = ["time", "people", "way", "water", "day", "part", "sound", "work", "place", "year", "back", "thing"]
    path, draw = folder / f"{prompt}-{answer}.jsonl", random.Random(0)
    with path.open("w", encoding="utf-8") as file:
        for _ in range(ROWS):
            said = [" ".join(draw.choices(words, k=length)) for length in (prompt, answer, answer)]
            file.write(json.dumps(dict(zip(("prompt", "chosen", "rejected"), said, strict=True))) + "\n")
    return path


def gpt2(folder: Path) -> Path:
    """A GPT-2 of its smallest shape with random weights and SmolLM2's tokenizer."""
    from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

    from preftune.models import embedded

    tokenizer = AutoTokenizer.from_pretrained(embedded.folder("embedded://smollm2"))
    GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer))).save_pretrained(folder / "gpt2")
    tokenizer.save_pretrained(folder / "gpt2")
    return folder / "gpt2"


def measure(recipe: str, overrides: list[str], only_plan: bool) -> None:
    """Plan and train in this process; print the finding as one line of JSON."""
    import torch
    from hydra import compose, initialize_config_module
    from hydra.utils import get_class

    from benchmarks.measure import memory, reset_peak
    from preftune.data.load import load
    from preftune.models.load import load_tokenizer
    from preftune.plan import plan
    from preftune.runs.training import build_trainer

    with initialize_config_module("preftune.conf", version_base="1.3"):
        cfg = compose(recipe, [*FIXED, *overrides])
    tokenizer = load_tokenizer(cfg.model)
    data = load(cfg.data, view=cfg.loss.view, tokenizer=tokenizer, max_length=cfg.train.max_length, seed=0)
    planned = plan.plan(cfg, data, tokenizer)
    if only_plan:
        return print("FOUND", json.dumps({"planned": dataclasses.asdict(planned)}), flush=True)
    get_class(cfg.loss.trainer)  # TRL's code, and what PyTorch loads for its first product, are not the run's
    with torch.autocast("cpu", torch.bfloat16):
        torch.nn.Linear(64, 64)(torch.ones(64, 64)).sum().backward()
    reset_peak()
    idle = memory("VmRSS")
    built = build_trainer(cfg, data, tokenizer)
    loaded = memory("VmRSS")
    built.train()
    peak = memory("VmHWM")
    seconds = built.state.log_history[-1]["train_runtime"]
    found = {
        "measured": peak - idle,
        "loaded": loaded - idle,
        "seconds": seconds,
        "planned": dataclasses.asdict(planned),
    }
    print("FOUND", json.dumps(found), flush=True)


def run(case: tuple, folder: Path, only_plan: bool = False) -> dict:
    """One case in a process of its own."""
    recipe, prompt, answer, overrides = case
    given = [*overrides, f"data.path={rows(folder, prompt, answer)}", f"output_dir={folder / 'run'}"]
    given.append(f"fastpath.reference_cache={tempfile.mkdtemp(dir=folder)}")
    if GPT2 in overrides:
        given.append(f"model.path={folder / 'gpt2'}")
    command = [sys.executable, "-m", "benchmarks.memory", *(["--plan"] if only_plan else []), "--one", recipe, *given]
    done = subprocess.run(command, capture_output=True, text=True)
    line = next((line for line in done.stdout.splitlines() if line.startswith("FOUND")), None)
    if line is None:
        raise SystemExit(f"{command}\n{done.stdout}\n{done.stderr}")
    return {"recipe": recipe, "prompt": prompt, "answer": answer, "overrides": overrides} | json.loads(line[6:])


def error(row: dict) -> float:
    """How far the plan is from what was measured, relative to that."""
    return row["planned"]["memory_gb"]["total"] / row["measured"] - 1


def table(found: list[dict]) -> list[str]:
    """The table of docs/plan.md."""
    lines = ["| recipe | prompt + answer | settings | measured | planned | |", "|---" * 6 + "|"]
    for row in found:
        said = " ".join(each.rpartition("hardware.")[2] for each in row["overrides"])
        said = said.replace("per_device_train_batch_size", "batch").replace("model=path", "gpt2's shape")
        lines.append(
            f"| {row['recipe']} | {row['prompt']} + {row['answer']} | {said} | {row['measured']:.2f} "
            f"| {row['planned']['memory_gb']['total']:.2f} | {error(row):+.0%} |"
        )
    close, worst = sum(abs(error(row)) <= 0.15 for row in found), max(map(error, found), key=abs)
    return [*lines, "", f"{len(found)} runs, in GB: {close} within 15%, the worst {worst:+.0%}."]


def publish(page: Path, marks: tuple[str, str], lines: list[str]) -> None:
    """Put a table between its two comments in a page."""
    begin, end = marks
    head, rest = page.read_text(encoding="utf-8").split(begin)
    page.write_text(head + "\n".join([begin, *lines, end]) + rest.split(end, 1)[1], encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--one", nargs="+", help="a recipe and its overrides, in this process")
    parser.add_argument("--plan", action="store_true", help="plan the measured runs anew, and train none")
    args = parser.parse_args()
    if args.one:
        return measure(args.one[0], args.one[1:], args.plan)
    before = json.loads(RESULTS.read_text()) if args.plan else []
    found = []
    with tempfile.TemporaryDirectory() as folder:
        gpt2(Path(folder))
        for number, case in enumerate(CASES):
            row = run(case, Path(folder), args.plan)
            if args.plan:
                row["measured"] = before[number]["measured"]
            found.append(row)
            parts, at = row["planned"]["memory_gb"], row["planned"]["fullest_at"]
            print(number, f"{row['measured']:.2f}", parts, f"{error(row):+.0%}", at, flush=True)
    RESULTS.write_text(json.dumps(found, indent=1) + "\n")
    publish(PAGE, MARKS, table(found))


if __name__ == "__main__":
    main()
