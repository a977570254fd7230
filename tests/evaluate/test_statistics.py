import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from preftune.evaluate.statistics import at_equal_length, interval


def test_wilson_is_the_textbook_interval():
    assert interval(0.8, 10) == pytest.approx([0.4902, 0.9433], abs=1e-4)  # Newcombe 1998's method 3 for 8 of 10
    assert interval(0.0, 10) == pytest.approx([0.0, 0.2775], abs=1e-4)
    assert interval(1.0, 10) == pytest.approx([0.7225, 1.0], abs=1e-4)


@given(st.integers(1, 200), st.data())
def test_wilson_holds_the_share(n, data):
    k = data.draw(st.integers(0, n))
    low, high = interval(k / n, n)
    assert 0 <= low <= k / n + 1e-12 and k / n - 1e-12 <= high <= 1


def test_a_ranking_by_length_alone_comes_out_near_a_half():
    longer = torch.randn(400, generator=torch.Generator().manual_seed(0)) * 30 + 25  # chosen is mostly longer
    wins = (longer > 0).double()
    assert wins.mean() > 0.75
    assert at_equal_length(wins, longer) == pytest.approx(0.5, abs=0.1)


def test_a_ranking_without_length_keeps_its_accuracy():
    draw = torch.Generator().manual_seed(0)
    wins = (torch.rand(4000, generator=draw) < 0.7).double()
    assert at_equal_length(wins, torch.randn(4000, generator=draw)) == pytest.approx(0.7, abs=0.03)


@pytest.mark.parametrize("outcome", [0.0, 0.5, 1.0])
def test_outcomes_that_are_all_the_same_are_the_answer(outcome):
    assert at_equal_length(torch.full((5,), outcome), torch.arange(5.0)) == outcome


def test_equal_lengths_change_nothing():
    assert at_equal_length(torch.tensor([1.0, 1.0, 0.0, 1.0]), torch.zeros(4)) == pytest.approx(0.75, abs=1e-4)
