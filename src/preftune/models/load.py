"""Model and tokenizer of a run: loaded, quantized and checked, with a chat template, an EOS and a padding token."""

import contextlib
import inspect
import logging
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import datasets
import torch
import transformers
from omegaconf import DictConfig, OmegaConf
from peft import PeftConfig, PeftModel, PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoProcessor,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

from preftune.config.errors import UserError, brief
from preftune.config.processes import main_process
from preftune.models import adapters, embedded, hub
from preftune.models.tokenizer import prepare


class ModelError(UserError):
    """What is wrong with the model that a config names, and how to go on."""


def location(model: DictConfig) -> str:
    """The folder or hub id that transformers loads: embedded models become the folder that they are cached in."""
    return str(embedded.folder(model.path)) if model.path.startswith(embedded.SCHEME) else model.path


def load_tokenizer(model: DictConfig) -> PreTrainedTokenizerBase:
    """The tokenizer, sure to have a chat template that renders and a padding token (tokenizer.py).

    Raises ModelError where the model cannot be had, TokenizerError where its tokens or template cannot be used.
    """
    return prepare(_from_pretrained(tokenizer_of, model), model)


def tokenizer_of(path: str, revision: str | None = None, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer beside the weights; that of its base where an adapter has none."""
    try:
        return AutoTokenizer.from_pretrained(path, revision=revision, trust_remote_code=trust_remote_code)
    except (OSError, ValueError):
        if (below := adapters.base_of(path, revision)) is None:
            raise
        return tokenizer_of(*below, trust_remote_code)


def load_processor(model: DictConfig, tokenizer: PreTrainedTokenizerBase) -> ProcessorMixin | PreTrainedTokenizerBase:
    """What makes images and text the model's inputs, over this tokenizer; the tokenizer itself where it sees none.

    A processor that cannot be had is said in a line: text trains without one. What is wrong with the model itself is
    said where it is loaded.
    """
    code = model.trust_remote_code
    try:
        path, revision = adapters.whole(location(model), model.revision)
        config = AutoConfig.from_pretrained(path, revision=revision, trust_remote_code=code)
    except (OSError, ValueError):
        return tokenizer
    if not hasattr(config, "vision_config"):
        return tokenizer
    try:
        found = AutoProcessor.from_pretrained(path, revision=revision, trust_remote_code=code)
    except Exception as error:
        print(f"images: {model.path} reads none here ({brief(error)})")
        return tokenizer
    if not isinstance(found, ProcessorMixin):
        return tokenizer
    found.tokenizer = tokenizer
    if model.chat_template is not None or not found.chat_template:
        found.chat_template = tokenizer.chat_template
    return found


def save_tokenizer(model: DictConfig, tokenizer: PreTrainedTokenizerBase, folder: str | Path) -> None:
    """Save the tokenizer, and with it the processor of a model that sees images, under the tokenizer's template."""
    for each in dict.fromkeys((load_processor(model, tokenizer), tokenizer)):  # the last one's template stays
        each.save_pretrained(folder)


def section(path: str, revision: str | None = None) -> DictConfig:
    """A `model` section that names a model and asks for nothing else."""
    return OmegaConf.create({"path": path, "revision": revision, "trust_remote_code": False, "chat_template": None})


def load_model(model: DictConfig, lora: DictConfig, use_cpu: bool, task: str | None = None) -> PreTrainedModel:
    """The model in `model.dtype`, or in 4 or 8 bits where `lora.quantization` says so; not yet wrapped by PEFT.

    With `task` SEQ_CLS it gives a number for a text, not words: a reward model, whose head is new to a language model.
    An adapter at model.path comes merged into its base. Raises ModelError where the model cannot be had, or where what
    is merged should be quantized.
    """
    options = {"dtype": getattr(torch, model.dtype), "attn_implementation": model.attn_implementation}
    options |= OmegaConf.to_container(model.kwargs, resolve=True)
    if "quantization" in lora:
        options |= in_few_bits(OmegaConf.to_container(lora.quantization, resolve=True), use_cpu)
    loaded = _from_pretrained(whole_model if task is None else reward_model, model, **options)
    for module in loaded.modules():
        # On a CPU with AVX-512-BF16, bitsandbytes repacks 4-bit weights at the first forward without gradients, for
        # good, and the layer then passes no gradient to its input, silently: adapters below it would never learn.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return loaded


def load_adapter(model: DictConfig, lora: DictConfig, use_cpu: bool, trainable: bool = False) -> PeftModel:
    """The adapter at model.path on its base, which is quantized where `lora.quantization` says so."""
    path, revision = location(model), model.revision
    base, base_revision = adapters.base_of(path, revision)
    below = load_model(OmegaConf.merge(model, {"path": base, "revision": base_revision}), lora, use_cpu)
    adapters.fit_vocabulary(below, path, revision)
    with undamaged(model.path):
        return PeftModel.from_pretrained(below, path, revision=revision, is_trainable=trainable)


def continued(model: DictConfig) -> bool:
    """Whether model.path is an adapter that is trained on itself."""
    return model.adapter == "continue" and adapters.base_of(location(model), model.revision) is not None


def in_few_bits(quantization: dict, use_cpu: bool) -> dict:
    """The arguments that load a model through bitsandbytes, on the device where it will compute."""
    device = "cpu" if use_cpu else torch.cuda.current_device()
    return {"quantization_config": BitsAndBytesConfig(**quantization), "device_map": {"": device}}


def whole_model(
    path: str, revision: str | None = None, trust_remote_code: bool = False, **options: object
) -> PreTrainedModel:
    """The model in the class that its checkpoint names, as TRL loads it; without a class that generates, a causal LM's.

    A checkpoint in MXFP4 or FP8 is dequantized, which is said: these weights cannot be trained as they are.
    Raises ModelError where it is quantized in another way and in bitsandbytes' as well.
    """
    with contextlib.redirect_stdout(sys.stderr):  # its import prints under WANDB_MODE=offline
        from trl.trainer.utils import create_model_from_path

    if below := adapters.base_of(path, revision):
        if "quantization_config" in options:
            raise ModelError(
                f"{path} is an adapter, which is merged into its base in full precision, and lora.quantization wants "
                "4 or 8 bits: model.adapter=continue trains on the adapter itself, over quantized weights"
            )
        try:
            base = whole_model(below[0], below[1], trust_remote_code, **options)
        except OSError as error:
            where = f"{below[0]}{f' (revision {below[1]})' if below[1] else ''}"
            raise ModelError(
                f"{path} is an adapter over {where}, which cannot be loaded ({brief(error)}). Write where it is as "
                f"base_model_name_or_path into {path}/adapter_config.json"
            ) from None
        print(f"model: the adapter {path} is merged into its base, {below[0]}")
        return adapters.with_adapter(base, path, revision)
    config = AutoConfig.from_pretrained(path, revision=revision, trust_remote_code=trust_remote_code)
    if stored := getattr(config, "quantization_config", None):
        method = dict(stored)["quant_method"] if isinstance(stored, dict) else stored.quant_method
        if "quantization_config" in options:
            raise ModelError(f"{path} is quantized already ({method}): lora=lora trains an adapter over it as it is")
        made = AUTO_QUANTIZATION_CONFIG_MAPPING.get(str(method))
        if made and "dequantize" in inspect.signature(made).parameters:
            print(f"model: {path} is stored in {method}, and is trained dequantized")
            options["quantization_config"] = made(dequantize=True)
    options = {"device_map": None} | options | {"revision": revision, "trust_remote_code": trust_remote_code}
    return create_model_from_path(str(path), class_of(config), **options)


def reward_model(
    path: str,
    revision: str | None = None,
    trust_remote_code: bool = False,
    new_head: bool = True,
    **options: object,
) -> PreTrainedModel:
    """The model with one number for a text, as TRL loads it; any adapter is merged into its base.

    A language model gets a new head, drawn from the seed. Raises ModelError where `new_head` is false and it would, or
    where a head gives several numbers.
    """
    with contextlib.redirect_stdout(sys.stderr):
        from trl.trainer.reward_trainer import suppress_seqcls_warning
        from trl.trainer.utils import create_model_from_path

    below = adapters.base_of(path, revision)
    outputs = scores_texts(path, revision, trust_remote_code)
    if not outputs and not new_head:
        raise ModelError(
            f"{path} is no reward model: it has no head that gives a number. python -m recipes.reward trains one"
        )
    if below:
        return adapters.with_adapter(reward_model(*below, trust_remote_code, **options), path, revision)
    if outputs > 1:
        raise ModelError(f"{path} gives {outputs} numbers for a text, and a reward is one")
    options = {"device_map": None, "num_labels": 1} | options | {"revision": revision}
    with suppress_seqcls_warning():
        return create_model_from_path(
            str(path), AutoModelForSequenceClassification, trust_remote_code=trust_remote_code, **options
        )


def scores_texts(path: str, revision: str | None = None, trust_remote_code: bool = False) -> int:
    """How many numbers a model gives for a text: 1 for a reward model, 0 for a language model."""
    if adapters.base_of(path, revision):
        return int(adapters.task_of(path, revision) == "SEQ_CLS")
    config = AutoConfig.from_pretrained(path, revision=revision, trust_remote_code=trust_remote_code)
    named = next(iter(config.architectures or ()), "")
    return config.num_labels if named.endswith("ForSequenceClassification") else 0


def load_reward_model(path: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A trained reward model in float32, and its tokenizer: a run's folder, a model folder or a hub id.

    Raises ModelError where it cannot be had, or has no head that gives a reward.
    """
    folders = (Path(path) / "model", Path(path))
    found = next((str(folder) for folder in folders if holds_weights(folder)), path)
    named = section(found)
    model = _from_pretrained(reward_model, named, new_head=False, dtype=torch.float32)
    return model.eval(), _from_pretrained(tokenizer_of, named)


def class_of(config: PreTrainedConfig) -> type | None:
    """The class that a checkpoint is loaded in; None: TRL finds it in the checkpoint's own code."""
    if not config.architectures:
        return AutoModelForCausalLM
    named = getattr(transformers, config.architectures[0], None)
    return named if named is None or named.can_generate() else AutoModelForCausalLM


def require_trainable(model: PreTrainedModel, path: str, adapter: bool) -> None:
    """Raise ModelError where the weights are quantized in a form that nothing trains, or that wants an adapter."""
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is None:
        return
    method = quantizer.quantization_config.quant_method
    if not quantizer.is_trainable:
        raise ModelError(
            f"model.path={path}: transformers trains no adapter over weights in {method}. Name the checkpoint that it "
            "was quantized from"
        )
    if not adapter:
        raise ModelError(f"model.path={path}: its weights are quantized ({method}) and cannot move: lora=lora")


def peft_config(given: dict, model: torch.nn.Module) -> PeftConfig:
    """PEFT's configuration of `peft_type` (LoRA without one) from these keywords.

    Where it means all layers, it is kept out of the towers that text never feeds.
    """
    if given.get("target_modules") == "all-linear" and (outside := outside_text(model)):
        given = {"exclude_modules": outside} | given
    kind = PeftType[str(given.get("peft_type") or "LORA").upper()]
    return PEFT_TYPE_TO_CONFIG_MAPPING[kind](**{name: value for name, value in given.items() if name != "peft_type"})


def disable_dropout(model: torch.nn.Module) -> int:
    """Switch off dropout that is a number of a module's own, which TRL's function leaves on; returns in how many.

    With it the policy would differ from its reference before the first step, and by chance.
    """
    found = 0
    for module in model.modules():
        names = [name for name, value in vars(module).items() if "drop" in name and isinstance(value, float) and value]
        for name in names:
            setattr(module, name, 0.0)
        found += bool(names)
    return found


def outside_text(model: PreTrainedModel) -> str | None:
    """The modules that text never feeds, as PEFT's `exclude_modules`: all but the text model; None where it is all."""
    if model.config.get_text_config() is model.config:
        return None
    decoder = model.get_decoder()
    names = [name for name, module in model.named_modules() if module is decoder]
    return rf"(?!{re.escape(names[0])}\.).*" if names and names[0] else None


def describe(model: PreTrainedModel) -> str:
    """One line on what is trained: all parameters, and how many of them move."""
    total = model.num_parameters() if hasattr(model, "num_parameters") else sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return f"{total / 1e6:,.1f}M parameters, {trained / 1e6:,.2f}M of them trained ({trained / total:.1%})"


@contextlib.contextmanager
def undamaged(path: str) -> Iterator[None]:
    """Raise ModelError, in one line, where weights that are loaded in it were cut short."""
    try:
        yield
    except SafetensorError as error:
        text = f"model.path={path}: its weights are damaged or half copied; copy or download them again ({error})"
        raise ModelError(text) from None


def holds_weights(folder: Path) -> bool:
    """Whether a folder holds an adapter or a whole model."""
    return any((folder / name).exists() for name in ("adapter_config.json", "config.json"))


def models_in(folder: Path) -> list[str]:
    """The models in a folder that is none itself: that of a run, those of a pipeline's stages."""
    if holds_weights(folder):
        return []
    return [str(each) for each in sorted((*folder.glob("model"), *folder.glob("*/model"))) if holds_weights(each)]


def _from_pretrained(load: Callable, model: DictConfig, **options: object) -> object:
    """What `load` makes of model.path. Raises ModelError or HubError, in one line, where it cannot be had."""
    path = location(model)
    local = Path(path).is_dir()
    if not local and (Path(path).exists() or path.startswith(("/", ".", "~")) or path.count("/") > 1):
        raise ModelError(f"model.path={model.path}: there is no such folder (from {Path.cwd()})")
    if found := models_in(Path(path)):
        raise ModelError(f"model.path={model.path} is a folder with models in it: model.path={' or '.join(found)}")
    if not local:
        hub.require(path, "model.path", model.revision)
    options |= {"revision": model.revision, "trust_remote_code": model.trust_remote_code}
    try:
        with undamaged(model.path):
            return load(path, **options)
    except UserError:
        raise
    except (OSError, ValueError, TypeError, ImportError) as error:
        if not local and isinstance(error, OSError):
            raise ModelError(hub.why(error, path, "model.path", model.revision)) from None
        said = str(error).strip().replace("`trust_remote_code=True`", "model.trust_remote_code=true")
        raise ModelError(f"model.path={model.path}: {next(iter(said.splitlines()), type(error).__name__)}") from error


def quiet() -> None:
    """One line a decision instead of a wall: the libraries speak up for errors, preftune for the rest."""
    if not main_process():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - until the process ends; errors are still shown
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=UserWarning, module=r"(torch|transformers|peft|trl|accelerate)\b")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    for name in ("trl", "accelerate", "peft", "httpx", "huggingface_hub"):
        logging.getLogger(name).setLevel(logging.ERROR)
