"""An adapter where a model is asked for: what it stands on, and how it is added to it."""

import json
from dataclasses import fields
from pathlib import Path

from peft import PeftConfig, PeftModel
from peft.utils.save_and_load import load_peft_weights
from transformers import PreTrainedModel
from transformers.utils.peft_utils import find_adapter_config_file

NOT_SETTINGS = {"auto_mapping", "base_model_name_or_path", "inference_mode", "peft_version", "revision", "task_type"}


def base_of(path: str | Path, revision: str | None = None) -> tuple[str, str | None] | None:
    """(path, revision) of the model that the adapter in a folder or hub repository was trained over.

    None where there is no adapter. The base may be an adapter itself.
    """
    found = find_adapter_config_file(str(path), revision=revision)
    if found is None:
        return None
    written = json.loads(Path(found).read_text(encoding="utf-8"))
    return written["base_model_name_or_path"], written.get("revision")


def task_of(path: str | Path, revision: str | None = None) -> str | None:
    """PEFT's name of what an adapter's model gives: SEQ_CLS for a reward model; None where it was not written."""
    found = find_adapter_config_file(str(path), revision=revision)
    return json.loads(Path(found).read_text(encoding="utf-8")).get("task_type") if found else None


def whole(path: str, revision: str | None = None) -> tuple[str, str | None]:
    """(path, revision) of the whole model at the bottom: `path` itself where it is no adapter."""
    below = base_of(path, revision)
    return (path, revision) if below is None else whole(*below)


def settings(path: str, revision: str | None = None) -> dict:
    """What an adapter was made with, as keywords of its PEFT configuration that differ from the defaults."""
    config = PeftConfig.from_pretrained(path, revision=revision)
    usual = {each.name: each.default for each in fields(type(config))}
    given = {name: value for name, value in config.to_dict().items() if name in usual and name not in NOT_SETTINGS}
    given = {name: sorted(value) if isinstance(value, set) else value for name, value in given.items()}
    return {name: value for name, value in given.items() if value and value != usual[name]}


def fit_vocabulary(base: PreTrainedModel, path: str | Path, revision: str | None = None) -> None:
    """Give `base` as many tokens as the adapter was trained with, where it holds embeddings of its own."""
    name = next(name for name, module in base.named_modules() if module is base.get_input_embeddings())
    saved = load_peft_weights(str(path), device="cpu", revision=revision)
    sizes = {len(tensor) for key, tensor in saved.items() if key.endswith((f"{name}.weight", "lm_head.weight"))}
    if sizes - {base.get_input_embeddings().num_embeddings}:
        base.resize_token_embeddings(max(sizes))


def with_adapter(base: PreTrainedModel, path: str | Path, revision: str | None = None) -> PreTrainedModel:
    """`base` as a plain whole model with the adapter's update added to its weights.

    A quantized base is dequantized first: merged into 4-bit weights, the sum would be rounded to 4 bits once more; and
    the adapter makes up for what rounding did to these weights, so that over the full-precision ones it is too much.
    """
    if getattr(base, "is_quantized", False):
        base = base.dequantize(base.dtype)
    fit_vocabulary(base, path, revision)
    config = PeftConfig.from_pretrained(str(path), revision=revision)
    if not base.can_generate() and config.task_type != "SEQ_CLS":
        config.task_type = None  # a language model's adapter, under a new head for rewards
    merged = PeftModel.from_pretrained(base, str(path), revision=revision, config=config).merge_and_unload()
    merged.config._name_or_path = merged.name_or_path = str(path)  # what an adapter over it stands on
    return merged
