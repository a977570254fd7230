"""Model and tokenizer of a run: loaded, quantized and checked, with a chat template, an EOS and a padding token."""

import os
import tempfile
from pathlib import Path

import torch
import xxhash
from huggingface_hub import HfApi
from omegaconf import DictConfig, OmegaConf
from peft import PeftConfig, PeftModel
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from preftune import embedded
from preftune.errors import UserError

PLAIN_TEMPLATE = Path(__file__).with_name("plain_chat.jinja")
PROBE = [{"role": "user", "content": "question"}, {"role": "assistant", "content": "answer"}]


class ModelError(UserError):
    """What is wrong with the model that a config names, and how to go on."""


def location(model: DictConfig) -> str:
    """The folder or hub id that transformers loads: embedded models become the folder that they are cached in."""
    return str(embedded.folder(model.path)) if model.path.startswith(embedded.SCHEME) else model.path


def load_tokenizer(model: DictConfig) -> PreTrainedTokenizerBase:
    """The tokenizer, sure to have a chat template that closes answers with EOS, and a padding token.

    Raises ModelError where the model cannot be had, or where its template never writes its EOS token: a model trained
    on such rows would not learn to stop.
    """
    tokenizer = _from_pretrained(AutoTokenizer, model)
    for name in ("eos_token", "pad_token"):
        if model[name] is not None:
            if model[name] not in tokenizer.get_vocab():
                raise ModelError(f"model.{name}={model[name]}: no such token in the vocabulary of {model.path}")
            setattr(tokenizer, name, model[name])
    if tokenizer.eos_token is None:
        raise ModelError(f"{model.path} names no EOS token; say which token ends an answer: model.eos_token=…")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token  # masked out of attention and loss, so its identity is harmless
    if model.chat_template is not None:
        tokenizer.chat_template = Path(model.chat_template).read_text(encoding="utf-8")
    elif tokenizer.chat_template is None:
        tokenizer.chat_template = PLAIN_TEMPLATE.read_text(encoding="utf-8")
    rendered = tokenizer.apply_chat_template(PROBE, tokenize=False)
    if tokenizer.eos_token not in rendered[rendered.rindex("answer") :]:
        raise ModelError(
            f"the chat template of {model.path} never writes its EOS token {tokenizer.eos_token!r} after an answer, so "
            f"the model would never learn to stop. It writes {rendered!r}. Name the token that it closes with "
            "(model.eos_token=…) or another template (model.chat_template=FILE)"
        )
    return tokenizer


def require_whole(model: DictConfig) -> None:
    """Raise ModelError where model.path is an adapter instead of a whole model."""
    if (Path(location(model)) / "adapter_config.json").exists():
        raise ModelError(
            f"model.path={model.path} is an adapter, not a whole model. Merge it first, so that the policy and its "
            f"reference start from the same weights: python -m recipes.export run={model.path} output=merged, then "
            f"model.path=merged. Or let a pipeline do so: python -m recipes.sft_dpo pipeline=from_adapter "
            f"pipeline.adapter={model.path}"
        )


def load_model(model: DictConfig, lora: DictConfig, use_cpu: bool) -> PreTrainedModel:
    """The model in `model.dtype`, or in 4 or 8 bits where `lora.quantization` says so; not yet wrapped by PEFT.

    Raises ModelError where the model cannot be had, or is an adapter instead of a whole model.
    """
    require_whole(model)
    options = {"dtype": getattr(torch, model.dtype), "attn_implementation": model.attn_implementation}
    if "quantization" in lora:
        options["quantization_config"] = BitsAndBytesConfig(**OmegaConf.to_container(lora.quantization, resolve=True))
        options["device_map"] = {"": "cpu" if use_cpu else torch.cuda.current_device()}
    loaded = _from_pretrained(AutoModelForCausalLM, model, **options)
    for module in loaded.modules():
        # On a CPU with AVX-512-BF16, bitsandbytes repacks 4-bit weights at the first forward without gradients, for
        # good, and the layer then passes no gradient to its input, silently: adapters below it would never learn.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return loaded


def merge(adapter: str | Path, target: str | Path, dtype: str = "float32", quantization: dict | None = None) -> None:
    """Add a PEFT adapter's update to its base model's weights, in `dtype`, and save the whole model with its tokenizer.

    `quantization`: the keywords of BitsAndBytesConfig that the adapter was trained over, so that it is added to what it
    has seen (`with_adapter`); without them it is added to the full-precision weights.
    """
    options = {"dtype": getattr(torch, dtype)}
    if quantization:
        options["quantization_config"] = BitsAndBytesConfig(**quantization)
        options["device_map"] = {"": torch.cuda.current_device() if torch.cuda.is_available() else "cpu"}
    base = PeftConfig.from_pretrained(str(adapter)).base_model_name_or_path
    merged = with_adapter(AutoModelForCausalLM.from_pretrained(base, **options), adapter)
    scratch = Path(tempfile.mkdtemp(prefix=".merge-", dir=Path(target).parent))
    merged.save_pretrained(scratch)
    AutoTokenizer.from_pretrained(adapter).save_pretrained(scratch)
    os.replace(scratch, target)


def with_adapter(base: PreTrainedModel, adapter: str | Path) -> PreTrainedModel:
    """`base` as a plain whole model with the adapter's update added to its weights.

    A quantized base is dequantized first: merged into 4-bit weights, the sum would be rounded to 4 bits once more; and
    the adapter makes up for what rounding did to these weights, so that over the full-precision ones it is too much.
    """
    if getattr(base, "is_quantized", False):
        base = base.dequantize(base.dtype)
    return PeftModel.from_pretrained(base, str(adapter)).merge_and_unload()


def describe(model: PreTrainedModel) -> str:
    """One line on what is trained: all parameters, and how many of them move."""
    total = model.num_parameters() if hasattr(model, "num_parameters") else sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return f"{total / 1e6:,.1f}M parameters, {trained / 1e6:,.2f}M of them trained ({trained / total:.1%})"


def fingerprint(model: torch.nn.Module) -> str:
    """A hash of all weights, names and dtypes: the identity of a model, wherever it came from."""
    return weights_digest(model.state_dict()).hexdigest()


def weights_digest(state: dict[str, torch.Tensor]) -> xxhash.xxh3_128:
    """The hash so far of these tensors, bit for bit, with their names, dtypes and shapes, in the order of the names."""
    digest = xxhash.xxh3_128()
    for name, tensor in sorted(state.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().reshape(-1).contiguous().view(torch.uint8).cpu().numpy())
    return digest


def _from_pretrained(auto: type, model: DictConfig, **options):
    path = location(model)
    try:
        offline = not Path(path).exists() and not _on_hub(path)
        return auto.from_pretrained(
            path,
            revision=model.revision,
            trust_remote_code=model.trust_remote_code,
            local_files_only=offline,
            **options,
        )
    except OSError as error:
        raise ModelError(
            f"model.path={model.path}: not a folder here, not in the local hub cache, and the hub does not give it "
            f"({type(error.__cause__ or error).__name__}). Where there is a network: `hf download {model.path} "
            "--local-dir FOLDER`, then `model=path model.path=FOLDER`. Or use the embedded model=smollm2"
        ) from None


def _on_hub(path: str) -> bool:
    """Whether the hub answers for this model: asked once, where transformers would try for 40 seconds."""
    try:
        return bool(HfApi().model_info(path, timeout=10))
    except (
        Exception
    ):  # no network, no such model, no access: in the words of whichever HTTP library the client stands on
        return False
