"""A run's result as one whole model: its adapter merged into the weights that it was trained over, and a card."""

import shutil
import tempfile
from pathlib import Path

import torch
from omegaconf import OmegaConf

from preftune.config.errors import UserError, advice
from preftune.evaluate.subjects import Subject, find, on_device, use_cpu, weights
from preftune.models import hub
from preftune.models.adapters import with_adapter
from preftune.models.load import load_model, quiet
from preftune.models.tokenizer import carry, token_ids
from preftune.report import model_card

BASES = ("trained", "original")
DTYPES = ("float32", "bfloat16", "float16")
PROBE = [
    {"role": "user", "content": "How do I keep bread fresh for a week?"},
    {"role": "assistant", "content": "Slice it, freeze it, and toast what you eat."},
]


class ExportError(UserError):
    """Why a run cannot be exported there, and how to go on."""


def export(run: str, output: str, dtype: str | None, base: str, push: str | None = None, private: bool = True) -> str:
    """Save the model of `run` (what subjects.find takes) in the new folder `output`; returns what was done, in words.

    `dtype` of the saved weights, null: as the run loaded them. `base`: "trained" merges a QLoRA adapter into the 4-bit
    weights that it was trained over, dequantized: an adapter makes up for what rounding did to these, so that over the
    full-precision ones ("original") the logits are others. The folder is written beside its place under a temporary
    name and moved into it, and nothing is overwritten; `push` uploads it to the hub as well.
    Raises ExportError, SubjectError and ModelError.
    """
    quiet()
    subject, target = find(run), Path(output).expanduser()
    if base not in BASES or dtype not in (None, *DTYPES):
        raise ExportError(f"base={base}: one of {', '.join(BASES)}; dtype={dtype}: null, or one of {', '.join(DTYPES)}")
    if target.exists():
        raise ExportError(f"output={output} exists, and nothing is overwritten: name a new folder")
    tokenizer = subject.tokenizer()
    ids = torch.tensor([token_ids(tokenizer, PROBE)])
    before = log_probs(weights(subject), ids)
    model = merged(subject, base)
    difference = (log_probs(model, ids) - before).abs().max().item()
    model.to(getattr(torch, dtype or subject.start.dtype))
    carry(tokenizer, model)
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        model.save_pretrained(scratch)
        tokenizer.save_pretrained(scratch)
        with advice("model card"):
            card = model_card.text(subject, target.name, base, difference)
            (scratch / "README.md").write_text(card, encoding="utf-8")
        for path in scratch.iterdir():  # mkdtemp's folders and safetensors' files are their owner's alone
            path.chmod(0o644)
        scratch.chmod(0o755)
        if target.exists():
            raise ExportError(f"output={output} was made meanwhile, and nothing is overwritten: name a new folder")
        scratch.rename(target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    told = f"\npushed: {hub.push(str(target), push, private)}" if push else ""
    return (
        f"{target}: {model.num_parameters() / 1e6:,.1f}M parameters in {dtype or subject.start.dtype}\n"
        f"log-probs before and after differ by {difference:.1e} nats at most (a dialogue of {ids.size(1)} tokens){told}"
    )


def merged(subject: Subject, base: str) -> torch.nn.Module:
    """The subject as a plain whole model, its adapter added to its base; `base` as in `export`."""
    if not subject.adapter:
        return weights(subject)
    lora = subject.lora if base == "trained" else OmegaConf.create({})
    start = load_model(subject.base, lora, use_cpu=use_cpu())
    return on_device(with_adapter(start, subject.weights))


@torch.no_grad()
def log_probs(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """Log-probs of every next token of `ids` (1, length), in float32: (length, vocabulary)."""
    return model(input_ids=ids.to(model.device), use_cache=False).logits[0].float().log_softmax(-1).cpu()
