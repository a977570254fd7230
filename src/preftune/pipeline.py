"""Stages from a base model to a served one, each with its lineage: kept while its inputs are the same, else redone."""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from preftune import checkpoints, engine, lineage, models, report, runs, training
from preftune.errors import UserError
from preftune.interruption import Interruption
from preftune.lineage import Artifact
from preftune.summary import combine

# The stage of the top-level loss and train; any other training stage has a section of its own
PREFERENCE = "preference"


class PipelineError(UserError):
    """Why a list of stages cannot be run, and how to write it."""


@dataclass
class Progress:
    """How far a pipeline has come: the model at hand, and the summaries of its training stages."""

    cfg: DictConfig
    run: Path
    choices: dict[str, str]
    model: Artifact
    summaries: dict[str, dict] = field(default_factory=dict)
    result: Path | None = None  # what the last training stage left: an adapter or a whole model


def run_stages(cfg: DictConfig) -> dict:
    """Run the stages of `cfg.pipeline` under one run directory, and sum them up.

    A stage that is finished and whose inputs (parent weights, data files, settings) are unchanged is kept; one whose
    inputs changed is set aside and redone, with the reason; an unfinished one goes on from its last whole checkpoint.
    What a stage trains and what its rewards are measured against is the result of the stage before, never silently the
    base model. Raises what the stages raise; returns the summary that summary.json holds.
    """
    training.quiet()
    started = time.time()
    steps = [(name, step_of(name, cfg)) for name in cfg.pipeline.stages]
    with runs.opened(cfg, training.write_report, stages=True) as run, Interruption():
        progress = Progress(cfg, run, training.chosen_files(cfg), starting_model(cfg, run))
        for number, (name, step) in enumerate(steps, 1):
            print(f"Stage {number} of {len(steps)}: {name}", flush=True)
            step(progress, name)
        summary = combine(progress.summaries) | {"seconds": round(time.time() - started, 1)}
        if runs.main_process():
            runs.write_json(run / "summary.json", summary)
    print(report.table(summary, run))
    return summary


def step_of(name: str, cfg: DictConfig) -> Callable[[Progress, str], None]:
    """What a name in pipeline.stages stands for. Raises PipelineError where it stands for nothing."""
    if name in STEPS:
        return STEPS[name]
    if name == PREFERENCE or (name in cfg and "loss" in cfg[name]):
        return trained
    known = ", ".join(
        [*STEPS, PREFERENCE, *(key for key in cfg if isinstance(cfg[key], DictConfig) and "loss" in cfg[key])]
    )
    raise PipelineError(
        f"pipeline.stages: there is no stage {name}; there are {known}. A section with a loss is one too"
    )


def starting_model(cfg: DictConfig, run: Path) -> Artifact:
    """The model that the first stage starts from; an adapter to start from is merged into its base."""
    if cfg.pipeline.adapter is None:
        return lineage.artifact(cfg.model.path)
    if not (Path(cfg.pipeline.adapter) / "adapter_config.json").exists():
        raise PipelineError(f"pipeline.adapter={cfg.pipeline.adapter}: there is no adapter_config.json in it")
    return whole_model(Path(cfg.pipeline.adapter), run / "start-model", cfg.model.dtype, OmegaConf.create({}))


def stage_config(progress: Progress, name: str, **changes) -> DictConfig:
    """The config of one training stage: that of the pipeline on the model at hand, its own section laid over it."""
    cfg = progress.cfg
    settings = OmegaConf.to_container(cfg, resolve=True)
    own = {} if name == PREFERENCE else settings.get(name, {})
    for section in [key for key in settings if isinstance(settings[key], dict) and "loss" in settings[key]]:
        settings.pop(section)  # the sections of the training stages
    settings.pop("pipeline")
    settings["train"] |= own.pop("train", {})
    settings["model"] = model_section(progress)
    return OmegaConf.create(settings | own | changes | {"output_dir": str(progress.run / name), "resume": False})


def model_at_hand(progress: Progress) -> Artifact:
    """The result of the last training stage as a whole model; before any, what the pipeline starts from."""
    if progress.result is None:
        return progress.model
    merged = progress.result.parent.with_name(f"{progress.result.parent.name}-model")
    return whole_model(progress.result, merged, progress.cfg.model.dtype, progress.cfg.lora)


def model_section(progress: Progress) -> dict:
    """The config's `model` section for the model at hand."""
    section = OmegaConf.to_container(progress.cfg.model, resolve=True)
    return section | ({} if progress.model.path == section["path"] else {"path": progress.model.path, "revision": None})


def trained(progress: Progress, name: str, **changes) -> None:
    """A training stage: its summary and its result go into `progress`. `changes` are laid over its config last."""
    progress.model = model_at_hand(progress)  # what is trained is the reference too, never silently the base model
    cfg = stage_config(progress, name, **changes)
    folder = Path(cfg.output_dir)
    checkpoints.wait_for_all()  # for the data that rank 0 may have written for it
    made_of = lineage.inputs(cfg, progress.model)
    if needed(folder, made_of):
        cfg.resume = runs.begun(folder)
        folder.mkdir(parents=True, exist_ok=True)
        if runs.main_process():
            lineage.record(folder, made_of)
        if not (folder / "summary.json").exists():
            loss = name if name != PREFERENCE else progress.choices.get("loss", PREFERENCE)
            training.stage(cfg, progress.choices | {"loss": loss})
            engine.forget()
        elif runs.main_process():  # it was killed in its last moments
            runs.ended(folder)
            training.write_report(folder)
        if runs.main_process():
            lineage.record(folder, made_of, lineage.artifact(folder / "model"))
        checkpoints.wait_for_all()
    progress.summaries[name] = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    progress.result = folder / "model"


def needed(folder: Path, made_of: dict[str, object]) -> bool:
    """Whether a stage must be run, after saying why; an outdated result is set aside."""
    state, changed = lineage.standing(folder, made_of)
    if state == "kept" and (damage := damaged(folder)):
        state, changed = "outdated", [damage]
    if state == "kept":
        print(f"{folder.name}: finished before of the same inputs, kept")
        return False
    if state == "outdated" and runs.main_process():
        shown = ", ".join(changed[:4]) + (f" and {len(changed) - 4} more" if changed[4:] else "")
        print(f"{folder.name}: redone, for {shown} changed; what was there is in {lineage.set_aside(folder).name}")
    checkpoints.wait_for_all()
    return True


def damaged(folder: Path) -> str | None:
    """What is wrong with the sealed model of a finished stage; None where it has none or it is whole."""
    fault = checkpoints.fault(folder / "model") if (folder / "model").exists() else None
    return fault and f"model: {fault};"


def whole_model(result: Path, merged: Path, dtype: str, lora: DictConfig) -> Artifact:
    """A stage's result as a whole model: itself, or where it is an adapter, merged into its base.

    A QLoRA adapter is merged into its 4-bit base, dequantized: the weights that it was trained over.
    """
    if not (result / "adapter_config.json").exists():
        return lineage.artifact(result)
    quantization = OmegaConf.to_container(lora.quantization, resolve=True) if "quantization" in lora else None
    made_of = {"adapter": lineage.artifact(result).digest, "dtype": dtype, "quantization": quantization}
    if needed(merged, made_of) and runs.main_process():
        models.merge(result, merged, dtype, quantization)
        lineage.record(merged, made_of, lineage.artifact(merged))
    checkpoints.wait_for_all()
    return lineage.artifact(merged)


def evaluated(progress: Progress, name: str) -> None:
    """Score the last training stage's result beside what it started from, into <run>/evaluation/."""
    from preftune.evaluate import evaluation

    if not list(progress.summaries.values())[-1]["looks"]:
        print("evaluate: nothing is held out (data.eval_split, data.eval_fraction)")
        return
    output, asked = progress.run / "evaluation", progress.cfg.pipeline.evaluate
    made_of = {"model": lineage.artifact(progress.result).digest, **OmegaConf.to_container(asked, resolve=True)}
    if not needed(output, made_of) or not runs.main_process():
        return
    output.mkdir(exist_ok=True)
    own = {"models": [str(progress.result.parent)], "output": str(output / "evaluation.json")}
    print(evaluation.run(OmegaConf.merge(defaults("evaluate"), asked, own)))
    lineage.record(output, made_of, Artifact(str(output), checkpoints.digest(output / "evaluation.json")))


def exported(progress: Progress, name: str) -> None:
    """Make the last training stage's result one whole model that anything can serve, in <run>/exported/."""
    from preftune import export

    output = progress.run / "exported"
    wanted = OmegaConf.merge(defaults("export"), progress.cfg.pipeline.export)
    made_of = {"model": lineage.artifact(progress.result).digest, "dtype": wanted.dtype, "base": wanted.base}
    if not needed(output, made_of) or not runs.main_process():
        return
    print(export.export(str(progress.result.parent), str(output), wanted.dtype, wanted.base))
    lineage.record(output, made_of, lineage.artifact(output))


def defaults(recipe: str) -> DictConfig:
    """The keys of another recipe's file, with their defaults."""
    loaded = OmegaConf.load(resources.files("preftune.conf") / f"{recipe}.yaml")
    return OmegaConf.create(
        {key: value for key, value in OmegaConf.to_container(loaded).items() if key not in ("defaults", "hydra")}
    )


def rounds(progress: Progress, name: str) -> None:
    """Iterative preference training (rounds.py)."""
    from preftune.rounds import trained_in_rounds

    trained_in_rounds(progress, name)


STEPS: dict[str, Callable[[Progress, str], None]] = {"rounds": rounds, "evaluate": evaluated, "export": exported}
