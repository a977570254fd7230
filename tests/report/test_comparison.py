"""Runs beside each other: matched by KL, controlled for length, and honest where they cannot be."""

import json
import math
import subprocess
import sys

import pytest

from preftune.report import comparison, comparison_report
from preftune.report.comparison import KL, LOG_RATIO
from preftune.report.comparison_report import as_json, as_text
from preftune.report.record import ReportError
from recipes.compare import main


def evaluation(step, accuracy, kl):
    """A held-out row of metrics.jsonl with its KL, and log-ratios that go with it (kl ≈ r²/2)."""
    far = (2 * kl) ** 0.5
    row = {"eval_loss": 0.5, "eval_rewards/accuracies": accuracy, "eval_rewards/margins": 1.0, "eval_kl/per_token": kl}
    for side in ("chosen", "rejected"):
        row |= {f"eval_logratios/{side}_per_token": -far, f"eval_logps/{side}_per_token": -2.2 - far}
    return {"step": step, "seconds": step, **row}


def without_reference(row):
    return {name: value for name, value in row.items() if "kl/" not in name and "logratios" not in name}


@pytest.fixture
def far_and_near(a_run):
    """A run that ends at 90% far from its reference and was at 70% near it, and one that ends near it at 80%."""
    far = a_run("far", [evaluation(5, 0.7, 0.01), evaluation(10, 0.9, 0.3)], accuracy=0.9)
    near = a_run("near", [evaluation(5, 0.6, 0.002), evaluation(10, 0.8, 0.011)], accuracy=0.8)
    return [far, near]


def test_runs_are_ranked_where_they_moved_equally_far(far_and_near):
    found = comparison.compare(far_and_near)
    assert found.measure == KL and found.common == 0.011
    assert [(each.name, each.rank, each.at.step, each.at.accuracy) for each in found.entries] == [
        ("near", 1, 10, 0.8),
        ("far", 2, 5, 0.7),
    ]
    assert found.entries[1].points[-1].accuracy == 0.9


def test_equals_share_a_rank_and_none_is_called_the_best(a_run):
    rows = [evaluation(5, 0.6, 0.002), evaluation(10, 0.8, 0.011)]
    found = comparison.compare([a_run(name, rows, 0.8) for name in ("one", "two", "three")])
    assert [each.rank for each in found.entries] == [1, 1, 1]
    assert [each.rank_length_controlled for each in found.entries] in ([1, 1, 1], [None, None, None])
    assert "<h1>3 runs level: 80.0%" in comparison_report.html(found)
    assert any("do not tell one apart from three, two" in note for note in found.notes)


def test_without_evaluations_in_between_final_values_are_ranked_and_it_is_said(a_run):
    runs = [a_run("far", [evaluation(10, 0.9, 0.3)], 0.9), a_run("near", [evaluation(10, 0.8, 0.01)], 0.8)]
    found = comparison.compare(runs)
    assert found.common is None and [each.name for each in found.entries] == ["far", "near"]
    assert any(note.startswith("Not at matched KL") for note in found.notes)
    assert "not at matched KL" in as_text(found)


def test_a_loss_without_a_reference_is_matched_by_its_log_probs(a_run, far_and_near):
    rows = [without_reference(evaluation(5, 0.75, 0.01)), without_reference(evaluation(10, 0.95, 0.3))]
    found = comparison.compare([*far_and_near, a_run("orpo", rows, 0.95)])
    assert found.measure == LOG_RATIO
    assert {each.name: each.at.step for each in found.entries} == {"far": 5, "near": 10, "orpo": 5}
    assert next(e for e in found.entries if e.name == "orpo").at.kl == pytest.approx(0.02**0.5)
    assert any("orpo, before its end: the accuracy by log-prob" in note for note in found.notes)


def test_a_run_that_did_not_move_is_not_ranked(a_run, far_and_near):
    found = comparison.compare([*far_and_near, a_run("still", [evaluation(10, 0.99, 1e-7)], 0.99)])
    assert found.entries[-1].name == "still" and found.entries[-1].rank is None
    assert any("still did not move" in note for note in found.notes)


def test_length_is_controlled_for_by_weighing_all_lengths_alike(a_run):
    one = a_run("short_only", [evaluation(10, 0.8, 0.01)], accuracy=0.8, lengths=(1.0, 0.7, 0.4))
    two = a_run("all_lengths", [evaluation(10, 0.78, 0.01)], accuracy=0.78, lengths=(0.8, 0.78, 0.76))
    short, even = comparison.compare([one, two]).entries
    assert (short.name, short.rank, short.rank_length_controlled) == ("short_only", 1, 2)
    assert (even.name, even.rank, even.rank_length_controlled) == ("all_lengths", 2, 1)
    assert short.merit == (0.8, pytest.approx(0.7)) and even.merit == (0.78, pytest.approx(0.78))


def test_the_interval_is_that_of_the_pairs_and_close_runs_are_called_close(far_and_near):
    found = comparison.compare(far_and_near)
    low, high = found.entries[0].interval
    assert (
        found.entries[0].values["pairs"] == 120
        and low == pytest.approx(0.720, abs=0.002)
        and high == pytest.approx(0.862, abs=0.002)
    )
    notes = comparison.compare(list(reversed(far_and_near))).notes
    assert not any("apart" in note for note in notes)  # 70% is below


def test_a_pipeline_is_compared_by_its_last_stage(a_run, far_and_near):
    pipe = a_run("pipe", accuracy=0.1)
    a_run("pipe/sft", manifest_json={"created": "1"})
    last = a_run("pipe/preference", [evaluation(10, 0.85, 0.01)], 0.85, manifest_json={"created": "2"})
    found = comparison.compare([pipe, *far_and_near])
    assert (found.entries[0].name, found.entries[0].record.path) == ("pipe", last)


def test_a_sweeps_folder_stands_for_its_runs(far_and_near, tmp_path):
    assert len(comparison.compare([tmp_path]).entries) == 2


def test_other_held_out_rows_and_other_starts_are_said(a_run, far_and_near):
    other = a_run("other", [evaluation(10, 0.8, 0.01)], config={"train": {"seed": 7}})
    notes = comparison.compare([*far_and_near, other]).notes
    assert any("held out different rows" in note for note in notes)


def test_a_run_that_did_not_finish_is_left_out_by_name(a_run, far_and_near):
    broken = a_run("broken", summary_json=None)
    found = comparison.compare([*far_and_near, broken])
    assert len(found.entries) == 2 and any(str(broken) in note for note in found.notes)
    with pytest.raises(ReportError, match="broken"):
        comparison.compare([broken, a_run("broken2", summary_json=None)])


def test_one_run_and_no_run_are_refused_by_name(a_run, tmp_path):
    with pytest.raises(ReportError, match="name two or more"):
        comparison.compare([a_run()])
    with pytest.raises(ReportError, match="elsewhere"):
        comparison.compare([tmp_path / "elsewhere", tmp_path / "run"])


def test_json_holds_the_ranking_and_no_nan(a_run, far_and_near):
    odd = a_run("odd", [evaluation(5, math.nan, 0.01), evaluation(10, 0.5, math.nan)], accuracy=math.nan)
    found = json.loads(as_json(comparison.compare([*far_and_near, odd])))
    assert [(each["name"], each["rank"]) for each in found["runs"]] == [("near", 1), ("far", 2), ("odd", None)]
    assert (
        found["runs"][0]["loss"] == "dpo" and found["runs"][0]["beta"] == 0.1 and found["runs"][2]["accuracy"] is None
    )


def test_the_page_shows_the_ranking_and_the_curves_of_all(a_run, far_and_near, tmp_path):
    rival = a_run("<b>rival", [evaluation(10, 0.75, 0.012)], 0.75, config={"loss": {"beta": 0.5}})
    text = comparison_report.compare([*far_and_near, rival], tmp_path / "page.html").read_text(encoding="utf-8")
    assert "<b>rival" not in text and "&lt;b&gt;rival" in text
    assert "<h1>near: 80.0% (72–86%)</h1>" in text and ">0.5</td>" in text
    for title in ("Held-out accuracy", "Held-out accuracy by KL", "KL to the reference, held-out"):
        assert f"<figcaption>{title}</figcaption>" in text


def test_the_recipe_prints_json_and_writes_the_page_without_torch(far_and_near, tmp_path):
    arguments = [*map(str, far_and_near), "format=json", "--output", str(tmp_path / "page.html")]
    code = f"import sys; sys.argv[1:] = {arguments!r}; from recipes.compare import main; main()"
    code += "; assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["runs"][0]["name"] == "near" and (tmp_path / "page.html").exists()


@pytest.mark.parametrize(("last", "code", "told"), [("format=xml", 2, "format=json"), ("empty", 1, "no run directory")])
def test_the_recipe_refuses_what_is_no_format_and_no_run(last, code, told, far_and_near, tmp_path, monkeypatch, capsys):
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["compare", *map(str, far_and_near), last])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == code and told in capsys.readouterr().err


def seeded(a_run, loss, accuracies):
    return [
        a_run(
            f"{loss}-{seed}", [evaluation(5, 0.6, 0.009), evaluation(10, accuracy, 0.011)], accuracy,
            config={"loss": {"loss_type": [loss]}, "train": {"seed": seed}, "data": {"eval_split": "held.jsonl"}},
            manifest_json={"choices": {"loss": loss}},
        )
        for seed, accuracy in enumerate(accuracies, start=1)
    ]  # fmt: skip


def test_a_loss_is_better_only_where_the_spreads_over_seeds_do_not_overlap(a_run):
    found = comparison.compare(
        [
            *seeded(a_run, "dpo", (0.80, 0.82, 0.84)),
            *seeded(a_run, "ipo", (0.79, 0.81, 0.83)),
            *seeded(a_run, "nca", (0.6, 0.61)),
        ]
    )
    assert [(each.label, len(each.runs)) for each in found.seeds] == [("dpo", 3), ("ipo", 3), ("nca", 2)]
    assert (found.seeds[0].mean, found.seeds[0].spread) == (pytest.approx(0.82), pytest.approx(0.02))
    assert {each.rank for each in found.entries if each.name[:3] != "nca"} == {1}
    assert {each.rank for each in found.entries if each.name[:3] == "nca"} == {7}
    assert any(note.startswith("dpo is better than nca:") for note in found.notes)
    assert any(note.startswith("dpo is not told apart from ipo:") for note in found.notes)
    text, page = as_text(found), comparison_report.html(found)
    assert "82.0% ± 2.0%" in text and "82.0% ± 2.0%" in page and "<h1>2 losses level: dpo 82.0%" in page
    assert json.loads(as_json(found))["seeds"][2] == {
        "label": "nca", "n": 2, "mean": pytest.approx(0.605), "standard_deviation": pytest.approx(0.00707, rel=1e-2)
    }  # fmt: skip


def test_a_single_seed_beats_nothing(a_run):
    found = comparison.compare([*seeded(a_run, "dpo", (0.60, 0.62)), *seeded(a_run, "ipo", (0.95,))])
    assert {each.rank for each in found.entries} == {1}
    assert any("ipo is not told apart from dpo" in note and "single seed" in note for note in found.notes)
