"""The models that a user names: a run, a stage, a checkpoint, an adapter, a whole model; and their references."""

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import torch
from omegaconf import DictConfig, OmegaConf
from peft import PeftConfig, PeftModel
from transformers import PreTrainedTokenizerBase

from preftune.config.errors import UserError
from preftune.data.load import Data
from preftune.data.load import load as load_data
from preftune.models import adapters, embedded
from preftune.models.load import continued, holds_weights, load_adapter, load_model, load_tokenizer, scores_texts

ADAPTER, CONFIG, MANIFEST = "adapter_config.json", "config.yaml", "manifest.json"


class SubjectError(UserError):
    """Why a model cannot be looked at, and how to name one that can."""


@dataclass(frozen=True)
class Subject:
    """A model as it was named: `weights` is its folder or id, `run` the directory of the run that trained it.

    `start` is the `model` section of what it was trained from, or of itself where no run is known; `cfg` is the run's
    whole configuration. `adapter`: whether `weights` is an adapter over `start`.
    """

    name: str
    weights: str
    start: DictConfig
    adapter: bool
    run: Path | None = None
    cfg: DictConfig | None = None

    @property
    def lora(self) -> DictConfig:
        """The run's `lora` section where its adapter was trained over quantized weights, so that these are loaded."""
        quantized = self.adapter and self.cfg is not None and "quantization" in self.cfg.lora
        return self.cfg.lora if quantized else OmegaConf.create({})

    @property
    def base(self) -> DictConfig:
        """The `model` section that the adapter stands on: the start, or the base of an adapter that was continued."""
        if not continued(self.start):
            return self.start
        path, revision = adapters.base_of(self.start.path, self.start.revision)
        return OmegaConf.merge(self.start, {"path": path, "revision": revision})

    @property
    def beta(self) -> float | None:
        """The β that the run trained with; None where there was none."""
        given = None if self.cfg is None else OmegaConf.to_container(self.cfg.loss).get("beta")
        return given[-1] if isinstance(given, list) else given  # online DPO has one for each epoch

    @property
    def bf16(self) -> bool:
        """Whether the run computed in bfloat16, so that what is measured is what it measured."""
        return self.cfg is not None and bool(self.cfg.hardware.bf16)

    @property
    def whole(self) -> DictConfig:
        """The `model` section that loads `weights` as a whole model; the run's template lies in the saved tokenizer."""
        saved = {"path": self.weights, "revision": None, "chat_template": None, "eos_token": None, "pad_token": None}
        return self.start if self.weights == self.start.path else OmegaConf.merge(self.start, saved)

    @property
    def scores_texts(self) -> bool:
        """Whether it is a reward model."""
        return not self.weights.startswith(embedded.SCHEME) and scores_texts(self.weights) > 0

    def tokenizer(self):
        """The tokenizer that lies with the weights, or that of the start where none does."""
        lies_there = (Path(self.weights) / "tokenizer_config.json").exists()
        return load_tokenizer(self.whole if lies_there else self.start)

    def data(self, tokenizer: PreTrainedTokenizerBase | None, max_length: int | None) -> Data:
        """The data of its run, by that run's seed and view, without other held-out sets. Raises DataError."""
        settings = OmegaConf.merge(base().data, self.cfg.data, {"skipped_file": None})
        settings.eval_sets = {}
        return load_data(settings, self.cfg.loss.view, tokenizer, max_length, self.cfg.train.seed)


def find(name: str) -> Subject:
    """The model that `name` means: a run directory (of a pipeline: its last stage), a folder of weights, a hub id.

    Raises SubjectError where there is nothing of the kind, or where a run has not finished.
    """
    name = str(name)
    path = Path(name).expanduser()
    if name.startswith(embedded.SCHEME):
        return Subject(name, name, base_model(name), adapter=False)
    if (path / CONFIG).exists():
        stage = ([path] if (path / MANIFEST).exists() else stages(path) or [path])[-1]
        return of_run(name, stage, stage / "model")
    if path.is_dir() and (path.parent / CONFIG).exists() and holds_weights(path):
        return of_run(name, path.parent, path)
    if (path / ADAPTER).exists():
        base = PeftConfig.from_pretrained(str(path)).base_model_name_or_path
        return Subject(name, str(path), base_model(base), adapter=True)
    if path.is_dir() and not (path / "config.json").exists():
        told = f"neither a run ({CONFIG}), nor an adapter ({ADAPTER}), nor a model (config.json)"
        raise SubjectError(f"{name} holds {told}")
    hub_id = name.count("/") == 1 and name[0] not in "./~" and not path.parent.is_dir()
    if not path.exists() and not hub_id:
        raise SubjectError(f"there is no {name} (from {Path.cwd()}); name a run directory, a model folder or a hub id")
    return Subject(name, str(path) if path.exists() else name, base_model(name), adapter=False)


def of_run(name: str, run: Path, weights: Path) -> Subject:
    """The model in a folder of a run. Raises SubjectError where the folder holds no weights."""
    if not holds_weights(weights):
        raise SubjectError(f"{name}: {run} has no model yet; finish the run, or name one of its checkpoints")
    cfg = OmegaConf.load(run / CONFIG)
    start = OmegaConf.merge(base_model(cfg.model.path), cfg.model)
    start.path = moved_with(run, start.path)
    return Subject(name, str(weights), start, (weights / ADAPTER).exists(), run, cfg)


def stages(run: Path) -> list[Path]:
    """The training stages of a pipeline's run in the order of their beginning, without those that were replaced."""
    made = {path.parent: json.loads(path.read_text(encoding="utf-8")) for path in run.glob(f"*/{MANIFEST}")}
    return sorted((each for each in made if "-replaced-" not in each.name), key=lambda each: made[each]["created"])


def moved_with(run: Path, path: str) -> str:
    """A local model of a run, found beside the stage where the whole run was moved, or is seen from elsewhere."""
    parts = Path(path).parts
    if embedded.SCHEME in path or Path(path).exists():
        return path
    beside = [run.parent.joinpath(*parts[-depth:]) for depth in (1, 2) if len(parts) > depth]
    return next((str(each) for each in beside if holds_weights(each)), path)


def base() -> DictConfig:
    """conf/base.yaml, as it is written."""
    return OmegaConf.load(resources.files("preftune.conf") / "base.yaml")


def base_model(path: str) -> DictConfig:
    """A `model` section with base.yaml's defaults."""
    return OmegaConf.merge(base().model, {"path": str(path)})


@dataclass(frozen=True)
class Loaded:
    """A subject in memory: `model`, `tokenizer`, and `other`, its reference; None: the model with its adapter off."""

    model: torch.nn.Module
    tokenizer: object
    other: torch.nn.Module | None

    @contextlib.contextmanager
    def reference(self) -> Iterator[torch.nn.Module]:
        """The reference model, for as long as the context lasts: the policy may be switched back after it."""
        if self.other is not None:
            yield self.other
        else:
            with self.model.disable_adapter():
                yield self.model


def load(subject: Subject, reference: str | None = None) -> Loaded:
    """The subject and its reference, on the accelerator if there is one.

    The reference is what `reference` names, else what the subject was trained from: an adapter's base, after SFT in a
    pipeline the SFT result. Raises SubjectError for a whole model that no run tells of.
    """
    if reference is None and not subject.adapter and subject.run is None:
        raise SubjectError(
            f"{subject.name} is a whole model, and nothing says what it was trained from: name that, reference=PATH"
        )
    tokenizer, other = subject.tokenizer(), None
    if reference is not None:
        measure = find(reference)
        if measure.tokenizer().get_vocab() != tokenizer.get_vocab():
            raise SubjectError(f"reference={reference} has other tokens than {subject.name}: no log-probs to compare")
        other = weights(measure)
    elif continued(subject.start) and subject.adapter:
        other = on_device(load_adapter(subject.start, subject.lora, use_cpu()))
    elif not subject.adapter:
        other = on_device(load_model(subject.start, OmegaConf.create({}), use_cpu()))
    return Loaded(weights(subject), tokenizer, other)


def weights(subject: Subject) -> torch.nn.Module:
    """The subject's own weights alone, with its adapter on, in evaluation mode."""
    if not subject.adapter:
        return on_device(load_model(subject.whole, OmegaConf.create({}), use_cpu()))
    start = on_device(load_model(subject.base, subject.lora, use_cpu()))
    return PeftModel.from_pretrained(start, subject.weights).eval()


def on_device(model: torch.nn.Module) -> torch.nn.Module:
    """The model where it computes; a quantized one lies there already."""
    quantized = getattr(model, "is_quantized", False)
    return (model if quantized or use_cpu() else model.to("cuda")).eval()


def use_cpu() -> bool:
    return not torch.cuda.is_available()
