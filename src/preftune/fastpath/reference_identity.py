"""What makes two references the same: their weights and adapter bit for bit, their configuration, their precision."""

import json

import torch
from accelerate.utils import is_peft_model
from peft import PeftType
from peft.tuners.tuners_utils import BaseTunerLayer

from preftune.models.identity import weights_digest

# Of a model's configuration, what does not change its log-probs: where it came from, how it generates, which tokens are
# padding, and which kernel computes attention.
UNIMPORTANT = {
    "_name_or_path",
    "_attn_implementation",
    "_attn_implementation_internal",
    "_experts_implementation",
    "_experts_implementation_internal",
    "architectures",
    "attn_implementation",
    "bos_token_id",
    "dtype",  # of the weights themselves, which are hashed with theirs
    "eos_token_id",
    "pad_token_id",
    "transformers_version",
    "use_cache",
}
UNIMPORTANT_TO_ADAPTERS = {
    "auto_mapping",
    "base_model_name_or_path",
    "inference_mode",
    "init_lora_weights",
    "lora_dropout",  # the reference is scored in evaluation mode
    "peft_version",
    "revision",
    "task_type",
}


def reference_state(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The tensors that the reference's forward reads, under the base model's own names.

    For a PeftModel that is the base model, and the adapter "ref" where TRL made one; the adapters that train are none
    of it. So the reference of a LoRA run and of a full fine-tuning from the same weights are the same.
    """
    state = model.state_dict(keep_vars=True)  # as they are, so that sharded ones can be gathered
    if not is_peft_model(model):
        return state
    trained = [f".{adapter}." for adapter in model.peft_config if adapter != "ref"]
    kept = {name: tensor for name, tensor in state.items() if not any(part in f"{name}." for part in trained)}
    return {
        name.removeprefix("base_model.model.").replace(".base_layer.", ".").replace(".original_module.", "."): tensor
        for name, tensor in kept.items()
    }


def reference_identity(model: torch.nn.Module, mixed_precision: str) -> tuple[str, dict]:
    """The hash that names a reference, and what it is in words.

    `model` is TRL's reference model, or its policy at the start of training where it keeps no other; `mixed_precision`
    is Accelerate's.
    """
    adapter = "ref" if is_peft_model(model) and "ref" in model.peft_config else None
    return _named(model, reference_state(model), adapter, mixed_precision)


def model_identity(model: torch.nn.Module, mixed_precision: str) -> tuple[str, dict]:
    """The same of a model as it is now: with its adapter, unless that is switched off or LoRA that has not learned."""
    if not is_peft_model(model) or _as_its_base(model):
        return _named(model, reference_state(model), None, mixed_precision)
    return _named(model, model.state_dict(), model.active_adapter, mixed_precision)


def _as_its_base(model: torch.nn.Module) -> bool:
    """Whether a PeftModel gives what its base gives."""
    if any(isinstance(module, BaseTunerLayer) and module.disable_adapters for module in model.modules()):
        return True
    config = model.active_peft_config
    if config.peft_type != PeftType.LORA or config.use_dora or config.modules_to_save:
        return False
    added = [each for name, each in model.named_parameters() if "lora_B." in name or "lora_embedding_B." in name]
    return bool(added) and not any(each.any() for each in added)


def _named(model: torch.nn.Module, state: dict, adapter: str | None, mixed_precision: str) -> tuple[str, dict]:
    """The hash of a model of these tensors under the settings of its configuration and adapter, and it in words."""
    digest = weights_digest(state)
    config = {key: value for key, value in model.config.to_dict().items() if key not in UNIMPORTANT}
    fields = model.peft_config[adapter].to_dict() if adapter else {}
    added = {key: value for key, value in fields.items() if key not in UNIMPORTANT_TO_ADAPTERS} or None
    settings = json.dumps([config, added, mixed_precision], sort_keys=True, default=plain)
    digest.update(settings.encode())
    floating = [str(tensor.dtype).removeprefix("torch.") for tensor in state.values() if tensor.is_floating_point()]
    quantization = config.get("quantization_config") or {}
    return f"r{digest.hexdigest()[:15]}", {  # a letter first: no command line reads it as a number
        "model": getattr(model.config, "_name_or_path", "") or type(model).__name__,
        "parameters": sum(getattr(tensor, "ds_numel", tensor.numel()) for tensor in state.values()),
        "dtype": max(set(floating), key=floating.count),
        "mixed_precision": mixed_precision,
        "quantization": quantization.get("quant_method") and str(quantization["quant_method"]),
        "adapter": adapter is not None,
    }


def plain(value):
    """JSON for what a configuration may hold beside plain values: sets in one order, the rest by its name."""
    return sorted(value, key=str) if isinstance(value, (set, frozenset)) else str(value)
