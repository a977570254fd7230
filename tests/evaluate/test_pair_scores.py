import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from preftune.evaluate import pairs
from preftune.evaluate.kept import Scorer
from preftune.evaluate.pairs import PairScores, implicit_rewards
from preftune.models import embedded

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


@pytest.fixture
def loaded_tiny():
    """The tiny model, its tokenizer and five pairs."""
    folder = embedded.folder("embedded://tiny")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    answers = [("Good.", "Bad, and longer."), ("Yes.", "No."), ("Left.", "Right."), ("One.", "Two."), ("A b c.", "D.")]
    said = [[[{"role": "assistant", "content": text}] for text in both] for both in answers]
    asked = [{"role": "user", "content": "Which of the two is it?"}]
    rows = Dataset.from_list([{"prompt": asked, "chosen": a, "rejected": b} for a, b in said])
    return AutoModelForCausalLM.from_pretrained(folder), tokenizer, rows


def test_scores_by_the_fast_forward_are_those_of_trls_own(loaded_tiny, monkeypatch):
    model, tokenizer, rows = loaded_tiny
    scorer = Scorer(tokenizer, 256, bf16=False, keeps=False)
    fast = scorer.score(model, rows)
    assert "forward" not in vars(model)  # what was lent is taken back
    run = model.tokens_run[1]
    monkeypatch.setattr(pairs, "install_for_scoring", lambda *given: None)
    plain = scorer.score(model, rows)
    assert run > 0
    for name in ("chosen", "rejected", "chosen_tokens", "rejected_tokens"):
        assert torch.allclose(getattr(fast, name), getattr(plain, name), atol=1e-3), name
