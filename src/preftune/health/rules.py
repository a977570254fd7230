"""What goes wrong while a preference run trains, each as a function of what was logged so far.

A rule takes the history and the thresholds of conf/health/, and returns a Finding or None. Units are those of
docs/losses.md: rewards are β·(log π − log π_ref), log-probs and log-ratios per token in nats, whatever a trainer logs.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from statistics import fmean, median

from preftune.health.findings import Finding


@dataclass
class History:
    """The logged rows of a run so far: `train` and `held_out` (names without `eval_`), each with its step."""

    max_steps: int
    learning_rate: float  # the highest of the schedule
    train: list[dict] = field(default_factory=list)
    held_out: list[dict] = field(default_factory=list)

    @property
    def step(self) -> int:
        return self.train[-1]["step"] if self.train else 0

    def last(self, name: str, rows: int) -> list[float]:
        """The values of a metric in the last `rows` logged rows that have it."""
        return [row[name] for row in self.train if name in row][-rows:]

    def mean(self, name: str, rows: int) -> float | None:
        """Their mean; None before there are so many."""
        values = self.last(name, rows)
        return fmean(values) if len(values) == rows else None

    def start(self, name: str) -> float | None:
        """The first value of a metric: the model as it came."""
        return next((row[name] for row in self.train if name in row), None)


def margin_explodes(history: History, limits) -> Finding | None:
    margin = history.mean("rewards/margins", min(limits.window, 3))
    if margin is not None and abs(margin) > limits.margin_max:
        return Finding(
            "margin_explodes",
            history.step,
            margin,
            limits.margin_max,
            "The margin of the implicit rewards is far beyond what telling two answers apart needs; the likelihoods of "
            "both are being torn away from the reference.",
            "A lower train.learning_rate (a tenth), or a loss whose margin has a target: loss=ipo. Where loss.beta "
            "is above 0.5, rewards are large by its factor: set it back to 0.1.",
        )


def margin_flat(history: History, limits) -> Finding | None:
    margin = history.mean("rewards/margins", limits.window)
    if margin is None or history.step < limits.patience or abs(margin) >= limits.margin_min:
        return None
    moved = max(
        abs(history.mean(f"logratios/{side}_per_token", limits.window) or 0.0) for side in ("chosen", "rejected")
    )
    if moved > 0.02:
        remedy = f"The policy has moved (log-ratios per token up to {moved:.2g}), so β makes it small: loss.beta=0.1."
    else:
        remedy = (
            f"The policy has hardly moved (log-ratios per token up to {moved:.2g}): a ten times train.learning_rate."
        )
    return Finding(
        "margin_flat", history.step, margin, limits.margin_min, "The margin does not move: nothing is learnt.", remedy
    )


def accuracy_at_chance(history: History, limits) -> Finding | None:
    accuracy = history.mean("rewards/accuracies", limits.window)
    if accuracy is None or history.step < limits.patience or accuracy > limits.accuracy_chance:
        return None
    return Finding(
        "accuracy_at_chance",
        history.step,
        accuracy,
        limits.accuracy_chance,
        "Chosen and rejected are told apart no better than by a coin, on the very rows that are trained.",
        "Look for swapped or random labels (python -m recipes.inspect_data lists suspects). Where the data is right, "
        "raise train.learning_rate, or train longer; for labels known to be noisy, loss=ipo or loss=robust.",
    )


def overfitting(history: History, limits) -> Finding | None:
    held_out = [row["rewards/accuracies"] for row in history.held_out if "rewards/accuracies" in row]
    train = history.mean("rewards/accuracies", min(limits.window, 5))
    if train is None or len(held_out) < 2 or train < limits.overfit_accuracy:
        return None
    fall = max(held_out) - held_out[-1]
    if fall >= limits.overfit_drop:
        return Finding(
            "overfitting",
            history.step,
            fall,
            limits.overfit_drop,
            f"Every pair of the training data is told apart, and the held-out accuracy has fallen to "
            f"{held_out[-1]:.0%} from "
            f"{max(held_out):.0%}: the policy learns these rows by heart.",
            "Stop at the best evaluation (health.early_stopping=2 with train.eval_strategy=steps), fewer epochs, a "
            "lower train.learning_rate, a higher loss.beta, or more diverse prompts.",
        )


def chosen_falls(history: History, limits) -> Finding | None:
    found = Finding(
        "chosen_falls",
        history.step,
        None,
        -limits.chosen_fall,
        "The chosen answers have become less likely, so the margin grows only by pushing the rejected down faster.",
        "An SFT term holds them up: loss=dpo_sft; or a higher loss.beta, a lower train.learning_rate.",
    )
    return _fall(history, limits.window, "logps/chosen_per_token", found)


def rejected_collapse(history: History, limits) -> Finding | None:
    found = Finding(
        "rejected_collapse",
        history.step,
        None,
        -limits.rejected_fall,
        "The rejected answers have become all but impossible; what is left of the language in them goes with it.",
        "A lower train.learning_rate, a higher loss.beta, or a loss with a target: loss=ipo.",
    )
    return _fall(history, limits.window, "logps/rejected_per_token", found)


def _fall(history: History, window: int, name: str, found: Finding) -> Finding | None:
    """`found` where the metric has fallen by more than its threshold since the start, with the numbers."""
    start, now = history.start(name), history.mean(name, min(window, 3))
    if start is None or now is None or now - start >= found.threshold:
        return None
    meaning = f"{found.meaning} ({name}: {start:.2f} to {now:.2f} nats.)"
    return replace(found, value=now - start, meaning=meaning)


def kl_large(history: History, limits) -> Finding | None:
    kl = history.mean("kl/per_token", min(limits.window, 3))
    if kl is not None and kl > limits.kl_max:
        return Finding(
            "kl_large",
            history.step,
            kl,
            limits.kl_max,
            "Policy and reference have parted (nats per token, estimated on the training answers): what the reference "
            "knew is being lost.",
            "A higher loss.beta, a lower train.learning_rate, fewer steps.",
        )


def kto_one_label(history: History, limits) -> Finding | None:
    row = history.train[-1]
    if "kl" in row and ("rewards/chosen" in row) != ("rewards/rejected" in row):
        return Finding(
            "kto_one_label",
            history.step,
            "only " + ("desirable" if "rewards/chosen" in row else "undesirable"),
            "both labels",
            "The batches since the last log held one label only: KTO weighs good against bad within a batch.",
            "Where the data has both labels, fastpath.enabled=true mixes them in each batch, and a larger "
            "hardware.per_device_train_batch_size makes room for both. Where it has one: rows of the other, or, with "
            "good answers alone, python -m recipes.sft.",
        )


def kto_kl_zero(history: History, limits) -> Finding | None:
    values = history.last("kl", 2 * limits.window)
    moved = history.mean("logratios/chosen_per_token", limits.window)
    if len(values) < 2 * limits.window or history.step < limits.patience or any(values) or abs(moved or 0.0) < 0.02:
        return None
    return Finding(
        "kto_kl_zero",
        history.step,
        0.0,
        "> 0",
        "KTO's KL estimate is stuck at 0 although the policy has moved (it is clamped there while mismatched answers "
        "become less likely): every answer is weighed against a reference point that is not there.",
        "A larger hardware.per_device_train_batch_size, a lower train.learning_rate.",
    )


def learning_rate(history: History, limits) -> Finding | None:
    rate = history.train[-1].get("learning_rate")
    middle = max(0.2 * history.max_steps, 5) < history.step < 0.9 * history.max_steps  # not in warm-up
    if rate is not None and (rate > 1.001 * history.learning_rate or (middle and rate == 0)):
        return Finding(
            "learning_rate",
            history.step,
            rate,
            history.learning_rate,
            "The learning rate is not that of the schedule: above its highest value, or 0 in the middle of the run.",
            "Look at train.lr_scheduler_type, train.warmup_steps and train.max_steps; a resumed run needs those it "
            "began with.",
        )


def gradient_norm(history: History, limits) -> Finding | None:
    norms = history.last("grad_norm", limits.window + 1)
    if not norms:
        return None
    usual = median(norms[:-1]) if len(norms) > limits.window else None
    jump = usual is not None and norms[-1] > 10 and norms[-1] > limits.grad_norm_spike * usual
    if norms[-1] > limits.grad_norm_max or jump:
        return Finding(
            "gradient_norm",
            history.step,
            norms[-1],
            limits.grad_norm_spike * usual if jump else limits.grad_norm_max,
            "The gradient norm before clipping is out of all proportion: one batch would move the model as far as "
            "many.",
            "Look at the rows of this step (python -m recipes.inspect_data), keep train.max_grad_norm at 1, lower "
            "train.learning_rate.",
        )
    if len(norms) > limits.window and not any(norms):
        return Finding(
            "gradient_norm", history.step, 0.0, "> 0", "No gradient for a whole window: nothing is learnt.",
            "The loss is saturated (a hinge beyond its margin), or nothing reaches the weights: loss=dpo, or a lower "
            "loss.beta.",
        )  # fmt: skip


def entropy_collapse(history: History, limits) -> Finding | None:
    start, now = history.start("entropy"), history.mean("entropy", min(limits.window, 3))
    if start is not None and now is not None and start > 0 and 1 - now / start > limits.entropy_fall:
        return Finding(
            "entropy_collapse",
            history.step,
            1 - now / start,
            limits.entropy_fall,
            f"The policy's entropy fell from {start:.2f} to {now:.2f} nats per token: it says one thing whatever it is "
            "asked.",
            "A lower train.learning_rate, a higher loss.beta, fewer epochs, more diverse prompts.",
        )


RULES: tuple[Callable[[History, object], Finding | None], ...] = (
    margin_explodes,
    margin_flat,
    accuracy_at_chance,
    overfitting,
    chosen_falls,
    rejected_collapse,
    kl_large,
    kto_one_label,
    kto_kl_zero,
    learning_rate,
    gradient_norm,
    entropy_collapse,
)


def length_drift(step: int, before: float, now: float, limit: float) -> Finding | None:
    """`before`, `now`: mean tokens of the sampled answers at the start and at this step."""
    before, now = max(before, 1.0), max(now, 1.0)  # an empty answer is as one token
    if 1 / limit <= now / before <= limit:
        return None
    direction = "longer" if now > before else "shorter"
    return Finding(
        "length_drift",
        step,
        now / before,
        limit if now > before else 1 / limit,
        f"Sampled answers are {direction} than the reference's by far ({before:.0f} to {now:.0f} tokens): the "
        "preference may be "
        "one for length.",
        "Compare the lengths of chosen and rejected (python -m recipes.inspect_data); loss=simpo or loss=dpo_norm "
        "take length out of the reward, loss.ld_alpha=0.5 weakens it.",
    )
