"""Tables of many plans: every model × lora × hardware, and 7B to 70B on 1 to 64 devices."""

import json
from collections.abc import Iterable
from importlib import resources

from omegaconf import DictConfig, OmegaConf

from preftune.config.schema import base
from preftune.plan.plan import changed, choice
from preftune.plan.planner import Plan, Planner, limit
from preftune.plan.rows import assumed
from preftune.plan.sizes import configuration
from preftune.plan.text import count, duration
from preftune.trainers.global_batch import GlobalBatchError

MODELS = ("mistral7b", "llama2_13b", "llama3_70b")
DEVICES = (1, 8, 64)
WAYS = (("qlora", "none"), ("lora", "none"), ("lora", "zero3"), ("none", "zero3"), ("none", "zero3_offload"))


def choices(group: str) -> list[str]:
    """The files of a group that name what they stand for."""
    folder = resources.files("preftune.conf") / group
    found = sorted(path.name[:-5] for path in folder.iterdir() if path.name.endswith(".yaml"))
    return [name for name in found if name not in ("auto", "path")]


def section(name: str, own: DictConfig) -> DictConfig:
    """A choice's keys over those of base.yaml."""
    defaults = {key.partition(".")[2]: value for key, value in base().items() if key.startswith(f"{name}.")}
    return OmegaConf.merge(OmegaConf.create(defaults), own)


def planned(cfg: DictConfig, world_size: int = 1, sharding: str = "none") -> Plan:
    """The plan of a configuration with the rows of `data.assumed`."""
    config, source = configuration(cfg.model)
    known = assumed(cfg.data, cfg.loss.view, limit(cfg))
    return Planner(cfg, config, source, known, world_size, sharding).plan()


def every_choice(cfg: DictConfig) -> str:
    """A line for each model, lora and hardware; the hardware's keys are its file's, but for what a file leaves open."""
    header = ("model", "lora", "hardware", "parameters", "trained", "GB", "of", "fits", "time")
    lines, told = [], []
    for model in choices("model"):
        for lora in choices("lora"):
            for machine in choices("hardware"):
                variant = changed(cfg, [f"lora={lora}", f"hardware={machine}"])
                if "engine" in variant.hardware and variant.hardware.engine:
                    continue  # the same machines, several at a time
                variant.model = section("model", choice("model", model))
                for key in ("memory_gb", "tflops"):
                    if variant.hardware[key] is None:
                        variant.hardware[key] = cfg.hardware[key]
                made = planned(variant)
                told.append({"model": model, "lora": lora, "hardware": machine} | made.as_json())
                lines.append((model, lora, machine, *cells(made)))
    return json.dumps(told, indent=2) if cfg.format == "json" else aligned([header, *lines])


def cells(made: Plan) -> tuple[str, ...]:
    room = "?" if made.limit_gb is None else f"{made.limit_gb:g}"
    fits = {True: "yes", False: "no", None: "?"}[made.fits]
    total = f"{made.memory_gb['total']:.1f}"
    return count(made.parameters), count(made.trained), total, room, fits, duration(made.seconds).removeprefix("about ")


def sizes_and_devices(cfg: DictConfig) -> str:
    """The table of docs/scaling.md, as Markdown: memory of a device and time, by size, way and number of devices."""
    header = "| model | way | devices | GB a device | fits | time | largest parts |"
    lines = [header, "|---|---|---|---|---|---|---|"]
    for model in MODELS:
        for lora, sharding in WAYS:
            for devices in DEVICES:
                if devices == 1 and sharding == "zero3":
                    continue
                lines.append(line(cfg, model, lora, sharding, devices))
    return "\n".join(lines)


def line(cfg: DictConfig, model: str, lora: str, sharding: str, devices: int) -> str:
    variant = changed(cfg, [f"lora={lora}", "hardware.gradient_checkpointing=true"])
    variant.model = section("model", choice("model", model))
    way = {"none": "full", "lora": "LoRA", "qlora": "QLoRA"}[lora] + ("" if sharding == "none" else f", {sharding}")
    try:
        made = planned(variant, devices, sharding)
    except GlobalBatchError as error:
        return f"| {model} | {way} | {devices} | {str(error).split(';')[0]} | | | |"
    parts = sorted(((n, gb) for n, gb in made.memory_gb.items() if n != "total"), key=lambda part: -part[1])[:3]
    said = ", ".join(f"{name} {gb:.1f}" for name, gb in parts if gb >= 0.05)
    _, _, total, _, fits, time = cells(made)
    return f"| {model} ({count(made.parameters)}) | {way} | {devices} | {total} | {fits} | {time} | {said} |"


def aligned(table: Iterable[tuple[str, ...]]) -> str:
    """A table with columns of one width."""
    table = list(table)
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in table
    )
