"""The layout: what is shared, what is kept, what sees what; and the way back, for any batch."""

import functools
import shutil

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import tiny_model
from trl.trainer.utils import add_fused_lm_head

from preftune.fastpath import packed
from preftune.fastpath.attention import masks, row_multiple
from preftune.fastpath.forward import output_of
from preftune.fastpath.host import IGNORED
from preftune.fastpath.layout import grouped, read_rows
from preftune.fastpath.packed import lay_out, place

FIELDS = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")


def padded(rows: list[tuple[list[int], list[int]]]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Token ids, mask and labels of rows given as (prompt, answer), padded on the right with token 0."""
    columns = max(len(prompt) + len(answer) for prompt, answer in rows)
    ids, seen = torch.zeros(len(rows), columns, dtype=torch.long), torch.zeros(len(rows), columns, dtype=torch.long)
    labels = torch.full_like(ids, IGNORED)
    for row, (prompt, answer) in enumerate(rows):
        ids[row, : len(prompt) + len(answer)] = torch.tensor(prompt + answer)
        seen[row, : len(prompt) + len(answer)] = 1
        labels[row, len(prompt) : len(prompt) + len(answer)] = torch.tensor(answer)
    return ids, seen, labels


def test_a_pair_shares_its_prompt_and_leaves_out_last_tokens():
    ids, _, labels = padded([([5, 6, 7], [8, 9]), ([5, 6, 7], [3, 4, 2])])
    layout = lay_out(read_rows(ids, labels, width=100), width=8)
    assert layout.input_ids.tolist() == [[5, 6, 7, 8, 3, 4]]
    assert layout.position_ids.tolist() == [[0, 1, 2, 3, 3, 4]]
    assert layout.branch.tolist() == [[0, 0, 0, 1, 2, 2]]
    assert layout.picks.tolist() == [2, 2, 3, 4, 5]
    assert layout.targets.tolist() == [3, 8, 9, 4, 2]


def test_as_many_answers_as_there_are_share_a_prompt():
    rows = [([5, 6, 7], [8, 9]), ([4], [2, 2]), ([5, 6, 7], [3, 4, 2]), ([5, 6, 7], [8, 1])]
    ids, _, labels = padded(rows)
    layout = lay_out(read_rows(ids, labels, width=100), width=1)
    assert layout.input_ids.tolist() == [[5, 6, 7, 8, 3, 4, 8], [4, 2, 0, 0, 0, 0, 0]]
    assert layout.branch.tolist()[0] == [0, 0, 0, 1, 3, 3, 4]


def test_rows_are_joined_where_that_is_cheaper():
    long = [list(range(10, 30)) + [n] * 200 for n in (1, 2)]
    assert grouped([*long, [10, 3]], width=8)[0].tolist() == [0, 1, 2]  # a row is seen by all of a wide tree
    group, shared = grouped([*long, [10, 3]], width=4096)
    assert group.tolist() == [0, 0, 1] and shared.tolist() == [20, 20, 0]  # and never for one token of twenty


def test_answers_that_begin_alike_share_more_than_the_prompt():
    ids, _, labels = padded([([5, 6], [8, 9, 1]), ([5, 6], [8, 4])])
    layout = lay_out(read_rows(ids, labels, width=100), width=8)
    assert layout.input_ids.tolist() == [[5, 6, 8, 9]]
    assert layout.slots.tolist() == [0, 2, 3, 0, 1]


def test_chosen_is_hidden_from_rejected_and_each_pair_from_the_other():
    ids, _, labels = padded([([5], [8, 9]), ([6], [7]), ([5], [3, 4]), ([6], [2, 2])])
    layout = lay_out(read_rows(ids, labels, width=100), width=100)
    assert layout.input_ids.tolist() == [[5, 8, 3, 6, 2]]
    config = tiny_model("llama").config
    assert masks(layout, config, torch.float32)[0, 0].int().tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 0, 1, 0, 0],
        [0, 0, 0, 1, 0],
        [0, 0, 0, 1, 1],
    ]


@given(st.lists(st.integers(0, 300), min_size=1, max_size=24).filter(any), st.integers(8, 600), st.sampled_from([1, 8]))
def test_trees_never_overlap_and_never_cost_more_than_padding(sizes, width, multiple):
    starts, (rows, columns) = place(np.array(sizes), width, multiple)
    taken = np.zeros(rows * columns, dtype=int)
    for start, size in zip(starts, sizes, strict=True):
        assert size == 0 or start // columns == (start + size - 1) // columns
        taken[start : start + size] += 1
    assert taken.max() == 1
    longest = max(sizes) + -max(sizes) % multiple
    assert rows * columns * (6 * width + columns) <= len(sizes) * longest * (6 * width + longest)


@functools.cache
def scorer(family: str):
    model = tiny_model(family).eval()
    add_fused_lm_head(model, outputs=FIELDS)
    return model


tokens = st.lists(st.integers(1, 4), min_size=0, max_size=9)


@st.composite
def pairs_of_rows(draw):
    """Pairs whose rows begin alike, each cut at a length that may leave no answer, or no token of the prompt alike."""
    prompts = st.lists(st.integers(1, 4), min_size=1, max_size=9)
    pairs = draw(st.lists(st.tuples(prompts, tokens, tokens), min_size=1, max_size=5))
    cut, keep_end = draw(st.integers(1, 20)), draw(st.booleans())
    rows = []
    for side in (1, 2):
        for pair in pairs:
            marked = [(token, False) for token in pair[0]] + [(token, True) for token in pair[side]]
            marked = marked[-cut:] if keep_end else marked[:cut]
            rows.append(([t for t, answer in marked if not answer], [t for t, answer in marked if answer]))
    return rows


@pytest.mark.parametrize("family", ["llama", "mistral-short-window", "gpt2"])
def test_any_batch_scores_as_trl_scores_it(family):
    model = scorer(family)

    @settings(max_examples=40, deadline=None)
    @given(pairs_of_rows(), st.sampled_from([1, 32]))
    def holds(rows, width):
        ids, seen, labels = padded(rows)
        if not (labels[:, 1:] != IGNORED).any():
            return
        theirs = model(input_ids=ids, attention_mask=seen, labels=labels, fused_lm_head=True)
        ours = output_of(packed, model.forward, model, lay_out(read_rows(ids, labels, width), width=32))
        for name in FIELDS[:-1]:
            torch.testing.assert_close(getattr(ours, name), getattr(theirs, name), rtol=1e-5, atol=1e-5)
        assert torch.equal(ours.is_top1, theirs.is_top1)
        assert torch.equal(ours.label_mask, theirs.label_mask)
        weights = torch.linspace(-1, 1, theirs.log_probs.numel()).view(theirs.log_probs.shape)
        gradients = [
            torch.autograd.grad((output.log_probs * weights).sum(), list(model.parameters()), allow_unused=True)
            for output in (ours, theirs)
        ]
        for mine, yours in zip(*gradients, strict=True):
            torch.testing.assert_close(mine, yours, rtol=1e-4, atol=2e-5)

    with torch.random.fork_rng():
        holds()


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="flex_attention is compiled, which takes a C++ compiler")
def test_flex_attention_scores_as_the_dense_mask_does():
    ids, _, labels = padded([([5] * 20, [8, 9, 4]), ([6, 7], [7, 3, 2]), ([5] * 20, [3, 4]), ([6, 7], [2, 2])])
    model = tiny_model("llama").eval()
    add_fused_lm_head(model)
    outputs = []
    with torch.no_grad():
        for implementation in ("sdpa", "flex_attention"):
            model.config._attn_implementation = implementation
            multiple = row_multiple(model.config, ids.device)
            outputs.append(
                output_of(packed, model.forward, model, lay_out(read_rows(ids, labels, 32), 32, multiple)).log_probs
            )
    torch.testing.assert_close(*outputs, rtol=1e-5, atol=1e-5)
