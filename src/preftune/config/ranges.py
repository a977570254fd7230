"""Numbers that make no sense by themselves, and those that only one loss forbids."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from preftune.config.problems import Problem
from preftune.config.stages import Stage, node
from preftune.config.values import written


@dataclass(frozen=True)
class Range:
    """Bounds of a number, each with whether the bound itself is outside; `usual` is a value to show."""

    least: float | None = None
    most: float | None = None
    above: float | None = None
    below: float | None = None
    usual: float | None = None

    def complaint(self, value: object, suffix: str = "") -> str | None:
        """What is wrong with a value; None inside the bounds, or for no number."""
        if isinstance(value, bool) or not isinstance(value, int | float):
            return None
        fits = (
            (self.least is None or value >= self.least)
            and (self.most is None or value <= self.most)
            and (self.above is None or value > self.above)
            and (self.below is None or value < self.below)
        )
        bounds = (("at least", self.least), ("above", self.above), ("at most", self.most), ("below", self.below))
        said = " and ".join(f"{word} {written(bound)}" for word, bound in bounds if bound is not None)
        usual = "" if self.usual is None else f"; usual is {written(self.usual)}"
        return None if fits else f"wants a number {said}{suffix}, got {written(value)}{usual}"


POSITIVE, AT_LEAST_1, NOT_NEGATIVE, SHARE = Range(above=0), Range(least=1), Range(least=0), Range(least=0, most=1)

ARGUMENTS = {
    "beta": Range(above=0, usual=0.1),
    "learning_rate": Range(least=0, below=math.inf, usual=5e-6),
    "max_length": Range(above=0, usual=1024),
    "num_train_epochs": POSITIVE,
    "per_device_train_batch_size": AT_LEAST_1,
    "per_device_eval_batch_size": AT_LEAST_1,
    "precompute_ref_batch_size": AT_LEAST_1,
    "gradient_accumulation_steps": AT_LEAST_1,
    "logging_steps": POSITIVE,
    "eval_steps": POSITIVE,
    "save_steps": POSITIVE,
    "save_total_limit": AT_LEAST_1,
    "warmup_steps": NOT_NEGATIVE,
    "weight_decay": NOT_NEGATIVE,
    "max_grad_norm": NOT_NEGATIVE,
    "adam_beta1": Range(least=0, below=1),
    "adam_beta2": Range(least=0, below=1),
    "label_smoothing": Range(below=1),
    "ld_alpha": SHARE,
    "ref_model_mixup_alpha": SHARE,
    "ref_model_sync_steps": AT_LEAST_1,
    "desirable_weight": POSITIVE,
    "undesirable_weight": POSITIVE,
    "discopop_tau": POSITIVE,
    "seed": Range(least=0, below=2**32),
    "data_seed": Range(least=0, below=2**32),
}
ADAPTER = {"r": AT_LEAST_1, "lora_alpha": POSITIVE, "lora_dropout": Range(least=0, below=1)}

# By loss_type. EXO takes log ε. Robust DPO divides by 1 − 2ε; a negative ε makes it cDPO, so only the top is bounded.
SMOOTHING = {"exo_pair": Range(above=0, below=1, usual=1e-3), "robust": Range(below=0.5, usual=0.1)}


def numbers(stage: Stage) -> Iterator[Problem]:
    for name, bounds in ARGUMENTS.items():
        if name == "beta" and "num_generations" in stage:  # there it weighs the KL term, which may be left out
            bounds = NOT_NEGATIVE
        if name in stage.args and (complaint := bounds.complaint(stage.args[name])):
            yield stage.problem(name, complaint)
    if stage.args.get("max_steps", -1) < -1 or stage.args.get("max_steps") == 0:
        yield stage.problem("max_steps", "wants 1 or more steps, or -1 for what num_train_epochs says")


def default_rate(stage: Stage) -> Iterator[Problem]:
    given = node(stage.config, f"{stage.prefix}loss").get("rate")
    number = isinstance(given, int | float) and not isinstance(given, bool)
    if given is not None and not (number and 0 < given < math.inf):
        text = f"wants a learning rate above 0, got {written(given)}; for example 2e-5"
        yield Problem(f"{stage.prefix}loss.rate", text)


def adapter_numbers(stage: Stage) -> Iterator[Problem]:
    for name, bounds in ADAPTER.items():
        if complaint := bounds.complaint(stage.section("lora").get(name)):
            yield Problem(f"lora.{name}", complaint)


def label_smoothing(stage: Stage) -> Iterator[Problem]:
    for name in stage.loss_types:
        suffix = f" with loss_type {name}"
        if complaint := SMOOTHING.get(name, Range()).complaint(stage["label_smoothing"], suffix):
            yield stage.problem("label_smoothing", complaint)
