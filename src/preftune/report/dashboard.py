"""The W&B workspace as code, so that it is the same for everybody: the panels of panels.py, runs by loss and β."""

import json
import webbrowser
from pathlib import Path

import wandb
import wandb_workspaces.reports.v2 as wr
import wandb_workspaces.workspaces as ws

from preftune.config.errors import UserError
from preftune.config.files import write_json
from preftune.config.hardware import wandb_mode
from preftune.report.panels import PANELS, Panel
from preftune.report.panels import SECTIONS as BY_SUBJECT

STEP = "train/global_step"
COLUMNS = [  # beside each run's name
    "config:choices.value.loss",
    "config:loss.value.beta",
    "config:train.value.learning_rate",
    "summary:eval/rewards/accuracies",
    "summary:eval/rewards/margins",
]


class DashboardError(UserError):
    """Why the workspace was not saved, and how to go on."""


def metrics(panel: Panel, part: str) -> list[str]:
    """W&B's names of a panel's metrics, of `part`: train or eval."""
    return [f"{part}/{metric}" for metric in panel.lines]


def sections() -> dict[str, list]:
    """The parts of the workspace by title: charts whose titles name the losses that log them, and the runs' tables."""

    def charts(given: list[Panel], part: str) -> list[wr.LinePlot]:
        titles = [panel.title + (f" ({panel.losses})" if panel.losses else "") for panel in given]
        shown = [(title, panel) for title, panel in zip(titles, given, strict=True) if part in panel.shown]
        return [wr.LinePlot(title=title, x=STEP, y=metrics(panel, part)) for title, panel in shown]

    findings, samples, data = (
        wr.WeavePanelSummaryTable(table_name=f"tables/{name}", layout=wr.Layout(w=24, h=9))
        for name in ("findings", "samples", "data_findings")  # tracking.TABLES
    )
    parts = {title: charts(given, "train") for title, given in BY_SUBJECT.items()}
    parts["Is it healthy?"].append(findings)
    return parts | {
        "Does it hold on held-out pairs?": charts(PANELS, "eval"),
        "What does it say, and of what data?": [samples, data],
    }


def workspace(entity: str, project: str, name: str) -> ws.Workspace:
    """The whole dashboard, not saved yet. Runs are grouped by loss and β: a line is the mean of a group's runs."""
    groups = [ws.Config("choices.loss"), ws.Config("loss.beta")]
    return ws.Workspace(
        entity=entity,
        project=project,
        name=name,
        sections=[ws.Section(name=title, panels=panels, is_open=True) for title, panels in sections().items()],
        settings=ws.WorkspaceSettings(x_axis=STEP),
        runset_settings=ws.RunsetSettings(groupby=groups, pinned_columns=COLUMNS),
    )


def build(project: str, entity: str | None, name: str, output: str, open: bool = False) -> str:
    """Save the workspace to W&B where runs go online, and write its spec into `output`; returns what was done.

    With `open` it is shown in the browser once saved. The spec keeps the saved workspace's address, so the next call
    updates that workspace and makes no second one. Raises DashboardError where W&B does not take it.
    """
    mode, why = wandb_mode()
    path = Path(output)
    url = json.loads(path.read_text(encoding="utf-8"))["url"] if path.exists() else None
    counts = "".join(f"\n  {title} {len(parts)} panels" for title, parts in sections().items())
    if mode != "online":
        write(path, workspace(entity or "", project, name), url)
        return f"{why}\nwrote {path}:{counts}\nPublish it: set WANDB_API_KEY (or `wandb login`), run this again"
    try:
        made = workspace(entity or wandb.Api().default_entity, project, name)
        if url:
            before = ws.Workspace.from_url(url)
            before.sections, before.settings, before.name = made.sections, made.settings, made.name
            before.runset_settings = made.runset_settings
            made = before
        made.save()
    except Exception as error:  # what wandb and wandb-workspaces raise has no common base
        raise DashboardError(
            f"W&B did not take the workspace ({type(error).__name__}: {error}). Is the project {project} there (it is "
            f"made by its first run), and entity={entity} yours? To make a new workspace, move {path} away"
        ) from error
    write(path, made, made.url)
    if open:
        webbrowser.open(made.url)
    return f"saved {made.url}{counts}"


def write(path: Path, made: ws.Workspace, url: str | None) -> None:
    """Write the workspace as JSON: its address or null, and the spec as W&B's app stores it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    spec = made._spec["spec"]  # wandb-workspaces has no public name for it
    write_json(path, {"url": url, "entity": made.entity, "project": made.project, "name": made.name, "spec": spec})
