import json
import re
import time

import numpy as np
import pytest
from base_section import pair
from hydra import compose, initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf

from preftune.data.findings import DataError
from preftune.data.label_noise import reading, swap_probabilities
from preftune.data.load import inspect, load
from preftune.data.set_checks import couples_in_order
from preftune.report import data_report
from preftune.report.data_report import as_dict

TINY = ["model=tiny", "hardware=cpu", "data=file"]


def rows(count=60):
    return [pair(f"Why {i}?", f"good answer {i}", f"bad answer {i % 7}") for i in range(count)]


@pytest.fixture
def reviewed(write, tmp_path, capsys):
    """reviewed(rows, "format=json", …): the exit code of recipes.inspect_data on these rows, and what it printed."""

    def review(content, *changes):
        GlobalHydra.instance().clear()
        path = f"data.path={write('rows.jsonl', content)}"
        with initialize_config_module("preftune.conf", version_base="1.3"):
            cfg = compose("inspect_data", [*TINY, path, f"output_dir={tmp_path / 'out'}", *changes])
        return data_report.review(cfg), capsys.readouterr().out

    return review


def test_a_review_prints_one_json_object_and_leaves_a_page(reviewed, tmp_path):
    out, twice = tmp_path / "out", pair("Why 3?", "good answer 3", "bad answer 3")
    code, printed = reviewed([*rows(), twice], "format=json", "suspects=5")
    assert code == 0
    told = json.loads(printed)
    assert told == json.loads((out / "findings.json").read_text())
    assert told["rows"] == {"read": 61, "train": 58, "eval": 3, "skipped": 0}
    assert told["shape"] == "prompt, chosen and rejected as texts"
    assert set(told["tokens"]) == {"prompt", "chosen", "rejected"}
    finding = next(finding for finding in told["findings"] if finding["code"] == "duplicate_rows")
    assert finding["severity"] == "warning" and finding["count"] == 1 and finding["examples"] == ["rows.jsonl:61"]
    suspects = [json.loads(line) for line in (out / "suspects.jsonl").open()]
    assert [row["rank"] for row in suspects] == [1, 2, 3, 4, 5]
    assert list(suspects[0]) == ["rank", "swapped", "id", "origin", "prompt", "chosen", "rejected"]
    assert suspects[0]["swapped"] >= suspects[-1]["swapped"]
    assert 'class="histogram"' in (out / "report.html").read_text()


def test_errors_in_the_data_end_a_review_with_1(reviewed):
    code, printed = reviewed([*rows(), pair("How?", "")])
    assert code == 1
    assert "error: empty_answer, 1: " in printed and "rows.jsonl:61: chosen" in printed
    assert "|good| answer" not in printed  # the tiny tokenizer has one token a byte
    assert "chosen (" in printed and "scored" in printed


def test_suspects_are_sought_among_pairs_alone(reviewed):
    with pytest.raises(DataError, match="suspects=5: only pairs have labels to doubt"):
        reviewed([{"prompt": "Why?", "completion": "So."}] * 12, "suspects=5")


@pytest.fixture(scope="module")
def hh_section():
    from base_section import BASE, HH

    if not HH.exists():
        pytest.skip("needs ../shared/data/hh-harmless-2000.jsonl.gz")
    return OmegaConf.create(
        OmegaConf.to_container(BASE.data, resolve=False) | {"path": str(HH), "on_bad_rows": "fail", "token_rows": None}
    )


def test_2000_hh_dialogues_are_inspected_in_under_20_seconds_with_a_page_that_needs_nothing(hh_section, byte_tokenizer):
    started = time.process_time()
    seen = inspect(hh_section, None, byte_tokenizer, 1024, 0)
    html = data_report.html(seen)
    assert time.process_time() - started < 20
    assert seen.read == 2000
    assert {each.code for each in seen.findings if each.severity == "error"} == {"empty_answer", "role_order"}
    assert not re.search(r"(src|href)=|url\(|@import|<script|https?://", html)
    assert html.count('class="histogram"') == 5 and html.count('class="meter"') == 6
    figures = as_dict(seen)["sets"]["pairs"]
    assert 0.4 < figures["longer_is_better"] < 0.5 < figures["bag_of_words"] < 0.65


def test_swapped_labels_are_found_far_better_than_by_chance(section, byte_tokenizer):
    from base_section import BASE

    from preftune.models.load import load_model

    pairs = load(section("pkg://preftune.data.demo/train.jsonl"), "paired", None, None, 0).train
    pairs = pairs.add_column("origin", pairs["id"][:])
    model = load_model(OmegaConf.merge(BASE.model, {"path": "embedded://tiny"}), OmegaConf.create({}), True)
    features = reading(model, byte_tokenizer, pairs, 256)
    swapped = np.random.default_rng(0).permutation(len(pairs)) < 0.2 * len(pairs)
    doubts = swap_probabilities(np.where(swapped[:, None], -features, features))
    assert couples_in_order(doubts, swapped)[0] > 0.8
    assert swapped[np.argsort(-doubts)[: swapped.sum()]].mean() > 0.5
