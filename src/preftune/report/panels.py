"""Which curves a page shows, and which thresholds and findings belong to which curve."""

from dataclasses import dataclass, field

from preftune.report.record import Record, finite


@dataclass(frozen=True)
class Panel:
    """One plot: metrics by TRL's names with label and colour, its fixed lines, the findings that are about it."""

    title: str
    lines: dict[str, tuple[str, str]]  # metric: (label, colour: a variable of page.css)
    codes: tuple[str, ...] = ()  # of docs/health.md
    limits: tuple[float, float] | None = None  # of y, where the unit has them
    constants: dict[float, str] = field(default_factory=dict)  # height: what it is


PANELS = (
    Panel(
        "Rewards",
        {"rewards/chosen": ("chosen", "a"), "rewards/rejected": ("rejected", "b")},
        ("step0_reference", "kto_one_label"),
        constants={0.0: ""},
    ),
    Panel(
        "Margin of the rewards",
        {"rewards/margins": ("chosen − rejected", "a")},
        ("margin_explodes", "margin_flat"),
        constants={0.0: ""},
    ),
    Panel(
        "Accuracy",
        {"rewards/accuracies": ("chosen above rejected", "a")},
        ("accuracy_at_chance", "overfitting"),
        limits=(0.0, 1.0),
        constants={0.5: "a coin"},
    ),
    Panel(
        "Accuracy by length of the answers",
        {
            "rewards/accuracies_short": ("shortest third", "a"),
            "rewards/accuracies_medium": ("middle", "b"),
            "rewards/accuracies_long": ("longest", "c"),
        },
        limits=(0.0, 1.0),
        constants={0.5: "a coin"},
    ),
    Panel(
        "Log-probs per token (nats)",
        {"logps/chosen_per_token": ("chosen", "a"), "logps/rejected_per_token": ("rejected", "b")},
        ("chosen_falls", "rejected_collapse"),
    ),
    Panel(
        "Log-ratios to the reference per token (nats)",
        {"logratios/chosen_per_token": ("chosen", "a"), "logratios/rejected_per_token": ("rejected", "b")},
        constants={0.0: ""},
    ),
    Panel("KL to the reference per token (nats)", {"kl/per_token": ("estimate", "a")}, ("kl_large",)),
    Panel("KTO's KL", {"kl": ("of mismatched answers", "a")}, ("kto_kl_zero",)),
    Panel(
        "IPO: margin per token",
        {"ipo/margin": ("margin", "a"), "ipo/target": ("its target 1/(2β)", "d")},
    ),
    Panel("Loss", {"loss": ("loss", "a")}, ("loss_not_finite", "step0_loss", "step0_mask")),
    Panel(
        "Gradient norm, before clipping",
        {"grad_norm": ("norm", "a")},
        ("gradient_norm", "gradient_not_finite", "step0_gradient", "step0_frozen", "step0_trainable", "step0_float16"),
    ),
    Panel("Learning rate", {"learning_rate": ("rate", "a")}, ("learning_rate",)),
    Panel("Entropy (nats a token)", {"entropy": ("policy", "a")}, ("entropy_collapse",)),
    Panel("Token accuracy", {"mean_token_accuracy": ("next token right", "a")}, limits=(0.0, 1.0)),
    Panel("Tokens a second", {"tokens_per_second": ("trained", "a")}),
)


def shown(record: Record) -> list[Panel]:
    """The panels of which the run logged something."""
    return [panel for panel in PANELS if any(record.series(m) or record.series(m, held_out=True) for m in panel.lines)]


def thresholds(panel: Panel, record: Record) -> dict[float, str]:
    """{height: words} of the thresholds of the run's config that lie in the panel's plot, in its units.

    Falls are limits below a start, so the first logged value of their metric places them.
    """
    health = record.config.get("health") or {}
    drawn = dict(panel.constants)

    def place(key: str, metric: str, height) -> None:
        limit, start = finite(health.get(key)), next(iter(record.series(metric).values()), None)
        if metric in panel.lines and limit is not None and finite(start) is not None:
            drawn[height(limit, start)] = f"health.{key}"

    place("margin_max", "rewards/margins", lambda limit, start: limit)
    place("margin_min", "rewards/margins", lambda limit, start: limit)
    place("accuracy_chance", "rewards/accuracies", lambda limit, start: limit)
    place("chosen_fall", "logps/chosen_per_token", lambda limit, start: start - limit)
    place("rejected_fall", "logps/rejected_per_token", lambda limit, start: start - limit)
    place("kl_max", "kl/per_token", lambda limit, start: limit)
    place("entropy_fall", "entropy", lambda limit, start: start * (1 - limit))
    place("grad_norm_max", "grad_norm", lambda limit, start: limit)
    return drawn


def findings_on(panel: Panel, panels: list[Panel], findings: list[dict]) -> list[tuple[int, int]]:
    """(number from 1, step) of the findings to mark in a panel: its own, and in "Loss" those with no panel shown."""
    at_home = {code for each in panels for code in each.codes}
    marks = []
    for place, finding in enumerate(findings, start=1):
        code, step = finding.get("code"), finite(finding.get("step"))
        if step is not None and (code in panel.codes or ("loss" in panel.lines and code not in at_home)):
            marks.append((place, int(step)))
    return marks
