"""The training that a configuration makes, as far as its memory and time depend on it."""

import json

from omegaconf import DictConfig, OmegaConf

from preftune.config.stages import config_class
from preftune.config.trainer_fields import fields
from preftune.data.shapes import PAIRS
from preftune.data.views import KINDS
from preftune.fastpath.attention import BLOCK, IMPLEMENTATIONS
from preftune.plan.measure import Footprint, Setting
from preftune.plan.model import Model, bits
from preftune.plan.rows import Batch, Rows, largest
from preftune.trainers import global_batch

NO_LIMIT = 2**20  # tokens, where train.max_length is null


class Training:
    """A configuration, its model and its rows, on so many devices; `sharding` is one of memory.SHARDS."""

    def __init__(self, cfg: DictConfig, model: Model, rows: Rows, world_size: int = 1, sharding: str = "none"):
        self.cfg, self.model, self.rows, self.world_size, self.sharding = cfg, model, rows, world_size, sharding
        defaults = {name: each.default for name, each in fields(config_class(cfg.loss.trainer)).items()}
        self.arguments = defaults | plain(cfg.loss) | plain(cfg.hardware) | plain(cfg.train)
        keywords = plain(cfg.lora)
        keywords.pop("quantization", None)  # preftune's own
        self.adapter = json.dumps(keywords, sort_keys=True) if keywords else None
        self.size = model.sizes(self.adapter)
        self.dtype = cfg.model.dtype
        self.bits = bits(cfg.lora)
        self.on_gpu = not cfg.hardware.use_cpu
        self.batch_size = cfg.hardware.per_device_train_batch_size
        self.accumulation = global_batch.accumulation(cfg, world_size)
        text = model.config.get_text_config()
        self.width, self.layers = text.hidden_size, text.num_hidden_layers
        # as far as a configuration tells: fastpath/applies.py
        takes_masks = cfg.model.attn_implementation in (None, *IMPLEMENTATIONS)
        self.packed = cfg.fastpath.enabled and takes_masks

    @property
    def autocast(self) -> str | None:
        """What is multiplied in, where it is not what the weights are in."""
        return "bfloat16" if self.cfg.hardware.bf16 else "float16" if self.cfg.hardware.get("fp16") else None

    @property
    def reference(self) -> str:
        """none | cached | adapter off | copy."""
        if "precompute_ref_log_probs" not in self.arguments:
            return "none"
        if self.arguments["precompute_ref_log_probs"]:
            return "cached"
        return "adapter off" if self.adapter else "copy"

    @property
    def reference_free(self) -> bool:
        """Whether pairs are trained without a reference, as by ORPO and CPO: they want the logits' means everywhere."""
        return KINDS[self.cfg.loss.view] == PAIRS and self.reference == "none"

    @property
    def batch_shape(self) -> dict:
        """How rows become a batch, as the arguments of rows.largest and rows.typical."""
        multiple = BLOCK if self.cfg.model.attn_implementation == "flex_attention" else 8 if self.on_gpu else 1
        limit = self.cfg.train.max_length or NO_LIMIT
        return {"max_length": limit, "packed": self.packed, "width": self.width, "multiple": multiple}

    def largest_batch(self) -> Batch:
        """The batch of the longest rows."""
        size = self.batch_size
        if budget := self.cfg.fastpath.tokens_per_batch:
            size = max(1, budget // largest(self.rows, 1, **self.batch_shape).tokens)
        return largest(self.rows, size, **self.batch_shape)

    def footprint(self, batch: Batch) -> Footprint:
        """What a step over `batch` takes."""
        setting = Setting(
            rows=batch.rows,
            columns=batch.columns,
            dtype=self.dtype,
            autocast=self.autocast,
            attention=self.cfg.model.attn_implementation,
            adapter=self.adapter,
            four_bit=self.bits == 4,
            checkpointing=self.arguments["gradient_checkpointing"],
            reference_tokens=self.reference_tokens(batch) if self.reference == "cached" else 0,
            dropout=not self.arguments.get("disable_dropout", False),
        )
        return self.model.footprint(setting)

    def reference_tokens(self, batch: Batch) -> int:
        """Tokens of one batch of the reference pass."""
        if not self.cfg.fastpath.enabled:
            return batch.tokens
        mean = (self.rows.prompt + self.rows.answers.sum(axis=1)).mean()
        return min(max(self.cfg.fastpath.reference_batch_tokens, batch.columns), int(mean * self.rows.count))


def plain(node: DictConfig) -> dict:
    """A section as plain values, resolved."""
    return OmegaConf.to_container(OmegaConf.create(node), resolve=True)
