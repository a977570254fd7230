"""A comparison of runs as a table for the terminal, as JSON, and as a page with the curves over each other."""

import json
from pathlib import Path

from rich.console import Console
from rich.table import Table

from preftune.evaluate.statistics import percent
from preftune.report import comparison
from preftune.report.comparison import Comparison, Entry
from preftune.report.curves import CURVES, Curve, Plot
from preftune.report.record import finite, write_text
from preftune.report.rendering import render, shown

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
        "runs": [row(each) for each in found.entries],
        "seeds": [
            {"label": each.label, "n": len(each.runs), "mean": each.mean, "standard_deviation": finite(each.spread)}
            for each in found.seeds
        ],
        "notes": found.notes,
    }
    return json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)


def row(entry: Entry) -> dict:
    """What a program learns of a run (docs/report.md)."""
    low, high = entry.interval or (None, None)
    ranks = {"rank": entry.rank, "rank_length_controlled": entry.rank_length_controlled}
    about = {"run": str(entry.record.path), "name": entry.name, **entry.values, **entry.at._asdict()}
    return ranks | about | {"accuracy_low": low, "accuracy_high": high, "final": entry.points[-1]._asdict()}


def cells(entry: Entry, found: Comparison) -> dict[str, str]:
    """A run's row as text, by the names of its columns."""
    of, controlled = row(entry), entry.rank_length_controlled
    words = [of["answer_words_before"], of["answer_words_after"]]
    return {
        "": str(entry.rank or "–"),
        "run": entry.name,
        "loss": of["loss"],
        "β": shown(of["beta"]),
        "lr": shown(of["learning_rate"]),
        "step": str(of["step"]),
        "accuracy (95%)": percent(of["accuracy"], of["pairs"]),
        "margin": shown(of["margin"]),
        found.distance: shown(of["kl"]),
        "length-contr.": percent(of["length_controlled_accuracy"]) + (f" (#{controlled})" if controlled else ""),
        "words": "–" if None in words else " → ".join(f"{count:.0f}" for count in words),
    }


def over_seeds(found: Comparison) -> list[tuple[str, str, str]]:
    """(label, number of seeds, mean accuracy ± standard deviation) of runs that differ by the seed alone."""
    return [(s.label, str(len(s.runs)), f"{s.mean:.1%} ± {percent(finite(s.spread))}") for s in found.seeds]


def as_text(found: Comparison) -> str:
    """The ranked table, how the runs were matched, and the notes."""
    console = Console(width=118, force_terminal=False, markup=False, emoji=False)
    table = Table(title=found.headline, title_justify="left")
    for place, name in enumerate(cells(found.entries[0], found)):
        table.add_column(name, justify="left" if place < 3 else "right")
    for each in found.entries:
        table.add_row(*cells(each, found).values())
    with console.capture() as captured:
        console.print(table)
        if found.seeds:
            seeds = Table("loss", "seeds", "accuracy", title="Over seeds", title_justify="left")
            for cells_of in over_seeds(found):
                seeds.add_row(*cells_of)
            console.print(seeds)
        for note in found.notes:
            console.print(note, highlight=False)
    return captured.get()


def html(found: Comparison) -> str:
    """The page of a comparison."""
    best, seeds = [each for each in found.entries if each.rank == 1], over_seeds(found)
    names = best[0].name if len(best) == 1 else f"{len(best)} runs level"
    title = f"{names}: {percent(best[0].at.accuracy, best[0].values['pairs'])}" if best else "No run can be ranked"
    if seeds:
        first, _, accuracy = seeds[0]
        level = sum(not found.seeds[0].better_than(each) for each in found.seeds[1:])
        title = f"{level + 1} losses level: {first} {accuracy}" if level else f"{first}: {accuracy}"
    styles = {e.name: (CURVES[i % len(CURVES)], i >= len(CURVES)) for i, e in enumerate(found.entries)}
    return render(
        "comparison.html.jinja",
        title=title,
        kicker=[f"comparison of {len(found.entries)} runs"],
        found=found,
        rows=[(entry, cells(entry, found)) for entry in found.entries],
        seeds=seeds,
        legend=[Curve(name, {}, *style) for name, style in styles.items()],
        plots=plots(found, styles),
    )


def plots(found: Comparison, styles: dict[str, tuple]) -> list[Plot]:
    """Curves of all runs over each other, `styles` being the colour and the dashes of each."""
    far, share = found.distance, (0.0, 1.0)
    drawn = [
        ("Held-out accuracy", "step", share, lambda run: path(run, "step", "accuracy")),
        (f"Held-out accuracy by {far}", f"{far}, nats per token", share, lambda run: path(run, "kl", "accuracy")),
        ("Held-out margin", "step", None, lambda run: path(run, "step", "margin")),
        (f"{far} to the reference, held-out", "step", None, lambda run: path(run, "step", "kl")),
    ]
    for metric, title in TRAINED.items():
        limits = share if metric.endswith("accuracies") else None
        drawn.append((title, "step", limits, lambda run, metric=metric: run.record.series(metric)))
    made = []
    for title, x_label, limits, of in drawn:
        curves = [Curve(each.name, of(each), *styles[each.name]) for each in found.entries if of(each)]
        made.append(Plot(title, curves, limits=limits, x_label=x_label, legend=False))
    return [plot for plot in made if plot.curves]


def path(entry: Entry, x: str, y: str) -> dict[float, float]:
    """A run's way through its held-out evaluations, `y` over `x` (fields of Point)."""
    known = [(getattr(p, x), getattr(p, y)) for p in entry.points if None not in (getattr(p, x), getattr(p, y))]
    if y == "margin" and len(known) == 1 < len(entry.points):
        return {}  # without a reference there is one, at the end, on a scale of its own
    return dict(known)
