"""An adapter added to the weights of its base model."""

import os
import tempfile
from pathlib import Path

import torch
from peft import PeftConfig
from transformers import AutoTokenizer

from preftune.models.adapters import with_adapter
from preftune.models.load import in_few_bits, save_tokenizer, section, whole_model
from preftune.models.tokenizer import carry


def merge(adapter: str | Path, target: str | Path, dtype: str = "float32", quantization: dict | None = None) -> None:
    """Add a PEFT adapter's update to its base model's weights, in `dtype`, and save the whole model with its tokenizer.

    `quantization`: the keywords of BitsAndBytesConfig that the adapter was trained over, so that it is added to what it
    has seen (`with_adapter`); without them it is added to the full-precision weights.
    """
    options = {"dtype": getattr(torch, dtype)}
    if quantization:
        options |= in_few_bits(quantization, use_cpu=not torch.cuda.is_available())
    trained = PeftConfig.from_pretrained(str(adapter))
    base = whole_model(trained.base_model_name_or_path, revision=trained.revision, **options)
    merged, tokenizer = with_adapter(base, adapter), AutoTokenizer.from_pretrained(adapter)
    carry(tokenizer, merged)
    scratch = Path(tempfile.mkdtemp(prefix=".merge-", dir=Path(target).parent))
    merged.save_pretrained(scratch)
    save_tokenizer(section(trained.base_model_name_or_path, trained.revision), tokenizer, scratch)
    os.replace(scratch, target)
