"""One table of panels: the curves of a run's page, with their thresholds and findings, and of the W&B workspace."""

from dataclasses import dataclass, field

from preftune.report.record import Record, finite

REFERENCE, PAIRS, IPO, KTO, ORPO = "with a reference", "DPO's trainer", "IPO", "KTO", "ORPO, CPO"
DRAWN, REWARD = "RLOO, GRPO", "reward models"


@dataclass(frozen=True)
class Panel:
    """One plot: metrics by TRL's names with their labels, and what is drawn beside them.

    `losses`: which losses log the metrics, in words; empty where every preference loss does. `shown` and `codes` belong
    to the two readers: the parts that the workspace shows, and the findings of docs/health.md that the page marks.
    """

    title: str
    lines: dict[str, str]  # metric: label
    losses: str = ""
    shown: tuple[str, ...] = ("train",)
    codes: tuple[str, ...] = ()
    limits: tuple[float, float] | None = None  # of y, where the unit has them
    constants: dict[float, str] = field(default_factory=dict)  # height: what it is


BOTH, HELD_OUT = ("train", "eval"), ("eval",)
SHARE = {"limits": (0.0, 1.0), "constants": {0.5: "a coin"}}
ZERO = {0.0: ""}


def sides(form: str) -> dict[str, str]:
    """The metrics of the chosen and of the rejected side, with their labels."""
    return {form.format(side): side for side in ("chosen", "rejected")}


THIRDS = {f"rewards/accuracies_{third}": f"{third} third" for third in ("short", "medium", "long")}  # by length
GRADIENT = ("gradient_norm", "gradient_not_finite")
START = ("step0_gradient", "step0_frozen", "step0_trainable", "step0_float16")
SECTIONS = {
    "Does it learn the preference?": [
        Panel("Rewards", sides("rewards/{}"), codes=("step0_reference", "kto_one_label"), constants=ZERO),
        Panel("Margin of the rewards", {"rewards/margins": "chosen − rejected"}, shown=BOTH,
              codes=("margin_explodes", "margin_flat"), constants=ZERO),
        Panel("Accuracy", {"rewards/accuracies": "chosen above rejected"}, shown=BOTH,
              codes=("accuracy_at_chance", "overfitting"), **SHARE),
        Panel("Accuracy by length of the answers", THIRDS, PAIRS, HELD_OUT, **SHARE),
        Panel("Loss", {"loss": "loss"}, shown=BOTH, codes=("loss_not_finite", "step0_loss", "step0_mask")),
        Panel("Margin per token and its target", {"ipo/margin": "margin", "ipo/target": "target 1/(2β)"}, IPO),
        Panel("Log odds ratio", {"log_odds_ratio": "chosen to rejected"}, ORPO),
    ],
    "Where does the probability go?": [
        Panel("Log-probs per token (nats)", sides("logps/{}_per_token"), shown=BOTH,
              codes=("chosen_falls", "rejected_collapse")),
        Panel("Log-ratios to the reference per token (nats)", sides("logratios/{}_per_token"), REFERENCE,
              constants=ZERO),
        Panel("Log-probs as the trainer counts them (nats)", sides("logps/{}")),
        Panel("NLL of the chosen answers", {"nll_loss": "NLL"}, ORPO),
    ],
    "Is it healthy?": [
        Panel("KL to the reference per token (nats)", {"kl/per_token": "estimate"}, REFERENCE, BOTH, ("kl_large",)),
        Panel("KL: of KTO's mismatched answers, or of drawn ones to the reference", {"kl": "KL"}, f"{KTO}, {DRAWN}",
              codes=("kto_kl_zero",)),
        Panel("Gradient norm, before clipping", {"grad_norm": "norm"}, codes=GRADIENT + START),
        Panel("Learning rate", {"learning_rate": "rate"}, codes=("learning_rate",)),
        Panel("Entropy (nats per token)", {"entropy": "policy"}, REFERENCE, codes=("entropy_collapse",)),
        Panel("Token accuracy", {"mean_token_accuracy": "next token right"}, PAIRS, limits=(0.0, 1.0)),
    ],
    "What do its answers earn?": [
        Panel("Reward of drawn answers", {"reward": "mean"}, DRAWN, BOTH, ("reward_hacked", "rewards_alike")),
        Panel("Tokens of drawn answers", {"completions/mean_length": "mean"}, DRAWN, codes=("length_drift",)),
        Panel("Share of drawn answers that are cut", {"completions/clipped_ratio": "cut"}, DRAWN,
              codes=("answers_cut",), limits=(0.0, 1.0)),
        Panel("Accuracy of the reward model", {"accuracy": "chosen above rejected"}, REWARD, BOTH, **SHARE),
        Panel("Margin of the reward model", {"margin": "chosen − rejected"}, REWARD, BOTH),
    ],
    "Is it fast?": [
        Panel("Tokens per second", {"tokens_per_second": "trained"}),
        Panel("Share of padding", {"padding_fraction": "of a batch"}, limits=(0.0, 1.0)),
    ],
}  # fmt: skip
PANELS = [panel for panels in SECTIONS.values() for panel in panels]
THRESHOLDS = {  # key of the health group: (metric, height from the limit and the first value logged)
    "margin_max": ("rewards/margins", lambda limit, start: limit),
    "margin_min": ("rewards/margins", lambda limit, start: limit),
    "accuracy_chance": ("rewards/accuracies", lambda limit, start: limit),
    "chosen_fall": ("logps/chosen_per_token", lambda limit, start: start - limit),
    "rejected_fall": ("logps/rejected_per_token", lambda limit, start: start - limit),
    "kl_max": ("kl/per_token", lambda limit, start: limit),
    "entropy_fall": ("entropy", lambda limit, start: start * (1 - limit)),
    "grad_norm_max": ("grad_norm", lambda limit, start: limit),
}


def shown(record: Record) -> list[Panel]:
    """The panels of which the run logged something; the last shows each reward by its own name."""
    names = {name for row in record.rows for name in row if name.startswith("rewards/") and name.endswith("/mean")}
    own = {name: name.split("/")[1] for name in sorted(names)}
    panels = [*PANELS, *([Panel("Rewards, each by itself", own)] if own else [])]
    return [panel for panel in panels if any(record.series(m) or record.series(m, held_out=True) for m in panel.lines)]


def thresholds(panel: Panel, record: Record) -> dict[float, str]:
    """{height: words} of the constants of a panel and of the run's health thresholds, in the panel's units."""
    health, drawn = record.group("health"), dict(panel.constants)
    for key, (metric, height) in THRESHOLDS.items():
        if metric in panel.lines and (limit := finite(health.get(key))) is not None:
            start = finite(next(iter(record.series(metric).values()), None))
            if start is not None:
                drawn[height(limit, start)] = f"health.{key}"
    return drawn


def findings_on(panel: Panel, panels: list[Panel], findings: list[dict]) -> list[tuple[int, int]]:
    """(number from 1, step) of the findings to mark in a panel: its own, and in "Loss" those that no panel shows."""
    at_home = {code for each in panels for code in each.codes}
    marks = []
    for place, finding in enumerate(findings, start=1):
        code, step = finding.get("code"), finite(finding.get("step"))
        if step is not None and (code in panel.codes or ("loss" in panel.lines and code not in at_home)):
            marks.append((place, int(step)))
    return marks
