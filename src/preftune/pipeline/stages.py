"""Stages from a base model to a served one, each with its lineage: kept while its inputs are the same, else redone."""

import json
from dataclasses import dataclass, field
from importlib import resources
from itertools import pairwise
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from preftune.config.errors import UserError
from preftune.config.processes import main_process
from preftune.models import merge, sharding
from preftune.pipeline import lineage
from preftune.pipeline.lineage import Artifact, set_aside
from preftune.report import record
from preftune.runs import checkpoints, directory, training
from preftune.runs.checkpoints import wait_for_all
from preftune.runs.training import write_report

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


def stage_config(progress: Progress, name: str, **changes: object) -> DictConfig:
    """The config of one training stage: that of the pipeline on the model at hand, its own section laid over it."""
    cfg = progress.cfg
    given = OmegaConf.to_container(cfg, resolve=True)
    own = {} if name == PREFERENCE else given.get(name, {})
    stages = {key for key, value in given.items() if isinstance(value, dict) and "loss" in value}
    settings = {key: value for key, value in given.items() if key not in stages | {"pipeline"}}
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


def trained(progress: Progress, name: str, **changes: object) -> None:
    """A training stage: its summary and its result go into `progress`. `changes` are laid over its config last."""
    progress.model = model_at_hand(progress)  # what is trained is the reference too, never silently the base model
    cfg = stage_config(progress, name, **changes)
    folder = Path(cfg.output_dir)
    wait_for_all()  # for the data that rank 0 may have written for it
    made_of = lineage.inputs(cfg, progress.model)
    looks_back = not looked_at_by_next(progress, name)
    kept = lineage.stage_status(folder, made_of)[0] == "kept"
    if looks_back and kept and len(record.read(folder).snapshots) == 1:
        print(f"{name}: no stage follows that measured its result, so it is done now")
        wait_for_all()
        if main_process():
            (folder / "summary.json").unlink()
            lineage.record(folder, made_of)
        wait_for_all()
    if needed(folder, made_of):
        cfg.resume = record.begun(folder)
        folder.mkdir(parents=True, exist_ok=True)
        if main_process():
            lineage.record(folder, made_of)
        if not (folder / "summary.json").exists():
            loss = name if name != PREFERENCE else progress.choices.get("loss", PREFERENCE)
            training.stage(cfg, progress.choices | {"loss": loss}, looks_back)
            sharding.forget()
        elif main_process():  # it was killed in its last moments
            directory.mark_finished(folder)
            write_report(folder)
        if main_process():
            lineage.record(folder, made_of, lineage.artifact(folder / "model"))
        wait_for_all()
    progress.summaries[name] = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    progress.result = folder / "model"


def looked_at_by_next(progress: Progress, name: str) -> bool:
    """Whether the next stage trains the result of this one: it looks at it first, at the same held-out pairs."""
    cfg = progress.cfg
    following = dict(pairwise(cfg.pipeline.stages)).get(name)
    if following is None or "ways" in cfg.pipeline:  # ways go on from one start, not from each other
        return False
    own = [cfg.get(each) or {} for each in (name, following)]
    return (following == PREFERENCE or "loss" in own[1]) and not any("data" in each for each in own)


def needed(folder: Path, made_of: dict[str, object]) -> bool:
    """Whether a stage must be run, after saying why; an outdated result is set aside."""
    state, changed = lineage.stage_status(folder, made_of)
    if state == "kept" and (folder / "model").exists() and (damage := checkpoints.damage(folder / "model")):
        state, changed = "outdated", [f"model: {damage};"]
    if state == "kept":
        print(f"{folder.name}: finished before of the same inputs, kept")
        return False
    if state == "outdated" and main_process():
        shown = ", ".join(changed[:4]) + (f" and {len(changed) - 4} more" if changed[4:] else "")
        print(f"{folder.name}: rerun: {shown} changed; the old result was moved to {set_aside(folder).name}")
    wait_for_all()
    return True


def whole_model(result: Path, merged: Path, dtype: str, lora: DictConfig) -> Artifact:
    """A stage's result as a whole model: itself, or where it is an adapter, merged into its base.

    A QLoRA adapter is merged into its 4-bit base, dequantized: the weights that it was trained over.
    """
    if not (result / "adapter_config.json").exists():
        return lineage.artifact(result)
    quantization = OmegaConf.to_container(lora.quantization, resolve=True) if "quantization" in lora else None
    made_of = {"adapter": lineage.artifact(result).digest, "dtype": dtype, "quantization": quantization}
    if needed(merged, made_of) and main_process():
        merge.merge(result, merged, dtype, quantization)
        lineage.record(merged, made_of, lineage.artifact(merged))
    wait_for_all()
    return lineage.artifact(merged)


def defaults(recipe: str) -> DictConfig:
    """The keys of another recipe's file, with their defaults."""
    loaded = OmegaConf.load(resources.files("preftune.conf") / f"{recipe}.yaml")
    return OmegaConf.masked_copy(loaded, [key for key in loaded if key not in ("defaults", "hydra")])
