"""The plan of one training run, from its configuration and, where they can be read, its rows; and what would fit."""

import copy
import math
from bisect import bisect
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import resources
from statistics import fmean

import psutil
from omegaconf import DictConfig, OmegaConf
from transformers import PreTrainedTokenizerBase

from preftune.config import hardware, resolvers  # noqa: F401  (resolvers registers what configs compute with)
from preftune.config.stages import SELECTIVE
from preftune.data.load import Data
from preftune.plan import model
from preftune.plan.measure import Footprint
from preftune.plan.memory import fullest
from preftune.plan.model import PlanError
from preftune.plan.rows import Batch, assumed, of_data, typical
from preftune.plan.training import NO_LIMIT, Training

GB = 1e9
MOST = 3  # suggestions


@dataclass(frozen=True)
class Plan:
    """What a run takes on each of `world_size` devices. Memory in GB (1e9 bytes), time in seconds."""

    parameters: int
    trained: int
    architecture: str  # where it was read
    memory_gb: dict[str, float]  # by part, and total
    fullest_at: str  # the moment at which it is
    limit_gb: float | None
    fits: bool | None  # None where the device's memory is not known
    packed: bool
    largest_batch: dict[str, int]
    global_batch: int
    rows: int
    lengths: str  # how they are known
    steps: int
    tokens: int
    padding: float
    reference: dict[str, object]  # kind, tokens, seconds
    seconds: float
    tflops: float
    world_size: int
    sharding: str
    suggestions: list[str]
    longest_row: int | None  # tokens, alone in its batch; asked for where activations are offloaded


def plan(
    cfg: DictConfig,
    data: Data | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    world_size: int = 1,
    sharding: str = "none",
) -> Plan:
    """The plan of `cfg`, a recipe's config; `data` is its loaded preftune.data.Data, or None for `data.assumed`.

    No weights are read. `tokenizer` counts the rows' tokens; without it their characters are. `sharding` is one of
    memory.SHARDS. With suggestions where it does not fit. Raises PlanError where the architecture cannot be had.
    """
    if cfg.loss.view == "prompts":
        raise PlanError("this trainer draws its answers while it trains, which is not planned")
    found = model.read(cfg.model)
    train = getattr(data, "train", None)
    if hasattr(train, "select"):
        rows = of_data(train, cfg.loss.view, tokenizer)
    else:
        rows = assumed(cfg.data, cfg.loss.view, cfg.train.max_length or NO_LIMIT)
    return planned(Training(cfg, found, rows, world_size, sharding))


def planned(run: Training) -> Plan:
    """The plan of a training."""
    batch = run.largest_batch()
    moment, parts = fullest(run, batch)
    total, limit = sum(parts.values()), device_memory(run.cfg, run.world_size)
    fits, feet = None if limit is None else total / GB <= limit, run.footprint(batch)
    return Plan(
        parameters=run.size.parameters,
        trained=run.size.adapter or run.size.parameters,
        architecture=run.model.source + ", measured in bfloat16 and doubled" * feet.doubled,
        memory_gb={name: round(value / GB, 3) for name, value in (parts | {"total": total}).items()},
        fullest_at=moment,
        limit_gb=limit,
        fits=fits,
        packed=run.packed,
        largest_batch={"rows": batch.rows, "columns": batch.columns, "scored": batch.scored},
        global_batch=run.batch_size * run.world_size * run.accumulation,
        rows=run.rows.count,
        lengths=run.rows.source,
        **work(run, feet),
        tflops=run.cfg.hardware.tflops,
        world_size=run.world_size,
        sharding=run.sharding,
        suggestions=suggestions(run) if fits is False else [],
        longest_row=longest_row(run) if run.arguments.get("activation_offloading") else None,
    )


def longest_row(run: Training) -> int | None:
    """How many tokens a pair or row may have, alone in its batch, to fit; to an eighth. None: memory is not known."""
    limit = device_memory(run.cfg, run.world_size)
    if limit is None:
        return None

    def too_long(tokens: int) -> bool:
        return sum(fullest(run, Batch(1, tokens, 0, tokens // 3))[1].values()) / GB > limit

    lengths = [2**n * eighths for n in range(4, 16) for eighths in range(8, 16)]  # from 128 on
    return max([0, *lengths[: bisect(lengths, False, key=too_long)]])


def work(run: Training, feet: Footprint) -> dict[str, object]:
    """Steps, tokens, share of padding and seconds of the whole run; tokens and seconds of its reference passes."""
    speed = run.cfg.hardware.tflops * 1e12 * run.world_size  # FLOP per second, of all devices together
    batches = typical(run.rows, run.batch_size, run.cfg.fastpath.enabled, **run.batch_shape)
    tokens = fmean(batch.tokens for batch in batches)
    training = fmean(flop_of(run, feet, batch, learning=True) for batch in batches)
    forward = fmean(flop_of(run, feet, batch, learning=False) for batch in batches)
    per_step = run.accumulation * run.world_size
    per_epoch = math.ceil(run.rows.count / (run.batch_size * run.world_size)) * run.world_size
    steps = math.ceil(math.ceil(per_epoch / per_step) * run.arguments["num_train_epochs"])
    if (most := run.arguments["max_steps"]) and most > 0:
        steps = most
    forwards = steps * per_step
    passes = {"none": 0, "cached": per_epoch}.get(run.reference, forwards)
    flop = training * forwards
    if run.cfg.loss.view == "unpaired":  # KTO's mismatched answers: a forward of the policy, one of the reference
        flop, passes = flop + forward * forwards, passes * 2
    reference = {"tokens": round(tokens * passes), "seconds": round(forward * passes / speed, 1)}
    return {
        "steps": steps,
        "tokens": round(tokens * forwards),
        "padding": round(sum(batch.padding for batch in batches) / max(1, tokens * len(batches)), 4),
        "reference": {"kind": run.reference} | reference,
        "seconds": round((flop + forward * passes) / speed, 1),
    }


def flop_of(run: Training, feet: Footprint, batch: Batch, learning: bool) -> float:
    """FLOP of a forward over one batch, and of its backward where it is learned from, with what is computed again.

    Layers are as measured, attention is by the length of the rows. The backward of the head computes its logits once
    more, its input's gradient, and its own in full fine-tuning.
    """
    each, attention = (feet.step, feet.attention_step) if learning else (feet.forward, feet.attention_forward)
    heads = (3 if run.adapter else 4) if learning else 1
    return batch.tokens * (each + attention * batch.columns) + 2.0 * batch.scored * run.size.head * heads


def device_memory(cfg: DictConfig, world_size: int = 1) -> float | None:
    """GB of one device: hardware.memory_gb, else of the card found here.

    On CPU what this machine has free, in equal parts for its processes.
    """
    if cfg.hardware.memory_gb is not None:
        return float(cfg.hardware.memory_gb)
    if cfg.hardware.use_cpu:
        return round(psutil.virtual_memory().available / GB / max(1, world_size // cfg.hardware.nodes), 1)
    card = hardware.accelerator()
    return round(card.memory / GB, 1) if card and card.memory else None


def require_fits(made: Plan, cfg: DictConfig) -> None:
    """Raise PlanError, with what would fit, where the plan cannot; not with `fit_check=false`."""
    if made.fits is not False or not cfg.fit_check:
        return
    would = "; or ".join(made.suggestions) or "a larger device, or more of them"
    raise PlanError(
        f"this run would take {made.memory_gb['total']:.1f} GB, and there are {made.limit_gb:g} (hardware.memory_gb). "
        f"It would fit with {would}. To start all the same: fit_check=false"
    )


def suggestions(run: Training) -> list[str]:
    """Overrides with which the run would fit, the gentlest first, each planned itself.

    One of each kind is enough. Where none helps alone, each is tried on top of those before it.
    """
    found: list[str] = []
    laid: list[str] = []
    for options in changes(run):
        for option in options:
            keys = {each.partition("=")[0] for each in option}
            laid = [each for each in laid if each.partition("=")[0] not in keys] + option
            fitting = next((each for each in ([option] if found else [option, laid]) if fits(run, each)), None)
            if fitting:
                found.append(" ".join(fitting))
                break
        if len(found) == MOST:
            break
    return found


def changes(run: Training) -> Iterator[list[list[str]]]:
    """Kinds of changes, the gentlest first, each as a list of overrides from weak to strong.

    Those before the optimizer's leave the training as it is; the others make another training of it.
    """
    cfg, checkpointing = run.cfg, run.arguments["gradient_checkpointing"]
    rows, steps = run.batch_size, cfg.hardware.gradient_accumulation_steps
    least = 2 if cfg.loss.view == "unpaired" else 1  # KTO's KL term is a mean over the batch
    if not cfg.fastpath.enabled:
        yield [["fastpath.enabled=true"]]
    if run.reference == "copy":
        yield [["loss.precompute_ref_log_probs=true"]]
    stronger = {SELECTIVE: ["true"], False: [SELECTIVE, "true"]}.get(checkpointing, [])
    yield [[f"hardware.gradient_checkpointing={each}"] for each in stronger]
    yield [
        [f"hardware.per_device_train_batch_size={rows // n}"]
        + ([] if cfg.global_batch else [f"hardware.gradient_accumulation_steps={steps * n}"])
        for n in (2, 4, 8, 16, 32, 64)
        if rows % n == 0 and rows // n >= least
    ]
    if "8bit" not in str(run.arguments["optim"]) and run.on_gpu:
        yield [["hardware.optim=paged_adamw_8bit"]]
    if run.dtype == "float32":
        yield [["model.dtype=bfloat16"]]
    if not cfg.lora:
        yield [["lora=lora"]]
    if not run.bits:
        yield [["lora=qlora"]]
    longest = cfg.train.max_length or 0
    yield [[f"train.max_length={longest // 2**n}"] for n in range(1, 12) if longest // 2**n >= 256]


def fits(run: Training, overrides: list[str]) -> bool:
    """Whether the run would fit with these overrides."""
    other = Training(changed(run.cfg, overrides), run.model, run.rows, run.world_size, run.sharding)
    _, parts = fullest(other, other.largest_batch())
    return sum(parts.values()) / GB <= device_memory(other.cfg, other.world_size)


def changed(cfg: DictConfig, overrides: list[str]) -> DictConfig:
    """`cfg` with overrides laid over it: key=value, or group=choice."""
    cfg = copy.deepcopy(cfg)
    OmegaConf.set_struct(cfg, False)
    for override in overrides:
        key, _, value = override.partition("=")
        OmegaConf.update(cfg, key, OmegaConf.create(f"x: {value}").x if "." in key else choice(key, value), merge=False)
    return cfg


def choice(group: str, name: str) -> DictConfig:
    """A file of conf/<group> with the files that it builds on."""
    own = OmegaConf.load(resources.files("preftune.conf") / group / f"{name}.yaml")
    below = [choice(group, each) for each in own.pop("defaults", []) if each != "_self_"]
    return OmegaConf.merge(*below, own)
