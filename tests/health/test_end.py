"""End-of-run proofs: each stands with its number where it holds, and a planted fault of each kind is found."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback

from preftune.config.errors import Stopped
from preftune.runs import training
from preftune.runs.training import fit

WEIGHTS = {"trained_weights_moved", "saved_equals_memory"}
FROZEN = {"frozen_weights_stayed"}
STARTS = {"trained_parameters", "gradients_arrive", "answers_alone_are_scored"}
AS_REFERENCE = {"policy_is_reference", "loss_at_start"}
ONLINE = "loss.precompute_ref_log_probs=false"


@pytest.fixture
def run(composed):
    def start(*overrides, recipe="dpo"):
        cfg = composed(recipe, "gate.max_perplexity=1000", "train.max_steps=2", "samples=1", *overrides)
        summary = training.stage(cfg, {})
        return {each["name"]: each for each in summary["proofs"]}, summary

    return start


@pytest.mark.parametrize(
    ("recipe", "overrides", "proved"),
    [
        ("dpo", [], WEIGHTS | FROZEN | STARTS | AS_REFERENCE),
        ("dpo", [ONLINE], WEIGHTS | FROZEN | STARTS | AS_REFERENCE | {"reference_stayed"}),
        ("dpo", [ONLINE, "lora=none"], WEIGHTS | STARTS | AS_REFERENCE | {"reference_stayed"}),
        ("dpo", ["lora=qlora"], WEIGHTS | FROZEN | STARTS | AS_REFERENCE),
        ("kto", [ONLINE], WEIGHTS | FROZEN | STARTS | AS_REFERENCE | {"reference_stayed"}),
        ("orpo", ["lora=none"], WEIGHTS | STARTS),
        ("sft", [], WEIGHTS | FROZEN | STARTS),
    ],
)
def test_a_healthy_run_states_each_proof(run, recipe, overrides, proved):
    found, summary = run(*overrides, recipe=recipe)
    assert found.keys() == proved
    assert summary["findings"] == 0


def test_the_best_model_may_be_that_of_a_step_without_a_learning_rate(run):
    """Warm-up begins at 0: where all that follows is worse, nothing has moved in the end, and that is no fault."""
    steps = ["train.eval_strategy=steps", "train.eval_steps=1", "train.save_strategy=steps", "train.save_steps=1"]
    worse = ["train.learning_rate=3.0", "train.max_steps=3", "+train.load_best_model_at_end=true"]
    found, summary = run("lora=none", *steps, *worse, recipe="sft")
    assert "saved_equals_memory" in found and summary["findings"] == 0
    start, end = summary["snapshots"]
    assert end["perplexity"] == pytest.approx(start["perplexity"], rel=1e-5)  # of what was saved, not of the last step


@pytest.fixture
def stopped_by(composed, monkeypatch, tmp_path):
    """The codes of the findings of a run whose training `spoil` has had its hand in."""

    def start(spoil, *overrides, before=False):
        train = fit

        def spoiled(trainer, checkpoint):
            if before:
                spoil(trainer)
            train(trainer, checkpoint)
            if not before:
                spoil(trainer)

        monkeypatch.setattr(training, "fit", spoiled)
        cfg = composed("dpo", "gate.max_perplexity=1000", "train.max_steps=2", "samples=1", *overrides)
        with pytest.raises(Stopped):
            training.stage(cfg, {})
        found = json.loads((tmp_path / "run" / "findings.json").read_text())
        return [each["code"] for each in found], tmp_path / "run"

    return start


class Average(TrainerCallback):
    """Writes into weights that nobody trains, as an average of weights over time would."""

    def on_step_end(self, args, state, control, model=None, **kwargs):
        for name, each in model.named_parameters():
            if "base_layer" in name:
                each.data += 0.01


def test_a_callback_that_moves_the_base_is_found_with_the_reference_that_it_drags_along(stopped_by):
    codes, run = stopped_by(lambda trainer: trainer.add_callback(Average()), ONLINE, before=True)
    assert codes == ["end_frozen_moved", "end_reference_moved"]
    assert (run / "model" / "adapter_model.safetensors").exists()  # nothing that was computed is lost
    assert json.loads((run / "status.json").read_text())["state"] == "stopped"


def test_a_reference_model_that_moves_is_found(stopped_by):
    def move(trainer):
        next(trainer.ref_model.parameters()).data += 0.1

    codes, _ = stopped_by(move, ONLINE, "lora=none")
    assert codes == ["end_reference_moved"]


def test_steps_too_small_for_the_weights_are_found(stopped_by):
    class Undo(TrainerCallback):
        """What rounding does to a step that is too small for its weight's precision."""

        def on_train_begin(self, args, state, control, model=None, **kwargs):
            self.kept = [each.detach().clone() for each in model.parameters()]

        def on_step_end(self, args, state, control, model=None, **kwargs):
            for each, before in zip(model.parameters(), self.kept, strict=True):
                each.data.copy_(before)

    codes, _ = stopped_by(lambda trainer: trainer.add_callback(Undo()), "lora=none", before=True)
    assert codes == ["end_nothing_moved"]


def test_a_file_that_is_not_the_model_is_found(composed, monkeypatch, stopped_by):
    save = training.save

    def damaged(trainer, folder):
        save(trainer, folder)
        path = f"{folder}/adapter_model.safetensors"
        tensors = load_file(path)
        name = sorted(tensors)[0]
        save_file(tensors | {name: tensors[name] + torch.ones(())}, path)

    monkeypatch.setattr(training, "save", damaged)
    codes, _ = stopped_by(lambda trainer: None)
    assert codes == ["end_saved_differs"]


def test_a_run_without_a_learning_rate_has_nothing_to_prove_about_it(run):
    found, _ = run("train.learning_rate=0")
    assert "trained_weights_moved" not in found
