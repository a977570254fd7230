"""recipes.plan: the plan of a configuration as text or JSON, or of both stages of a pipeline."""

import json
import logging
import os
import sys
import warnings
from dataclasses import asdict
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from preftune.config.errors import UserError, brief
from preftune.config.processes import processes, sharding_engine
from preftune.data import images
from preftune.data.load import load
from preftune.data.sources import sources
from preftune.models.load import load_tokenizer, location
from preftune.plan.model import PlanError
from preftune.plan.plan import Plan, plan
from preftune.plan.text import page

WORDS = {
    "format": ("text", "json"),
    "stages": ("preference", "sft_dpo"),
    "machine": (None, "cpu", "gpu", "gpu24gb", "gpu80gb"),
}


def report(cfg: DictConfig) -> str:
    """What recipes.plan prints."""
    warnings.filterwarnings("ignore")
    logging.getLogger("transformers").setLevel(logging.ERROR)
    for key, words in WORDS.items():
        if cfg[key] not in words:
            raise PlanError(f"{key}={cfg[key]}: wants one of {', '.join(filter(None, words))}")
    try:
        plans = {name: planned(stage) for name, stage in stages(cfg).items()}
    except UserError:
        raise
    except Exception as error:  # whatever an architecture that nobody has planned raises
        raise PlanError(f"plan: not available ({brief(error)})") from error
    if cfg.format == "json":
        return json.dumps(as_json(plans), indent=2)
    if len(plans) == 1:
        return page(next(iter(plans.values())))
    return "\n\n".join(f"{name}\n{page(each)}" for name, each in plans.items())


def stages(cfg: DictConfig) -> dict[str, DictConfig]:
    """The trainings of `cfg` by their name: one, or SFT and the preference stage."""
    if cfg.stages == "preference":
        return {"preference": cfg}
    plain = OmegaConf.to_container(cfg, resolve=True)
    first = OmegaConf.create(plain | {"loss": plain["sft"]["loss"], "train": plain["train"] | plain["sft"]["train"]})
    return {"sft": first, "preference": cfg}


def as_json(plans: dict[str, Plan]) -> dict:
    """One plan as it is; several with what they come to: the larger memory, the sum of steps, tokens and seconds."""
    told = {name: asdict(each) for name, each in plans.items()}
    if len(told) == 1:
        return next(iter(told.values()))
    largest = max(plans.values(), key=lambda each: each.memory_gb["total"])
    sums = {key: sum(each[key] for each in told.values()) for key in ("steps", "tokens", "seconds")}
    return asdict(largest) | sums | {"stages": told}


def planned(cfg: DictConfig) -> Plan:
    """The plan of one training, its rows counted where they lie on this machine."""
    on_disk = Path(location(cfg.model)).is_dir()
    tokenizer = load_tokenizer(cfg.model) if on_disk else None  # without a network
    together = {"world_size": devices(cfg), "sharding": sharding_engine(cfg)}
    if not all(source.is_local() for source in sources(cfg.data)):
        return plan(cfg, **together)
    given = OmegaConf.merge(cfg.data, {"on_bad_rows": "skip", "skipped_file": os.devnull})
    data = load(given, view=cfg.loss.view, tokenizer=None, max_length=cfg.train.max_length, seed=cfg.train.seed)
    if images.held(data.train).any():
        print("images are left out of this plan: it counts the text of their rows alone", file=sys.stderr)
    return plan(cfg, data, tokenizer, **together)


def devices(cfg: DictConfig) -> int:
    """How many processes, each with a device, the training would be. Raises PlanError where it would not start."""
    asked = cfg.hardware
    if asked.engine == "fsdp" and asked.use_cpu:
        some = "machine=gpu80gb nproc=8"
        raise PlanError(f"hardware=fsdp shards on GPUs alone. Plan it for a machine that has some: {some}")
    if asked.engine and cfg.machine and not cfg.nproc:
        raise PlanError(f"machine={cfg.machine}: say how many processes it is to have, nproc=8")
    return processes(cfg) * asked.nodes
