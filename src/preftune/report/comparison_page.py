"""The page of a comparison: the ranking, losses × β, and the curves of the runs over each other."""

from html import escape
from pathlib import Path

from preftune.evaluate.statistics import percent
from preftune.report import ranking
from preftune.report.comparison import KL, Comparison, Entry
from preftune.report.curves import Curve, Plot, figure, legend_of
from preftune.report.page import document
from preftune.report.ranking import headline
from preftune.report.sections import short

HEAD = ("", "run", "loss", "β", "lr", "step", "accuracy (95%)", "margin")
COLOURS = ("a", "b", "c", "d", "e", "f")
TRAINED = {  # curves by step, of training
    "rewards/margins": "Margin, train",
    "rewards/accuracies": "Accuracy, train",
    "logps/chosen_per_token": "Log-prob of chosen per token, train",
    "logps/rejected_per_token": "Log-prob of rejected per token, train",
    "grad_norm": "Gradient norm",
}


def html(found: Comparison) -> str:
    """The page of a comparison."""
    best = [each for each in found.entries if each.rank == 1]
    names = best[0].name if len(best) == 1 else f"{len(best)} runs level"
    first = f"{names}: {percent(best[0].at.accuracy, best[0].pairs)}" if best else "No run can be ranked"
    notes = "".join(f"<li>{escape(note)}</li>" for note in found.notes)
    below = f"<ul>{notes}</ul>" if notes else ""
    return document(
        "Comparison of runs",
        f"""<header><p class="kicker">preftune · comparison of {len(found.entries)} runs</p><h1>{escape(first)}</h1>
<p class="verdict {"good" if found.common is not None else "unsure"}">{escape(headline(found))}</p></header>
<section><h2>Ranking</h2><p class="shape">{escape(how(found))}</p>{table(found)}{below}</section>
{losses_by_beta(found)}
{plots(found)}""",
    )


def how(found: Comparison) -> str:
    """How the ranking was made, in a few words."""
    matched = (
        f"Each run at its held-out evaluation nearest to {found.common:.3g} nats a token from its reference: where the "
        "run that moved least ended, or the next distance at which all have one."
        if found.common is not None
        else "Each run at its end."
    )
    measured = "kl/per_token" if found.measure == KL else "the mean |log-ratio| of chosen and rejected"
    return (
        f"{matched} {ranking.distance(found)}: {measured}, nats a token. Length-controlled: at the end, all lengths "
        "weighing the same; its rank in brackets. Words: mean of the sampled answers before → after."
    )


def table(found: Comparison) -> str:
    names = (*HEAD, ranking.distance(found), "length-contr.", "words")
    head = "".join(f"<th>{escape(name)}</th>" for name in names)
    rows = ""
    for entry in found.entries:
        cells = [escape(cell) for cell in ranking.cells(entry)]
        cells[0] = f'<b class="tag">{cells[0]}</b>'
        cells[1] = f"<b>{cells[1]}</b>" + (
            ' <span class="tag error">not healthy</span>' if entry.healthy is False else ""
        )
        named = zip(names, cells, strict=True)
        rows += "<tr>" + "".join(f'<td data-name="{escape(name)}">{cell}</td>' for name, cell in named) + "</tr>"
    return f'<div class="wide"><table class="comparison"><tr>{head}</tr>{rows}</table></div>'


def losses_by_beta(found: Comparison) -> str:
    """The same figures with a row a loss and a column a β; runs that share both stand below each other."""
    losses = list(dict.fromkeys(each.loss for each in found.entries))
    betas = sorted({each.beta for each in found.entries}, key=lambda beta: (beta is None, beta or 0))
    if len(found.entries) < 2 or len(losses) * len(betas) < 2:
        return ""
    head = "".join(f"<th>{'no β' if beta is None else f'β {beta:g}'}</th>" for beta in betas)
    rows = ""
    for loss in losses:
        row = ""
        for beta in betas:
            there = [each for each in found.entries if each.loss == loss and each.beta == beta]
            row += f"<td>{''.join(cell(each, ranking.distance(found)) for each in there)}</td>"
        rows += f"<tr><th>{escape(loss)}</th>{row}</tr>"
    grid = f'<table class="grid"><tr><th></th>{head}</tr>{rows}</table>'
    return f'<section><h2>Losses × β</h2><div class="wide">{grid}</div></section>'


def cell(entry: Entry, distance: str) -> str:
    words = f"{entry.words[1]:.0f} words" if entry.words else ""
    rate = f"lr {entry.learning_rate:g}" if entry.learning_rate is not None else ""
    parts = [f"margin {short(entry.at.margin) or '–'}", f"{distance} {short(entry.at.distance) or '–'}", words, rate]
    return f"<p><b>{percent(entry.at.accuracy)}</b><br><small>{'<br>'.join(part for part in parts if part)}</small></p>"


def plots(found: Comparison) -> str:
    """Curves of all runs over each other, with one legend for all plots."""
    looks = {each.name: (COLOURS[i % len(COLOURS)], i >= len(COLOURS)) for i, each in enumerate(found.entries)}
    drawn = [
        Plot("Held-out accuracy", over(found, looks, "step", "accuracy"), limits=(0.0, 1.0)),
        Plot(
            f"Held-out accuracy by {ranking.distance(found)}",
            over(found, looks, "distance", "accuracy"),
            limits=(0.0, 1.0),
            x_label=f"{ranking.distance(found)}, nats a token",
        ),
        Plot("Held-out margin", over(found, looks, "step", "margin")),
        Plot(f"{ranking.distance(found)} to the reference, held-out", over(found, looks, "step", "distance")),
    ]
    for metric, title in TRAINED.items():
        lines = [
            Curve(each.name, values, *looks[each.name])
            for each in found.entries
            if (values := each.record.series(metric))
        ]
        drawn.append(Plot(title, lines, limits=(0.0, 1.0) if metric.endswith("accuracies") else None))
    figures = "".join(figure(plot, legend=False) for plot in drawn if plot.curves)
    key = legend_of([Curve(name, {}, *look) for name, look in looks.items()])
    return f'<section><h2>Curves</h2>{key}<div class="charts">{figures}</div></section>'


def over(found: Comparison, looks: dict, x: str, y: str) -> list[Curve]:
    """A curve a run through its held-out evaluations, `y` over `x` (fields of Point)."""
    lines = []
    for each in found.entries:
        known = [(getattr(p, x), getattr(p, y)) for p in each.points if None not in (getattr(p, x), getattr(p, y))]
        if y == "margin" and len(known) == 1 < len(each.points):
            continue  # without a reference there is one, at the end, on a scale of its own
        if known:
            lines.append(Curve(each.name, dict(known), *looks[each.name]))
    return lines


def compare(runs: list[Path], output: Path) -> Path:
    """Write the page that compares `runs` (two or more; a sweep's folder stands for its runs). Returns its path."""
    from preftune.report import comparison, comparison_page
    from preftune.report.record import write_text

    found = comparison.compare(runs)
    return write_text(Path(output), comparison_page.html(found))
