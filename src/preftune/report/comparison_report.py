"""A comparison of runs as a table for the terminal, as JSON, and as a page with the curves over each other."""

import json
from pathlib import Path

from rich.console import Console
from rich.table import Table

from preftune.evaluate.statistics import percent
from preftune.report import comparison
from preftune.report.comparison import KL, Comparison, Entry, Point
from preftune.report.curves import CURVES, Curve, Plot
from preftune.report.page import render, shown
from preftune.report.record import write_text

TRAINED = {  # curves by step, of training
    "rewards/margins": "Margin, train",
    "rewards/accuracies": "Accuracy, train",
    "logps/chosen_per_token": "Log-prob of chosen per token, train",
    "logps/rejected_per_token": "Log-prob of rejected per token, train",
    "grad_norm": "Gradient norm",
}


def compare(runs: list[Path], output: Path) -> Path:
    """Write the page that compares `runs` (two or more; a sweep's folder stands for its runs). Returns its path."""
    return write_text(Path(output), html(comparison.compare(runs)))


def as_json(found: Comparison) -> str:
    """What `format=json` prints: the runs, the best first; unknown numbers are null."""
    value = {
        "matched_at": found.common,
        "measure": f"{found.measure}, nats per token, held-out",
        "runs": [_row(each) for each in found.entries],
        "notes": found.notes,
    }
    return json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)


def _row(entry: Entry) -> dict:
    low, high = entry.interval or (None, None)
    before, after = entry.words or (None, None)
    return {
        "rank": entry.rank,
        "rank_length_controlled": entry.rank_length_controlled,
        "run": str(entry.record.path),
        "name": entry.name,
        "loss": entry.loss,
        "beta": entry.beta,
        "learning_rate": entry.learning_rate,
        **_point(entry.at),
        "accuracy_low": low,
        "accuracy_high": high,
        "pairs": entry.pairs,
        "length_controlled_accuracy": entry.length_controlled,
        "answer_words_before": before,
        "answer_words_after": after,
        "healthy": entry.healthy,
        "final": _point(entry.final),
    }


def _point(point: Point) -> dict:
    return {"step": point.step, "accuracy": point.accuracy, "margin": point.margin, "kl": point.distance}


def as_text(found: Comparison) -> str:
    """The ranked table, how the runs were matched, and the notes."""
    console = Console(width=118, force_terminal=False)
    table = Table(title=headline(found), title_justify="left")
    for place, name in enumerate(columns(found)):
        table.add_column(name, justify="left" if place < 3 else "right")
    for each in found.entries:
        table.add_row(*cells(each))
    with console.capture() as captured:
        console.print(table)
        for note in found.notes:
            console.print(note, highlight=False)
    return captured.get()


def distance(found: Comparison) -> str:
    """The name of the distance from the reference."""
    return "KL" if found.measure == KL else "|log-ratio|"


def headline(found: Comparison) -> str:
    if found.common is None:
        return "Held-out accuracy, final values (not at matched KL)"
    return f"Held-out accuracy at matched KL: {found.measure} near {found.common:.3g} nats"


def columns(found: Comparison) -> list[str]:
    """The names of `cells`."""
    first = ["", "run", "loss", "β", "lr", "step", "accuracy (95%)", "margin"]
    return [*first, distance(found), "length-contr.", "words"]


def cells(entry: Entry) -> list[str]:
    """A run's row as text."""
    rank = f" (#{entry.rank_length_controlled})" if entry.rank_length_controlled else ""
    return [
        str(entry.rank or "–"),
        entry.name,
        entry.loss,
        shown(entry.beta),
        shown(entry.learning_rate),
        str(entry.at.step),
        percent(entry.at.accuracy, entry.pairs),
        shown(entry.at.margin),
        shown(entry.at.distance),
        percent(entry.length_controlled) + rank,
        f"{entry.words[0]:.0f} → {entry.words[1]:.0f}" if entry.words else "–",
    ]


def html(found: Comparison) -> str:
    """The page of a comparison."""
    best = [each for each in found.entries if each.rank == 1]
    names = best[0].name if len(best) == 1 else f"{len(best)} runs level"
    styles = {e.name: (CURVES[i % len(CURVES)], i >= len(CURVES)) for i, e in enumerate(found.entries)}
    return render(
        "comparison.html.jinja",
        title=f"{names}: {percent(best[0].at.accuracy, best[0].pairs)}" if best else "No run can be ranked",
        kicker=[f"comparison of {len(found.entries)} runs"],
        found=found,
        headline=headline(found),
        columns=columns(found),
        rows=[(entry, cells(entry)) for entry in found.entries],
        legend=[Curve(name, {}, *style) for name, style in styles.items()],
        plots=plots(found, styles),
    )


def plots(found: Comparison, styles: dict[str, tuple]) -> list[Plot]:
    """Curves of all runs over each other, `styles` being the colour and the dashes of each."""

    def over(x: str, y: str) -> list[Curve]:
        return [Curve(each.name, points, *styles[each.name]) for each in found.entries if (points := path(each, x, y))]

    far, share = distance(found), {"limits": (0.0, 1.0), "legend": False}
    drawn = [
        Plot("Held-out accuracy", over("step", "accuracy"), **share),
        Plot(f"Held-out accuracy by {far}", over("distance", "accuracy"), x_label=f"{far}, nats per token", **share),
        Plot("Held-out margin", over("step", "margin"), legend=False),
        Plot(f"{far} to the reference, held-out", over("step", "distance"), legend=False),
    ]
    for metric, title in TRAINED.items():
        series = {each.name: each.record.series(metric) for each in found.entries}
        curves = [Curve(name, values, *styles[name]) for name, values in series.items() if values]
        drawn.append(Plot(title, curves, limits=(0.0, 1.0) if metric.endswith("accuracies") else None, legend=False))
    return [plot for plot in drawn if plot.curves]


def path(entry: Entry, x: str, y: str) -> dict[float, float]:
    """A run's way through its held-out evaluations, `y` over `x` (fields of Point)."""
    known = [(getattr(p, x), getattr(p, y)) for p in entry.points if None not in (getattr(p, x), getattr(p, y))]
    if y == "margin" and len(known) == 1 < len(entry.points):
        return {}  # without a reference there is one, at the end, on a scale of its own
    return dict(known)
