"""The W&B workspace as code: sections of panels on what runs log, and runs beside each other by loss and β.

Built with wandb-workspaces, so it is the same for everybody, and a test holds every panel against real runs.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import wandb
import wandb_workspaces.reports.v2 as wr
import wandb_workspaces.workspaces as ws

from preftune.config.errors import UserError
from preftune.config.files import write_json
from preftune.config.hardware import wandb_mode

STEP = "train/global_step"
SIDES = ("chosen", "rejected")
REFERENCE, PAIRS, IPO, KTO, ORPO = "with a reference", "DPO's trainer", "IPO", "KTO", "ORPO, CPO"


@dataclass(frozen=True)
class Chart:
    """Lines over the steps. `of`: which losses log them, in words; empty where every preference loss does."""

    title: str
    metrics: tuple[str, ...]
    of: str = ""


@dataclass(frozen=True)
class Table:
    """A table that runs log (tracking.TABLES)."""

    name: str


def both(name: str) -> tuple[str, ...]:
    """The metrics of the chosen and of the rejected side."""
    return tuple(f"train/{name.format(side)}" for side in SIDES)


SECTIONS: dict[str, list[Chart | Table]] = {
    "Preference": [
        Chart("Margin", ("train/rewards/margins",)),
        Chart("Accuracy", ("train/rewards/accuracies",)),
        Chart("Rewards, chosen and rejected", both("rewards/{}")),
        Chart("Loss", ("train/loss",)),
        Chart("Margin per token and its target 1/(2β)", ("train/ipo/margin", "train/ipo/target"), IPO),
        Chart("Log odds ratio", ("train/log_odds_ratio",), ORPO),
    ],
    "Log-probs": [
        Chart("Log-prob per token, chosen and rejected", both("logps/{}_per_token")),
        Chart("Log-ratio to the reference per token", both("logratios/{}_per_token"), REFERENCE),
        Chart("Log-prob as the trainer counts it", both("logps/{}")),
        Chart("NLL of the chosen answers", ("train/nll_loss",), ORPO),
    ],
    "Health": [
        Chart("KL to the reference per token", ("train/kl/per_token",), REFERENCE),
        Chart("KL term of the loss", ("train/kl",), KTO),
        Chart("Gradient norm", ("train/grad_norm",)),
        Chart("Learning rate", ("train/learning_rate",)),
        Chart("Entropy", ("train/entropy",), REFERENCE),
        Table("findings"),
    ],
    "Held-out": [
        Chart("Accuracy", ("eval/rewards/accuracies",)),
        Chart("Margin", ("eval/rewards/margins",)),
        Chart("Loss", ("eval/loss",)),
        Chart("Log-prob per token", tuple(f"eval/logps/{side}_per_token" for side in SIDES)),
        Chart("Accuracy of short answers", ("eval/rewards/accuracies_short",), PAIRS),
        Chart("Accuracy of medium answers", ("eval/rewards/accuracies_medium",), PAIRS),
        Chart("Accuracy of long answers", ("eval/rewards/accuracies_long",), PAIRS),
        Chart("KL to the reference per token", ("eval/kl/per_token",), REFERENCE),
    ],
    "Speed": [
        Chart("Tokens a second", ("train/tokens_per_second",)),
        Chart("Share of padding", ("train/padding_fraction",)),
        Chart("Tokens trained", ("train/num_tokens",), REFERENCE),
        Chart("Held-out rows a second", ("eval/samples_per_second",)),
    ],
    "Samples": [Table("samples"), Table("data_findings")],
}
COLUMNS = [  # beside each run's name
    "config:choices.value.loss",
    "config:loss.value.beta",
    "config:train.value.learning_rate",
    "summary:eval/rewards/accuracies",
    "summary:eval/rewards/margins",
]


class DashboardError(UserError):
    """Why the workspace was not saved, and how to go on."""


def panel(part: Chart | Table) -> wr.LinePlot | wr.WeavePanelSummaryTable:
    """One panel of the workspace."""
    if isinstance(part, Table):
        return wr.WeavePanelSummaryTable(table_name=f"tables/{part.name}", layout=wr.Layout(w=24, h=9))
    return wr.LinePlot(title=part.title + (f" ({part.of})" if part.of else ""), x=STEP, y=list(part.metrics))


def workspace(entity: str, project: str, name: str) -> ws.Workspace:
    """The whole dashboard, not saved yet. Runs are grouped by loss and β: a line is the mean of a group's runs."""
    return ws.Workspace(
        entity=entity,
        project=project,
        name=name,
        sections=[
            ws.Section(name=title, panels=[panel(part) for part in parts], is_open=True)
            for title, parts in SECTIONS.items()
        ],
        settings=ws.WorkspaceSettings(x_axis=STEP),
        runset_settings=ws.RunsetSettings(
            groupby=[ws.Config("choices.loss"), ws.Config("loss.beta")], pinned_columns=COLUMNS
        ),
    )


def build(project: str, entity: str | None, name: str, output: str) -> str:
    """Save the workspace to W&B where runs go online, and write its spec into `output`; returns what was done.

    The spec keeps the saved workspace's address: the next time the same workspace is brought up to date, and no second
    one made. Raises DashboardError where W&B does not take it.
    """
    mode, why = wandb_mode()
    path = Path(output)
    if mode != "online":
        write(path, workspace(entity or "", project, name), url=saved_url(path))
        return f"{why}\nwrote {path}: {describe()}\nPublish it: set WANDB_API_KEY (or `wandb login`), run this again"
    try:
        made = workspace(entity or wandb.Api().default_entity, project, name)
        if url := saved_url(path):
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
    return f"saved {made.url}: {describe()}"


def describe() -> str:
    """How many panels there are, by section."""
    return ", ".join(f"{title} {len(parts)}" for title, parts in SECTIONS.items())


def write(path: Path, made: ws.Workspace, url: str | None) -> None:
    """The workspace as JSON: its address or null, and the spec as W&B's app stores it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    spec = made._spec["spec"]  # wandb-workspaces has no public name for it
    write_json(path, {"url": url, "entity": made.entity, "project": made.project, "name": made.name, "spec": spec})


def saved_url(path: Path) -> str | None:
    """The address that an earlier `build` saved the workspace at."""
    return json.loads(path.read_text(encoding="utf-8"))["url"] if path.exists() else None
