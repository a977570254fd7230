"""Held-out metrics that have one value: means over rows, or over tokens where TRL's own unit is tokens.

TRL logs the mean of the batches' means, so that a last batch of one row weighs as much as one of sixteen, and with
several processes rows are counted twice to fill the last batch. Here each batch counts by its rows or tokens, each row
once, whatever the batch size and the number of processes. What a loss takes from its whole batch (KTO's KL, the sorting
of AOT) still depends on who shares one.
"""

from collections import defaultdict
from contextlib import contextmanager

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

TOKENS = ("entropy", "mean_token_accuracy", "logits/", "nll_loss", "logps/chosen_per_token", "logps/rejected_per_token",
          "logratios/")  # fmt: skip


class EvaluationMeans:
    """Mixin for every trainer: weighs each evaluation batch, and gives TRL's `log` the means over the whole set.

    `per_row` names the metrics that are means of rows although `TOKENS` lists them.
    """

    per_row: tuple[str, ...] = ()

    def prediction_step(self, model, inputs, *args, **kwargs):
        rows, known = real_rows(self.accelerator, self._prepare_inputs(inputs))
        self.weights = {}  # of metrics that know their own
        with alone(self.accelerator):
            result = super().prediction_step(model, rows, *args, **kwargs)
        taken = {name.removeprefix("eval_"): values[-1] for name, values in self._eval_store().items()}
        self._eval_store().clear()
        counts = counted(rows)
        token_loss, share = self._token_loss(taken, result[0].item(), counts)
        self._add("loss of rows", result[0].item() - token_loss, counts["rows"] * known)
        self._add("loss of tokens", token_loss, share * known)
        for name, value in taken.items():
            self._add(name, value, self.weights.get(name, counts[self._unit(name)]) * known)
        return result

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        """TRL's, and of several sets by name (data.eval_sets) each: the one called eval keeps the plain names."""
        if eval_dataset is not None or not isinstance(self.eval_dataset, dict):
            return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        found = {}
        for name in self.eval_dataset:
            prefix = metric_key_prefix if name == "eval" else f"{metric_key_prefix}_{name}"
            found |= super().evaluate(name, ignore_keys, prefix)
        return found

    def evaluation_loop(self, *args, metric_key_prefix="eval", **kwargs):
        self._sums = defaultdict(lambda: [0.0, 0.0])
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        totals = defaultdict(lambda: [0.0, 0.0])
        for part in gather_object([dict(self._sums)]):
            for name, (value, weight) in part.items():
                totals[name] = [totals[name][0] + value, totals[name][1] + weight]
        means = {name: value / weight for name, (value, weight) in totals.items() if weight}
        if "loss of rows" in means:
            output.metrics[f"{metric_key_prefix}_loss"] = means.pop("loss of rows") + means.pop("loss of tokens", 0.0)
        if {"rewards/chosen", "rewards/rejected"} <= means.keys():  # KTO's batches need not hold both labels
            means["rewards/margins"] = means["rewards/chosen"] - means["rewards/rejected"]
        means |= self._of_the_whole_set()
        store, prefix = self._eval_store(), f"{metric_key_prefix}_"
        if hasattr(self, "_metrics"):  # to which TRL adds eval_ itself
            prefix = prefix.removeprefix("eval_")
        for name, value in means.items():
            store[f"{prefix}{name}"] = [value]
        return output

    def _add(self, name: str, value: float, weight: float) -> None:
        if weight:
            self._sums[name][0] += value * weight
            self._sums[name][1] += weight

    def _eval_store(self) -> dict:
        return self._metrics["eval"] if hasattr(self, "_metrics") else self._stored_metrics["eval"]

    def _unit(self, name: str) -> str:
        """The count of `counted` that a metric of a batch is a mean over."""
        side = next((side for side in ("chosen", "rejected") if f"/{side}" in name), "")
        if not name.startswith(TOKENS) or name in self.per_row:
            return f"{side} rows".strip()
        if hasattr(self, "_stored_metrics"):  # ORPO and CPO: logits of whole rows, and ORPO's likelihood is of them too
            whole = name.startswith("logits/") or (name == "nll_loss" and not hasattr(self, "cpo_alpha"))
            return f"{side or 'chosen'} {'row tokens' if whole else 'tokens'}"
        return "chosen tokens" if name == "mean_token_accuracy" and not side else f"{side} tokens".strip()

    def _token_loss(self, taken: dict, loss: float, counts: dict) -> tuple[float, float]:
        """(the part of a batch's loss that is a mean over tokens, their number)."""
        if "nll_loss" in taken:
            return getattr(self, "cpo_alpha", 1.0) * taken["nll_loss"], counts[self._unit("nll_loss")]
        if "chosen rows" not in counts:  # SFT
            return loss, counts["tokens"]
        types = getattr(self, "loss_types", [])
        if "sft" not in types or getattr(self, "use_weighting", False):
            return 0.0, 0.0
        weight = sum(weight for name, weight in zip(types, self.loss_weights, strict=True) if name == "sft")
        return -weight * taken["logps/chosen_per_token"], counts["chosen tokens"]

    def _of_the_whole_set(self) -> dict[str, float]:
        """Metrics that are no mean over batches, computed from all rows."""
        return {}


def real_rows(accelerator: Accelerator, inputs: dict) -> tuple[dict, bool]:
    """The batch without the rows that only fill it, and whether any is left: one row stays, to be run and not counted.

    The last batches of several processes are filled up with rows from the start of the data set.
    """
    state = accelerator.gradient_state
    if accelerator.num_processes == 1 or not state.end_of_dataloader or state.remainder <= 0:
        return inputs, True
    if "attention_mask" not in inputs and "position_ids" in inputs:  # SFT's packed rows
        return inputs, True
    paired = "label" not in inputs and not {"labels", "chosen_labels"} & inputs.keys()
    size = len(inputs["input_ids"]) // 2 if paired else len(next(iter(inputs.values())))
    real = min(size, max(0, state.remainder - accelerator.process_index * size))

    def cut(value):
        if len(value) == 2 * size and isinstance(value, torch.Tensor):
            return torch.cat([value[: max(real, 1)], value[size : size + max(real, 1)]])
        return value[: max(real, 1)] if len(value) == size else value

    return {name: cut(value) for name, value in inputs.items()}, real > 0


def counted(inputs: dict) -> dict[str, float]:
    """Rows and tokens of a batch, by side: `rows`, `tokens`, `chosen rows`, `chosen tokens`, …"""
    if "completion_mask" in inputs:
        tokens = inputs["completion_mask"][:, 1:].sum(1)
        pairs = len(tokens) // 2
        good = inputs["label"].bool() if "label" in inputs else torch.arange(len(tokens), device=tokens.device) < pairs
        sides = {"chosen": tokens[good], "rejected": tokens[~good]}
        found = {"rows": len(tokens) if "label" in inputs else pairs, "tokens": tokens.sum().item()}
    elif "chosen_labels" in inputs:
        sides = {side: (inputs[f"{side}_labels"][:, 1:] != -100).sum(1) for side in ("chosen", "rejected")}
        found = {"rows": len(sides["chosen"]), "tokens": sum(side.sum().item() for side in sides.values())}
        for side in sides:
            found[f"{side} row tokens"] = inputs[f"{side}_attention_mask"][:, 1:].sum().item()
    elif "labels" not in inputs:  # a reward model's pairs
        pairs = len(inputs["input_ids"]) // 2
        return {"rows": pairs, "chosen rows": pairs}
    else:
        tokens = (inputs["labels"][:, 1:] != -100).sum().item()
        return {"rows": len(inputs["labels"]), "tokens": tokens, "chosen tokens": tokens}
    for side, tokens in sides.items():
        found |= {f"{side} rows": len(tokens), f"{side} tokens": tokens.sum().item()}
    return found


@contextmanager
def alone(accelerator):
    """Metrics of this process's rows: gathering gives back what it is given."""
    for name in ("gather", "gather_for_metrics"):
        setattr(accelerator, name, lambda values: values)
    try:
        yield
    finally:
        for name in ("gather", "gather_for_metrics"):
            delattr(accelerator, name)
