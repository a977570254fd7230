import json
import subprocess
import sys

import pytest
from base_section import BASE_FILE, pair
from datasets import IterableDataset
from omegaconf import ListConfig

from preftune.data.findings import DataError
from preftune.data.load import load


def rows(count=40, each=2):
    return [pair(f"Why {i // each}?", f"good {i}", f"bad {i}", id=f"r{i}") for i in range(count)]


def test_demo_data_loads_with_its_own_eval_file(section):
    demo = section("pkg://preftune.data.demo/train.jsonl", eval_split="pkg://preftune.data.demo/eval.jsonl")
    data = load(demo, "paired", None, None, 0)
    assert (len(data.train), len(data.eval)) == (96, 48)
    assert data.eval_pairs[:] == data.eval[:]
    assert not [finding for finding in data.findings if finding.severity == "error"]


def test_prompts_are_held_out_with_all_of_their_rows_whatever_their_order(loaded):
    data = loaded(rows(), eval_fraction=0.25)
    prompts = [{row["prompt"][0]["content"] for row in part} for part in (data.train, data.eval)]
    assert not prompts[0] & prompts[1]
    assert (len(data.train), len(data.eval)) == (30, 10)
    backwards = loaded(rows()[::-1], eval_fraction=0.25)
    assert {row["prompt"][0]["content"] for row in backwards.eval} == prompts[1]
    assert loaded(rows(), eval_fraction=0.25, seed=1).eval["id"][:] != data.eval["id"][:]


def test_eval_pairs_are_pairs_whatever_the_view(loaded):
    for view in ("paired", "unpaired", "demonstrations"):
        data = loaded(rows(), view=view, eval_fraction=0.25)
        assert set(data.eval_pairs.column_names) == {"id", "prompt", "chosen", "rejected"}
    assert set(data.eval.column_names) == {"id", "prompt", "completion"}
    messages = [{"prompt": f"Why {i}?", "completion": "So."} for i in range(10)]
    assert loaded(messages, view="demonstrations", eval_fraction=0.25).eval_pairs is None


def test_the_fingerprint_changes_with_what_is_taught_and_with_nothing_else(loaded, write, section):
    one = loaded(rows()).fingerprint
    assert loaded(rows()).fingerprint == one
    renamed = write("other.jsonl", [{"rejected": "bad 0"} | row for row in rows()])
    assert load(section(renamed), "paired", None, None, 0).fingerprint == one
    assert loaded(rows()[1:]).fingerprint != one
    assert loaded([pair("Why 0?", "good 0", "BAD 0"), *rows()[1:]]).fingerprint != one
    assert loaded(rows(), view="unpaired").fingerprint != one
    assert loaded(rows(), eval_fraction=0.25).fingerprint != one


def test_loading_twice_gives_the_same_data_set_to_what_caches_by_fingerprint(loaded):
    first, second = (loaded(rows(), view="unpaired") for _ in range(2))
    assert first.train._fingerprint == second.train._fingerprint
    assert first.train["id"][:] == second.train["id"][:]


def test_max_rows_bounds_what_is_read(loaded):
    assert loaded(rows(), max_rows=7).train["id"][:] == [f"r{i}" for i in range(7)]


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"pairs_rule": "best_wurst"}, "best_wurst is none of .*; did you mean best_worst"),
        ({"columns": {"promt": "question"}}, "promt is none of .*; did you mean prompt"),
        ({"eval_split": "test"}, "is no folder and no hub data set, and has no splits"),
        ({"columns": {"prompt": "question"}}, "data.columns names question; there are prompt, chosen"),
    ],
)
def test_settings_that_mean_nothing_are_refused_with_a_remedy(changes, told, loaded):
    with pytest.raises(DataError, match=told):
        loaded(rows(), **changes)


@pytest.mark.parametrize("view", ["paired", "unpaired", "demonstrations"])
def test_a_stream_gives_the_same_rows_as_the_whole_set(view, loaded):
    whole, stream = (loaded(rows(), view=view, streaming=streaming).train for streaming in (False, True))
    assert isinstance(stream, IterableDataset)
    assert sorted(row["id"] for row in stream) == sorted(whole["id"])
    assert list(stream.features) == [*whole.column_names, "tools", "chat_template_kwargs"]
    assert [row["id"] for row in stream] != [row["id"] for row in rows()]


def test_a_stream_stops_at_a_bad_row_or_skips_it_on_demand(loaded, tmp_path):
    broken = [*rows(30), pair(rejected=""), *rows(5)]
    with pytest.raises(DataError, match="empty_answer.*rows.jsonl:31"):
        loaded(broken, streaming=True)
    data = loaded(broken, streaming=True, token_rows=10)
    with pytest.raises(DataError, match="empty_answer.*rows.jsonl:31"):
        list(data.train)
    skipping = loaded(broken, streaming=True, on_bad_rows="skip")
    assert len(list(skipping.train)) == 35
    (skipped,) = [json.loads(line) for line in (tmp_path / "skipped.jsonl").open()]
    assert skipped["origin"] == "rows.jsonl:31"


def test_streams_mix_by_weight(write, loaded):
    a = write("a.jsonl", [pair(f"a{i}", id=f"a{i}") for i in range(300)])
    b = write("b.jsonl", [pair(f"b{i}", id=f"b{i}") for i in range(300)])
    mixed = loaded(ListConfig([{"path": a, "weight": 0.8}, {"path": b, "weight": 0.2}]), streaming=True).train
    names = [row["id"][0] for row in mixed]
    assert 0.1 < names.count("b") / len(names) < 0.3


def test_reading_data_leaves_torch_out(write):
    path = write("rows.jsonl", rows())
    code = f"""
import sys
from omegaconf import OmegaConf
from preftune.data.load import load
base = OmegaConf.load({str(BASE_FILE)!r}).data
load(OmegaConf.merge(base, {{"path": {path!r}}}), "paired", None, None, 0)
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_hh_dialogues_load_with_their_few_bad_rows_left_out(hh, loaded):
    data = loaded(hh, on_bad_rows="skip", eval_fraction=0.05)
    assert (len(data.train), len(data.eval), data.skipped) == (1889, 99, 12)
    assert data.shape == "whole dialogues in chosen and rejected, as Human/Assistant texts"
    assert {finding.code for finding in data.findings} == {"empty_answer", "role_order"}


def test_a_margin_is_read_where_a_loss_asks_for_it_and_named_as_unread_elsewhere(loaded):
    rows = [{"prompt": f"Why {n}?", "chosen": "So.", "rejected": "No.", "margin": n} for n in range(3)]
    rows.append({"prompt": "When?", "chosen": "Now.", "rejected": "Never."})
    asked = loaded(rows, view="margins")
    assert asked.train["margin"] == [0.0, 1.0, 2.0, 0.0]
    beside = loaded(rows)
    assert "margin" not in beside.train.column_names and "not read: margin (3)" in beside.line
    assert "margin" not in loaded([{**row, "margin": None} for row in rows], view="margins").train.column_names


def test_a_margin_that_is_no_number_is_named_with_its_row(loaded):
    rows = [{"prompt": "Why?", "chosen": "So.", "rejected": "No.", "margin": "large"}]
    with pytest.raises(DataError, match="margin is 'large', which is no number"):
        loaded(rows, view="margins")
