"""What preftune logs beside TRL's own metrics: log-probs and log-ratios per token, and accuracies where TRL has none.

Units: natural log. `*_per_token` is the batch's sum over its completion tokens divided by their number, so that the
numbers of trainers that log sums (DPO, KTO) and means (ORPO, CPO) can be compared. `kl/per_token` estimates
KL(reference ‖ policy) from the log-ratios r of the batch's answers, as the mean of exp(r) − 1 − r (Schulman 2020, k3),
with r each answer's mean per token: never negative, and a lower bound where the tokens of an answer differ (Jensen).
"""

import contextlib
import time
from statistics import quantiles

import numpy as np
import pyarrow.compute as pc
import torch
from accelerate.utils import gather_object
from datasets import Dataset

from preftune.data.token_checks import row_key
from preftune.trainers.evaluation_means import EvaluationMeans


class PerTokenMetrics(EvaluationMeans):
    """Mixin for trl.DPOTrainer and trl.KTOTrainer: reads the policy's log-probs as the loss is computed.

    Of the batch computed last it keeps `logratios_per_token` and `scored_tokens` (rows,), `desirable_share`
    (KTO) and `unscaled_loss`: what the step-0 invariants are about; and since the last step in `evaluated` the log-prob
    of each completion evaluated, by its `row_key`.
    """

    logratios_per_token: torch.Tensor | None = None
    desirable_share: float | None = None
    evaluated: dict[bytes, float] = {}
    _length_bounds: list[float] | None = None

    def training_step(self, *args, **kwargs):
        loss = super().training_step(*args, **kwargs)
        self.evaluated = {}  # the weights are about to move
        return loss

    def _compute_loss(self, model, inputs, return_outputs):
        calls = []

        def recorded(*args, **kwargs):
            output = model(*args, **kwargs)
            if kwargs.get("fused_lm_head"):
                calls.append(output.log_probs)
            return output

        with self._reference_calls() as reference_calls:
            result = super()._compute_loss(recorded, inputs, return_outputs)
        mode = "train" if self.model.training else "eval"
        mask = inputs["completion_mask"][:, 1:]
        log_probs = calls[-1].detach()[:, -mask.size(1) :]  # the policy's pass is the last (KTO's KL pass comes before)
        sums, tokens = (log_probs * mask).sum(1), mask.sum(1)
        weights = self._weights(mask)
        if "label" in inputs:
            chosen, reference = inputs["label"].bool(), inputs.get("ref_logps")
        else:
            chosen = torch.arange(len(sums), device=sums.device) < len(sums) // 2
            reference = torch.cat(parts) if None not in (parts := _reference_of_pairs(inputs)) else None
        if reference_calls:  # after KTO's KL pass too
            reference = (reference_calls[-1][:, -mask.size(1) :] * weights).sum(1)
        if mode == "eval" and "attention_mask" in inputs:
            self.evaluated = self.evaluated or {}  # the trainer's own, in place of the class's
            self.evaluated.update(by_row(inputs, sums))
        self._log_per_token(mode, chosen, sums, tokens)
        self.unscaled_loss = (result[0] if return_outputs else result).detach()
        if reference is not None:
            ratios = (log_probs * weights).sum(1) - reference.to(sums.device)
            means = ratios / tokens.clamp(min=1)
            self.logratios_per_token, self.scored_tokens = means, tokens
            self._log(mode, "kl/per_token", (means.expm1() - means).clamp(min=0))
            if "label" in inputs:
                self.desirable_share = chosen.float().mean().item()
                self._log_accuracy(mode, chosen, ratios)
            else:
                self._log_by_length(mode, ratios[chosen] > ratios[~chosen], (tokens[chosen] + tokens[~chosen]) / 2)
                if "ipo" in self.loss_types:
                    self._log(mode, "ipo/margin", means[chosen] - means[~chosen])
                    self._metrics[mode]["ipo/target"].append(1 / (2 * self.beta))
        return result

    @contextlib.contextmanager
    def _reference_calls(self):
        """The log-probs (rows, tokens) that the reference gives meanwhile; none where they were computed beforehand."""
        calls = []
        if self.precompute_ref_logps:
            yield calls
            return

        def keep(module, args, kwargs, output):
            if kwargs.get("fused_lm_head") and not torch.is_grad_enabled():
                calls.append(output.log_probs)

        reference = self.model if self.ref_model is None else self.ref_model
        hook = reference.register_forward_hook(keep, with_kwargs=True)
        try:
            yield calls
        finally:
            hook.remove()

    def _weights(self, mask: torch.Tensor) -> torch.Tensor:
        """What each completion token counts in the log-ratios: 1, and `ld_alpha` beyond the shorter of two answers."""
        if getattr(self, "ld_alpha", None) is None:
            return mask
        shared = torch.minimum(*mask.sum(1).chunk(2)).repeat(2)
        return torch.where(mask.cumsum(1) <= shared[:, None], 1.0, self.ld_alpha) * mask

    def _log_per_token(self, mode: str, chosen: torch.Tensor, sums: torch.Tensor, tokens: torch.Tensor) -> None:
        for name, rows in (("chosen", chosen), ("rejected", ~chosen)):
            totals = torch.stack([sums[rows].sum(), tokens[rows].sum(), rows.sum()]).float()
            total, count, n = self.accelerator.gather(totals.unsqueeze(0)).sum(0).tolist()
            if count:
                self._metrics[mode][f"logps/{name}_per_token"].append(total / count)
                reward = self._metrics[mode][f"rewards/{name}"][-1]  # TRL's own, the mean over the rows of all ranks
                self._metrics[mode][f"logratios/{name}_per_token"].append(reward / self.beta * n / count)

    def _log_by_length(self, mode: str, right: torch.Tensor, tokens: torch.Tensor) -> None:
        """Held-out accuracy in thirds of the evaluation set by the mean tokens of a pair's two answers."""
        if mode != "eval" or (bounds := self._length_bounds) is None:
            return
        third = torch.bucketize(tokens.float(), torch.tensor(bounds, device=tokens.device))
        right, third = self.accelerator.gather_for_metrics((right.float(), third))
        for number, name in enumerate(("short", "medium", "long")):
            if (rows := right[third == number]).numel():
                self._metrics[mode][f"rewards/accuracies_{name}"].append(rows.mean().item())
                self.weights[f"rewards/accuracies_{name}"] = len(rows)

    def _log_accuracy(self, mode: str, chosen: torch.Tensor, ratios: torch.Tensor) -> None:
        """KTO has no pairs: how often a desirable row is rewarded above an undesirable one, of a batch or held out."""
        if mode == "eval":
            self._scored = getattr(self, "_scored", [])
            self._scored += zip(chosen.tolist(), ratios.tolist(), strict=True)
        elif chosen.any() and not chosen.all():
            above = ratios[chosen][:, None] > ratios[~chosen][None]
            self._log(mode, "rewards/accuracies", above.float().mean().unsqueeze(0))

    def evaluation_loop(self, dataloader, *args, **kwargs):
        self._scored, self._length_bounds = [], length_thirds(dataloader.dataset)
        return super().evaluation_loop(dataloader, *args, **kwargs)

    def _of_the_whole_set(self) -> dict[str, float]:
        scored = gather_object(self._scored)
        good, bad = (np.sort([ratio for label, ratio in scored if label == side]) for side in (True, False))
        if not len(good) or not len(bad):
            return {}
        return {"rewards/accuracies": np.searchsorted(bad, good, side="left").mean().item() / len(bad)}

    def _log(self, mode: str, name: str, values: torch.Tensor) -> None:
        self._metrics[mode][name].append(self.accelerator.gather_for_metrics(values).mean().item())


class Throughput:
    """Mixin for every trainer: `tokens_per_second`, the tokens of the rows trained (without padding) over wall time."""

    _tokens, _since = 0, None

    def training_step(self, model, inputs, num_items_in_batch=None):
        self._since = self._since or time.perf_counter()
        masks = [
            v for k, v in inputs.items() if k in ("attention_mask", "chosen_attention_mask", "rejected_attention_mask")
        ]
        self._tokens += sum(mask.sum() for mask in masks) * self.accelerator.num_processes  # stays on the device
        return super().training_step(model, inputs, num_items_in_batch)

    def log(self, logs, start_time=None):
        if "loss" in logs and self._tokens:
            now = time.perf_counter()
            logs["tokens_per_second"] = round(int(self._tokens) / (now - self._since), 1)
            self._tokens, self._since = 0, now
        return super().log(logs, start_time)


class PerTokenMeans(EvaluationMeans):
    """Mixin for trl's ORPOTrainer and CPOTrainer, whose `logps/*` are means per token where the loss is."""

    AVERAGED = ("ipo", "simpo")  # CPOTrainer's losses on means (its concatenated_forward); ORPO's one loss is on means

    @property
    def per_row(self) -> tuple[str, ...]:  # type: ignore[override]
        """What is a mean over rows where the loss is on means."""
        return ("logps/chosen_per_token", "logps/rejected_per_token") if self._averaged_loss() else ()

    def _averaged_loss(self) -> bool:
        return getattr(self, "loss_type", self.AVERAGED[0]) in self.AVERAGED

    def get_batch_loss_metrics(self, model, batch, train_eval="train"):
        loss, logged = super().get_batch_loss_metrics(model, batch, train_eval)
        prefix = "eval_" if train_eval == "eval" else ""
        for side in ("chosen", "rejected"):
            value = logged[f"{prefix}logps/{side}"]
            if not self._averaged_loss():
                labels = batch[f"{side}_labels"]
                counts = torch.stack([(labels != -100).sum(), torch.tensor(len(labels), device=labels.device)]).float()
                tokens, rows = self.accelerator.gather(counts.unsqueeze(0)).sum(0).tolist()
                value = value * rows / max(tokens, 1)
            logged[f"{prefix}logps/{side}_per_token"] = value
        return loss, logged


def by_row(inputs: dict, sums: torch.Tensor) -> dict[bytes, float]:
    """The log-probs `sums` (rows,) of a batch's completions by their row_key."""
    ids, seen, scored = (inputs[name].cpu() for name in ("input_ids", "attention_mask", "completion_mask"))
    rows = zip(ids, seen.bool(), scored, strict=True)
    keys = [row_key(ids[seen].tolist(), int(scored.argmax())) for ids, seen, scored in rows]
    return dict(zip(keys, sums.tolist(), strict=True))


def length_thirds(rows: Dataset) -> list[float] | None:
    """The lengths, in mean tokens of a pair's answers, between the thirds of a set; None where it has no pairs."""
    if "chosen_ids" not in (getattr(rows, "column_names", None) or []) or len(rows) < 3:
        return None
    sides = (rows.with_format("arrow")[:][name] for name in ("chosen_ids", "rejected_ids"))
    chosen, rejected = (pc.list_value_length(side).to_numpy() for side in sides)
    return quantiles((chosen + rejected) / 2, n=3)


def _reference_of_pairs(inputs: dict) -> tuple:
    return inputs.get("ref_chosen_logps"), inputs.get("ref_rejected_logps")
