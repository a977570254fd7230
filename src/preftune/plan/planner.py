"""The plan of one training run, put together from its configuration and, where they can be read, its rows."""

import math
import os
from dataclasses import asdict, dataclass
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from preftune.config import hardware
from preftune.config.stages import config_class
from preftune.config.trainer_fields import fields
from preftune.fastpath.attention import BLOCK, IMPLEMENTATIONS
from preftune.plan import work
from preftune.plan.measure import Setting
from preftune.plan.memory import Memory, Run, estimate
from preftune.plan.rows import Batch, Rows, largest, typical
from preftune.plan.sizes import bits, footprint, frozen, sizes, weight_bytes
from preftune.plan.work import Work
from preftune.trainers import global_batch

GB = 1e9


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

    def as_json(self) -> dict:
        """The plan as plain values."""
        return asdict(self)


def limit(cfg: DictConfig) -> int:
    """Tokens of the longest row that is trained on."""
    return cfg.train.max_length or 2**20


class Planner:
    """A configuration, its architecture and its rows on so many devices."""

    def __init__(self, cfg, config, source: str, known: Rows, world_size: int = 1, sharding: str = "none"):
        self.cfg, self.config, self.source, self.known = cfg, config, source, known
        self.text = config.get_text_config()
        self.world_size, self.sharding = world_size, sharding
        self.takes = fields(config_class(cfg.loss.trainer))
        self.adapter = frozen(cfg.lora)
        self.size = sizes(config, self.adapter)
        self.packed = self._packs()
        settings = {**asdict_of(cfg.loss), **asdict_of(cfg.hardware), **asdict_of(cfg.train)}
        self.settings = settings
        self.checkpointing = settings.get("gradient_checkpointing", True)  # TRL's default

    def argument(self, name: str):
        """A trainer's argument as the config has it, else TRL's default."""
        return self.settings[name] if name in self.settings else self.takes[name].default

    def _packs(self) -> bool:
        """Whether the packed forward applies, as far as a configuration tells (fastpath/applies.py)."""
        sharded = self.sharding.startswith(("zero3", "fsdp"))
        return (
            self.cfg.fastpath.enabled and self.cfg.model.attn_implementation in (None, *IMPLEMENTATIONS) and not sharded
        )

    @property
    def on_gpu(self) -> bool:
        return not self.cfg.hardware.use_cpu

    @property
    def batch_size(self) -> int:
        return self.cfg.hardware.per_device_train_batch_size

    def how(self) -> dict:
        """How rows become a batch."""
        multiple = BLOCK if self.cfg.model.attn_implementation == "flex_attention" else 8 if self.on_gpu else 1
        return {
            "max_length": limit(self.cfg),
            "packed": self.packed,
            "width": self.text.hidden_size,
            "multiple": multiple,
        }

    def reference(self) -> str:
        """none | cached | adapter off | copy."""
        if "precompute_ref_log_probs" not in self.takes:
            return "none"
        if self.argument("precompute_ref_log_probs"):
            return "cached"
        return "adapter off" if self.adapter else "copy"

    def everywhere(self) -> bool:
        """Whether the head scores prompts and padding too, as it does off GPUs where rows are not packed."""
        return self.bare() or not (self.packed or self.on_gpu)

    def bare(self) -> bool:
        """Whether pairs are trained without a reference, as by ORPO and CPO: they want the logits' means everywhere."""
        return self.cfg.loss.view == "paired" and self.reference() == "none"

    def setting(self, batch: Batch) -> Setting:
        hardware, model = self.cfg.hardware, self.cfg.model
        fp16 = "fp16" in hardware and hardware.fp16
        return Setting(
            rows=batch.rows,
            columns=batch.columns,
            dtype=model.dtype,
            autocast="bfloat16" if hardware.bf16 else "float16" if fp16 else None,
            attention=model.attn_implementation,
            adapter=self.adapter,
            four_bit=bits(self.cfg.lora) == 4,
            checkpointing=self.checkpointing,
            reference_tokens=self.reference_tokens(batch) if self.reference() == "cached" else 0,
            dropout="disable_dropout" not in self.takes or not self.argument("disable_dropout"),
        )

    def reference_tokens(self, batch: Batch) -> int:
        """Tokens of one batch of the reference pass; DeepSpeed and FSDP take TRL's own pass."""
        if not self.cfg.fastpath.enabled or self.sharding != "none":
            return batch.tokens
        mean = self.known.prompt + self.known.answers.sum(axis=1)
        return min(max(self.cfg.fastpath.reference_batch_tokens, batch.columns), int(mean.mean() * self.known.count))

    def memory(self) -> tuple[Memory, Batch]:
        """The fullest moment, and the largest batch, at which it comes."""
        batch = largest(self.known, self.rows_at_once(), **self.how())
        setting = self.setting(batch)
        run = Run(
            size=self.size,
            weights=weight_bytes(self.size, self.cfg.model.dtype, self.cfg.lora, self.bare()),
            dtype=self.cfg.model.dtype,
            autocast=setting.autocast,
            optim=str(self.argument("optim")),
            four_bit=setting.four_bit,
            accumulation=global_batch.accumulation(self.cfg, self.world_size),
            reference=self.reference(),
            reference_tokens=setting.reference_tokens,
            quantized=bits(self.cfg.lora) > 0,
            kbit_prepared=self.bare() and bits(self.cfg.lora) > 0,
            full_logits=self.bare() and not self.packed,
            everywhere=self.everywhere(),
            packed=self.packed,
            on_gpu=self.on_gpu,
            layers=self.text.num_hidden_layers,
            sharding=self.sharding,
            world_size=self.world_size,
        )
        self.feet = footprint(self.config, setting)
        return estimate(run, self.feet, batch, self.text.hidden_size), batch

    def rows_at_once(self) -> int:
        """Rows of the batch of the longest rows."""
        if not (budget := self.cfg.fastpath.tokens_per_batch):
            return self.batch_size
        longest = largest(self.known, 1, **self.how())
        return max(1, budget // longest.tokens)

    def steps(self) -> tuple[int, int]:
        """Optimizer steps of the run, and forwards of all devices in each."""
        accumulation = global_batch.accumulation(self.cfg, self.world_size)
        most, epochs = self.argument("max_steps"), self.argument("num_train_epochs")
        an_epoch = math.ceil(self.forwards_an_epoch() / (accumulation * self.world_size))
        return most if most and most > 0 else math.ceil(an_epoch * epochs), accumulation * self.world_size

    def forwards_an_epoch(self) -> int:
        """Forwards of all devices over all rows once."""
        return math.ceil(self.known.count / (self.batch_size * self.world_size)) * self.world_size

    def work(self) -> Work:
        """Steps, tokens and operations of the whole run."""
        batches = typical(self.known, self.batch_size, self.cfg.fastpath.enabled, **self.how())
        mean = work.mean(self.size, self.feet, batches)
        steps, a_step = self.steps()
        forwards = steps * a_step
        passes = {"none": 0, "cached": self.forwards_an_epoch()}.get(self.reference(), forwards)
        flop = mean.training * forwards
        if self.cfg.loss.view == "unpaired":  # KTO's mismatched answers: a forward of the policy, one of the reference
            flop, passes = flop + mean.forward * forwards, passes * 2
        return Work(
            steps=steps,
            rows=self.known.count,
            tokens=round(mean.tokens * forwards),
            padding=mean.padding,
            flop=flop,
            reference_tokens=round(mean.tokens * passes),
            reference_flop=mean.forward * passes,
        )

    def plan(self) -> Plan:
        held, batch = self.memory()
        run = self.work()
        parts = {name: round(value / GB, 3) for name, value in held.parts().items()}
        most = device_memory(self.cfg, self.world_size)
        speed = self.cfg.hardware.tflops * 1e12 * self.world_size
        moved = self.size.adapter or self.size.parameters
        return Plan(
            parameters=self.size.parameters,
            trained=moved,
            architecture=self.source + ", measured in bfloat16 and doubled" * self.feet.doubled,
            memory_gb=parts | {"total": round(held.total / GB, 3)},
            fullest_at=held.moment,
            limit_gb=most,
            fits=None if most is None else held.total / GB <= most,
            packed=self.packed,
            largest_batch={"rows": batch.rows, "columns": batch.columns, "scored": batch.scored},
            global_batch=self.batch_size * self.world_size * global_batch.accumulation(self.cfg, self.world_size),
            rows=run.rows,
            lengths=self.known.source,
            steps=run.steps,
            tokens=run.tokens,
            padding=round(run.padding, 4),
            reference={
                "kind": self.reference(),
                "tokens": run.reference_tokens,
                "seconds": round(run.reference_flop / speed, 1),
            },
            seconds=round((run.flop + run.reference_flop) / speed, 1),
            tflops=self.cfg.hardware.tflops,
            world_size=self.world_size,
            sharding=self.sharding,
            suggestions=[],
        )


def asdict_of(node: DictConfig) -> dict:
    return OmegaConf.to_container(OmegaConf.create(node), resolve=True)


def device_memory(cfg: DictConfig, world_size: int = 1) -> float | None:
    """GB of one device: hardware.memory_gb, else of the card found here.

    On CPU what this machine has free, in equal parts for its processes.
    """
    if cfg.hardware.memory_gb is not None:
        return float(cfg.hardware.memory_gb)
    if cfg.hardware.use_cpu:
        return round(free_memory() / GB / max(1, world_size // cfg.hardware.nodes), 1)
    card = hardware.accelerator()
    return round(card.memory / GB, 1) if card and card.memory else None


def free_memory() -> int:
    """Bytes that this machine can still give to a process."""
    told = Path("/proc/meminfo")
    if told.exists():
        line = next(line for line in told.read_text().splitlines() if line.startswith("MemAvailable"))
        return int(line.split()[1]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
