"""SFT, then a preference stage whose policy and reference both start from the SFT result."""

import json
import time
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from preftune import models, report, runs, training

SFT, MERGED, PREFERENCE = "sft", "sft-model", "preference"  # folders of the run directory


def sft_then_preference(cfg: DictConfig) -> dict:
    """Train both stages of `cfg` (base.yaml's keys plus `sft`) under one run directory, and sum them up.

    An SFT adapter is merged into its base: the merged model is what the preference stage trains and what its rewards
    are measured against, never silently the base model. With `resume=true` a finished stage is kept and an unfinished
    one goes on from its last checkpoint. Raises what `train` raises; returns the summary that summary.json holds.
    """
    training.quiet()
    started = time.time()
    run = runs.open_run(cfg)
    choices = training.chosen_files(cfg)
    print(f"Stage 1 of 2: SFT on the chosen answers ({run / SFT})")
    first = finished_or_trained(
        stage_config(cfg, run / SFT, loss=cfg.sft.loss, train=OmegaConf.merge(cfg.train, cfg.sft.train)),
        choices | {"loss": SFT},
    )
    start = whole_model(run / SFT / "model", run / MERGED, cfg.model.dtype)
    print(f"Stage 2 of 2: {choices.get('loss', 'preference')}, policy and reference from the SFT result ({start})")
    model = OmegaConf.merge(cfg.model, {"path": str(start), "revision": None})
    second = finished_or_trained(stage_config(cfg, run / PREFERENCE, model=model), choices)
    summary = combine(first, second)
    summary["seconds"] = round(time.time() - started, 1)
    runs.write_json(run / "summary.json", summary)
    print(report.table(summary, run))
    return summary


def stage_config(cfg: DictConfig, output_dir: Path, **changes) -> DictConfig:
    """The config of one stage: that of the pipeline in a directory of its own, with `changes` laid over it."""
    settings = OmegaConf.to_container(cfg, resolve=True)
    settings.pop("sft")
    return OmegaConf.create(settings | changes | {"output_dir": str(output_dir)})


def finished_or_trained(cfg: DictConfig, choices: dict[str, str]) -> dict:
    """The summary of a stage: read where it is finished, else trained, from its last checkpoint if it had begun."""
    finished = Path(cfg.output_dir) / "summary.json"
    if cfg.resume and finished.exists():
        print(f"{finished.parent.name}: finished before, kept")
        return json.loads(finished.read_text(encoding="utf-8"))
    cfg.resume = cfg.resume and (finished.parent / "config.yaml").exists()
    return training.stage(cfg, choices)


def whole_model(result: Path, merged: Path, dtype: str) -> Path:
    """The folder of a stage's result as a whole model: itself, or where it is an adapter, merged into its base."""
    if not (result / "adapter_config.json").exists():
        return result
    if not merged.exists():
        models.merge(result, merged, dtype)
    return merged


def combine(first: dict, second: dict) -> dict:
    """The pipeline's summary: the preference stage's own, seen from the model that SFT started with."""
    if not first["looks"]:  # data without held-out pairs
        return second | {"stages": {SFT: first, PREFERENCE: second}}
    start, after = first["looks"][0], first["looks"][-1]["name"]
    looks = [start, {**second["looks"][0], "name": after}, *second["looks"][1:]]
    answers = zip(first["samples"], second["samples"], strict=True)
    return second | {
        "looks": looks,
        "logp_accuracy_before": start["logp_accuracy"],
        "samples": [{**new, "before": old["before"]} for old, new in answers],
        "stages": {SFT: first, PREFERENCE: second},
    }
