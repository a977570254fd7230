"""One way to train, in a process of its own: it steps when it is told to, and says what each step took.

Started by benchmarks/fastpath.py, which reads the lines that begin with BENCH. The ways are TRL with its defaults, TRL
tuned by hand, preftune, and the limit (benchmarks/limit.py).
"""

import json
import sys
import tempfile
import time
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import SequentialSampler
from transformers import TrainerCallback

from benchmarks import data, flops, limit
from benchmarks.measure import collate, give_memory_back, hear, memory, reset_peak, say
from preftune.config.stages import SELECTIVE
from preftune.fastpath import trainer_class
from preftune.fastpath.checkpointing import keep_products
from preftune.fastpath.reference_cache import reference_jobs, scored_example, without_kl

REFERENCE = {"precompute_ref_log_probs": True}


@dataclass(frozen=True)
class Case:
    """What is trained, the same for every path."""

    method: str = "dpo"  # dpo | kto | orpo
    model: str = "smollm2"  # smollm2 | gpt2 | moe | hybrid | gemma3 | tiny
    tuning: str = "lora"  # lora | full
    dtype: str = "bfloat16"  # what autocast multiplies in; the weights are float32
    source: str = "hh"  # hh | demo | synthetic-<prompt tokens>-<answer tokens>
    checkpointing: bool | str = False  # of preftune, and of TRL tuned where true; TRL with its defaults has it on
    batch: int = 8
    max_length: int = 512  # at 1024 TRL tuned, without checkpointing, outgrows 24 GB on HH dialogues
    rows: int | None = None  # of the data; None: all
    seed: int = 0

    @property
    def rows_a_pair(self) -> int:
        return 2 if self.method == "kto" else 1


def trainer_classes(method: str) -> tuple[type, type]:
    if method == "orpo":
        from trl.experimental.orpo import ORPOConfig, ORPOTrainer

        return ORPOTrainer, ORPOConfig
    from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer

    return (KTOTrainer, KTOConfig) if method == "kto" else (DPOTrainer, DPOConfig)


class Staged:
    """Over a trainer: its reference pass and its sequence of batches wait until the benchmark has picked the rows."""

    staged = False

    def _precompute_ref_logps(self, dataset, name, batch_size):
        return super()._precompute_ref_logps(dataset, name, batch_size) if self.staged else dataset

    def _get_train_sampler(self, train_dataset=None):
        return SequentialSampler(self.train_dataset) if self.staged else super()._get_train_sampler(train_dataset)


class Turns(TrainerCallback):
    """Each optimizer step waits for its turn, and is timed by itself; the first one warms up."""

    def on_step_begin(self, args, state, control, **kwargs):
        hear()
        reset_peak()
        self.began = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        seconds, peak = time.perf_counter() - self.began, memory("VmHWM")
        give_memory_back()  # the other paths' steps need it
        say(step=state.global_step, seconds=seconds, peak=peak)


def build(case: Case, path: str, folder: str):
    """The trainer of this path, with its data tokenized and nothing computed yet."""
    trl_class, config_class = trainer_classes(case.method)
    base = trainer_class(trl_class) if path == "preftune" else trl_class
    recomputed = bool(case.checkpointing) if path == "preftune" else case.checkpointing is True
    tuned = {"gradient_checkpointing": recomputed} | (REFERENCE if case.method != "orpo" else {})
    options = {} if path == "trl_default" else tuned
    staged = type(base.__name__, (Staged, base), {"reference_cache": Path(folder) / "reference"})
    args = config_class(
        output_dir=folder,
        use_cpu=not torch.cuda.is_available(),
        bf16=case.dtype == "bfloat16",
        report_to="none",
        disable_tqdm=True,
        logging_strategy="no",
        save_strategy="no",
        max_length=case.max_length,
        per_device_train_batch_size=case.batch,
        num_train_epochs=1,
        seed=case.seed,
        dataloader_pin_memory=False,
        **options,
    )
    model, tokenizer, peft = data.model_of(case)
    trainer = staged(model, args=args, train_dataset=data.pairs(case), processing_class=tokenizer, peft_config=peft)
    if path == "preftune" and case.checkpointing == SELECTIVE:
        keep_products(trainer.model)
    return trainer


def planned(trainer) -> list[list[int]]:
    """The batches of rows of the first epoch, as this trainer draws them."""
    torch.manual_seed(trainer.args.seed)
    return [list(batch) for batch in trainer.get_train_dataloader().batch_sampler]


def spread(costs: np.ndarray, count: int) -> list[int]:
    """`count` batches at even quantiles of what they cost."""
    order = np.argsort(costs, kind="stable")
    return [int(order[int((i + 0.5) / count * len(order))]) for i in range(count)]


def reference_batches(trainer, path: str) -> list[dict]:
    """The batches of this path's reference pass over all rows, collated; none where it has no such pass."""
    if path == "trl_default" or not hasattr(trainer, "compute_ref_log_probs"):
        return []
    rows = trainer.train_dataset
    if path == "preftune":
        jobs = reference_jobs(rows, trainer.args.max_length, "keep_start", None)
        examples = [[scored_example(rows[job.row], job.columns) for job in batch] for batch in trainer._batches(jobs)]
        return [trainer.data_collator(batch) for batch in examples]
    size = 1 if path == "limit" else trainer.args.per_device_train_batch_size
    return [collate(trainer, list(range(i, min(i + size, len(rows))))) for i in range(0, len(rows), size)]


def measure(case: Case, path: str, steps: int, timed: bool = True) -> None:
    """Build, plan, step in turn, count; every finding is said. Not `timed`: what would be stepped is counted alone."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = build(case, path, folder)
        way = limit.Limit(trainer) if path == "limit" else Way(trainer, path)
        batches = [rows for rows in planned(trainer) if len(rows) == case.batch]
        plan = np.array([flops.features(trainer, collate(trainer, rows), way.form) for rows in batches])
        picked = spread(plan[:, 0], steps)
        warm = int(np.argmin(plan[:, 0]))
        reference = reference_batches(trainer, path) if timed else []
        later = [flops.features(trainer, inputs, way.form) for inputs in reference]
        examples = data.calibration(trainer, plan.shape[1] + 1)
        reset_peak()
        idle = memory("VmRSS")
        all_pairs, pairs = len(trainer.train_dataset) / case.rows_a_pair, sum(map(len, batches)) / case.rows_a_pair
        trainer.train_dataset = trainer.train_dataset.select([row for i in [warm, *picked] for row in batches[i]])
        say(ready=True, idle=idle, pairs=pairs, all_pairs=all_pairs)
        hear()
        if timed:
            sample = way.reference() if reference else None
            say(reference=sample and sample[0])
            way.train(steps + 1)
            hear()
        else:
            way.prepare()
        torch.set_num_threads(1)  # two paths count at once, and would wait for each other's threads
        step_cost, step_error = flops.fit(way.step, examples, trainer, way.form)
        found = {"gflop": float(np.dot(plan.sum(axis=0), step_cost)) / 1e9, "fit_error": step_error}
        found["picked_gflop"] = [float(np.dot(plan[i], step_cost)) / 1e9 for i in picked]
        if reference:
            cost, error = flops.fit(way.score, [way.scored(inputs) for inputs in examples], trainer, way.form)
            found["fit_error"] = max(error, step_error)
            found["reference_gflop"] = float(np.dot(np.sum(later, axis=0), cost)) / 1e9
            found["sample_gflop"] = float(np.dot(np.sum(sample[1], axis=0), cost)) / 1e9
        say(done=found)


class Way:
    """A trainer's steps, its reference pass over the picked rows, and both by hand for counting."""

    def __init__(self, trainer, path: str):
        self.trainer, self.path = trainer, path
        self.form = trainer.form if path == "preftune" else None

    def reference(self) -> tuple[float, list]:
        """Compute the picked rows' reference log-probs: seconds, and the features of the batches that it ran."""
        trainer = self.trainer
        ran = [flops.features(trainer, inputs, self.form) for inputs in reference_batches(trainer, self.path)]
        trainer.staged = True
        began = time.perf_counter()
        size = trainer.args.per_device_train_batch_size
        trainer.train_dataset = trainer._precompute_ref_logps(trainer.train_dataset, "train", size)
        return time.perf_counter() - began, ran

    def train(self, steps: int) -> None:
        self.trainer.staged = True
        self.trainer.args.max_steps = steps
        self.trainer.add_callback(Turns())
        self.trainer.train()
        self.trainer.optimizer.zero_grad()

    def prepare(self) -> None:
        """Make the trainer ready for steps by hand, without training."""
        trainer, args = self.trainer, self.trainer.args
        trainer.current_gradient_accumulation_steps = 1
        if args.gradient_checkpointing:
            trainer.model.gradient_checkpointing_enable(args.gradient_checkpointing_kwargs)
        trainer.model.train()

    def step(self, inputs: dict) -> None:
        trainer = self.trainer
        if getattr(trainer, "precompute_ref_logps", False):
            inputs = inputs | flops.no_reference(inputs)
        trainer.training_step(trainer.model_wrapped, inputs)

    def scored(self, inputs: dict) -> dict:
        """What of a training batch the reference pass takes: preftune's has KTO's mismatched answers as rows."""
        return {name: value for name, value in inputs.items() if self.path != "preftune" or not name.startswith("KL_")}

    def score(self, inputs: dict) -> None:
        trainer = self.trainer
        with without_kl(trainer) if self.path == "preftune" else nullcontext():
            trainer.compute_ref_log_probs(trainer.model, trainer._prepare_inputs(inputs))


if __name__ == "__main__":
    measure(Case(**json.loads(sys.argv[1])), sys.argv[2], int(sys.argv[3]), timed=sys.argv[4] == "timed")
