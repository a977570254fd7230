"""What to change where a run does not fit, as overrides ready to type."""

import copy
from collections.abc import Iterator
from dataclasses import replace
from importlib import resources

from omegaconf import DictConfig, OmegaConf

from preftune.config.stages import SELECTIVE
from preftune.plan.planner import GB, Plan, Planner, device_memory, limit
from preftune.plan.rows import assumed, of_data
from preftune.plan.sizes import PlanError, configuration

MOST = 3  # suggestions


def choice(group: str, name: str) -> DictConfig:
    """A file of conf/<group> with the files that it builds on."""
    own = OmegaConf.load(resources.files("preftune.conf") / group / f"{name}.yaml")
    below = [choice(group, each) for each in own.pop("defaults", []) if each != "_self_"]
    return OmegaConf.merge(*below, own)


def changed(cfg: DictConfig, overrides: list[str]) -> DictConfig:
    """`cfg` with overrides laid over it: key=value, or group=choice."""
    cfg = copy.deepcopy(cfg)
    OmegaConf.set_struct(cfg, False)
    for override in overrides:
        key, _, value = override.partition("=")
        if "." in key:
            OmegaConf.update(cfg, key, OmegaConf.create(f"x: {value}").x)
        else:
            cfg[key] = choice(key, value)
    return cfg


def gentle(cfg: DictConfig, planner: Planner) -> Iterator[list[str]]:
    """Changes that leave the training as it is, the cheapest first."""
    if not cfg.fastpath.enabled:
        yield ["fastpath.enabled=true"]
    if planner.reference() == "copy":
        yield ["loss.precompute_ref_log_probs=true"]
    if not planner.checkpointing:
        yield [f"hardware.gradient_checkpointing={SELECTIVE}"]
    if planner.checkpointing is not True:
        yield ["hardware.gradient_checkpointing=true"]
    rows, steps = cfg.hardware.per_device_train_batch_size, cfg.hardware.gradient_accumulation_steps
    least = 2 if cfg.loss.view == "unpaired" else 1  # KTO's KL term is a mean over the batch
    while rows % 2 == 0 and rows // 2 >= least:
        rows, steps = rows // 2, steps * 2
        split = [f"hardware.per_device_train_batch_size={rows}"]
        yield split if cfg.global_batch else [*split, f"hardware.gradient_accumulation_steps={steps}"]


def drastic(cfg: DictConfig, planner: Planner) -> Iterator[list[str]]:
    """Changes that make another training of it."""
    if "8bit" not in str(planner.argument("optim")) and planner.on_gpu:
        yield ["hardware.optim=paged_adamw_8bit"]
    if cfg.model.dtype == "float32":
        yield ["model.dtype=bfloat16"]
    if not cfg.lora:
        yield ["lora=lora"]
    if "quantization" not in cfg.lora:
        yield ["lora=qlora"]
    length = cfg.train.max_length
    while length and length > 512:
        length //= 2
        yield [f"train.max_length={length}"]


def suggestions(planner: Planner) -> list[str]:
    """Overrides with which the run would fit, the gentlest first; none where it fits, or where nothing helps."""
    cfg = planner.cfg
    found: dict[tuple, str] = {}  # by their keys: one of each kind is enough
    laid: list[str] = []
    for change in [*gentle(cfg, planner), *drastic(cfg, planner)]:
        keys = {each.partition("=")[0] for each in change}
        laid = [each for each in laid if each.partition("=")[0] not in keys] + change
        for overrides in (change,) if found else (change, laid):
            kind = tuple(sorted(overrides if overrides[0].startswith("lora=") else keys))
            if kind not in found and fits(planner, overrides):
                found[kind] = " ".join(overrides)
                break
        if len(found) == MOST:
            break
    return list(found.values())


def fits(planner: Planner, overrides: list[str]) -> bool:
    """Whether the run would fit with these overrides."""
    cfg = changed(planner.cfg, overrides)
    other = Planner(cfg, planner.config, planner.source, planner.known, planner.world_size, planner.sharding)
    return other.memory()[0].total / GB <= device_memory(cfg, planner.world_size)


def plan(cfg: DictConfig, data=None, tokenizer=None, world_size: int = 1, sharding: str = "none") -> Plan:
    """The plan of `cfg`, a recipe's config; `data` is its loaded preftune.data.Data, or None for `data.assumed`.

    No weights are read. `tokenizer` counts the rows' tokens; without it their characters are. `sharding` is one of
    memory.SHARDS. With suggestions where it does not fit. Raises PlanError where the architecture cannot be had.
    """
    config, source = configuration(cfg.model)
    train = getattr(data, "train", None)
    if hasattr(train, "select"):
        known = of_data(train, cfg.loss.view, tokenizer)
    else:
        known = assumed(cfg.data, cfg.loss.view, limit(cfg))
    planner = Planner(cfg, config, source, known, world_size, sharding)
    made = planner.plan()
    return replace(made, suggestions=suggestions(planner)) if made.fits is False else made


def require_fits(plan: Plan, cfg: DictConfig) -> None:
    """Raise PlanError, with what would fit, where the plan cannot; not with `fit_check=false`."""
    if plan.fits is not False or not cfg.fit_check:
        return
    would = "; or ".join(plan.suggestions) or "a larger device, or more of them"
    raise PlanError(
        f"this run would take {plan.memory_gb['total']:.1f} GB, and there are {plan.limit_gb:g} (hardware.memory_gb). "
        f"It would fit with {would}. To start all the same: fit_check=false"
    )
