"""Stages from a base model to a served one, each kept while its inputs are the same, else rerun."""

import json
import time
from collections.abc import Callable
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from preftune.config.files import write_json
from preftune.config.processes import main_process
from preftune.evaluate import evaluation
from preftune.evaluate.snapshots import combine
from preftune.models.load import quiet
from preftune.pipeline import export, lineage
from preftune.pipeline.rounds import trained_in_rounds
from preftune.pipeline.stages import PREFERENCE, PipelineError, Progress, defaults, needed, trained
from preftune.pipeline.ways import branch, compared, halved
from preftune.report import terminal
from preftune.runs import checkpoints, directory
from preftune.runs.signals import Interruption
from preftune.runs.training import chosen_files, write_report

HEADLINE = {  # in summary.json, and in evaluation.json
    "rule_score_before": "reference_rule_score",
    "rule_score_after": "rule_score",
    "perplexity_before": "reference_perplexity",
    "perplexity_after": "perplexity",
    "win_rate": "win_rate",
    "kl": "kl",
}


def run_stages(cfg: DictConfig) -> dict:
    """Run the stages of `cfg.pipeline` under one run directory, and sum them up.

    A stage that is finished and whose inputs (parent weights, data files, settings) are unchanged is kept; one whose
    inputs changed is set aside and redone, with the reason; an unfinished one goes on from its last whole checkpoint.
    What a stage trains and what its rewards are measured against is the result of the stage before, never silently the
    base model. Raises what the stages raise; returns the summary that summary.json holds.
    """
    quiet()
    started = time.time()
    steps = [(name, step_of(name, cfg)) for name in cfg.pipeline.stages]
    with directory.opened(cfg, write_report, stages=True) as run, Interruption():
        progress = Progress(cfg, run, chosen_files(cfg), lineage.artifact(cfg.model.path))
        for number, (name, step) in enumerate(steps, 1):
            print(f"Stage {number} of {len(steps)}: {name}", flush=True)
            step(progress, name)
        summary = combine(progress.summaries)
        summary |= headline(run / "evaluation" / "evaluation.json", cfg.model.path, shown=summary["samples"])
        summary["seconds"] = round(time.time() - started, 1)
        if main_process():
            write_json(run / "summary.json", summary)
    print(terminal.table(summary, run))
    return summary


def step_of(name: str, cfg: DictConfig) -> Callable[[Progress, str], None]:
    """What a name in pipeline.stages stands for. Raises PipelineError where it stands for nothing."""
    branches = "ways" in cfg.pipeline and name != cfg.pipeline.ways.start
    if name in STEPS and not (branches and name == "rounds"):
        return STEPS[name]
    if name in (PREFERENCE, "rounds") or (name in cfg and "loss" in cfg[name]):
        return branch if branches else trained
    sections = [key for key in cfg if isinstance(cfg[key], DictConfig) and "loss" in cfg[key]]
    known = ", ".join([*STEPS, PREFERENCE, *sections])
    raise PipelineError(
        f"pipeline.stages: there is no stage {name}; there are {known}. A section with a loss is one too"
    )


def evaluated(progress: Progress, name: str) -> None:
    """Score the result of the last training stage beside its reference, into <run>/evaluation/."""
    if not list(progress.summaries.values())[-1]["snapshots"]:
        print("evaluate: no pairs of text are held out (data.eval_split, data.eval_fraction)")
        return
    output, asked = progress.run / "evaluation", OmegaConf.to_container(progress.cfg.pipeline.evaluate, resolve=True)
    made_of = {"model": lineage.artifact(progress.result).digest, **asked}
    if not needed(output, made_of) or not main_process():
        return
    output.mkdir(exist_ok=True)
    own = {"models": [str(progress.run / list(progress.summaries)[-1])], "output": str(output / "evaluation.json")}
    print(evaluation.run(OmegaConf.merge(defaults("evaluate"), asked, own)))
    lineage.record(output, made_of, lineage.Artifact(str(output), checkpoints.digest(output / "evaluation.json")))


def headline(path: Path, start: str, shown: list[dict]) -> dict:
    """What the evaluation says of the last stage, under the names that summary.json has for before and after.

    Its answers too, where the stages kept none (`shown`) and the reference is what the pipeline started from.
    """
    if not path.exists():
        return {}
    last = json.loads(path.read_text(encoding="utf-8"))[-1]
    found = {name: last[key] for name, key in HEADLINE.items() if last.get(key) is not None}
    if not shown and last["reference"] == start:
        sides = {"prompt": "prompt", "before": "reference", "after": "policy"}
        found["samples"] = [{name: each[side] for name, side in sides.items()} for each in last["generations"]]
    return found


def exported(progress: Progress, name: str) -> None:
    """Make the last training stage's result one whole model that anything can serve, in <run>/exported/."""
    output = progress.run / "exported"
    wanted = OmegaConf.merge(defaults("export"), progress.cfg.pipeline.export)
    asked = OmegaConf.to_object(OmegaConf.masked_copy(wanted, ["dtype", "base", "to"]))
    made_of = {"model": lineage.artifact(progress.result).digest, **asked}
    if not needed(output, made_of) or not main_process():
        return
    print(export.export(str(progress.result.parent), str(output), **asked))
    lineage.record(output, made_of, lineage.artifact(output))


STEPS: dict[str, Callable[[Progress, str], None]] = {
    "rounds": trained_in_rounds,
    "evaluate": evaluated,
    "export": exported,
    "halves": halved,
    "compare": compared,
}
