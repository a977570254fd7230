"""Step-0 invariants: a healthy start passes for every loss, and planted faults stop before a weight moves."""

import json
from pathlib import Path

import pytest
import torch

from preftune.config.errors import Stopped
from preftune.health.findings import Findings, Proof
from preftune.health.start import check_reference
from preftune.runs.training import build_trainer

LOSSES = sorted(path.stem for path in (Path(__file__).parents[2] / "conf" / "loss").glob("*.yaml"))
RECIPES = {"kto": "kto", "orpo": "orpo", "sft": "sft"}


@pytest.fixture
def trainer_of(composed, tmp_path):
    def build(*overrides, recipe="dpo"):
        trainer = build_trainer(composed(recipe, "train.eval_strategy=no", "train.save_strategy=no", *overrides))
        trainer.findings = Findings(tmp_path)
        return trainer

    return build


def stops(trainer) -> str:
    """The code of the finding that stops this trainer, all weights as they were."""
    before = {name: each.detach().clone() for name, each in trainer.model.named_parameters()}
    with pytest.raises(Stopped):
        trainer.train()
    for name, each in trainer.model.named_parameters():
        assert torch.equal(each.nan_to_num(), before[name].nan_to_num()), name
    return json.loads(trainer.findings.path.read_text())[-1]["code"]


@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss_starts_at_its_constant(trainer_of, loss):
    full = ["lora=none"] if loss == "tr_dpo" else []
    trainer = trainer_of(f"loss={loss}", "train.max_steps=1", *full, recipe=RECIPES.get(loss, "dpo"))
    trainer.train()
    assert trainer.findings.rows() == []


@pytest.mark.parametrize(
    "how", ["lora=none", "lora=dora", "lora=qlora", "hardware.bf16=true", "loss.precompute_ref_log_probs=false"]
)
def test_every_way_of_training_starts_healthy(trainer_of, how):
    trainer = trainer_of(how, "train.max_steps=1")
    trainer.train()
    assert trainer.findings.rows() == []


def test_another_model_as_reference_stops(trainer_of):
    trainer = trainer_of()
    rows = trainer.train_dataset
    shifted = [value - 3.0 for value in rows["ref_chosen_logps"]]
    trainer.train_dataset = rows.remove_columns("ref_chosen_logps").add_column("ref_chosen_logps", shifted)
    assert stops(trainer) == "step0_reference"


def test_what_bf16_rounds_in_short_answers_is_no_other_model(trainer_of):
    """Log-ratios of one model beside itself, SmolLM2 in bf16; its last row was once over the bound for a single row."""
    trainer = trainer_of("hardware.bf16=true")
    ratios = [
        0.0039,
        0.0105,
        -0.0125,
        0.0,
        0.0073,
        -0.0517,
        0.019,
        -0.0047,
        -0.0073,
        0.0037,
        0.0044,
        0.0199,
        0.04,
        0.0615,
    ]
    trainer.logratios_per_token = torch.tensor(ratios)
    trainer.scored_tokens = torch.tensor([20, 18, 9, 17, 11, 11, 8, 8, 11, 8, 16, 11, 10, 8])
    [found] = check_reference(trainer)
    assert isinstance(found, Proof)
    trainer.logratios_per_token[0] = 0.4  # one answer of another model
    [found] = check_reference(trainer)
    assert found.code == "step0_reference"


def test_an_adapter_that_does_not_begin_at_zero_stops(trainer_of):
    assert stops(trainer_of("+lora.init_lora_weights=false")) == "step0_reference"


def test_a_loss_that_is_not_its_constant_stops(trainer_of):
    trainer = trainer_of("loss=hinge")
    trainer.args.loss_type = ["sigmoid"]  # what the run believes; the trainer computes the hinge loss
    assert stops(trainer) == "step0_loss"


@pytest.mark.parametrize("move", [-2, 2])
def test_a_mask_that_is_off_by_some_tokens_stops(trainer_of, move):
    trainer = trainer_of()
    collate = trainer.data_collator

    def shifted(examples):
        batch = collate(examples)
        batch["completion_mask"] = batch["completion_mask"].roll(move, dims=1)
        return batch

    trainer.data_collator = shifted
    assert stops(trainer) == "step0_mask"


def test_a_mask_over_the_prompt_stops(trainer_of):
    trainer = trainer_of()
    collate = trainer.data_collator
    trainer.data_collator = lambda examples: (batch := collate(examples)) | {"completion_mask": batch["attention_mask"]}
    assert stops(trainer) == "step0_mask"


def test_a_frozen_adapter_stops(trainer_of):
    trainer = trainer_of()
    next(each for name, each in trainer.model.named_parameters() if "lora_B" in name).requires_grad_(False)
    assert stops(trainer) == "step0_frozen"


def test_a_frozen_layer_in_full_fine_tuning_stops(trainer_of):
    trainer = trainer_of("lora=none")
    next(trainer.model.parameters()).requires_grad_(False)
    assert stops(trainer) == "step0_frozen"


def test_base_weights_that_would_move_beside_lora_stop(trainer_of):
    trainer = trainer_of()
    next(each for name, each in trainer.model.named_parameters() if "lora_" not in name).requires_grad_(True)
    assert stops(trainer) == "step0_trainable"


def test_weights_trained_in_float16_stop(trainer_of):
    trainer = trainer_of()
    for each in trainer.model.parameters():
        if each.requires_grad:
            each.data = each.data.half()
    assert stops(trainer) == "step0_float16"


def test_a_layer_that_no_gradient_reaches_stops(trainer_of):
    trainer = trainer_of()
    layer = next(module for name, module in trainer.model.named_modules() if name.endswith("layers.0"))
    layer.register_forward_hook(lambda module, given, output: output.detach())
    assert stops(trainer) == "step0_gradient"


def test_a_weight_that_is_no_number_stops(trainer_of):
    trainer = trainer_of("loss=simpo")  # no reference pass, which would refuse it too
    next(trainer.model.parameters()).data[:] = float("nan")
    assert stops(trainer) == "loss_not_finite"


def test_a_gradient_that_is_no_number_stops_before_the_step(trainer_of):
    from preftune.health.monitor import Monitor

    trainer = trainer_of("train.max_steps=4")
    trainer.add_callback(Monitor(trainer.findings, None))
    trainer._proved = True  # past the first step, where the monitor alone looks
    next(each for each in trainer.model.parameters() if each.requires_grad).register_hook(
        lambda grad: grad * float("nan")
    )
    assert stops(trainer) == "gradient_not_finite"


@pytest.mark.parametrize("noise", ["+train.neftune_noise_alpha=5", "+train.disable_dropout=false"])
@pytest.mark.parametrize("recipe", ["dpo", "kto"])
def test_noise_that_was_asked_for_is_no_fault_and_the_reference_is_measured_without_it(trainer_of, noise, recipe):
    trainer = trainer_of(noise, "lora.lora_dropout=0.5", "train.max_steps=1", recipe=recipe)
    trainer.train()
    assert trainer.findings.rows() == []
    assert {"policy_is_reference", "loss_at_start"} <= trainer.findings.proofs.keys()


def test_a_wrong_reference_is_found_under_noise_too(trainer_of):
    assert stops(trainer_of("+lora.init_lora_weights=false", "+train.neftune_noise_alpha=5")) == "step0_reference"


def test_a_compiled_model_is_judged_by_what_it_compiles(trainer_of):
    trainer = trainer_of("+train.torch_compile=true", "+train.torch_compile_backend=eager", "train.max_steps=1")
    trainer.train()
    assert trainer.findings.rows() == []
