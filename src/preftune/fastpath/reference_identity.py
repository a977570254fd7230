"""What makes two references the same: their weights and adapter bit for bit, their configuration, their precision."""

import json

import torch
from accelerate.utils import is_peft_model

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
    state = model.state_dict()
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
    state = reference_state(model)
    digest = weights_digest(state)
    config = {key: value for key, value in model.config.to_dict().items() if key not in UNIMPORTANT}
    adapter = None
    if is_peft_model(model) and "ref" in model.peft_config:
        fields = model.peft_config["ref"].to_dict()
        adapter = {key: value for key, value in fields.items() if key not in UNIMPORTANT_TO_ADAPTERS}
    settings = json.dumps([config, adapter, mixed_precision], sort_keys=True, default=plain)
    digest.update(settings.encode())
    floating = [str(tensor.dtype).removeprefix("torch.") for tensor in state.values() if tensor.is_floating_point()]
    quantization = config.get("quantization_config") or {}
    return f"r{digest.hexdigest()[:15]}", {  # a letter first: no command line reads it as a number
        "model": getattr(model.config, "_name_or_path", "") or type(model).__name__,
        "parameters": sum(tensor.numel() for tensor in state.values()),
        "dtype": max(set(floating), key=floating.count),
        "mixed_precision": mixed_precision,
        "quantization": quantization.get("quant_method") and str(quantization["quant_method"]),
        "adapter": adapter is not None,
    }


def plain(value):
    """JSON for what a configuration may hold beside plain values: sets in one order, the rest by its name."""
    return sorted(value, key=str) if isinstance(value, (set, frozenset)) else str(value)
