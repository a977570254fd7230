"""The page of one run, or of a pipeline with all its stages: one HTML file that needs nothing beside it."""

from datetime import timedelta
from pathlib import Path

from preftune.evaluate.statistics import percent
from preftune.report import panels, record, terminal
from preftune.report.curves import Curve, Plot
from preftune.report.record import Record, accuracy_name, finite, number, short
from preftune.report.rendering import render
from preftune.report.verdict import held_out, of_stage, verdict


def write(run: Path, output: Path | None = None) -> Path:
    """Write <run>/report.html (or `output`) from what the run directory holds, and return its path.

    Raises ReportError where `run` is no run directory or a file in it is broken.
    """
    seen = record.read(Path(run))
    return record.write_text(output or seen.path / "report.html", html(seen))


def html(seen: Record) -> str:
    """The page of a run directory."""
    last = seen.last_stage
    made = [str(part) for group in ("model", "data", "loss") if (part := last.choice(group))]
    return render(
        "run.html.jinja",
        title=seen.name,
        kicker=["run", " · ".join(made), last.manifest.get("created")],
        judged=verdict(seen),
        cards=cards(seen),
        stages=[stage_values(stage) for stage in seen.stages or [seen]],
        pipeline=bool(seen.stages),
        samples=seen.summary.get("samples") or last.summary.get("samples") or [],
        answers=last.samples,
    )


def cards(seen: Record) -> dict[str, str | None]:
    """The main numbers, large."""
    last, snapshot = seen.last_stage, seen.last_snapshot or seen.last_stage.last_snapshot
    accuracy, _ = held_out(seen if seen.snapshots else last)
    seconds = finite(seen.summary.get("seconds") or last.summary.get("seconds"))
    return {
        "held-out accuracy": None if accuracy is None else percent(accuracy),
        "held-out margin": short(snapshot.get("reward_margin")),
        "KL per token": short((last.summary.get("held_out") or {}).get("eval_kl/per_token")),
        "perplexity of chosen": short(snapshot.get("perplexity")),
        "steps": f"{last.last_step:,}",
        "time": str(timedelta(seconds=round(seconds))) if seconds else None,
        "tokens per second": short(speed(last).get("tokens per second", (None, None))[1]),
    }


def stage_values(stage: Record) -> dict:
    """What the template shows of one training run, beside the files of the run."""
    shown = panels.shown(stage)
    return {
        "run": stage,
        "judged": of_stage(stage),
        "plots": [plot_of(panel, panels.findings_on(panel, shown, stage.findings or []), stage) for panel in shown],
        "rows": terminal.rows(stage.snapshots),
        "accuracy": accuracy_name(stage.last_snapshot),
        "speed": speed(stage),
        "memory": (stage.summary.get("plan") or {}).get("memory_gb", {}),
    }


def plot_of(panel: panels.Panel, marks: list[tuple[int, int]], stage: Record) -> Plot:
    """A panel's curves of a run: train solid, held-out sets dashed, with thresholds and the marks of findings."""
    curves, others = [], stage.group("data").get("eval_sets") or ()
    parts = [("", "train"), ("eval_", "held-out"), *((f"eval_{name}_", f"held-out {name}") for name in others)]
    for place, (prefix, part) in enumerate(parts):
        for (metric, label), colour in zip(panel.lines.items(), "abc", strict=False):
            if values := stage.series(f"{prefix}{metric}"):
                name = f"{label}, {part}" if len(panel.lines) > 1 else part
                colour = colour if place < 2 else "def"[place % 3]
                curves.append(Curve(name, values, colour, dashed=place > 0))
    return Plot(panel.title, curves, panels.thresholds(panel, stage), marks, panel.limits)


def speed(stage: Record) -> dict[str, tuple[float | None, float | None]]:
    """{name: (planned, measured)} of time and memory, as far as one of the two is known."""
    plan = stage.summary.get("plan") or {}
    last = next((row for row in reversed(stage.rows) if "train_runtime" in row), {})
    seconds, tokens = plan.get("seconds"), plan.get("tokens")
    runtime, counted = number(last.get("train_runtime")), number(last.get("num_tokens"))
    found = {
        "seconds": (seconds, stage.summary.get("seconds")),
        "tokens": (tokens, counted),
        "tokens per second": (
            tokens / seconds if seconds else None,
            counted / runtime if counted and runtime else None,
        ),
        "peak memory, GB": (plan.get("memory_gb", {}).get("total"), stage.summary.get("peak_memory_gb")),
    }
    return {name: both for name, both in found.items() if both != (None, None)}
