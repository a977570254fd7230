"""preftune beside TRL on one GPU: speed, MFU, memory and start-up of twelve settings, and whether the losses agree.

    python -m benchmarks.gpu                 what is missing, in order, for 8 minutes; call it again to go on
    python -m benchmarks.gpu --page          docs/performance.md anew, from the results at hand
    python -m benchmarks.gpu --tiny          a rehearsal on tiny shapes, on a CPU too; its results are thrown away

Every cell is a process of its own: a model of a known shape with random weights made on the device (no hub), rows whose
lengths are drawn from a fixed distribution, one epoch of a few steps. Tokens are the unique ones of a pair (its prompt
once) for every path, so that tokens per second compare; MFU is their FLOP, recomputation left out and LoRA's backward
as it runs, over the card's dense bf16 peak.
"""

import argparse
import contextlib
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

from benchmarks.memory import publish

RESULTS = Path(__file__).parent / "results" / "gpu.jsonl"
PAGE = Path(__file__).parents[1] / "docs" / "performance.md"
MARKS = "<!-- table: python -m benchmarks.gpu --page -->", "<!-- end of GPU table -->"
BUDGET = 480  # seconds of one call
PEAKS = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12, "4090": 165e12, "A10": 125e12, "L4": 121e12}
SHAPES = {
    "135m": ("llama", {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "vocab_size": 49152,
                       "num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True}),
    "1.5b": ("qwen2", {"hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "vocab_size": 151936,
                       "num_attention_heads": 12, "num_key_value_heads": 2, "tie_word_embeddings": True}),
    "8b": ("llama", {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "vocab_size": 128256,
                     "num_attention_heads": 32, "num_key_value_heads": 8, "tie_word_embeddings": False}),
}  # fmt: skip
TINY = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 512,
        "num_attention_heads": 4, "num_key_value_heads": 2}  # fmt: skip
LENGTHS = {  # medians of prompt and answer tokens, log-normal, and the spread of their logarithms
    "hh": (110, 60, 0.8),
    "ultrafeedback": (140, 260, 0.8),
    "long prompts": (2600, 250, 0.2),
}
PATHS = ("trl", "trl tuned", "packed", "packed flex", "forked")


@dataclass(frozen=True)
class Row:
    """One setting."""

    shape: str
    tuning: str  # lora | qlora | full
    lengths: str
    max_length: int
    batch: int
    checkpointing: bool = False  # of all paths but TRL with its defaults, which has it on

    @property
    def name(self) -> str:
        more = ", checkpointing" if self.checkpointing else ""
        return f"{self.shape} {self.tuning}, {self.lengths}, {self.max_length}{more}"


ROWS = [  # in the order of what matters most
    Row("8b", "lora", "hh", 1024, 4),
    Row("8b", "qlora", "hh", 1024, 4),
    Row("8b", "lora", "ultrafeedback", 4096, 2),
    Row("1.5b", "full", "ultrafeedback", 4096, 4),
    Row("1.5b", "lora", "hh", 1024, 8),
    Row("135m", "full", "hh", 1024, 16),
    Row("8b", "lora", "long prompts", 4096, 2, True),
    Row("8b", "lora", "hh", 1024, 8, True),
    Row("1.5b", "qlora", "ultrafeedback", 4096, 4),
    Row("135m", "lora", "ultrafeedback", 4096, 8),
    Row("1.5b", "full", "hh", 1024, 8),
    Row("8b", "full", "hh", 1024, 2, True),
]
STEPS, WARM = 10, 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--page", action="store_true", help="write docs/performance.md from the results at hand")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--rows", type=int, default=len(ROWS), help="how many, from the first")
    parser.add_argument("--cell", nargs=2, metavar=("ROW", "PATH"), help="run one cell and print it (used by itself)")
    args = parser.parse_args()
    if args.cell:
        row = args.cell[0]
        found = checks(args.tiny) if row == "checks" else cell(ROWS[int(row)], args.cell[1], args.tiny)
        print("CELL", json.dumps(found), flush=True)
    elif args.page:
        write_page(args.results)
    else:
        with tempfile.TemporaryDirectory() as scratch:
            fill(Path(scratch) / "tiny.jsonl" if args.tiny else args.results, args.rows, args.tiny)


def fill(results: Path, rows: int, tiny: bool) -> None:
    """Run the cells that have no result yet, one after the other, until the call's time is spent."""
    results.parent.mkdir(parents=True, exist_ok=True)
    known = read(results)
    wanted = [("checks", ""), *((str(number), path) for number in range(rows) for path in PATHS)]
    begun, longest = time.perf_counter(), 60.0
    for number, path in wanted:
        name = "checks" if number == "checks" else ROWS[int(number)].name
        if (name, path) in known:
            continue
        spent = time.perf_counter() - begun
        if not tiny and spent + longest > BUDGET:
            print(f"{spent:.0f} s spent; call again for the rest", flush=True)
            return
        found = run_cell(number, path, tiny, BUDGET if tiny else BUDGET - spent)
        longest = max(longest, time.perf_counter() - begun - spent)
        print(name, path, json.dumps(found), flush=True)
        with results.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"row": name, "path": path} | found) + "\n")
    print("every cell has a result", flush=True)


def run_cell(number: str, path: str, tiny: bool, seconds: float) -> dict:
    """A cell in a process of its own; what ended it instead, where it gave no result."""
    command = [sys.executable, "-m", "benchmarks.gpu", "--cell", number, path, *(["--tiny"] if tiny else [])]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=seconds, env=environment, cwd=Path(__file__).parents[1]
        )
    except subprocess.TimeoutExpired:
        return {"error": f"no end in {seconds:.0f} s"}
    for line in done.stdout.splitlines():
        if line.startswith("CELL "):
            return json.loads(line[5:])
    return {"error": next((line for line in reversed(done.stderr.splitlines()) if line.strip()), "no output")[:200]}


def read(results: Path) -> dict[tuple[str, str], dict]:
    """The results at hand, by row and path."""
    lines = results.read_text(encoding="utf-8").splitlines() if results.exists() else []
    return {(each["row"], each["path"]): each for each in map(json.loads, lines)}


def absent(row: Row, path: str) -> str | None:
    """The package that a cell needs and that is not installed."""
    if row.tuning == "qlora" and find_spec("bitsandbytes") is None:
        return "bitsandbytes"
    return "triton" if path == "packed flex" and find_spec("triton") is None else None


def cell(row: Row, path: str, tiny: bool) -> dict:
    """Train a few steps of a setting by one path: what they took."""
    if package := absent(row, path):
        return {"left_out": f"{package} is not installed"}
    started = time.time() - process_start()
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not tiny:
        return {"error": "no GPU found"}
    with tempfile.TemporaryDirectory() as folder:
        timer = timed(device)
        began = time.perf_counter()
        try:
            trainer = build(row, path, tiny, folder, device)
            trainer.add_callback(timer)
            reference = time.perf_counter() - began
            trainer.train()
        except torch.OutOfMemoryError:
            return {"error": "out of memory"}
    steps = timer.seconds[WARM:]
    tokens = sum(trainer.data_collator.tokens[WARM:STEPS])
    flop = sum(work(trainer.model, row, each) for each in trainer.data_collator.rows[WARM:STEPS])
    name = torch.cuda.get_device_name(0) if device == "cuda" else "cpu"
    peak = next((peak for card, peak in PEAKS.items() if card in name), None)
    return {
        "device": name,
        "form": getattr(trainer, "form", None),
        "tokens_per_s": tokens / sum(steps),
        "pairs_per_s": len(steps) * row.batch / sum(steps),
        "mfu": flop / sum(steps) / peak if peak else None,
        "peak_gb": torch.cuda.max_memory_allocated() / 1e9 if device == "cuda" else None,
        "startup_s": started + timer.first - process_start(),
        "build_s": reference,
        "loss": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry][:3],
        "versions": versions(),
    }


def process_start() -> float:
    """When this process began, seconds since the epoch."""
    ticks = int(Path("/proc/self/stat").read_text().rsplit(")", 1)[1].split()[19])
    return time.time() - float(Path("/proc/uptime").read_text().split()[0]) + ticks / os.sysconf("SC_CLK_TCK")


def versions() -> dict[str, str]:
    found = {}
    for name in ("torch", "trl", "transformers", "peft", "bitsandbytes", "liger-kernel", "flash-attn", "kernels"):
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def timed(device: str):
    """A callback that times every step by itself, the device's work included."""
    import torch
    from transformers import TrainerCallback

    wait = torch.cuda.synchronize if device == "cuda" else lambda: None

    class Timer(TrainerCallback):
        def __init__(self):
            self.seconds, self.first = [], 0.0

        def on_step_begin(self, args, state, control, **kwargs):
            wait()
            if len(self.seconds) == WARM and device == "cuda":
                torch.cuda.reset_peak_memory_stats()
            self.began = time.perf_counter()

        def on_step_end(self, args, state, control, **kwargs):
            wait()
            self.seconds.append(time.perf_counter() - self.began)
            self.first = self.first or time.time()

    return Timer()


class Counting:
    """A collator that notes the lengths of the rows of each batch: (prompt, chosen, rejected) tokens."""

    def __init__(self, collator, limit: int):
        self.collator, self.limit, self.rows = collator, limit, []

    @property
    def tokens(self) -> list[int]:
        return [sum(map(sum, batch)) for batch in self.rows]

    def __call__(self, examples: list[dict]) -> dict:
        batch = []
        for each in examples:
            prompt = min(len(each["prompt_ids"]), self.limit)
            answers = [min(len(each[side]), self.limit - prompt) for side in ("chosen_ids", "rejected_ids")]
            batch.append((prompt, *answers))
        self.rows.append(batch)
        return self.collator(examples)


def work(model, row: Row, batch: list[tuple[int, int, int]]) -> float:
    """FLOP that a step on these pairs needs: their unique tokens, the head on answers, no layer computed twice."""
    config = model.config.get_text_config()
    width, layers = config.hidden_size, config.num_hidden_layers
    head = width * config.vocab_size
    adapters = sum(p.numel() for name, p in model.named_parameters() if "lora_" in name)
    inner = layer_weights(config)
    tokens, scored = sum(map(sum, batch)), sum(chosen + rejected for _, chosen, rejected in batch)
    seen = sum(p * p / 2 + sum(a * p + a * a / 2 for a in answers) for p, *answers in batch)
    forward = 2 * inner * tokens + 2 * head * scored + 4 * width * layers * seen
    products = 2 if row.tuning == "full" else 1  # of the backward; frozen weights get no gradient
    backward = products * (2 * inner * tokens + 2 * head * scored) + 8 * width * layers * seen
    return forward + backward + 6 * adapters * tokens


def layer_weights(config) -> float:
    """Weights of all layers, whatever they are stored in."""
    width, groups = config.hidden_size, config.num_key_value_heads / config.num_attention_heads
    return config.num_hidden_layers * (2 * width * width * (1 + groups) + 3 * width * config.intermediate_size)


def rows_of(row: Row, tiny: bool, count: int) -> list[dict]:
    """Pairs of the lengths of a setting, each character a token; the same for every path."""
    import numpy as np

    prompt, answer, spread = LENGTHS[row.lengths]
    rng, scale = np.random.default_rng(0), 16 if tiny else 1
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz"))

    def text(median: int) -> str:
        length = max(2, round(median / scale * math.exp(rng.normal(0, spread))))
        return "".join(rng.choice(letters, min(length, 2 * row.max_length)))

    return [{"prompt": text(prompt), "chosen": text(answer), "rejected": text(answer)} for _ in range(count)]


def model_of(row: Row, tiny: bool, device: str, attention: str | None = None):
    """A model of the row's shape with random weights, made on the device; in four bits for QLoRA."""
    import torch
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM, BitsAndBytesConfig

    kind, sizes = SHAPES[row.shape]
    sizes = dict(sizes) | (TINY if tiny else {})
    config = CONFIG_MAPPING[kind](**sizes, max_position_embeddings=8192, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    torch.manual_seed(0)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention or "sdpa")
    if row.tuning != "qlora":
        return model
    with tempfile.TemporaryDirectory() as folder:  # only from_pretrained quantizes
        model.save_pretrained(folder)
        del model
        four = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
        return AutoModelForCausalLM.from_pretrained(
            folder, quantization_config=four, dtype=dtype, device_map=device, attn_implementation=attention or "sdpa"
        )


def build(row: Row, path: str, tiny: bool, folder: str, device: str, cls=None, **options):
    """The trainer of a path, its reference log-probs computed where it computes them beforehand.

    `cls` in place of the path's own trainer class; `options` go to DPOConfig.
    """
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoTokenizer
    from trl import DPOConfig

    from preftune.models import embedded

    rows = rows_of(row, tiny, STEPS * row.batch)
    if path == "trl tuned":  # rows of like length in a batch, by hand: TRL's own way fails in DPO
        rows.sort(key=lambda each: -len(each["prompt"]) - max(len(each["chosen"]), len(each["rejected"])))
    settings = {
        "output_dir": folder,
        "use_cpu": device == "cpu",
        "bf16": device == "cuda",
        "per_device_train_batch_size": row.batch,
        "max_length": row.max_length,
        "max_steps": STEPS,
        "learning_rate": 1e-6,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }
    if path != "trl":
        settings |= {"gradient_checkpointing": row.checkpointing, "precompute_ref_log_probs": True}
    trainer = (cls or class_of(path, folder))(
        model_of(row, tiny, device, attention_of(path, device)),
        args=DPOConfig(**settings | options),
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(embedded.folder("embedded://tiny")),
        peft_config=None if row.tuning == "full" else LoraConfig(r=16, target_modules="all-linear"),
    )
    trainer.data_collator = Counting(trainer.data_collator, row.max_length)
    return trainer


def class_of(path: str, folder: str) -> type:
    """The trainer class of a path."""
    from torch.utils.data import SequentialSampler
    from trl import DPOTrainer

    from preftune.fastpath import trainer_class

    class InOrder(DPOTrainer):
        def _get_train_sampler(self, train_dataset=None):
            return SequentialSampler(train_dataset or self.train_dataset)

    if path.startswith("trl"):
        return DPOTrainer if path == "trl" else InOrder
    return trainer_class(DPOTrainer, form=path.split()[0], reference_cache=Path(folder) / "reference")


def attention_of(path: str, device: str) -> str:
    """The attention that a path takes."""
    if path == "trl tuned" and device == "cuda" and find_spec("flash_attn"):
        return "flash_attention_2"
    return "flex_attention" if path == "packed flex" else "sdpa"


def checks(tiny: bool) -> dict:
    """Whether five steps lose as TRL's do, by form and with NF4; and whether a second run finds its reference.

    Gives the largest differences from TRL's losses, and of the gradients' norms relative to TRL's; bfloat16's rounding
    is all that may be in them.
    """
    import torch
    from trl import DPOTrainer

    from preftune.fastpath import mixins

    device, found = "cuda" if torch.cuda.is_available() else "cpu", {}
    same = {"max_steps": 5, "learning_rate": 1e-4, "precompute_ref_log_probs": False}
    for tuning in ("lora", "qlora"):
        row, logs = Row("135m", tuning, "hh", 1024, 4), {}
        for path in PATHS:
            if path == "trl tuned" or absent(row, path):
                continue
            form = None if path == "trl" else path.split()[0]
            cls = (
                DPOTrainer if form is None else type("DPOTrainer", (mixins(DPOTrainer)[0], DPOTrainer), {"form": form})
            )
            with tempfile.TemporaryDirectory() as folder:
                trainer = build(row, path, tiny, folder, device, cls, gradient_checkpointing=False, **same)
                trainer.train()
            logs[path] = [entry for entry in trainer.state.log_history if "loss" in entry]
        for path in [path for path in logs if path != "trl"]:
            pairs = list(zip(logs["trl"], logs[path], strict=True))
            found[f"{path}, {tuning}"] = {
                "loss": max(abs(one["loss"] - other["loss"]) for one, other in pairs),
                "grad_norm": max(abs(one["grad_norm"] / other["grad_norm"] - 1) for one, other in pairs),
            }
    with tempfile.TemporaryDirectory() as folder:
        first, second = (build(Row("135m", "lora", "hh", 1024, 4), "packed", tiny, folder, device) for _ in range(2))
        found["reference computed, first and second run"] = [first.reference_forwards, second.reference_forwards]
    name = torch.cuda.get_device_name(0) if device == "cuda" else "cpu"
    return {"device": name, "checks": found, "versions": versions()}


def write_page(results: Path) -> None:
    """The table of docs/performance.md, between its two comments."""
    known = read(results)
    publish(PAGE, MARKS, ["", table(known), ""])


def table(known: dict[tuple[str, str], dict]) -> str:
    """A line per setting, and what was checked; in plain words where nothing was measured."""
    if not known:
        return "Not measured: no GPU was at hand."
    lines = [f"| tokens per second (MFU, peak GB, start-up s) | {' | '.join(PATHS)} |", "|---" * (1 + len(PATHS)) + "|"]
    for row in ROWS:
        lines.append(f"| {row.name} | " + " | ".join(written(known.get((row.name, path))) for path in PATHS) + " |")
    devices = dict.fromkeys(each["device"] for each in known.values() if "device" in each)
    lines += ["", f"Measured on {', '.join(devices)}, with {next(iter(known.values())).get('versions')}."]
    if checked := known.get(("checks", "")):
        lines += ["", f"Beside TRL, over five steps: `{json.dumps(checked.get('checks', checked.get('error')))}`."]
    return "\n".join(lines)


def written(found: dict | None) -> str:
    """A cell of the table."""
    if found is None:
        return "not measured"
    if "tokens_per_s" not in found:
        return found.get("left_out") or found["error"][:60]
    mfu = f"{found['mfu']:.0%}, " if found["mfu"] else ""
    return f"{found['tokens_per_s']:,.0f} ({mfu}{found['peak_gb'] or 0:.1f}, {found['startup_s']:.0f})"


if __name__ == "__main__":
    main()
