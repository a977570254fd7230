"""End-of-run proofs: what was trained has moved and nothing else, the reference has not, what was saved is the model.

Step 0 cannot see these: a callback that moves frozen weights drags an "adapter off" reference with it from step 1 on.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import torch
from accelerate.utils import gather_object
from datasets import Dataset
from peft import PeftModel, get_peft_model_state_dict
from safetensors import safe_open
from transformers import Trainer, TrainerCallback
from transformers.core_model_loading import revert_weight_conversion
from trl.trainer.utils import use_adapter

from preftune.config.errors import advice
from preftune.config.processes import main_process
from preftune.evaluate.kept import Scorer
from preftune.evaluate.pairs import PairScores
from preftune.health.findings import Finding, Findings, Proof
from preftune.health.start import rounding
from preftune.models import sharding
from preftune.models.identity import weights_digest

PAIRS = 8  # held-out pairs of which the reference's log-probs are compared


class EndProofs(TrainerCallback):
    """Keeps hashes of the weights and the reference's log-probs from before the first step, and compares at the end."""

    def __init__(self, trainer: Trainer, findings: Findings, pairs: Dataset | None):
        self.trainer, self.findings, self.pairs = trainer, findings, pairs
        self.weights: dict[str, str] = {}  # a hash of each parameter before the first step
        self.trained: set[str] = set()
        self.moves_from: int | None = None  # the first step with a learning rate
        self.failed: Finding | None = None
        self.start = self._reference()

    def on_train_begin(self, args, state, control, **kwargs):
        with advice("end-of-run proof of the weights"):
            self.trained = {name for name, each in self.trainer.model.named_parameters() if each.requires_grad}
            self.weights = hashes(self.trainer.model)

    def on_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        rates = [float(group["lr"]) for group in getattr(optimizer, "param_groups", [])]
        if self.moves_from is None and max(rates, default=0.0) > 0:
            self.moves_from = state.global_step + 1

    def on_train_end(self, args, state, control, **kwargs):
        with advice("end-of-run proof of the weights"):
            now = hashes(self.trainer.model) if self.weights else {}
            moved = {name for name, value in now.items() if value != self.weights[name]}
            began = self.moves_from
            back = args.load_best_model_at_end and (state.best_global_step or 0) < (began or 0)  # none after was better
            if now and began is not None and not back:
                self._judge(trained_moved(moved & self.trained, self.trained, state.global_step))
            if frozen := now.keys() - self.trained:
                self._judge(frozen_stayed(moved - self.trained, frozen, state.global_step))

    def after_saving(self, folder: Path) -> None:
        """Compare what stands in `folder` with the model in memory, and the reference with the start's."""
        step = self.trainer.state.global_step
        with advice("end-of-run proof of what was saved"):
            for found in gather_object(list(saved_equals(self.trainer.model, folder, step))):
                self._judge(found)
        if self.start is not None and (end := self._reference()) is not None:
            self._judge(reference_stayed(self.start, end, rounding(self.trainer), step))

    def _judge(self, found: Finding | Proof) -> None:
        """Keep a proof or a finding; the run ends with the first finding, once all that it made is on disk."""
        if isinstance(found, Proof):
            self.findings.prove(found)
        else:
            self.findings.add(found)
            self.failed = self.failed or found

    def _reference(self) -> PairScores | None:
        """The reference's scores of a few held-out pairs; None where it is fixed beforehand, or is none, or moves."""
        with advice("end-of-run proof of the reference"):
            trainer = self.trainer
            none = not hasattr(trainer, "ref_model") or getattr(trainer, "beta", None) == 0
            fixed = getattr(trainer, "precompute_ref_logps", False)
            if self.pairs is None or none or fixed or getattr(trainer.args, "sync_ref_model", False):
                return None
            own = trainer.ref_model is None  # the policy, as TRL's trainers turn it into the reference
            model = trainer.accelerator.unwrap_model(trainer.model if own else trainer.ref_model)
            off = use_adapter(model, "ref" if "ref" in model.peft_config else None) if own else contextlib.nullcontext()
            with sharding.whole(model), off:
                rows = self.pairs.select(range(min(PAIRS, len(self.pairs))))
                length = getattr(trainer.args, "max_length", None)  # trainers that sample have none
                fused = own and hasattr(trainer, "_metrics")  # TRL's online DPO fuses no head
                tokenizer, bf16, lend = trainer.processing_class, bool(trainer.args.bf16), "none" if fused else "head"
                return Scorer(tokenizer, length, bf16, lend, keeps=False).score(model, rows)


def hashes(model: torch.nn.Module) -> dict[str, str]:
    """{parameter: hash of its dtype, shape and bytes}."""
    names = {name for name, _ in model.named_parameters()}
    with sharding.whole(model):
        # by the state dict, in which bitsandbytes brings back weights that it has laid out anew for this CPU
        state = {name: tensor for name, tensor in model.state_dict().items() if name in names}
        return {name: weights_digest({name: tensor}).hexdigest() for name, tensor in sorted(state.items())}


def trained_moved(moved: set[str], trained: set[str], step: int) -> Finding | Proof:
    value = f"{len(moved)} of {len(trained)} tensors"
    if moved:
        return Proof("trained_weights_moved", value, "> 0", "Weights that are trained differ from those of the start.")
    meaning = "No weight that is trained has moved: the run has changed nothing."
    remedy = (
        "Raise train.learning_rate. In bfloat16 weights small steps round to nothing: then model.dtype=float32 or "
        "lora=lora. Drawn answers that are all rewarded alike teach nothing either: loss.rewards."
    )
    return Finding("end_nothing_moved", step, value, "> 0", meaning, remedy)


def frozen_stayed(moved: set[str], frozen: set[str], step: int) -> Finding | Proof:
    if not moved:
        count = f"{len(frozen)} of {len(frozen)} tensors"
        return Proof("frozen_weights_stayed", count, "all", "No other weight moved.")
    meaning = (
        "Weights that were frozen have moved. A reference with the adapter off has moved with them, and the saved "
        "adapter belongs to a base that no longer exists."
    )
    remedy = "Leave out what writes into them (a callback, an average of weights), or train in full: lora=none."
    value = f"{len(moved)} of {len(frozen)} tensors, first {min(moved)}"
    return Finding("end_frozen_moved", step, value, "0", meaning, remedy)


def reference_stayed(start: PairScores, end: PairScores, allowed: float, step: int) -> Finding | Proof:
    chosen = (end.chosen - start.chosen) / start.chosen_tokens
    rejected = (end.rejected - start.rejected) / start.rejected_tokens
    value = torch.cat([chosen, rejected]).abs().max().item()
    if value <= allowed:
        meaning = f"Largest change of the reference's log-prob per token in {2 * len(start.chosen)} held-out answers."
        return Proof("reference_stayed", value, f"at most {allowed:.1e}", meaning)
    meaning = (
        "The reference gives other log-probs (per token of a held-out answer) than before the first step: the rewards "
        "were measured against a model that moved."
    )
    remedy = "loss.precompute_ref_log_probs=true computes them before the first step."
    return Finding("end_reference_moved", step, value, allowed, meaning, remedy)


def saved_tensors(folder: Path) -> dict[str, Path]:
    """The tensors in the safetensors files of a folder, each with its file."""
    place = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            place |= dict.fromkeys(file.keys(), path)
    return place


def differs(path: Path, name: str, tensor: torch.Tensor) -> bool:
    """Whether a saved tensor is another than that in memory."""
    with safe_open(path, "pt") as file:
        saved = file.get_tensor(name)
    return saved.shape != tensor.shape or not torch.equal(saved, tensor.to("cpu", saved.dtype))


def saved_equals(model: torch.nn.Module, folder: Path, step: int) -> Iterator[Finding | Proof]:
    """Whether the weights in `folder` are the model's; yields on the main process, all ranks take part.

    Raises ValueError where names in memory and on disk cannot be matched.
    """
    adapter = isinstance(model, PeftModel)
    with sharding.whole(model):
        state = get_peft_model_state_dict(model) if adapter else model.state_dict()
        state = {name: sharding.whole_tensor(tensor) for name, tensor in sorted(state.items())}
        if not main_process():
            return
        saved = saved_tensors(folder)
        if not adapter and not saved.keys() <= state.keys():  # the hub's form: experts apart, other names
            state = revert_weight_conversion(model, state)
        tied = getattr(model, "all_tied_weights_keys", {})
        if apart := (saved.keys() ^ state.keys()) - tied.keys():
            raise ValueError(f"{len(apart)} names differ between memory and disk, first {min(apart)}")
        differ = [name for name, path in saved.items() if differs(path, name, state[name])]
    files = len(set(saved.values()))
    all_of = f"of {len(saved)} tensors in {files} file{'s' * (files > 1)}"
    if not differ:
        yield Proof("saved_equals_memory", f"{len(saved)} {all_of}", "all", "The saved weights are the model's.")
        return
    checkpoint = f"{folder.parent}/checkpoint-{step}"
    remedy = f"Check the disk, and take the last checkpoint: python -m recipes.export run={checkpoint} output=EXPORTED"
    meaning = f"What was saved in {folder} is not the model that was trained."
    yield Finding("end_saved_differs", step, f"{len(differ)} {all_of}, first {min(differ)}", "0", meaning, remedy)
