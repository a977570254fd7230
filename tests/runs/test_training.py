"""train(): every choice trains, and a run directory tells what happened."""

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from preftune.config.check import ConfigError
from preftune.evaluate.snapshots import take_snapshot
from preftune.models.load import load_tokenizer
from preftune.runs.directory import RunError, changed
from preftune.runs.training import build_trainer, train
from preftune.trainers.build import SettingsError, load_data, trainer_arguments

CONF = Path(__file__).parents[2] / "conf"
LOSSES = sorted(path.stem for path in (CONF / "loss").glob("*.yaml"))


def letters(prompt, answer):
    return float(len(set(answer)))


def logged(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss_trains(composed, loss, capsys):
    given = ["lora=none"] if loss == "tr_dpo" else []
    given += [f"loss.rewards=[{__name__}.letters]"] if loss in ("rloo", "grpo", "online_dpo") else []
    cfg = composed("dpo", f"loss={loss}", "fit_check=true", *given)
    summary = train(cfg)
    assert ("plan: not available" in capsys.readouterr().err) == (cfg.loss.view == "prompts")
    steps = [row for row in logged(Path(cfg.output_dir)) if "loss" in row]
    assert [row["step"] for row in steps] == [1, 2]
    assert all(math.isfinite(row["loss"]) for row in steps)
    if loss == "reward":  # it says nothing, so no answer of it has a probability
        return
    assert summary["perplexity"] > 1
    if cfg.loss.view == "paired":
        assert {"rewards/margins", "rewards/accuracies", "logps/chosen", "logps/chosen_per_token"} <= steps[0].keys()


@pytest.mark.parametrize("lora", ["none", "dora", "qlora"])
@pytest.mark.parametrize("recipe", ["dpo", "orpo"])
def test_every_kind_of_adapter_trains(composed, lora, recipe):
    cfg = composed(recipe, f"lora={lora}", "train.learning_rate=0.01")
    train(cfg)
    run = Path(cfg.output_dir)
    assert (run / "model" / "adapter_config.json").exists() == (lora != "none")
    weights = load_file(run / "model" / ("model.safetensors" if lora == "none" else "adapter_model.safetensors"))
    if lora != "none":
        assert any(weight.abs().max() > 0 for name, weight in weights.items() if "lora_B" in name)


def test_checkpointing_changes_no_number(composed, tmp_path):
    found = []
    for given in ("false", "selective", "true"):
        run = tmp_path / given
        cfg = composed("dpo", f"hardware.gradient_checkpointing={given}", "hardware.bf16=false", f"output_dir={run}")
        trainer = build_trainer(cfg)
        layer = trainer.model.get_base_model().model.layers[0]
        trainer.train()
        kept = layer._gradient_checkpointing_func.keywords if given != "false" else {}
        assert layer.gradient_checkpointing == (given != "false") and ("context_fn" in kept) == (given == "selective")
        found.append([row for row in trainer.state.log_history if "loss" in row])
    for name in ("loss", "grad_norm", "rewards/margins", "logps/chosen"):
        none, selective, full = ([row[name] for row in rows] for rows in found)
        assert selective == pytest.approx(none, rel=1e-5) and full == pytest.approx(none, rel=1e-5)


def test_a_run_directory_says_what_made_it(composed):
    cfg = composed("dpo")
    train(cfg, {"model": "tiny", "data": "file", "loss": "dpo"})
    run = Path(cfg.output_dir)
    manifest = json.loads((run / "manifest.json").read_text())
    assert manifest["choices"]["loss"] == "dpo"
    assert manifest["seed"] == 42
    assert manifest["versions"]["trl"].startswith("1.16")
    assert len(manifest["model"]["weights"]) == 32 and manifest["data"]["fingerprint"]
    assert "adapter off" in manifest["reference"] or "beforehand" in manifest["reference"]
    assert (run / "config.yaml").exists() and (run / "checkpoint-2").exists()
    assert not [path for path in run.iterdir() if path.name.startswith(".")]


def test_before_training_margins_are_zero_and_the_loss_is_ln_2(composed):
    cfg = composed("dpo")
    train(cfg)
    rows = [row for row in logged(Path(cfg.output_dir)) if "loss" in row]
    assert rows[0]["learning_rate"] == 0  # warm-up begins so: the second step finds the weights as they were
    for row in rows[:2]:
        assert row["loss"] == pytest.approx(math.log(2), abs=1e-5)
        assert row["rewards/margins"] == pytest.approx(0, abs=1e-5)
        assert row["rewards/accuracies"] == 0.5  # ties, whichever way they are rounded


def test_the_first_steps_say_how_long_the_training_takes(composed, capsys):
    summary = train(composed("dpo", "fit_check=true", "train.max_steps=12", "train.eval_strategy=no"))
    said = capsys.readouterr().out
    assert "of training, by the first 3 steps" in said and "by its first steps)" in said
    measured = summary["measured"]
    assert measured["seconds"] / 3 < measured["seconds_by_first_steps"] < 3 * measured["seconds"]


def test_kto_logs_accuracies_and_log_probs_per_token(composed):
    cfg = composed("kto", "hardware.per_device_train_batch_size=8")
    train(cfg)
    first = logged(Path(cfg.output_dir))[0]
    assert 0 <= first["rewards/accuracies"] <= 1
    tokens = first["logps/chosen"] / first["logps/chosen_per_token"]
    assert 10 < tokens < 60
    assert first["logratios/chosen_per_token"] == pytest.approx(0, abs=1e-5)


def test_kto_weighs_the_rarer_label_up(composed, tmp_path, capsys):
    rows = [{"prompt": f"Say {i}.", "completion": f"It is {i}.", "label": i % 4 == 0} for i in range(32)]
    (tmp_path / "thumbs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    train(composed("kto", f"data.path={tmp_path / 'thumbs.jsonl'}", "data.eval_fraction=0"))
    assert "KTO weights: desirable_weight 3, undesirable_weight 1" in capsys.readouterr().out


def test_ipo_logs_its_margin_per_token_beside_its_target(composed):
    cfg = composed("dpo", "loss=ipo", "loss.beta=0.5")
    train(cfg)
    rows = [row for row in logged(Path(cfg.output_dir)) if "loss" in row]
    assert rows[0]["ipo/target"] == 1.0
    assert rows[0]["ipo/margin"] == pytest.approx(0, abs=1e-5)
    assert rows[1]["loss"] == pytest.approx((rows[1]["ipo/margin"] - 1) ** 2, rel=0.2)


def test_simpo_and_cpo_log_the_same_units_per_token(composed):
    shown = {}
    for loss in ("simpo", "cpo"):
        cfg = composed("dpo", f"loss={loss}", "train.eval_strategy=no")
        cfg.output_dir = str(Path(composed("dpo").output_dir).with_name(loss))
        train(cfg)
        shown[loss] = logged(Path(cfg.output_dir))[0]
    assert shown["simpo"]["logps/chosen_per_token"] == pytest.approx(shown["cpo"]["logps/chosen_per_token"], rel=0.1)
    assert shown["cpo"]["logps/chosen"] < 5 * shown["cpo"]["logps/chosen_per_token"] < 0


def test_groups_of_trainer_arguments_are_disjoint(composed):
    hardware = [path.stem for path in (CONF / "hardware").glob("*.yaml")]
    for choice in [f"loss={name}" for name in LOSSES] + [f"hardware={name}" for name in hardware]:
        assert trainer_arguments(composed("dpo", choice))
    with pytest.raises(ValueError, match="learning_rate"):
        cfg = composed("dpo", "+loss.learning_rate=1e-4")
        trainer_arguments(cfg)


def test_a_run_directory_is_never_overwritten(composed):
    cfg = composed("dpo")
    train(cfg)
    with pytest.raises(RunError, match="a finished run.*output_dir=ANOTHER"):
        train(cfg)
    with pytest.raises(RunError, match="nothing to resume") as refused:
        train(composed("dpo", "resume=true"))
    assert "other settings" not in str(refused.value)
    with pytest.raises(RunError, match=r"other settings \(loss\): output_dir=ANOTHER"):
        train(composed("dpo", "resume=true", "loss=ipo"))


def test_a_folder_with_other_things_in_it_is_refused(composed):
    cfg = composed("dpo")
    Path(cfg.output_dir).mkdir()
    (Path(cfg.output_dir) / "thesis.txt").write_text("do not touch")
    with pytest.raises(RunError, match="not empty"):
        train(cfg)


def test_what_failed_before_training_may_be_started_again_in_its_place(composed):
    with pytest.raises(ValueError, match="not a folder or file here"):
        train(composed("dpo", "model=path", "model.path=nobody/nothing"))
    assert train(composed("dpo"))["snapshots"]


def test_a_resumed_run_equals_the_unbroken_one(composed, tmp_path):
    whole = composed("dpo", "train.max_steps=6", "train.save_steps=3", "train.eval_strategy=no")
    train(whole)
    broken = composed("dpo", "train.max_steps=6", "train.save_steps=3", "train.eval_strategy=no")
    broken.output_dir = str(tmp_path / "broken")
    train(broken)
    run = Path(broken.output_dir)
    (run / "summary.json").unlink()  # as if killed between steps 3 and 6
    for path in sorted((run / "checkpoint-6").iterdir()):
        path.unlink()
    (run / "checkpoint-6").rmdir()
    broken.resume = True
    train(broken)
    unbroken = {row["step"]: row["loss"] for row in logged(Path(whole.output_dir)) if "loss" in row}
    resumed = {row["step"]: row["loss"] for row in logged(run) if "loss" in row}
    assert sorted(resumed) == [1, 2, 3, 4, 5, 6]
    assert resumed == pytest.approx(unbroken, abs=1e-6)


def test_a_run_is_not_resumed_as_another(composed):
    cfg = composed("dpo")
    train(cfg)
    (Path(cfg.output_dir) / "summary.json").unlink()
    with pytest.raises(RunError, match="loss differ"):
        train(composed("dpo", "resume=true", "loss.beta=0.5"))
    assert not changed(composed("dpo", "resume=true", "fit_check=true"), Path(cfg.output_dir))  # no part of the result


def test_a_config_that_cannot_work_stops_before_anything_is_written(composed):
    cfg = composed("dpo", "+loss.betta=1")
    with pytest.raises(ConfigError, match="loss.beta"):
        train(cfg)
    assert not Path(cfg.output_dir).exists()


def test_full_fine_tuning_moves_every_weight_and_lora_only_its_own(composed):
    full = build_trainer(composed("dpo", "lora=none"))
    assert all(parameter.requires_grad for parameter in full.model.parameters())
    lora = build_trainer(composed("dpo"))
    moving = {name for name, parameter in lora.model.named_parameters() if parameter.requires_grad}
    assert moving and all("lora_" in name for name in moving)
    assert all(parameter.dtype == torch.float32 for parameter in lora.model.parameters())


def test_an_online_reference_is_a_copy_of_the_very_model_that_is_trained(composed):
    trainer = build_trainer(composed("dpo", "lora=none", "loss.precompute_ref_log_probs=false"))
    assert trainer.ref_model is not trainer.model
    for policy, reference in zip(trainer.model.parameters(), trainer.ref_model.parameters(), strict=True):
        assert policy.data_ptr() != reference.data_ptr() and torch.equal(policy, reference)


@pytest.mark.parametrize(
    ("recipe", "given", "library"),
    [
        ("sft", "+train.assistant_only_loss=true", "trl refuses these settings"),
        ("sft", "+train.padding_free=true", "trl refuses these settings"),
        ("dpo", "lora.target_modules=nope.*", "peft refuses these settings"),
    ],
)
def test_what_a_library_refuses_is_one_line_in_its_own_words(composed, recipe, given, library):
    with pytest.raises(SettingsError, match=library):
        build_trainer(composed(recipe, given))


def test_a_target_module_that_is_not_there_is_named(composed, capsys):
    build_trainer(composed("dpo", "lora.target_modules=[q_proj,nope]"))
    assert "lora.target_modules: no module is named nope" in capsys.readouterr().out


def test_a_best_metric_that_no_evaluation_has_is_one_line(composed):
    asked = ["+train.metric_for_best_model=nope", "+train.load_best_model_at_end=true", "train.eval_steps=2"]
    cfg = composed("dpo", *asked, "train.eval_strategy=steps", "train.save_strategy=steps", "train.save_steps=2")
    with pytest.raises(SettingsError, match="metric_for_best_model=nope: no evaluation has it.*eval_loss"):
        train(cfg, {})


def test_arguments_that_preftune_sets_by_itself_may_be_given(composed):
    trainer = build_trainer(composed("dpo", "+train.disable_tqdm=true", "+train.logging_first_step=false"))
    assert trainer.args.disable_tqdm and not trainer.args.logging_first_step
    assert build_trainer(composed("dpo")).args.logging_first_step


@pytest.mark.parametrize("recipe", ["dpo", "orpo"])
def test_held_out_pairs_are_scored_by_the_fast_forward(composed, recipe):
    cfg = composed(recipe)
    tokenizer = load_tokenizer(cfg.model)
    data = load_data(cfg, tokenizer)
    trainer = build_trainer(cfg, data, tokenizer)
    base = trainer.model.get_base_model()
    vars(base).pop("tokens_run", None)
    take_snapshot("start", trainer, data, cfg)
    assert base.tokens_run[1] > 0
