"""A finished run in the terminal: what changed, in one table and three answers."""

from pathlib import Path
from shlex import join, quote

from omegaconf import OmegaConf
from rich.console import Console
from rich.table import Column, Table

from preftune.report.record import finite

FILES = ("model", "preference/model", "summary.json", "metrics.jsonl")
ROWS = {  # key of an evaluation: its name in the table, and its format
    "perplexity": ("perplexity of chosen answers", ".2f"),
    "logp_accuracy": ("accuracy by log-prob per token", ".1%"),
    "reward_accuracy": ("rewards/accuracies", ".1%"),
    "reward_margin": ("rewards/margins", ".3f"),
    "logps_chosen": ("logps/chosen", ".1f"),
    "logps_rejected": ("logps/rejected", ".1f"),
    "logps_chosen_per_token": ("logps/chosen per token", ".3f"),
    "logps_rejected_per_token": ("logps/rejected per token", ".3f"),
}


def table(summary: dict, run: Path) -> str:
    """The text that a run ends with: a table of before and after, sample answers, and where to look next."""
    console = Console(width=110, force_terminal=False, markup=False, emoji=False)
    with console.capture() as captured:
        if summary["snapshots"]:
            names = [Column(each["name"], justify="right") for each in summary["snapshots"]]
            numbers = Table(Column(), *names, title="Held-out pairs", title_justify="left")
            for label, cells in rows(summary["snapshots"]):
                numbers.add_row(label, *cells)
            console.print(numbers)
            for sample in summary["samples"]:
                title = f"“{sample['prompt']}”"
                grid = Table(title=title, title_justify="left", show_header=False, show_lines=True, width=110)
                for side in ("before", "after"):
                    grid.add_row(side, sample[side])
                console.print(grid)
        if "accuracy_ci" in summary:
            low, high = summary["accuracy_ci"]
            told = f"{summary['accuracy_after']:.1%} ({low:.1%} to {high:.1%}, {summary['pairs']} pairs)"
            console.print(f"Held-out accuracy of the reward model {told}")
        files = [path for path in FILES if (run / path).exists()]
        lines = [f"Run   {run}: {' · '.join(files)}"]
        if tracked := sorted(run.glob("**/wandb/*run-*"), key=lambda path: path.stat().st_mtime):
            lines.append(f"Look  wandb leet {quote(str(tracked[-1]))}   (in the terminal)")
        if offline := [str(path) for path in tracked if path.name.startswith("offline")]:
            lines.append(f"      wandb sync {join(offline)}   (to W&B)")
            project = OmegaConf.load(run / "config.yaml").tracking.project
            lines.append(f"      python -m recipes.dashboard project={project} open=true   (its workspace)")
        if any(run.glob("*/lineage.json")):  # a pipeline's
            named, exported = quote(f"run={run}"), Path("exported", run.name)
            lines.append(f"Next  python -m recipes.chat {named} --compare   (beside what it started from)")
            if not (run / "exported").exists() and not exported.exists():
                lines.append(f"      python -m recipes.export {named} {quote(f'output={exported}')}   (to serve it)")
            lines.append("      python -m recipes.inspect_data data=file data.path=YOURS.jsonl   (your data)")
        console.print("\n".join(lines), highlight=False, soft_wrap=True)
    return captured.get()


def rows(snapshots: list[dict]) -> list[tuple[str, list[str]]]:
    """(name, a cell for each evaluation) of the figures that an evaluation has."""
    found = []
    for key, (label, form) in ROWS.items():
        values = [finite(snapshot.get(key)) for snapshot in snapshots]
        if any(value is not None for value in values):
            found.append((label, ["–" if value is None else format(value, form) for value in values]))
    return found
