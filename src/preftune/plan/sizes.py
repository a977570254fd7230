"""How large a model is: its configuration without its weights, and the bytes of its parts."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from omegaconf import DictConfig, OmegaConf
from transformers import AutoConfig, Conv1D, PreTrainedConfig

from preftune.config.errors import UserError
from preftune.models import hub
from preftune.models.load import location
from preftune.plan import measure
from preftune.plan.measure import Footprint, Setting, meta_model

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
NF4 = 0.5 + 4 / 64  # a scale in float32 for each 64 weights
NF4_DOUBLE = 0.5 + 1 / 64 + 4 / (64 * 256)  # the scales in 8 bits, with a scale for each 256 of them
# Bytes that an optimizer keeps for a parameter, by the beginning of its name; Adam's as many as two of the parameter
OPTIMIZERS = {"adafactor": 0.01, "sgd": 0.0, "rmsprop_bnb_8bit": 1.0, "lion_8bit": 1.0, "paged_lion_8bit": 1.0}
STATES = {"rmsprop": 1, "adagrad": 1, "lion": 1, "paged_lion": 1}  # states of the parameter's own size; else 2


class PlanError(UserError):
    """Why a plan cannot be made, or says that a run cannot fit."""


@dataclass(frozen=True)
class Sizes:
    """Parameters of a model: all, those of its layers' matrices (they make the work), its head's, and an adapter's."""

    parameters: int
    matrices: int
    head: int
    embeddings: int
    adapter: int
    tied: bool


def configuration(model: DictConfig) -> tuple[PreTrainedConfig, str]:
    """The configuration of `model`, and where it was read: beside the weights, or in model.architecture.

    No weights are loaded. Raises PlanError where neither gives one.
    """
    path = location(model)
    local = Path(path).exists()
    options = {"revision": model.revision, "trust_remote_code": model.trust_remote_code}
    try:
        return AutoConfig.from_pretrained(path, local_files_only=True, **options), model.path
    except (OSError, ValueError) as error:
        reason = error
    try:
        if not local:
            hub.require(path, "model.path", model.revision)
            return AutoConfig.from_pretrained(path, **options), model.path
    except (OSError, ValueError) as error:
        reason = error
    if not model.architecture or local:
        raise PlanError(
            f"model.path={model.path}: no config.json to plan from ({str(reason).splitlines()[0][:120]}). Name a "
            "folder that holds one, or give the architecture in transformers' keywords: "
            "'model.architecture={model_type: llama, hidden_size: 4096, num_hidden_layers: 32}'"
        ) from None
    return from_keywords(model.architecture), "model.architecture"


def from_keywords(architecture: DictConfig) -> PreTrainedConfig:
    """A configuration from transformers' keywords, `model_type` among them."""
    keywords = OmegaConf.to_container(OmegaConf.create(architecture), resolve=True)
    if "model_type" not in keywords:
        raise PlanError("model.architecture names no model_type; for example model.architecture.model_type=llama")
    return AutoConfig.for_model(**keywords)


def as_json(config: PreTrainedConfig) -> str:
    """A configuration as text, so that what was found for it is kept by it."""
    whole = config.to_dict()
    kept = {key: whole[key] for key in whole if not key.startswith("_") and key != "quantization_config"}
    return json.dumps({"model_type": config.model_type} | kept, sort_keys=True, default=str)


_known: dict[tuple, object] = {}  # what was measured for a configuration, as a plan asks for it several times


def kept(config: PreTrainedConfig, what: Callable, *arguments):
    """`what(config, *arguments)`, found once."""
    key = (what, as_json(config), *arguments)
    if key not in _known:
        _known[key] = what(config, *arguments)
    return _known[key]


def sizes(config: PreTrainedConfig, adapter: tuple | None) -> Sizes:
    """The parameters of a model and of an adapter over it, counted on the meta device; `adapter` as in Setting."""
    return kept(config, _sizes, adapter)


def footprint(config: PreTrainedConfig, setting: Setting) -> Footprint:
    """`measure.footprint`, kept for the next question of the same kind."""
    return kept(config, measure.footprint, setting)


def _sizes(config: PreTrainedConfig, adapter: tuple | None) -> Sizes:
    model = meta_model(config, "float32")
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    linear = (module for module in model.modules() if isinstance(module, (torch.nn.Linear, Conv1D)))
    learned = meta_model(config, "float32", adapter=adapter).parameters() if adapter else ()
    return Sizes(
        parameters=sum(p.numel() for p in model.parameters()),
        matrices=sum(module.weight.numel() for module in linear if module is not head),
        head=head.weight.numel(),
        embeddings=embeddings.weight.numel(),
        adapter=sum(p.numel() for p in learned if p.requires_grad),
        tied=head.weight is embeddings.weight,
    )


def frozen(lora: DictConfig) -> tuple | None:
    """`lora` as a hashable tuple of LoraConfig's keywords, without preftune's own; None without an adapter."""
    given = OmegaConf.to_container(OmegaConf.create(lora), resolve=True)
    given.pop("quantization", None)
    return tuple(sorted((k, tuple(v) if isinstance(v, list) else v) for k, v in given.items())) or None


def bits(lora: DictConfig) -> int:
    """Bits of a quantized weight: 4, 8, or 0 where nothing is quantized."""
    if "quantization" not in lora:
        return 0
    return next(
        (n for n in (4, 8) if f"load_in_{n}bit" in lora.quantization and lora.quantization[f"load_in_{n}bit"]), 0
    )


def weight_bytes(size: Sizes, dtype: str, lora: DictConfig, prepared: bool = False) -> float:
    """Bytes of the model's weights: 4 or 8 bits a weight of the layers' matrices where they are quantized.

    `prepared`: what is not quantized is then held in float32, as PEFT prepares it for ORPO and CPO.
    """
    each = BYTES[dtype]
    packed = each
    if bits(lora) == 4:
        double = "bnb_4bit_use_double_quant" in lora.quantization and lora.quantization.bnb_4bit_use_double_quant
        packed = NF4_DOUBLE if double else NF4
    elif bits(lora) == 8:
        packed = 1.0
    rest = 4 if prepared and bits(lora) else each
    return size.matrices * packed + (size.parameters - size.matrices) * rest


def state_bytes(optim: str, parameter: int) -> float:
    """Bytes that the optimizer keeps for one parameter of `parameter` bytes."""
    for name, each in OPTIMIZERS.items():
        if optim.startswith(name):
            return each
    states = next((count for name, count in STATES.items() if optim.startswith(name)), 2)
    if "8bit" in optim:
        return states * (1 + 4 / 256)
    return states * (4 if "32bit" in optim else parameter)
