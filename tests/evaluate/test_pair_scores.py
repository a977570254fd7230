import pytest
import torch

from preftune.evaluate.pairs import PairScores, implicit_rewards

POLICY = PairScores(
    chosen=torch.tensor([-10.0, -30.0, -60.0, -90.0]),
    rejected=torch.tensor([-12.0, -20.0, -70.0, -80.0]),
    chosen_tokens=torch.tensor([10.0, 20.0, 30.0, 40.0]),
    rejected_tokens=torch.tensor([10.0, 22.0, 30.0, 44.0]),
)
REFERENCE = PairScores(
    chosen=POLICY.chosen - torch.tensor([1.0, 1.0, -1.0, -1.0]),
    rejected=POLICY.rejected,
    chosen_tokens=POLICY.chosen_tokens,
    rejected_tokens=POLICY.rejected_tokens,
)


def test_terciles_are_by_tokens_and_hold_every_pair():
    found = POLICY.summary()["by_length"]
    assert [row["tokens"] for row in found] == ["10–21", "30–30", "42–42"]
    assert [row["pairs"] for row in found] == [2, 1, 1]
    assert [row["logp_accuracy"] for row in found] == [0.5, 1.0, 0.0]


def test_the_last_look_has_both_accuracies_by_length():
    row = POLICY.summary()
    row |= implicit_rewards(POLICY, REFERENCE, beta=0.1)
    assert row["reward_accuracy"] == 0.5
    assert row["reward_margin"] == pytest.approx(0.0)
    assert [bucket["accuracy"] for bucket in row["by_length"]] == [1.0, 0.0, 0.0]
    assert [bucket["logp_accuracy"] for bucket in row["by_length"]] == [0.5, 1.0, 0.0]


def test_two_pairs_make_two_buckets():
    two = PairScores(POLICY.chosen[:2], POLICY.rejected[:2], POLICY.chosen_tokens[:2], POLICY.rejected_tokens[:2])
    assert [row["pairs"] for row in two.summary()["by_length"]] == [1, 1]
