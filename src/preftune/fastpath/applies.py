"""Whether the packed forward gives what TRL's gives: for a model, once; for a batch, each time."""

import inspect
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate.utils import is_peft_model
from transformers import PreTrainedModel, Trainer
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from preftune.config.errors import brief
from preftune.fastpath.attention import FULL, IMPLEMENTATIONS, SLIDING, masks
from preftune.fastpath.layout import IGNORED, Layout, lay_out

# What TRL's text trainers give to the model's forward; anything else (images, token types, positions) is not packed
INPUTS = {"input_ids", "attention_mask", "use_cache", "return_dict", "output_attentions", "output_hidden_states"}
PACKED_BY_TRL = {"position_ids", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx"}
LENGTH_BOUND_ROPES = ("dynamic", "longrope")  # rotary frequencies that change with the length of the row


def why_not(model: PreTrainedModel, trainer: Trainer) -> str | None:
    """Why `model`, which `trainer` runs, keeps TRL's own forward, in one line; None where it can be packed."""
    try:
        return _why_not(model, trainer)
    except Exception as error:  # whatever a model of unknown code raises, TRL's path remains
        return f"{type(model).__name__} could not be tried ({brief(error)})"


def _why_not(model: PreTrainedModel, trainer: Trainer) -> str | None:
    if is_peft_model(model):
        if getattr(model.active_peft_config, "is_prompt_learning", False):
            return "prompt-learning adapters put tokens before every row"
        model = model.get_base_model()
    return _why_not_trainer(trainer) or _why_not_model(model) or _why_not_probe(model)


def _why_not_trainer(trainer: Trainer) -> str | None:
    parallel = getattr(trainer.accelerator, "parallelism_config", None)
    if getattr(trainer, "_is_vision_dataset", False):
        return "the data holds images"
    if getattr(trainer, "aux_loss_enabled", False):
        return "the mixture-of-experts auxiliary loss counts every row's tokens"
    if trainer.is_fsdp_enabled or is_deepspeed_zero3_enabled():
        return "the model's weights are sharded"
    if parallel is not None and (parallel.tp_enabled or parallel.cp_enabled or parallel.sp_enabled):
        return "rows or weights are split among devices"
    return None


def _why_not_model(model: PreTrainedModel) -> str | None:
    config, attention = model.config, model.config._attn_implementation
    odd = set(getattr(config, "layer_types", None) or ()) - {FULL, SLIDING}
    if config.is_encoder_decoder:
        return "an encoder-decoder model"
    if config.get_text_config() is not config:
        return "a model of more than text"
    if getattr(model, "_is_stateful", False) or odd:
        return f"layers that are not plain attention ({', '.join(sorted(odd)) or 'recurrent'})"
    if attention not in IMPLEMENTATIONS:
        return f"attn_implementation={attention} takes no mask; {', '.join(IMPLEMENTATIONS)} do"
    if getattr(config, "output_router_logits", False):
        return "the mixture-of-experts router logits are asked for"
    if "position_ids" not in inspect.signature(model.base_model.forward).parameters:
        return f"{type(model).__name__} takes no position ids"
    if any(buffer.ndim == 4 and buffer.shape[-1] == buffer.shape[-2] > 1 for buffer in model.buffers()):
        return "layers that build their own masks"
    return None


def _why_not_probe(model: PreTrainedModel) -> str | None:
    """Run seven tokens both ways: an architecture that reads masks or positions in a way of its own shows here."""
    if model.device.type == "meta":
        return "the model has no weights yet"
    ids = torch.tensor([[1, 2, 3, 4, 5, 0], [1, 2, 3, 6, 7, 4]], device=model.device) % model.config.vocab_size
    seen = torch.tensor([[1] * 5 + [0], [1] * 6], device=model.device)
    labels = ids.masked_fill(seen == 0, IGNORED)
    layout = lay_out(ids, labels, pairs=True, width=model.config.hidden_size).to(model.device)
    try:
        with torch.no_grad(), without_dropout(model):
            expected = model.base_model(ids, attention_mask=seen, use_cache=False).last_hidden_state[:, :-1]
            packed = run_backbone(model, layout)
    except Exception as error:  # whatever a model of unknown code raises, TRL's path remains
        return f"{type(model).__name__} takes no mask of ours ({type(error).__name__}: {str(error).splitlines()[0]})"
    expected, packed = expected[layout.scored].float(), packed[layout.source[layout.scored]].float()
    tolerance = 1e-3 if model.dtype == torch.float32 else 5e-2
    if not (packed - expected).norm() <= tolerance * expected.norm():
        return f"{type(model).__name__} gives other hidden states when packed"
    return None


@contextmanager
def without_dropout(model: PreTrainedModel) -> Iterator[None]:
    """Evaluation mode for a moment, except for 4-bit layers.

    In that mode, on a CPU with AVX-512-BF16, bitsandbytes repacks their weights for good, and no gradient passes them
    again.
    """
    modes = [(module, module.training) for module in model.modules()]
    for module, _ in modes:
        module.training = hasattr(getattr(module, "weight", None), "quant_state")
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def run_backbone(model: PreTrainedModel, layout: Layout) -> torch.Tensor:
    """The hidden states of every packed token, (R·C, hidden), after the final norm."""
    outputs = model.base_model(
        input_ids=layout.input_ids,
        attention_mask=masks(layout, model.config, model.dtype),
        position_ids=layout.position_ids,
        use_cache=False,
    )
    return outputs.last_hidden_state.flatten(0, 1)


def longest_row(model: PreTrainedModel) -> int | None:
    """The longest row that is packed: beyond it the model changes in ways that a packed row would not repeat."""
    config, code = model.config, sys.modules[type(model.base_model).__module__]
    rope = getattr(config, "rope_parameters", None) or {}
    limits = []
    for kind in [rope, *rope.values()]:  # one, or one for each type of layer
        if isinstance(kind, dict) and kind.get("rope_type") in LENGTH_BOUND_ROPES:
            limits.append(kind.get("original_max_position_embeddings") or config.max_position_embeddings)
    if not getattr(config, "layer_types", None) and not hasattr(code, "create_sliding_window_causal_mask"):
        limits.append(getattr(config, "sliding_window", None))
    return min((limit for limit in limits if limit), default=None)


def names(inputs: dict) -> set[str]:
    """The inputs that say something."""
    return {name for name, value in inputs.items() if value is not None and value is not False}


def packed_by_trl(inputs: dict, labels: torch.Tensor | None) -> bool:
    """Whether the batch is SFT's own packing: rows side by side already, with position ids and no mask."""
    given = names(inputs)
    if labels is None or not {"input_ids", "position_ids"} <= given <= (INPUTS | PACKED_BY_TRL) - {"attention_mask"}:
        return False
    return bool((labels[:, 1:] != IGNORED).any())


def why_not_batch(inputs: dict, labels: torch.Tensor | None, pairs: bool, longest: int | None) -> str | None:
    """Why this batch keeps TRL's own forward, in one line; None where it can be packed."""
    given = names(inputs)
    if given - INPUTS or not {"input_ids", "attention_mask"} <= given or labels is None:
        return f"batches with {', '.join(sorted(given - INPUTS)) or 'neither mask nor labels'}"
    seen = inputs["attention_mask"]
    if longest is not None and seen.shape[1] > longest:
        return f"rows longer than {longest} tokens"
    if pairs and len(seen) % 2:
        return "batches that are not pairs"
    padded_right = (seen[:, 1:] <= seen[:, :-1]).all()
    scored = labels[:, 1:] != IGNORED
    if not bool(padded_right & (scored <= seen[:, 1:].bool()).all()):
        return "rows that are not padded on the right"
    if not bool(scored.any()):
        return "batches without a token to score"
    return None
