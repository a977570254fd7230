"""A held-out metric has one value: the same for every batch size, order of rows and number of processes."""

import json
import random
from pathlib import Path

import pytest

from preftune.runs.training import build_trainer, train

ROWS = 17
INHERENT = {"kto": ("eval_loss", "eval_kl")}  # the KL term is that of the rows that share a batch
PADDED = ("eval_logits/chosen", "eval_logits/rejected")  # of ORPO and CPO: a few float32 roundings more


@pytest.fixture
def files(tmp_path):
    """A training file and seventeen held-out pairs of many lengths."""
    rows = [
        {"prompt": f"Say {i}.", "chosen": "Yes, " * (1 + i * 7 % 11) + f"{i}.", "rejected": "No! " * (1 + i * 5 % 7)}
        for i in range(24 + ROWS)
    ]
    for name, part in (("train", rows[:24]), ("eval", rows[24:])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    return [f"data.path={tmp_path}/train.jsonl", f"data.eval_split={tmp_path}/eval.jsonl", "data.eval_fraction=0"]


def moved(trainer):
    """The trainer with an adapter that is not the start, so that no metric is 0."""
    import torch

    torch.manual_seed(0)
    for name, each in trainer.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(each.data, std=0.05)
    return trainer


def evaluated(trainer, size: int, dataset=None) -> dict:
    trainer.args.per_device_eval_batch_size = size
    found = trainer.evaluate(dataset) if dataset is not None else trainer.evaluate()
    return {name: value for name, value in found.items() if not name.endswith(("runtime", "per_second"))}


@pytest.mark.parametrize("loss", ["dpo", "ipo", "dpo_sft", "kto", "orpo", "cpo", "simpo", "sft"])
@pytest.mark.parametrize("fast", [True, False])
def test_an_evaluation_is_the_same_for_every_batch_size(composed, files, loss, fast):
    trainer = moved(build_trainer(composed("dpo", f"loss={loss}", *files, f"fastpath.enabled={fast}")))
    rows = len(trainer.eval_dataset)
    whole = evaluated(trainer, rows)  # one batch: TRL's own values, the means of one
    assert len(whole) > 3
    for size in (1, 4, rows - 1):
        other = evaluated(trainer, size)
        skip = INHERENT.get(loss, ()) + (PADDED if not fast and loss not in ("dpo", "ipo", "dpo_sft", "kto") else ())
        for name in whole.keys() - set(skip):
            assert other[name] == pytest.approx(whole[name], rel=2e-4, abs=2e-6), (size, name)


def test_an_evaluation_is_the_same_for_every_order_of_rows(composed, files):
    trainer = moved(build_trainer(composed("dpo", *files)))
    order = random.Random(0).sample(range(ROWS), ROWS)
    first = evaluated(trainer, 4)
    trainer.eval_dataset = trainer.eval_dataset.select(order)
    assert evaluated(trainer, 4) == pytest.approx(first, rel=1e-4, abs=1e-6)


def test_table_log_and_early_stopping_read_one_accuracy(composed, files):
    cfg = composed("dpo", *files, "train.learning_rate=0.01", "hardware.per_device_eval_batch_size=16",
                   "train.eval_strategy=steps", "train.eval_steps=2",
                   "health.early_stopping=5")  # fmt: skip
    summary = train(cfg)
    run = Path(cfg.output_dir)
    logged = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    logged = [row for row in logged if "eval_rewards/accuracies" in row][-1]
    state = json.loads((run / "checkpoint-2" / "trainer_state.json").read_text())
    assert summary["accuracy_after"] == pytest.approx(logged["eval_rewards/accuracies"])
    assert state["best_metric"] == pytest.approx(logged["eval_rewards/accuracies"])
    assert summary["margin_after"] == pytest.approx(logged["eval_rewards/margins"], rel=1e-3)
