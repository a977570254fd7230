"""A run's result for those who serve it: one whole model, its adapter, a Modelfile; checked to answer as it did."""

import json
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from omegaconf import OmegaConf

from preftune.config.errors import UserError, advice
from preftune.evaluate.agreement import EXACT, HALF, Answers, Limit, answers, asked
from preftune.evaluate.subjects import ADAPTER, Subject, base_model, find, on_device, use_cpu, weights
from preftune.models import adapters, load
from preftune.models.tokenizer import PROBE, carry, stop_tokens, token_ids
from preftune.report import model_card

BASES = ("trained", "original")
DTYPES = ("float32", "bfloat16", "float16")
FORMS = ("merged", "adapter", "ollama")
FOR_VLLM = {"use_dora": False, "modules_to_save": None, "bias": "none", "peft_type": "LORA"}  # it serves nothing else

WHY_NO_TEMPLATE = """# No TEMPLATE: Ollama's are written in Go, and it chooses one of its own where it knows the family
# of the Jinja template in tokenizer_config.json or GGUF. Where `ollama show --template` prints {{ .Prompt }} alone, it
# knew none, and one has to be written here."""


class ExportError(UserError):
    """Why a run cannot be exported there, and how to go on."""


def export(run: str, output: str, dtype: str | None, base: str, to: Sequence[str] = ("merged",)) -> str:
    """Save the model of `run` (what subjects.find takes) in the new folder `output`; returns what was done, in words.

    `to`: "merged" is the whole model, "ollama" the same with a Modelfile, "adapter" the adapter in `output`/adapter.
    `dtype` of the saved weights, null: as the run loaded them. `base`: "trained" merges a QLoRA adapter into the 4-bit
    weights that it was trained over, dequantized: an adapter makes up for what rounding did to these, so that over the
    full-precision ones ("original") the logits are others. Nothing is overwritten.
    Raises ExportError, also where what was saved answers otherwise than the run, SubjectError and ModelError.
    """
    load.quiet()
    subject, target, to = find(run), Path(output).expanduser(), [to] if isinstance(to, str) else list(to)
    require(subject, target, to, dtype, base)
    if subject.scores_texts:
        return export_reward_model(subject, target, dtype)
    check = Check(subject)
    check.ask("trained", weights(subject), subject.tokenizer(), None)
    said = []
    with new_folder(target) as folder:
        if "adapter" in to:
            said.append(save_adapter(subject, folder / "adapter", check))
        if {"merged", "ollama"} & set(to):
            said.append(save_merged(subject, folder, dtype or subject.start.dtype, base, check))
        if "ollama" in to:
            said.append(modelfile(folder, target))
        with advice("model card"):
            card = model_card.text(subject, target.name, base, check.lines)
            (folder / "README.md").write_text(card, encoding="utf-8")
    return "\n".join([f"{target}: {said[0]}", *said[1:], *check.lines])


def require(subject: Subject, target: Path, to: list[str], dtype: str | None, base: str) -> None:
    """Raise ExportError where it cannot be done, before a model is loaded."""
    if base not in BASES or dtype not in (None, *DTYPES):
        raise ExportError(f"base={base}: one of {', '.join(BASES)}; dtype={dtype}: null, or one of {', '.join(DTYPES)}")
    if not to or set(to) - set(FORMS):
        raise ExportError(f"to=[{','.join(to)}]: a list of some of {', '.join(FORMS)}")
    if target.exists():
        raise ExportError(f"output={target} exists, and nothing is overwritten: name a new folder")
    if subject.scores_texts and to != ["merged"]:
        raise ExportError(f"to=[{','.join(to)}]: {subject.name} is a reward model, which is saved whole: to=[merged]")
    if "adapter" in to and not subject.adapter:
        raise ExportError(f"to=[adapter]: {subject.name} has no adapter, all its weights were trained: to=[merged]")
    if "adapter" in to and (below := adapters.base_of(load.location(subject.base), subject.base.revision)):
        raise ExportError(
            f"to=[adapter]: this adapter stands on another one, {subject.base.path} over {below[0]}, and servers take "
            "an adapter over a whole model: to=[merged]"
        )


def export_reward_model(subject: Subject, target: Path, dtype: str | None) -> str:
    """Save a reward model whole, with its tokenizer; read again it must give the reward that it gave."""
    model, tokenizer = load.load_reward_model(subject.weights)
    ids = torch.tensor([token_ids(tokenizer, PROBE)])
    with new_folder(target) as folder, torch.no_grad():
        before = model(input_ids=ids).logits.item()
        model.to(getattr(torch, dtype or subject.start.dtype)).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        after = load.load_reward_model(str(folder))[0](input_ids=ids).logits.item()
    return f"{target}: a reward model; its reward of a dialogue is {before:.5f}, and {after:.5f} read again"


class Check:
    """Whether each form of an export answers as the model that was trained; `lines` say it."""

    def __init__(self, subject: Subject):
        self.subject, self.prompts, self.lines = subject, asked(subject), []
        self.seen: dict[str, Answers] = {}

    def ask(self, name: str, model: torch.nn.Module, tokenizer: object, limit: Limit | None) -> None:
        """Note what a form says. Raises ExportError where it is further from the trained model than `limit` allows."""
        trained = self.seen.get("trained")
        with advice("check of the export"):
            self.seen[name] = answers(model, tokenizer, self.prompts, trained)
        if trained is None or name not in self.seen:
            return
        found = self.seen[name]
        if [prompt for prompt, _ in found.rows] != [prompt for prompt, _ in trained.rows]:
            raise ExportError(f"the {name} model's tokenizer writes other prompts than {self.subject.name}'s: {ASK}")
        line = f"the {name} model beside the trained one: {trained.beside(found)}"
        if limit and not trained.within(found, limit):
            raise ExportError(f"{line}, and rounding stays below {limit.nats} {limit.of}. Nothing was exported: {ASK}")
        self.lines.append(line)


ASK = "please report it with the run's config.yaml; to=[adapter] saves the adapter as it is"


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A folder that is written beside its place and moved there at the end, readable by everyone."""
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        yield scratch
        for path in [scratch, *scratch.rglob("*")]:  # mkdtemp's folders and safetensors' files are their owner's alone
            path.chmod(0o755 if path.is_dir() else 0o644)
        if target.exists():
            raise ExportError(f"output={target} was made meanwhile, and nothing is overwritten: name a new folder")
        scratch.rename(target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def save_merged(subject: Subject, folder: Path, dtype: str, base: str, check: Check) -> str:
    """Save the whole model with its tokenizer, template and generation config, and read it again."""
    tokenizer, model = subject.tokenizer(), merged(subject, base)
    quantized, full = "quantization" in subject.lora, subject.start.dtype == "float32"
    limit = EXACT if full and not quantized else HALF if base == "trained" else None
    check.ask("merged", model, tokenizer, limit)
    model.to(getattr(torch, dtype))
    carry(tokenizer, model)
    model.save_pretrained(folder)
    load.save_tokenizer(subject.start, tokenizer, folder)
    size = model.num_parameters() / 1e6
    del model
    saved = OmegaConf.merge(subject.start, {"dtype": dtype})
    again = replace(subject, weights=str(folder), adapter=False, start=saved)
    check.ask("re-loaded", weights(again), again.tokenizer(), limit and (limit if dtype == "float32" else HALF))
    return f"{size:,.1f}M parameters in {dtype}"


def merged(subject: Subject, base: str) -> torch.nn.Module:
    """The subject as a plain whole model, its adapter added to its base; `base` as in `export`."""
    if not subject.adapter:
        return weights(subject)
    lora = subject.lora if base == "trained" else OmegaConf.create({})
    return on_device(adapters.with_adapter(load.load_model(subject.base, lora, use_cpu()), subject.weights))


def save_adapter(subject: Subject, folder: Path, check: Check) -> str:
    """Save the adapter with its tokenizer, its base named by hub id or whole path, and load it over that base."""
    folder.mkdir()
    for path in Path(subject.weights).glob("adapter_*"):
        shutil.copyfile(path, folder / path.name)
    base, settings = load.location(subject.base), json.loads((folder / ADAPTER).read_text(encoding="utf-8"))
    base = str(Path(base).resolve()) if Path(base).exists() else base
    settings |= {"base_model_name_or_path": base, "revision": subject.base.revision}
    (folder / ADAPTER).write_text(json.dumps(settings, indent=2), encoding="utf-8")
    load.save_tokenizer(subject.start, subject.tokenizer(), folder)
    saved = OmegaConf.merge(subject.base, {"path": str(folder), "revision": None})
    loaded = on_device(load.load_adapter(saved, subject.lora, use_cpu()))
    check.ask("saved adapter's", loaded, load.load_tokenizer(base_model(str(folder))), HALF if subject.bf16 else EXACT)
    other = [f"{key}={settings[key]}" for key, value in FOR_VLLM.items() if settings.get(key) not in (value, None)]
    other += ["a quantized base"] if "quantization" in subject.lora else []
    told = f"; vLLM does not serve {', '.join(other)} as it was trained: serve the merged model" if other else ""
    return f"adapter over {base}{told}"


def modelfile(folder: Path, target: Path) -> str:
    """Write Ollama's Modelfile; returns how to make a GGUF of the folder."""
    tokenizer = load.load_tokenizer(base_model(str(folder)))
    stops = [tokenizer.decode([token]) for token in stop_tokens(tokenizer)]
    lines = [WHY_NO_TEMPLATE, "FROM .", *(f"PARAMETER stop {json.dumps(stop)}" for stop in stops)]
    (folder / "Modelfile").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return (
        f"Ollama: ollama create {target.name} -f {target}/Modelfile; as GGUF, for architectures that it does not read: "
        f"python llama.cpp/convert_hf_to_gguf.py {target} --outfile {target}.gguf, and FROM that file"
    )
