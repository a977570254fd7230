from collections import Counter

import numpy as np
from datasets import Dataset, Features
from hypothesis import given, settings
from hypothesis import strategies as st

from preftune.data import table
from preftune.data.findings import Findings
from preftune.data.messages import split_pair
from preftune.data.shapes import LABELLED, PAIRS
from preftune.data.views import kto_weights, pair_up, shares, spread, stratified, unpair

ROW_SETS = st.lists(
    st.tuples(st.integers(0, 9), st.text("ab", max_size=3), st.text("cd", max_size=3)), min_size=1, max_size=40
)
FEATURES = {
    kind: Features({name: each for name, each in features.items() if name not in table.BESIDE})
    for kind, features in table.FEATURES.items()
}
FEW = settings(max_examples=40, deadline=None)


def says(text, role="assistant"):
    return [{"role": role, "content": text}]


def pairs_of(drawn):
    rows = [
        {"id": str(i), "origin": f"f:{i}", "prompt": says(f"p{p}", "user"), "chosen": says(a), "rejected": says(b)}
        for i, (p, a, b) in enumerate(drawn)
    ]
    return Dataset.from_list(rows, FEATURES[PAIRS])


def contents(rows, *columns):
    return Counter(tuple(row[column][0]["content"] for column in columns) for row in rows)


@FEW
@given(ROW_SETS)
def test_unpairing_keeps_every_answer_once_under_its_label(drawn):
    pairs = pairs_of(drawn)
    loose = unpair(pairs, Findings())
    assert len(loose) == 2 * len(pairs)
    assert len(set(loose["id"])) == len(loose)
    for side, label in (("chosen", True), ("rejected", False)):
        mine = [row for row in loose if row["label"] is label]
        assert contents(mine, "prompt", "completion") == contents(pairs, "prompt", side)


@FEW
@given(st.lists(st.tuples(st.integers(0, 5), st.booleans()), min_size=1, max_size=40))
def test_pairing_up_uses_each_answer_once_and_counts_what_is_left(drawn):
    rows = [
        {"id": str(i), "origin": f"f:{i}", "prompt": says(f"p{p}", "user"), "completion": says(f"a{i}"), "label": label}
        for i, (p, label) in enumerate(drawn)
    ]
    findings = Findings()
    pairs = pair_up(Dataset.from_list(rows, FEATURES[LABELLED]), findings)
    used = [row[side][0]["content"] for row in pairs for side in ("chosen", "rejected")]
    assert len(set(used)) == len(used)
    assert len(used) + sum(each.count for each in findings.all()) == len(rows)
    by_answer = {row["completion"][0]["content"]: row for row in rows}
    for row in pairs:
        good, bad = (by_answer[row[side][0]["content"]] for side in ("chosen", "rejected"))
        assert good["label"] and not bad["label"]
        assert good["prompt"] == bad["prompt"] == row["prompt"]
    for prompt in {p for p, _ in drawn}:
        labels = [label for p, label in drawn if p == prompt]
        assert sum(row["prompt"][0]["content"] == f"p{prompt}" for row in pairs) == min(
            sum(labels), labels.count(False)
        )


@FEW
@given(ROW_SETS)
def test_unpaired_and_paired_up_again_gives_the_pairs_back(drawn):
    distinct = list({p: (p, a, b) for p, a, b in drawn}.values())
    pairs = pairs_of(distinct)
    again = pair_up(unpair(pairs, Findings()), Findings())
    assert contents(again, "prompt", "chosen", "rejected") == contents(pairs, "prompt", "chosen", "rejected")


@given(st.integers(1, 60), st.integers(1, 60), st.integers(0, 5))
def test_stratified_order_mixes_labels_in_every_stretch_and_loses_no_row(good, bad, seed):
    labels = [True] * good + [False] * bad
    order = stratified(labels, np.arange(good + bad, dtype=np.uint64), seed)
    assert sorted(order) == list(range(good + bad))
    told = np.array(labels)[order]
    share = good / (good + bad)
    for size in (4, 8, 16):
        for start in range(0, len(told) - size + 1):
            assert abs(told[start : start + size].sum() - share * size) < 2


@given(st.integers(4, 80), st.integers(0, 5))
def test_no_two_neighbours_of_a_stratified_order_share_a_prompt(pairs, seed):
    prompts = np.repeat(np.arange(pairs, dtype=np.uint64), 2)
    order = stratified([True, False] * pairs, prompts, seed)
    ordered = prompts[order]
    assert (ordered[1:] != ordered[:-1]).all()


def test_no_batch_of_unpaired_pairs_holds_one_label_alone_and_the_order_is_shuffled(loaded):
    rows = [{"prompt": f"p{i}", "chosen": f"a{i}", "rejected": f"b{i}"} for i in range(2500)]
    data = loaded(rows, view="unpaired")
    labels = np.array(data.train["label"])
    batches = labels[: len(labels) // 16 * 16].reshape(-1, 16).sum(axis=1)
    assert len(labels) == 5000 and batches.min() >= 7 and batches.max() <= 9
    numbers = [int(row["prompt"][0]["content"][1:]) for row in data.train]
    assert abs(np.corrcoef(numbers, range(len(numbers)))[0, 1]) < 0.1
    assert data.kto_weights == {"desirable_weight": 1.0, "undesirable_weight": 1.0}
    assert "2,500 good and 2,500 bad" in data.line


@given(st.integers(1, 10_000), st.integers(1, 10_000), st.floats(1, 4 / 3))
def test_kto_weights_balance_the_labels_within_the_papers_bounds(good, bad, ratio):
    weights = kto_weights(good, bad, ratio)
    weighed = weights["desirable_weight"] * good / (weights["undesirable_weight"] * bad)
    assert abs(weighed / ratio - 1) < 1e-3
    assert min(weights.values()) == 1.0


@given(st.lists(st.integers(1, 500), min_size=1, max_size=5), st.data())
def test_shares_follow_the_weights_and_use_up_one_source(sizes, data):
    weights = [data.draw(st.floats(0.05, 1)) for _ in sizes]
    counts = shares(sizes, weights)
    assert all(count <= size for count, size in zip(counts, sizes, strict=True))
    assert any(count == size for count, size in zip(counts, sizes, strict=True))
    total = sum(counts)
    for count, weight in zip(counts, weights, strict=True):
        assert abs(count - total * weight / sum(weights)) <= 1 + len(sizes) / 2


@given(st.lists(st.integers(0, 60), min_size=1, max_size=4))
def test_spreading_keeps_every_row_once_and_each_set_in_order(sizes):
    order = spread(sizes)
    assert sorted(order) == list(range(sum(sizes)))
    start = 0
    for size in sizes:
        mine = [row for row in order if start <= row < start + size]
        assert mine == sorted(mine)
        start += size


TURNS = st.lists(st.sampled_from("ab"), min_size=0, max_size=3)


@given(TURNS, TURNS, TURNS)
def test_splitting_whole_dialogues_loses_no_message(shared, left, right):
    def dialogue(*parts):
        roles = ("user", "assistant")
        said = [text for part in parts for text in part]
        said = said if len(said) % 2 == 0 else [*said, "end"]
        return [{"role": roles[place % 2], "content": text} for place, text in enumerate(["x", "y", *said])]

    chosen, rejected = dialogue(shared, left), dialogue(shared, right)
    prompt, good, bad = split_pair(chosen, rejected)
    assert prompt + good == chosen and prompt + bad == rejected
    assert good[0]["role"] == bad[0]["role"] == "assistant"
    assert prompt[-1]["role"] == "user"
    assert len(good) == 1 or len(bad) == 1 or good[:2] != bad[:2]
