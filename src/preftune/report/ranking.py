"""A comparison as a table for the terminal, and as JSON."""

import json

from rich.console import Console
from rich.table import Table

from preftune.evaluate.statistics import percent
from preftune.report.comparison import KL, Comparison, Entry
from preftune.report.sections import short


def as_dict(found: Comparison) -> dict:
    """What `format=json` prints: the runs, the best first; numbers that are not known are null."""
    return {
        "matched_at": found.common,
        "measure": f"{found.measure}, nats a token, held-out",
        "runs": [_row(each) for each in found.entries],
        "notes": found.notes,
    }


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
        "step": entry.at.step,
        "accuracy": entry.at.accuracy,
        "accuracy_low": low,
        "accuracy_high": high,
        "pairs": entry.pairs,
        "margin": entry.at.margin,
        "kl": entry.at.distance,
        "length_controlled_accuracy": entry.length_controlled,
        "answer_words_before": before,
        "answer_words_after": after,
        "healthy": entry.healthy,
        "final": {
            "step": entry.final.step,
            "accuracy": entry.final.accuracy,
            "margin": entry.final.margin,
            "kl": entry.final.distance,
        },
    }


def as_json(found: Comparison) -> str:
    return json.dumps(as_dict(found), indent=2, ensure_ascii=False, allow_nan=False)


def as_text(found: Comparison) -> str:
    """The ranked table, how it was matched, and the notes."""
    console = Console(width=118, force_terminal=False)
    table = Table(title=headline(found), title_justify="left")
    for name in ("", "run", "loss"):
        table.add_column(name)
    for name in ("β", "lr", "step", "accuracy (95%)", "margin", distance(found), "length-contr.", "words"):
        table.add_column(name, justify="right")
    for each in found.entries:
        table.add_row(*cells(each))
    with console.capture() as captured:
        console.print(table)
        for note in found.notes:
            console.print(note, highlight=False)
    return captured.get()


def distance(found: Comparison) -> str:
    """What the distance from the reference is called."""
    return "KL" if found.measure == KL else "|log-ratio|"


def headline(found: Comparison) -> str:
    if found.common is None:
        return "Held-out accuracy, final values (not at matched KL)"
    return f"Held-out accuracy at matched KL: {found.measure} near {found.common:.3g} nats"


def cells(entry: Entry) -> list[str]:
    """A run's row as text: rank, run, loss, β, learning rate, step, accuracy, margin, KL, length-controlled, words."""
    controlled = percent(entry.length_controlled)
    if entry.rank_length_controlled:
        controlled += f" (#{entry.rank_length_controlled})"
    return [
        str(entry.rank or "–"),
        entry.name,
        entry.loss,
        short(entry.beta) or "–",
        short(entry.learning_rate) or "–",
        str(entry.at.step),
        percent(entry.at.accuracy, entry.pairs),
        short(entry.at.margin) or "–",
        short(entry.at.distance) or "–",
        controlled,
        f"{entry.words[0]:.0f} → {entry.words[1]:.0f}" if entry.words else "–",
    ]
