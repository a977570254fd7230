"""Batches of similar length: every row once, seeded, resumable, the same on every rank, and less padding."""

import numpy as np
import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import BatchSampler
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer

from preftune.fastpath.batches import BudgetSampler, LengthBatches, LengthSampler, row_lengths
from preftune.fastpath.kto_batches import BatchSequence, KTOBatches, mixed_order
from preftune.models import embedded

LENGTHS = np.random.default_rng(0).lognormal(5, 0.7, 1003).astype(np.int64) + 1


def padding(batches) -> float:
    run = sum(len(batch) * LENGTHS[batch].max() for batch in batches)
    return 1 - sum(LENGTHS[batch].sum() for batch in batches) / run


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 70), st.integers(1, 9), st.integers(1, 5), st.integers(1, 3), st.integers(0, 3))
def test_every_row_comes_once_an_epoch(rows, batch_size, bucket_batches, ranks, epoch):
    lengths = np.arange(1, rows + 1)
    sampler = LengthSampler(lengths, batch_size, bucket_batches, seed=1, epoch=lambda: epoch, ranks=ranks)
    assert sorted(sampler) == list(range(rows))
    assert sorted(BatchSequence(rows, batch_size, 1, lambda: epoch, ranks)) == list(range(rows))


def test_order_depends_on_seed_and_epoch_alone():
    def order(seed, epoch):
        return list(LengthSampler(LENGTHS, 8, 64, seed, lambda: epoch))

    assert order(0, 0) == order(0, 0)
    assert order(0, 0) != order(0, 1) != order(1, 1)


def test_buckets_take_away_nearly_all_padding_without_sorting_the_data():
    def batches(bucket_batches):
        return list(BatchSampler(LengthSampler(LENGTHS, 8, bucket_batches, 0, lambda: 0), 8, drop_last=False))

    assert padding(batches(1)) > 0.4
    assert padding(batches(64)) < 0.05
    longest = [LENGTHS[batch].max() for batch in batches(64)]
    assert abs(np.corrcoef(longest, np.arange(len(longest)))[0, 1]) < 0.25


def test_ranks_take_neighbours_of_similar_length():
    order = list(LengthSampler(LENGTHS, 8, 64, 0, lambda: 0, ranks=2))
    first, second = np.array(order[: 1003 // 16 * 16]).reshape(-1, 2, 8).transpose(1, 0, 2)
    ratio = LENGTHS[first].max(axis=1) / LENGTHS[second].max(axis=1)
    assert np.median(np.abs(np.log(ratio))) < 0.05


def test_token_budget_is_kept_and_every_row_comes_once_over_all_ranks():
    ranks = [BudgetSampler(LENGTHS, 2000, 512, 0, lambda: 3, (rank, 3)) for rank in range(3)]
    shares = [list(sampler) for sampler in ranks]
    assert [len(share) for share in shares] == [len(sampler) for sampler in ranks]
    assert len({len(share) for share in shares}) == 1
    batches = sum(shares, [])
    assert sorted(row for batch in batches for row in batch) == list(range(len(LENGTHS)))
    assert all(len(batch) * LENGTHS[batch].max() <= 2000 or len(batch) == 1 for batch in batches)
    assert padding(batches) < 0.06


def test_kto_order_mixes_labels_and_lengths_and_parts_rows_of_one_prompt():
    labels = np.arange(len(LENGTHS)) % 3 == 0
    prompts = [i // 2 for i in range(len(LENGTHS))]
    lengths = np.repeat(LENGTHS, 2)[: len(LENGTHS)]  # the two rows of a prompt want the same batch
    order = np.array(mixed_order(lengths, labels, prompts, 8, 64))
    assert sorted(order) == list(range(len(LENGTHS)))
    batches = order[: 1003 // 8 * 8].reshape(-1, 8)
    held = labels[batches].sum(axis=1)
    assert held.min() >= 1 and held.max() <= 5
    assert sum(len({prompts[row] for row in batch}) < 8 for batch in batches) <= 1
    spread = lengths[batches].max(axis=1).sum() * 8 / lengths[batches].sum()
    assert spread < 1.15


def pairs(rows=26):
    words = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "again"]
    rng = np.random.default_rng(0)

    def text():
        return " ".join(rng.choice(words, rng.integers(1, 30)))

    return Dataset.from_list(
        [
            {"prompt": [{"role": "user", "content": f"{i} {text()}"}]}
            | {side: [{"role": "assistant", "content": text()}] for side in ("chosen", "rejected")}
            for i in range(rows)
        ]
    )


def thumbs(rows=26):
    data = pairs(rows)
    return Dataset.from_list(
        [
            {"prompt": row["prompt"], "completion": row[side], "label": side == "chosen"}
            for row in data
            for side in ("chosen", "rejected")
        ]
    )


class LengthDPO(LengthBatches, DPOTrainer):
    bucket_batches = 3


class BatchedKTO(KTOBatches, KTOTrainer):
    bucket_batches = 3


@pytest.fixture(scope="module")
def tiny():
    return embedded.folder("embedded://tiny").as_posix()


def options(path, **more):
    return {
        "output_dir": str(path), "use_cpu": True, "bf16": False, "report_to": "none", "max_length": 256,
        "logging_steps": 1, "per_device_train_batch_size": 4, "gradient_checkpointing": False,
        "disable_tqdm": True, **more,
    }  # fmt: skip


def record(trainer):
    """The trainer, which now keeps the token ids of each batch that it trains on."""
    trainer.seen = []
    step = trainer.training_step

    def recording(model, inputs, *args):
        trainer.seen.append(inputs["input_ids"].tolist())
        return step(model, inputs, *args)

    trainer.training_step = recording
    return trainer


def test_training_resumes_in_the_same_order_in_a_later_epoch(tiny, tmp_path):
    arguments = options(tmp_path, num_train_epochs=2, save_strategy="steps", save_steps=9)
    whole = record(LengthDPO(tiny, args=DPOConfig(**arguments), train_dataset=pairs()))
    whole.train()
    assert len(whole.seen) == 14 and whole.seen[:7] != whole.seen[7:]
    resumed = record(LengthDPO(tiny, args=DPOConfig(**arguments), train_dataset=pairs()))
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-9"))
    assert resumed.seen == whole.seen[9:]


def test_token_budget_trains_with_every_row_weighing_the_same(tiny, tmp_path):
    trainer = record(LengthDPO(tiny, args=DPOConfig(**options(tmp_path, num_train_epochs=1)), train_dataset=pairs()))
    trainer.tokens_per_batch = 1200
    trainer.train()
    rows = [len(ids) // 2 for ids in trainer.seen]
    assert sum(rows) == 26 and len(set(rows)) > 1
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    first = rows[0] / trainer.mean_rows * np.log(2)  # policy = reference: DPO's loss is ln 2 before the first step
    assert losses[0] == pytest.approx(first, abs=1e-3)


def test_kto_batches_mix_labels_and_turn_their_own_answers(tiny, tmp_path):
    trainer = BatchedKTO(tiny, args=KTOConfig(**options(tmp_path, max_length=512)), train_dataset=thumbs())
    batches = list(trainer.get_train_dataloader())
    assert [len(batch["label"]) for batch in batches] == [4] * 13
    mixtures = [batch["label"].sum().item() for batch in batches]
    assert sum(0 < labels < 4 for labels in mixtures) >= 12
    for batch in batches:
        length = [mask.argmax().item() for mask in batch["completion_mask"]]
        answers = [
            ids[at:][mask[at:].bool()].tolist()
            for ids, mask, at in zip(batch["input_ids"], batch["completion_mask"], length, strict=True)
        ]
        turned = [
            ids[at:][mask[at:].bool()].tolist()
            for ids, mask, at in zip(batch["KL_input_ids"], batch["KL_completion_mask"], length, strict=True)
        ]
        assert turned == answers[-1:] + answers[:-1]
    plain = KTOTrainer(tiny, args=KTOConfig(**options(tmp_path, max_length=512)), train_dataset=thumbs()).train_dataset
    assert sorted(plain["completion_ids"]) == sorted(trainer.train_dataset["completion_ids"])


def test_lengths_count_the_prompt_once_and_stop_at_max_length():
    columns = {"prompt_ids": [[1] * 5, [1] * 9], "chosen_ids": [[1] * 3, [1] * 9], "rejected_ids": [[1], [1]]}
    data = Dataset.from_dict(columns)
    assert row_lengths(data, 12).tolist() == [9, 13]
    assert row_lengths(data, None).tolist() == [9, 19]
    assert row_lengths(Dataset.from_dict({"text": ["a"]}), None) is None
