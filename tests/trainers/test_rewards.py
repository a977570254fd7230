"""Reward models and the trainers that draw their answers: plain TRL's numbers, and one clear error for bad rewards."""

import json
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from omegaconf import OmegaConf
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer, RewardConfig, RewardTrainer, RLOOConfig, RLOOTrainer
from trl.experimental.online_dpo import OnlineDPOConfig, OnlineDPOTrainer

from preftune.config.check import ConfigError, require
from preftune.evaluate import evaluation
from preftune.models import embedded
from preftune.models.load import ModelError, load_reward_model, peft_config
from preftune.pipeline.export import ExportError, export
from preftune.report import panels, record
from preftune.report.panels import DRAWN, PANELS, REWARD
from preftune.runs.training import stage, train
from preftune.trainers.rewards import RewardError, reward

ALL = ("data.eval_fraction=0", "train.warmup_steps=0")
SHORT = ("loss.num_generations=2", "loss.max_completion_length=8")
RULE = f"loss.rewards=[{__name__}.letters]"


def letters(prompt, answer):
    return float(len(set(answer)))


def vowels(completions, solution, **_):
    assert all(isinstance(each, str) for each in solution)
    return [float(sum(letter in "aeiou" for letter in each[-1]["content"])) for each in completions]


def broken(prompt, answer):
    raise KeyError("weather")


def not_a_number(prompt, answer):
    return float("nan")


def too_few(completions, **_):
    return [1.0]


def theirs(trainer):
    trainer.train()
    return [row for row in trainer.state.log_history if "loss" in row]


def ours(cfg):
    lines = Path(cfg.output_dir, "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if "loss" in row]


def arguments(cfg, folder, **more):
    kept = ("learning_rate", "lr_scheduler_type", "warmup_steps", "seed", "weight_decay")
    return dict(
        output_dir=str(folder), use_cpu=True, bf16=False, gradient_checkpointing=False, optim="adamw_torch",
        per_device_train_batch_size=4, max_steps=2, logging_steps=1, report_to="none", save_strategy="no",
        disable_tqdm=True, **{name: cfg.train[name] for name in kept}, **more,
    )  # fmt: skip


def rows_of(pairs_file):
    for row in map(json.loads, Path(pairs_file).read_text().splitlines()):
        sides = {side: [{"role": "assistant", "content": row[side]}] for side in ("chosen", "rejected")}
        beside = {"margin": row["margin"]} if "margin" in row else {}
        yield {"prompt": [{"role": "user", "content": row["prompt"]}], **sides, **beside}


def with_margins(pairs_file, path):
    lines = pairs_file.read_text().splitlines()
    rows = [json.loads(line) | {"margin": place / 4} for place, line in enumerate(lines)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def tiny():
    folder = embedded.folder("embedded://tiny")
    return folder, AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize(("lora", "margins"), [("lora", False), ("none", False), ("none", True)])
def test_a_reward_model_loses_what_plain_trl_loses(lora, margins, composed, pairs_file, tmp_path):
    pairs_file = with_margins(pairs_file, tmp_path / "margins.jsonl") if margins else pairs_file
    rows = f"data.path={pairs_file}"
    cfg = composed("reward", f"lora={lora}", "hardware.per_device_train_batch_size=24", *ALL, rows)
    train(cfg)
    folder, tokenizer = tiny()
    given = arguments(cfg, tmp_path / "trl", max_length=1024, center_rewards_coefficient=0.01)
    model = AutoModelForCausalLM.from_pretrained(folder)
    adapter = peft_config({**OmegaConf.to_container(cfg.lora), "task_type": "SEQ_CLS"}, model) if cfg.lora else None
    trainer = RewardTrainer(
        str(folder), args=RewardConfig(**given | {"per_device_train_batch_size": 24}), processing_class=tokenizer,
        train_dataset=Dataset.from_list(list(rows_of(pairs_file))), peft_config=adapter,
    )  # fmt: skip
    same = list(zip(ours(cfg), theirs(trainer), strict=True))
    moved = () if cfg.lora else ("grad_norm",)  # TRL draws head and adapter one after the other, we each from the seed
    for mine, other in same[:1] if cfg.lora else same:
        for name in ("loss", "accuracy", "margin", "mean_reward", *moved):
            assert mine[name] == pytest.approx(other[name], abs=1e-5), name


@pytest.mark.parametrize("lora", ["lora", "none"])
@pytest.mark.parametrize("name", ["rloo", "grpo"])
def test_a_trainer_that_draws_answers_draws_and_loses_what_plain_trl_does(name, lora, composed, pairs_file, tmp_path):
    rewards = f"loss.rewards=[{__name__}.letters,{__name__}.vowels]"
    cfg = composed(name, f"lora={lora}", "loss.beta=0.05", "loss.reward_weights=[1.0,0.5]", rewards, *SHORT, *ALL)
    summary = stage(cfg)
    folder, tokenizer = tiny()
    config, trainer_class = {"rloo": (RLOOConfig, RLOOTrainer), "grpo": (GRPOConfig, GRPOTrainer)}[name]
    model = AutoModelForCausalLM.from_pretrained(folder)
    drawn = dict(beta=0.05, num_generations=2, max_completion_length=8, reward_weights=[1.0, 0.5])
    rows = [{"prompt": row["prompt"], "solution": row["chosen"][0]["content"]} for row in rows_of(pairs_file)]

    def first(completions, prompts, **_):
        return [letters(p, c[-1]["content"]) for p, c in zip(prompts, completions, strict=True)]

    adapter = peft_config(OmegaConf.to_container(cfg.lora), model) if cfg.lora else None
    trainer = trainer_class(
        model, [first, vowels], config(**arguments(cfg, tmp_path / "trl", **drawn)), Dataset.from_list(rows),
        processing_class=tokenizer, peft_config=adapter,
    )  # fmt: skip
    for mine, other in zip(ours(cfg), theirs(trainer), strict=True):
        for key in ("loss", "reward", "kl", "completions/mean_length", "rewards/vowels/mean", "grad_norm"):
            assert mine[key] == pytest.approx(other[key], abs=1e-5), key
    assert any(row["grad_norm"] for row in ours(cfg)) and summary["proofs"]


def test_online_dpo_loses_what_plain_trl_loses(composed, pairs_file, tmp_path, capsys):
    cfg = composed("dpo", "loss=online_dpo", "loss.max_new_tokens=8", RULE, *ALL[1:])
    cfg.data.eval_split, cfg.data.eval_fraction = str(pairs_file), 0.0  # every row is drawn for, and some are held out
    train(cfg)
    folder, tokenizer = tiny()
    model = AutoModelForCausalLM.from_pretrained(folder)

    def first(prompts, completions, **_):
        return [letters(p, c[-1]["content"]) for p, c in zip(prompts, completions, strict=True)]

    trainer = OnlineDPOTrainer(
        model, reward_funcs=first, processing_class=tokenizer,
        args=OnlineDPOConfig(**arguments(cfg, tmp_path / "trl", beta=[0.1], max_new_tokens=8, max_length=1024)),
        train_dataset=Dataset.from_list([{"prompt": row["prompt"]} for row in rows_of(pairs_file)]),
        peft_config=peft_config(OmegaConf.to_container(cfg.lora), model),
    )  # fmt: skip
    assert len(ours(cfg)) == 2 and "not available (Attr" not in capsys.readouterr().err
    for mine, other in zip(ours(cfg), theirs(trainer), strict=True):
        assert mine["loss"] == pytest.approx(other["loss"], abs=1e-5)
        assert mine["objective/scores"] == pytest.approx(other["objective/scores"], abs=1e-4)


def test_a_reward_model_is_a_reward_and_one_of_weight_0_is_watched(trained, composed):
    scores = trained("reward")
    cfg = composed("rloo", f"loss.rewards=[{__name__}.letters,{scores}]", "loss.reward_weights=[1,0]", *SHORT)
    train(cfg)
    row = ours(cfg)[-1]
    watched = row["rewards/watched_run/mean"]
    assert watched != 0 and row["reward"] == pytest.approx(row["rewards/letters/mean"])


@pytest.mark.parametrize(("name", "losses"), [("rloo", DRAWN), ("grpo", DRAWN), ("reward", REWARD)])
def test_every_panel_of_theirs_shows_what_they_log(name, losses, trained):
    given = [f"loss.rewards=[{__name__}.letters]", "loss.num_generations=2", "loss.max_completion_length=8"]
    run = trained(name, *(given if name != "reward" else []), *(["loss.beta=0.1"] if name == "grpo" else []))
    logged = {key for line in (run / "metrics.jsonl").read_text().splitlines() for key in json.loads(line)}
    for panel in PANELS:
        if losses in panel.losses:
            assert logged.issuperset(panel.lines), panel.title
            assert "eval" not in panel.shown or logged.issuperset(f"eval_{name}" for name in panel.lines), panel.title
    assert panels.shown(record.read(run))


def test_a_trained_reward_model_is_evaluated_as_it_was_in_training(trained, settings):
    run = trained("reward")
    summary = json.loads((run / "summary.json").read_text())
    (row,) = json.loads(evaluation.run(settings("evaluate", f"models=[{run}]", "format=json")))
    assert row["accuracy"] == pytest.approx(summary["accuracy_after"])
    assert row["margin"] == pytest.approx(summary["held_out"]["eval_margin"], abs=1e-5)


def test_a_reward_model_is_exported_whole(trained, tmp_path):
    run = str(trained("reward"))
    assert "its reward of a dialogue is" in export(run, str(tmp_path / "whole"), None, "trained")
    ids = torch.tensor([[5, 6, 7, 8]])
    first, second = (load_reward_model(path)[0](input_ids=ids).logits.item() for path in (run, str(tmp_path / "whole")))
    assert first == pytest.approx(second, abs=1e-5)
    with pytest.raises(ExportError, match="is a reward model, which is saved whole"):
        export(run, str(tmp_path / "other"), None, "trained", ["ollama"])


def test_a_reward_model_judges(trained, settings):
    judge = ["judge=reward_model", f"judge.path={trained('reward')}", "kl_prompts=0"]
    (row,) = json.loads(evaluation.run(settings("evaluate", f"models=[{trained('dpo')}]", "format=json", *judge)))
    assert 0 <= row["win_rate"] <= 1 and row["rule_score"] != row["reference_rule_score"]


def test_a_reward_model_starts_from_an_sft_adapter_as_from_the_merged_model(trained, composed, tmp_path):
    adapter = trained("sft") / "model"
    export(str(trained("sft")), str(tmp_path / "merged"), None, "trained")
    losses = []
    for path in (adapter, tmp_path / "merged"):
        cfg = composed("reward", "model=path", f"model.path={path}", f"output_dir={tmp_path / path.name}-reward")
        train(cfg)
        losses.append([row["loss"] for row in ours(cfg)])
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


def test_what_has_no_head_for_rewards_is_no_reward_model(trained):
    with pytest.raises(ModelError, match="is no reward model: it has no head"):
        load_reward_model(str(embedded.folder("embedded://tiny")))
    with pytest.raises(ModelError, match="is no reward model"):
        load_reward_model(str(trained("dpo")))


def test_a_head_with_several_numbers_is_no_reward_model(tmp_path):
    folder, tokenizer = tiny()
    AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3).save_pretrained(tmp_path / "three")
    tokenizer.save_pretrained(tmp_path / "three")
    with pytest.raises(ModelError, match="gives 3 numbers"):
        load_reward_model(str(tmp_path / "three"))


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("broken", "broken raised KeyError: 'weather' .prompt: "),
        ("not_a_number", "gave nan, which is no finite number"),
        ("too_few", "gave 1 values for 4 answers"),
        ("nowhere", "neither a model nor a function"),
    ],
)
def test_a_reward_that_cannot_be_used_is_one_error(name, says, composed):
    with pytest.raises(RewardError, match=says):
        train(composed("rloo", f"loss.rewards=[{__name__}.{name}]", *SHORT, *ALL))


def test_none_is_a_reward_that_does_not_apply():
    function, _ = reward(f"{__name__}.nothing", watched=False)
    assert function(prompts=[[{"role": "user", "content": "a"}]], completions=[[{"content": "b"}]]) == [None]


def nothing(prompt, answer):
    return None


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (["loss.num_generations=3"], "4 answers are no whole number of prompts"),
        (["loss.reward_weights=[1,2]"], "gives 2 for 1 rewards; for example"),
        (["loss.rewards=[]"], "wants one or more reward models or functions"),
        (["+loss.use_vllm=true"], "vllm is not installed"),
        (["loss.beta=-1"], "wants a number at least 0"),
    ],
)
def test_settings_that_cannot_work_are_refused_before_torch(given, says, composed):
    with pytest.raises(ConfigError, match=says):
        require(composed("rloo", *given))


def test_held_out_accuracy_of_a_reward_model_is_that_of_all_rows(composed, tmp_path):
    found = []
    for rows in (4, 6):
        cfg = composed("reward", f"hardware.per_device_eval_batch_size={rows}", f"output_dir={tmp_path / str(rows)}",
                       "data.eval_fraction=0.45")  # fmt: skip
        found.append(stage(cfg))
    four, six = (each["held_out"] for each in found)
    for name in ("eval_loss", "eval_accuracy", "eval_margin", "eval_mean_reward"):
        assert four[name] == pytest.approx(six[name], abs=1e-6), name
    low, high = found[0]["accuracy_ci"]
    assert low < found[0]["accuracy_after"] <= high


def test_rows_that_are_too_long_for_a_reward_model_are_counted(composed, capsys):
    train(composed("reward", "train.max_length=58"))
    assert (
        "rows, which are longer than train.max_length=58: TRL's reward trainer takes whole" in capsys.readouterr().out
    )
