"""What goes wrong while a preference run trains, as a table: what is judged, what it means, what to do.

Units are those of docs/losses.md: rewards are β·(log π − log π_ref), log-probs and log-ratios per token in nats,
whatever a trainer logs. Thresholds are those of conf/health/.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from statistics import fmean, median, variance

from omegaconf import DictConfig

from preftune.health.findings import Finding

MOVED = 0.02  # log-ratio per token, in nats, from which on a policy has moved
Judged = tuple[float | str, float | str, str] | None  # value, threshold, what to add to the meaning; None: healthy


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

    def moved(self, rows: int) -> float:
        """How far the policy is from its reference: the larger log-ratio per token of chosen and rejected."""
        sides = (self.mean(f"logratios/{side}_per_token", rows) for side in ("chosen", "rejected"))
        return max(abs(each or 0.0) for each in sides)


def above(name: str, limit: str, beside: str = "") -> Callable:
    """The mean of a metric over the last logged rows, in size, against a limit of conf/health.

    With `beside` only where that is logged too: "reward" tells trainers that draw answers from KTO and its other "kl".
    """

    def judge(history: History, limits: DictConfig) -> Judged:
        value = history.mean(name, min(limits.window, 3)) if beside in ("", *history.train[-1]) else None
        return (value, limits[limit], "") if value is not None and abs(value) > limits[limit] else None

    return judge


def fallen(name: str, limit: str) -> Callable:
    """How far a metric has fallen since the start, against a limit of conf/health."""

    def judge(history: History, limits: DictConfig) -> Judged:
        start, now = history.start(name), history.mean(name, min(limits.window, 3))
        if start is None or now is None or now - start >= -limits[limit]:
            return None
        return now - start, -limits[limit], f" ({name}: {start:.2f} to {now:.2f} nats.)"

    return judge


def flat_margin(moved: bool) -> Callable:
    """A margin that stays near 0, of a policy that has moved or has not."""

    def judge(history: History, limits: DictConfig) -> Judged:
        margin = history.mean("rewards/margins", limits.window)
        if margin is None or history.step < limits.patience or abs(margin) >= limits.margin_min:
            return None
        far = history.moved(limits.window)
        return (margin, limits.margin_min, f" (log-ratios per token: {far:.2g})") if (far > MOVED) == moved else None

    return judge


def accuracy_name(history: History) -> str:
    """What a run's accuracy is called: a reward model's is by its own rewards."""
    return "accuracy" if "accuracy" in history.train[-1] else "rewards/accuracies"


def at_chance(history: History, limits: DictConfig) -> Judged:
    accuracy = history.mean(accuracy_name(history), limits.window)
    if accuracy is None or history.step < limits.patience or accuracy > limits.accuracy_chance:
        return None
    return accuracy, limits.accuracy_chance, ""


def overfits(history: History, limits: DictConfig) -> Judged:
    name = accuracy_name(history)
    held_out = [row[name] for row in history.held_out if name in row]
    train = history.mean(name, min(limits.window, 5))
    if train is None or len(held_out) < 2 or train < limits.overfit_accuracy:
        return None
    best, now, limit = max(held_out), held_out[-1], limits.overfit_drop
    return (best - now, limit, f" ({best:.0%} to {now:.0%})") if best - now >= limit else None


def one_label(history: History, limits: DictConfig) -> Judged:
    row = history.train[-1]
    if "kl" not in row or ("rewards/chosen" in row) == ("rewards/rejected" in row):
        return None
    return "only " + ("desirable" if "rewards/chosen" in row else "undesirable"), "both labels", ""


def kl_stuck(history: History, limits: DictConfig) -> Judged:
    values, moved = history.last("kl", 2 * limits.window), history.mean("logratios/chosen_per_token", limits.window)
    if len(values) < 2 * limits.window or history.step < limits.patience or any(values) or abs(moved or 0.0) < MOVED:
        return None
    return 0.0, "> 0", ""


def off_schedule(history: History, limits: DictConfig) -> Judged:
    rate = history.train[-1].get("learning_rate")
    middle = max(0.2 * history.max_steps, 5) < history.step < 0.9 * history.max_steps  # not in warm-up
    if rate is None or not (rate > 1.001 * history.learning_rate or (middle and rate == 0)):
        return None
    return rate, history.learning_rate, ""


def gradient_jumps(history: History, limits: DictConfig) -> Judged:
    norms = history.last("grad_norm", limits.window + 1)
    usual = limits.grad_norm_spike * median(norms[:-1]) if len(norms) > limits.window else None
    if usual is not None and norms[-1] > max(10, usual):
        return norms[-1], usual, ""
    return (norms[-1], limits.grad_norm_max, "") if norms and norms[-1] > limits.grad_norm_max else None


def no_gradient(history: History, limits: DictConfig) -> Judged:
    norms = history.last("grad_norm", limits.window + 1)
    return (0.0, "> 0", "") if len(norms) > limits.window and not any(norms) else None


def entropy_lost(history: History, limits: DictConfig) -> Judged:
    start, now = history.start("entropy"), history.mean("entropy", min(limits.window, 3))
    if not start or now is None or start < 0 or 1 - now / start <= limits.entropy_fall:
        return None
    return 1 - now / start, limits.entropy_fall, f" ({start:.2f} to {now:.2f} nats per token)"


def lengths_drift(history: History, limits: DictConfig) -> Judged:
    """Drawn answers that have grown or shrunk by a factor since the start."""
    start, now = history.start("completions/mean_length"), history.mean("completions/mean_length", limits.window)
    if not start or not now or 1 / limits.length_drift <= now / start <= limits.length_drift:
        return None
    limit = limits.length_drift if now > start else 1 / limits.length_drift
    return now / start, limit, f" ({start:.0f} to {now:.0f} tokens)"


def hacked(history: History, limits: DictConfig) -> Judged:
    """A reward that has risen while a watched one has fallen, each by more than 2 standard errors, window by window."""
    watched = [name for name in history.train[-1] if name.startswith("rewards/watched_") and name.endswith("/mean")]
    moves = {}
    for name in ("reward", *watched):
        values = history.last(name, len(history.train))
        if len(values) < 2 * limits.window:
            return None
        first, last = values[: limits.window], values[-limits.window :]
        moves[name] = fmean(last) - fmean(first), 2 * ((variance(first) + variance(last)) / limits.window) ** 0.5
    rise, error = moves.pop("reward")
    fallen = {name: change for name, (change, noise) in moves.items() if change < -noise}
    if rise <= error or not fallen:
        return None
    name, change = min(fallen.items(), key=lambda each: each[1])
    return change, 0.0, f" ({name.split('/')[1]}: {change:+.3g}, the reward {rise:+.3g})"


FLAT = "The margin does not move: nothing is learnt."
RULES = (  # code, what judges it, what it means, what to do
    ("margin_explodes", above("rewards/margins", "margin_max"),
     "The margin of the implicit rewards is far beyond what telling two answers apart needs; the likelihoods of both "
     "are being torn away from the reference.",
     "A lower train.learning_rate (a tenth), or a loss whose margin has a target: loss=ipo. Where loss.beta is above "
     "0.5, rewards are large by its factor: set it back to 0.1."),
    ("margin_flat", flat_margin(moved=True), FLAT, "The policy has moved, so β makes the margin small: loss.beta=0.1."),
    ("margin_flat", flat_margin(moved=False), FLAT, "The policy has hardly moved: a ten times train.learning_rate."),
    ("accuracy_at_chance", at_chance,
     "Chosen and rejected are told apart no better than by a coin, on the very rows that are trained.",
     "Look for swapped or random labels (python -m recipes.inspect_data lists suspects). Where the data is right, a "
     "higher train.learning_rate, or longer training; for labels known to be noisy, loss=ipo or loss=robust."),
    ("overfitting", overfits,
     "Every pair of the training data is told apart, and the held-out accuracy has fallen: the policy learns these "
     "rows by heart.",
     "Stop at the best evaluation (health.early_stopping=2 with train.eval_strategy=steps), fewer epochs, a lower "
     "train.learning_rate, a higher loss.beta, or more diverse prompts."),
    ("chosen_falls", fallen("logps/chosen_per_token", "chosen_fall"),
     "The chosen answers have become less likely, so the margin grows only by pushing the rejected down faster.",
     "An SFT term holds them up: loss=dpo_sft; or a higher loss.beta, a lower train.learning_rate."),
    ("rejected_collapse", fallen("logps/rejected_per_token", "rejected_fall"),
     "The rejected answers have become all but impossible; what is left of the language in them goes with it.",
     "A lower train.learning_rate, a higher loss.beta, or a loss with a target: loss=ipo."),
    ("kl_large", above("kl/per_token", "kl_max"),
     "Policy and reference have parted (nats per token, estimated on the training answers): what the reference knew is "
     "being lost.",
     "A higher loss.beta, a lower train.learning_rate, fewer steps."),
    ("kto_one_label", one_label,
     "The batches since the last log held one label only: KTO weighs good against bad within a batch.",
     "Where the data has both labels, fastpath.enabled=true mixes them in each batch, and a larger "
     "hardware.per_device_train_batch_size makes room for both. Where it has one: rows of the other, or, with good "
     "answers alone, python -m recipes.sft."),
    ("kto_kl_zero", kl_stuck,
     "KTO's KL estimate is stuck at 0 although the policy has moved (it is clamped there while mismatched answers "
     "become less likely): every answer is weighed against a reference point that is not there.",
     "A larger hardware.per_device_train_batch_size, a lower train.learning_rate."),
    ("learning_rate", off_schedule,
     "The learning rate is not that of the schedule: above its highest value, or 0 in the middle of the run.",
     "Look at train.lr_scheduler_type, train.warmup_steps and train.max_steps; a resumed run needs those of before."),
    ("gradient_norm", gradient_jumps,
     "The gradient norm before clipping is out of all proportion: one batch would move the model as far as many.",
     "Look at the rows of this step (python -m recipes.inspect_data), keep train.max_grad_norm at 1, lower "
     "train.learning_rate."),
    ("gradient_norm", no_gradient, "No gradient for a whole window: nothing is learnt.",
     "The loss is saturated (a hinge beyond its margin), or nothing reaches the weights: loss=dpo, lower loss.beta."),
    ("entropy_collapse", entropy_lost,
     "The policy's entropy has fallen: it says one thing whatever it is asked.",
     "A lower train.learning_rate, a higher loss.beta, fewer epochs, more diverse prompts."),
    ("kl_large", above("kl", "kl_max", "reward"),
     "Policy and reference have parted (nats per token, on drawn answers): what the reference knew is being lost.",
     "A higher loss.beta, a lower train.learning_rate, fewer steps."),
    ("answers_cut", above("completions/clipped_ratio", "clipped_max", "reward"),
     "Most drawn answers are cut at loss.max_completion_length: fragments are rewarded, and an end is never learnt.",
     "A larger loss.max_completion_length, a reward for ending, or loss.mask_truncated_completions=true (loss=rloo)."),
    ("rewards_alike", above("frac_reward_zero_std", "alike_max", "reward"),
     "The answers to most prompts are rewarded alike, so they teach nothing.",
     "More answers for each prompt (loss.num_generations), a reward with more steps, prompts that are neither too easy "
     "nor too hard, a better start (python -m recipes.sft)."),
    ("length_drift", lengths_drift,
     "Drawn answers have become far longer or shorter: the reward may be one for length.",
     "Look at the answers; a second reward that minds length (loss.rewards, loss.reward_weights), a higher loss.beta."),
    ("reward_hacked", hacked,
     "The reward rises while a reward that is only watched falls: what is learnt pleases the one and not the other.",
     "Stop at an earlier checkpoint; a higher loss.beta, a better reward model, or the watched reward trained on as "
     "well (loss.reward_weights)."),
)  # fmt: skip


def judged(history: History, limits: DictConfig) -> Iterator[Finding]:
    """What the rules find in a history with at least one training row."""
    for code, judge, meaning, remedy in RULES:
        if found := judge(history, limits):
            value, threshold, detail = found
            yield Finding(code, history.step, value, threshold, meaning + detail, remedy)


def length_drift(step: int, before: float, now: float, limit: float) -> Finding | None:
    """`before`, `now`: mean tokens of the sampled answers at the start and at this step."""
    before, now = max(before, 1.0), max(now, 1.0)  # an empty answer is as one token
    if 1 / limit <= now / before <= limit:
        return None
    longer = now > before
    meaning = (
        f"Sampled answers are far {'longer' if longer else 'shorter'} than the reference's "
        f"({before:.0f} to {now:.0f} tokens): the preference may be one for length."
    )
    remedy = (
        "Compare the lengths of chosen and rejected (python -m recipes.inspect_data); loss=simpo or loss=dpo_norm take "
        "length out of the reward, loss.ld_alpha=0.5 weakens it."
    )
    return Finding("length_drift", step, now / before, limit if longer else 1 / limit, meaning, remedy)
