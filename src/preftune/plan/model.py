"""The model of a plan: its configuration without its weights, its parameters, and the bytes of each."""

from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import torch
from omegaconf import DictConfig, OmegaConf
from transformers import AutoConfig, Conv1D, PreTrainedConfig

from preftune.config.errors import UserError
from preftune.models import adapters, hub
from preftune.models.load import location
from preftune.plan.measure import footprint, meta_model

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
NF4 = 0.5 + 4 / 64  # a scale in float32 for each 64 weights
NF4_DOUBLE = 0.5 + 1 / 64 + 4 / (64 * 256)  # the scales in 8 bits, with a scale for each 256 of them
# Bytes per parameter that an optimizer keeps, by the beginning of its name
OPTIMIZERS = {"adafactor": 0.01, "sgd": 0.0, "rmsprop_bnb_8bit": 1.0, "lion_8bit": 1.0, "paged_lion_8bit": 1.0}
STATES = {"rmsprop": 1, "adagrad": 1, "lion": 1, "paged_lion": 1}  # states of the parameter's own size; else Adam's two


class PlanError(UserError):
    """Why a plan cannot be made, or says that a run cannot fit."""


@dataclass(frozen=True)
class Sizes:
    """Parameters of a model: all, those of its layers' matrices, its head's, and those that an adapter adds."""

    parameters: int
    matrices: int
    head: int
    adapter: int


class Model:
    """An architecture and where it was read. What is measured for it is kept: a plan asks several times."""

    def __init__(self, config: PreTrainedConfig, source: str):
        self.config, self.source = config, source
        self.sizes = cache(partial(sizes, config))
        self.footprint = cache(partial(footprint, config))


def read(model: DictConfig) -> Model:
    """The architecture of `model`: from beside its weights, or from model.architecture. No weights are loaded.

    Raises PlanError where neither gives one.
    """
    path = location(model)
    local = Path(path).exists()
    options = {"revision": model.revision, "trust_remote_code": model.trust_remote_code}
    for offline in (True, False):
        try:
            if not offline and not local:
                hub.require(path, "model.path", model.revision)
            if not offline:
                path, options["revision"] = adapters.whole(path, model.revision)
            return Model(AutoConfig.from_pretrained(path, local_files_only=offline, **options), model.path)
        except (OSError, ValueError) as error:
            reason = error
    if not model.architecture or local:
        raise PlanError(
            f"model.path={model.path}: no config.json to plan from ({str(reason).splitlines()[0][:120]}). Name a "
            "folder that holds one, or give the architecture in transformers' keywords: "
            "'model.architecture={model_type: llama, hidden_size: 4096, num_hidden_layers: 32}'"
        ) from None
    return Model(from_keywords(model.architecture), "model.architecture")


def from_keywords(architecture: DictConfig) -> PreTrainedConfig:
    """A configuration from transformers' keywords, `model_type` among them."""
    keywords = OmegaConf.to_container(OmegaConf.create(architecture), resolve=True)
    if "model_type" not in keywords:
        raise PlanError("model.architecture names no model_type; for example model.architecture.model_type=llama")
    return AutoConfig.for_model(**keywords)


def sizes(config: PreTrainedConfig, adapter: str | None) -> Sizes:
    """The parameters of a model and of an adapter over it, counted on the meta device; `adapter` as in Setting."""
    model = meta_model(config, "float32")
    head = model.get_output_embeddings()
    linear = (module for module in model.modules() if isinstance(module, (torch.nn.Linear, Conv1D)))
    learned = meta_model(config, "float32", adapter=adapter).parameters() if adapter else ()
    return Sizes(
        parameters=sum(p.numel() for p in model.parameters()),
        matrices=sum(module.weight.numel() for module in linear if module is not head),
        head=head.weight.numel(),
        adapter=sum(p.numel() for p in learned if p.requires_grad),
    )


def bits(lora: DictConfig) -> int:
    """Bits of a quantized weight: 4, 8, or 0 where nothing is quantized."""
    given = lora.get("quantization") or {}
    return next((n for n in (4, 8) if given.get(f"load_in_{n}bit")), 0)


def weight_bytes(size: Sizes, dtype: str, lora: DictConfig, prepared: bool = False) -> float:
    """Bytes of the model's weights: 4 or 8 bits per weight of the layers' matrices where they are quantized.

    `prepared`: what is not quantized is then held in float32, as PEFT prepares it for ORPO and CPO.
    """
    each: float = BYTES[dtype]
    rest = packed = each
    if kind := bits(lora):
        packed = 1.0 if kind == 8 else NF4_DOUBLE if lora.quantization.get("bnb_4bit_use_double_quant") else NF4
        rest = 4 if prepared else each
    return size.matrices * packed + (size.parameters - size.matrices) * rest


def state_bytes(optim: str, parameter: int) -> float:
    """Bytes that the optimizer keeps for one parameter of `parameter` bytes."""
    for name, each in OPTIMIZERS.items():
        if optim.startswith(name):
            return each
    states = next((count for name, count in STATES.items() if optim.startswith(name)), 2)
    return states * (1 + 4 / 256 if "8bit" in optim else 4 if "32bit" in optim else parameter)
