"""Held-out sets by name: each has the metrics of an evaluation of it alone, under its own names."""

import json
from pathlib import Path

import pytest
import torch
from datasets import load_dataset
from hydra.utils import get_class
from test_evaluation_means import moved

from preftune.config.check import ConfigError, require
from preftune.runs.training import build_trainer, train

DEMO = "pkg://preftune.data/demo/eval.jsonl"
LOSSES = ["dpo", "kto", "orpo", "simpo", "sft", "reward"]


@pytest.fixture
def sets(tmp_path):
    """Overrides with a main held-out set of nine pairs and two others, of seven and five."""
    rows = [
        {"prompt": f"Say {i}.", "chosen": "Yes, " * (1 + i * 7 % 11) + f"{i}.", "rejected": "No! " * (1 + i * 5 % 7)}
        for i in range(45)
    ]
    for name, start, end in (("train", 0, 24), ("main", 24, 33), ("ood", 33, 40), ("hard", 40, 45)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[start:end]))
    named = f"+data.eval_sets={{ood: {tmp_path}/ood.jsonl, hard: {{path: {tmp_path}/hard.jsonl}}}}"
    split = f"data.eval_split={tmp_path}/{{}}.jsonl"
    return [f"data.path={tmp_path}/train.jsonl", "hardware.per_device_eval_batch_size=4"], named, split


def measured(trainer):
    found = moved(trainer).evaluate()
    return {name: value for name, value in found.items() if not name.endswith(("time", "per_second", "epoch"))}


@pytest.mark.parametrize("loss", LOSSES)
def test_each_set_has_the_metrics_of_an_evaluation_of_it_alone(composed, sets, loss):
    given, named, split = sets
    together = measured(build_trainer(composed("dpo", f"loss={loss}", *given, split.format("main"), named)))
    names = set()
    for name, prefix in (("main", "eval_"), ("ood", "eval_ood_"), ("hard", "eval_hard_")):
        alone = measured(build_trainer(composed("dpo", f"loss={loss}", *given, split.format(name))))
        for key, value in alone.items():
            names.add(prefix + key.removeprefix("eval_"))
            assert together[prefix + key.removeprefix("eval_")] == pytest.approx(value, rel=1e-4, abs=1e-6), key
    assert names == together.keys()


def test_a_set_has_the_metrics_of_plain_trl(composed, sets, tmp_path):
    given, named, split = sets
    batch = "hardware.per_device_eval_batch_size=9"
    ours = build_trainer(composed("dpo", "lora=none", *given, split.format("main"), named, batch))
    rows = load_dataset("json", data_files=f"{tmp_path}/ood.jsonl", split="train", cache_dir=str(tmp_path / "cache"))
    rows = rows.map(lambda row: {"prompt": [{"role": "user", "content": row["prompt"]}]} | {
        side: [{"role": "assistant", "content": row[side]}] for side in ("chosen", "rejected")})  # fmt: skip
    plain = get_class("trl.DPOTrainer")(
        model=ours.model, args=ours.args, train_dataset=rows, eval_dataset=rows, processing_class=ours.processing_class
    )
    with torch.no_grad():
        for each in ours.model.parameters():
            each += 0.02 * torch.randn_like(each)
    together, found = ours.evaluate(), plain.evaluate()
    assert found["eval_loss"] != pytest.approx(0.6931, abs=1e-3)
    for key in ("loss", "rewards/accuracies", "rewards/margins", "logps/chosen", "logps/rejected"):
        assert together[f"eval_ood_{key}"] == pytest.approx(found[f"eval_{key}"], rel=1e-4, abs=1e-6), key


def test_sets_are_logged_and_the_main_one_decides(composed, sets, capsys):
    given, named, split = sets
    steps = ["train.eval_strategy=steps", "train.eval_steps=1", "health.early_stopping=5"]
    cfg = composed("dpo", *given, split.format("main"), named, *steps)
    summary = train(cfg)
    logged = [json.loads(line) for line in (Path(cfg.output_dir) / "metrics.jsonl").read_text().splitlines()]
    for name in ("eval_rewards/accuracies", "eval_ood_rewards/accuracies", "eval_hard_rewards/margins"):
        assert sum(name in row for row in logged) == 2, name
        assert name in summary["held_out"]
    told = capsys.readouterr().out
    assert "9 held out, 7 ood, 5 hard" in told and "held-out ood  loss" in told
    page = (Path(cfg.output_dir) / "report.html").read_text()
    assert "held-out ood" in page and "held-out hard" in page


@pytest.mark.parametrize(
    "given, says",
    [
        ("{train: a.jsonl}", "its metrics would be eval_train_"),
        ("{a/b: a.jsonl}", "its metrics would be eval_a/b_"),
        ("{ood: nowhere.jsonl}", "data.eval_sets.ood  *there is no nowhere.jsonl"),
        ("{ood: {columns: {a: b}}}", "without a path"),
        (
            f"{{ood: {{path: {DEMO}, colums: {{a: b}}}}}}",
            "data.eval_sets.ood.colums  *no such key",
        ),
        ("abc", "wants a mapping"),
    ],
)
def test_sets_that_cannot_be_are_refused_before_torch(composed, given, says):
    with pytest.raises(ConfigError, match=says):
        require(composed("dpo", f"++data.eval_sets={given}"))


def test_sets_stand_beside_held_out_rows(composed):
    with pytest.raises(ConfigError, match="data.eval_sets  *stand beside held-out rows"):
        require(composed("dpo", "++data.eval_sets={ood: pkg://preftune.data/demo/eval.jsonl}", "data.eval_fraction=0"))
