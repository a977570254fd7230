"""The page of one run, or of a pipeline with all its stages: one HTML file that needs nothing beside it."""

from html import escape
from pathlib import Path

import yaml

from preftune.report import panels
from preftune.report.curves import Curve, Plot, figure
from preftune.report.panels import Panel, findings_on, thresholds
from preftune.report.record import Record
from preftune.report.sections import by_length, cards, data, findings, gate, looks, proofs, samples, speed
from preftune.report.verdict import Verdict, of_stage, verdict

STYLES = (Path(__file__).with_name("data_page.css"), Path(__file__).with_name("page.css"))


def html(record: Record) -> str:
    """The page of a run directory."""
    judged = verdict(record)
    stages = record.stages or [record]
    body = header(record, judged) + cards(record)
    for place, stage in enumerate(stages, start=1):
        body += stage_parts(stage, f"Stage {place}: {stage.name}" if record.stages else "")
    body += samples(record)
    for stage in stages:
        body += details(stage, f" of {stage.name}" if record.stages else "")
    return document(f"{record.name}: run", body)


def document(title: str, body: str) -> str:
    """A whole HTML document around the body of a page; `title` is text, `body` is markup."""
    style = "".join(path.read_text(encoding="utf-8") for path in STYLES)
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title><style>{style}</style></head>
<body><main>
{body}
</main></body></html>
"""


def header(record: Record, judged: Verdict) -> str:
    made = " · ".join(str(part) for group in ("model", "data", "loss") if (part := record.last_stage.choice(group)))
    when = record.last_stage.manifest.get("created", "")
    kicker = " · ".join(part for part in ("preftune · run", made, when) if part)
    why = "".join(f"<li>{escape(reason)}</li>" for reason in judged.why)
    onward = "".join(f"<li>{escape(step)}</li>" for step in judged.next)
    return f"""<header><p class="kicker">{escape(kicker)}</p><h1>{escape(record.name)}</h1>
<p class="verdict {judged.tone}">{escape(judged.headline)}</p>
<div class="words"><div><h2>Why</h2><ul>{why}</ul></div><div><h2>What next</h2><ul>{onward}</ul></div></div></header>"""


def stage_parts(stage: Record, title: str) -> str:
    """Everything about one training run between the verdict and the samples."""
    opening = ""
    if title:
        judged = of_stage(stage)
        opening = (
            f'<h2 class="stage">{escape(title)} <small class="{judged.tone}">{escape(judged.headline)}</small></h2>'
        )
    parts = [
        findings(stage),
        gate(stage),
        looks(stage),
        curves_of(stage),
        by_length(stage),
        proofs(stage),
        speed(stage),
        data(stage),
    ]
    return opening + "".join(part for part in parts if part)


def curves_of(stage: Record) -> str:
    shown = panels.shown(stage)
    if not shown:
        return '<section><h3 class="part">Curves</h3><p>Nothing was logged: no step was taken.</p></section>'
    drawn = "".join(figure(plot_of(panel, shown, stage)) for panel in shown)
    held_out = any(name.startswith("eval_") for row in stage.rows for name in row)
    told = "Solid: train" + ("; dashed: held-out" if held_out else "") + ". "
    told += "Red, dashed: thresholds of the health check. " if any(thresholds(p, stage) for p in shown) else ""
    told += "Red with a number: the finding of that number, at its step." if stage.findings else ""
    if stage.unreadable:
        told += f" {stage.unreadable} line{'s' * (stage.unreadable > 1)} of metrics.jsonl could not be read."
    return (
        f'<section><h3 class="part">Curves</h3><p class="shape">{told}</p><div class="charts">{drawn}</div></section>'
    )


def plot_of(panel: Panel, shown: list[Panel], stage: Record) -> Plot:
    lines = []
    for held_out in (False, True):
        for metric, (label, colour) in panel.lines.items():
            if values := stage.series(metric, held_out):
                part = "held-out" if held_out else "train"
                told = f"{label}, {part}" if len(panel.lines) > 1 else part
                lines.append(Curve(told, values, colour, held_out))
    return Plot(
        panel.title,
        lines,
        thresholds(panel, stage),
        findings_on(panel, shown, stage.findings or []),
        panel.limits,
    )


def details(stage: Record, of: str) -> str:
    """Config by group, and the manifest, folded."""
    body = ""
    plain = {key: value for key, value in stage.config.items() if not isinstance(value, dict)}
    groups = {key: value for key, value in stage.config.items() if isinstance(value, dict)}
    for group, values in [*groups.items(), *([("beside the groups", plain)] if plain else [])]:
        choice = f" <small>{escape(name)}</small>" if (name := stage.choice(group)) else ""
        body += folded(f"{escape(group)}{choice}", values)
    body = f"<section><h2>Config{escape(of)}</h2>{body}</section>"
    if stage.manifest:
        body += f"<section><h2>Manifest{escape(of)}</h2>{folded('manifest.json', stage.manifest)}</section>"
    return body


def folded(summary: str, values: dict) -> str:
    text = yaml.safe_dump(values, sort_keys=False, allow_unicode=True, default_flow_style=False)
    return f"<details><summary>{summary}</summary><pre>{escape(text)}</pre></details>"


def write(run: Path, output: Path | None = None) -> Path:
    """Write <run>/report.html (or `output`) from what the run directory holds, however far the run came.

    A pipeline's page shows every stage. Returns the page's path. Raises ReportError where `run` is no run directory or
    a file in it is broken.
    """
    from preftune.report import page, record
    from preftune.report.record import write_text  # matplotlib takes half a second, which a recipe's start is spared

    seen = record.read(Path(run))
    return write_text(output or seen.path / "report.html", page.html(seen))
