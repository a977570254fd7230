"""The monitor: each finding from a run that really shows it, and silence on healthy runs of each family of losses."""

import json
import random
from pathlib import Path

import pytest
import torch
from torch.optim.lr_scheduler import LambdaLR

from preftune.config.errors import Stopped
from preftune.health.findings import Findings
from preftune.health.monitor import Monitor
from preftune.health.rules import History, judged, length_drift
from preftune.report import record
from preftune.runs.training import build_trainer, train

THINGS = ["a cat", "rain", "the moon", "bread", "a door", "tea", "a hill", "snow", "a boat", "wood", "salt", "a song"]
ASKED = [(f"{verb} {thing}?", thing) for verb in ("What is", "Who likes", "Where is", "Why is") for thing in THINGS]


def good():
    return [
        {"prompt": prompt, "chosen": f"In short, {thing} it is.", "rejected": f"Who can say{'!' * (i % 5 + 1)}"}
        for i, (prompt, thing) in enumerate(ASKED)
    ]


def flipped():
    draw = random.Random(0)
    swap = {"chosen": "rejected", "rejected": "chosen", "prompt": "prompt"}
    return [row if draw.random() < 0.5 else {swap[name]: row[name] for name in row} for row in good()]


def thumbs_up():
    return [
        {"prompt": prompt, "completion": f"In short, {thing} it is." if i else "no", "label": i > 0}
        for i, (prompt, thing) in enumerate(ASKED)
    ]


def codes(history, limits):
    return {finding.code for finding in judged(history, limits)}


@pytest.fixture
def watched(composed, tmp_path):
    """The codes of the findings of thirty real steps on these rows."""

    def run(recipe, rows, *overrides, before=lambda trainer: None):
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows()))
        cfg = composed(
            recipe,
            f"data.path={path}",
            *("train.save_strategy=no", "train.eval_strategy=no", "train.max_steps=30"),
            *("health.patience=15", "health.window=5"),
            *overrides,
        )
        trainer = build_trainer(cfg)
        trainer.findings = Findings(tmp_path)
        trainer.add_callback(Monitor(trainer.findings, cfg.health))
        before(trainer)
        trainer.train()
        return {row["code"] for row in trainer.findings.rows()}

    return run


@pytest.mark.parametrize(
    ("recipe", "overrides"),
    [
        ("dpo", []),
        ("dpo", ["loss=ipo", "loss.beta=0.5"]),
        ("dpo", ["loss=simpo"]),
        ("dpo", ["loss=dpo_sft"]),
        ("kto", []),
        ("orpo", []),
    ],
)
def test_a_healthy_run_is_silent(watched, recipe, overrides):
    assert watched(recipe, good, *overrides) == set()


WRONG_BETA = ["loss.beta=50", "train.learning_rate=1e-2"]
TORN = ["lora=none", "train.learning_rate=0.1"]
SICK = [
    ("margin_explodes", "dpo", good, WRONG_BETA),
    ("gradient_norm", "dpo", good, WRONG_BETA),
    ("margin_flat", "dpo", good, ["train.learning_rate=1e-9"]),
    ("margin_flat", "dpo", good, ["loss.beta=0.0001"]),
    ("accuracy_at_chance", "dpo", flipped, []),
    ("chosen_falls", "dpo", good, TORN),
    ("rejected_collapse", "dpo", good, TORN),
    ("kl_large", "dpo", good, TORN),
    ("entropy_collapse", "dpo", good, TORN),
    ("kto_one_label", "kto", thumbs_up, []),
    ("kto_kl_zero", "kto", good, ["lora=none", "train.learning_rate=0.03"]),
]


@pytest.mark.parametrize(("code", "recipe", "rows", "overrides"), SICK)
def test_a_sick_run_is_named(watched, code, recipe, rows, overrides):
    assert code in watched(recipe, rows, *overrides)


def test_accuracy_that_is_whole_on_train_and_falls_on_held_out_is_named(composed):
    limits = composed("dpo").health
    train = [{"step": step, "rewards/accuracies": 1.0} for step in range(1, 31)]
    held_out = [{"step": step, "rewards/accuracies": value} for step, value in ((10, 0.9), (20, 0.8), (30, 0.6))]
    assert "overfitting" in codes(History(30, 1e-3, train, held_out), limits)
    assert "overfitting" not in codes(History(30, 1e-3, train, held_out[:1] * 2), limits)


def test_a_learning_rate_above_the_schedule_is_named(watched):
    def raised(trainer):
        trainer.lr_scheduler = LambdaLR(trainer.create_optimizer(), lambda step: 5.0)

    assert "learning_rate" in watched("dpo", good, before=raised)


def test_a_spike_of_the_gradient_norm_is_named_and_a_calm_one_is_not():
    from omegaconf import OmegaConf

    limits = OmegaConf.load(Path(__file__).parents[2] / "conf" / "health" / "default.yaml")
    calm = [{"step": step, "loss": 0.5, "grad_norm": 1.0 + step % 3} for step in range(11)]
    history = History(100, 1e-5, train=calm)
    assert "gradient_norm" not in codes(history, limits)
    history.train.append({"step": 11, "loss": 0.5, "grad_norm": 500.0})
    assert "gradient_norm" in codes(history, limits)


def drawn(steps=40, **of):
    """Logged rows of a trainer that draws its answers; each metric a number or a function of the step."""
    usual = {"reward": 1.0, "kl": 0.01, "completions/clipped_ratio": 0.1, "frac_reward_zero_std": 0.2}
    values = {**usual, "completions/mean_length": 20.0, **of}
    return [
        {"step": step, "loss": 0.0, **{name: v(step) if callable(v) else v for name, v in values.items()}}
        for step in range(1, steps + 1)
    ]


RISES, FALLS = {"reward": lambda step: step / 40}, {"rewards/watched_rule/mean": lambda step: 1 - step / 40}


@pytest.mark.parametrize(
    ("code", "of"),
    [
        (None, {}),
        (None, RISES | {"rewards/watched_rule/mean": lambda step: step / 40}),
        (None, {"reward": 1.0, **FALLS}),
        ("reward_hacked", RISES | FALLS),
        ("kl_large", {"kl": 0.9}),
        ("answers_cut", {"completions/clipped_ratio": 0.9}),
        ("rewards_alike", {"frac_reward_zero_std": 1.0}),
        ("length_drift", {"completions/mean_length": lambda step: 10 + 2 * step}),
    ],
)
def test_what_goes_wrong_with_drawn_answers_is_named_and_nothing_else(code, of, composed):
    limits = composed("rloo").health
    assert codes(History(40, 1e-3, drawn(**of)), limits) == ({code} if code else set())


def test_a_reward_model_that_learns_its_rows_by_heart_is_named(composed):
    train = [{"step": step, "accuracy": 1.0} for step in range(1, 31)]
    held_out = [{"step": step, "accuracy": value} for step, value in ((10, 0.9), (20, 0.6))]
    assert "overfitting" in codes(History(30, 1e-3, train, held_out), composed("reward").health)


def test_answers_that_grow_or_shrink_by_more_than_the_limit_are_named():
    assert length_drift(5, 20, 30, 3.0) is None
    assert length_drift(5, 20, 61, 3.0).value == pytest.approx(3.05)
    assert length_drift(5, 60, 19, 3.0).threshold == pytest.approx(1 / 3)


def test_answers_are_sampled_while_training_and_their_length_is_watched(composed):
    cfg = composed(
        "sft",
        *("train.max_steps=60", "sample_steps=30", "samples=2", "health.length_drift=1.5", "train.eval_strategy=no"),
        *("lora=none", "train.learning_rate=0.01"),
    )
    train(cfg)
    run = Path(cfg.output_dir)
    rows = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [30, 30, 60, 60]
    assert "length_drift" in {row["code"] for row in json.loads((run / "findings.json").read_text())}


def test_stop_ends_the_run_and_leaves_its_checkpoints(composed):
    cfg = composed("dpo", *TORN, "train.max_steps=20", "train.save_steps=2", "health.action=stop")
    with pytest.raises(Stopped, match="kl_large|rejected_collapse|margin"):
        train(cfg)
    run = Path(cfg.output_dir)
    assert json.loads((run / "status.json").read_text())["state"] == "stopped"
    assert list(run.glob("checkpoint-*")) and (run / "report.html").exists()
    assert not (run / "model").exists() and not (run / "summary.json").exists()


def test_rollback_keeps_the_weights_from_before_the_finding(composed):
    from safetensors.torch import load_file

    cfg = composed(
        "dpo", *TORN, "train.max_steps=20", "train.save_steps=1", "train.save_total_limit=20", "health=strict"
    )
    cfg.health.action = "rollback"
    with pytest.raises(Stopped):
        train(cfg)
    run = Path(cfg.output_dir)
    summary = json.loads((run / "summary.json").read_text())
    found = json.loads((run / "findings.json").read_text())[-1]
    assert summary["rolled_back_to"] == f"checkpoint-{found['step'] - 1}"
    kept = load_file(run / summary["rolled_back_to"] / "model.safetensors")
    final = load_file(run / "model" / "model.safetensors")
    assert all(torch.equal(kept[name], final[name]) for name in final)
    assert summary["held_out"]["eval_rewards/accuracies"] == pytest.approx(summary["accuracy_after"], abs=1e-6)
    assert record.read(run).last_step == found["step"] - 1


def test_early_stopping_keeps_the_best_held_out_checkpoint(composed):
    cfg = composed(
        "dpo",
        *("train.max_steps=30", "train.eval_strategy=steps", "train.eval_steps=2", "health.early_stopping=2"),
        *("train.learning_rate=1e-2",),
    )
    summary = train(cfg)
    best = json.loads(sorted(Path(cfg.output_dir).glob("checkpoint-*"))[-1].joinpath("trainer_state.json").read_text())
    assert best["global_step"] < 30  # accuracy is 1.0 soon, and does not get better
    assert summary["held_out"]["eval_rewards/accuracies"] == pytest.approx(best["best_metric"])


def test_strict_evaluates_answers_and_keeps_the_best(composed):
    cfg = composed("dpo", "health=strict", "health.action=warn", "train.max_steps=20", "sample_steps=5")
    train(cfg)
    rows = [json.loads(line) for line in (Path(cfg.output_dir) / "metrics.jsonl").read_text().splitlines()]
    held_out = [row["step"] for row in rows if "eval_rewards/accuracies" in row]
    assert held_out == list(range(2, held_out[-1] + 1, 2)) and len(held_out) >= 4
    assert all("eval_kl/per_token" in row for row in rows if "eval_loss" in row)
    samples = (Path(cfg.output_dir) / "samples.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in samples][:1] == [5]
    best = json.loads(max(Path(cfg.output_dir).glob("checkpoint-*/trainer_state.json")).read_text())
    assert best["best_metric"] == max(row["eval_rewards/accuracies"] for row in rows if "eval_loss" in row)
