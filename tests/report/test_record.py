"""Run directories as they are read, whole or not."""

import math

import pytest

from preftune.report import page, record
from preftune.report.record import ReportError


def trained(step, loss):
    return {"step": step, "seconds": step, "loss": loss}


def test_of_a_step_logged_twice_the_later_value_counts(a_run):
    run = a_run(rows=[trained(1, 0.7), trained(2, 0.6), trained(2, 0.5), trained(3, 0.4)])  # resumed before step 2
    assert record.read(run).series("loss") == {1: 0.7, 2: 0.5, 3: 0.4}


def test_nan_in_metrics_is_read_as_nan(a_run):
    series = record.read(a_run(rows=[trained(1, math.nan), trained(2, math.inf)])).series("loss")
    assert math.isnan(series[1]) and math.isinf(series[2])


def test_a_line_cut_off_by_a_kill_is_counted_and_left_out(a_run):
    run = a_run(rows=[trained(1, 0.7)])
    with (run / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"step": 2, "lo')
    seen = record.read(run)
    assert len(seen.rows) == 1 and seen.unreadable == 1


def test_every_file_but_the_config_may_be_missing(a_run):
    files = {"manifest_json": None, "summary_json": None, "findings_json": None, "data_findings_json": None}
    seen = record.read(a_run(**files))
    assert (seen.manifest, seen.summary, seen.findings, seen.data_findings, seen.rows) == ({}, {}, None, None, [])


def test_a_folder_that_is_no_run_is_named(tmp_path):
    with pytest.raises(ReportError, match=f"{tmp_path}: no run directory"):
        record.read(tmp_path)
    with pytest.raises(ReportError, match="nowhere: no such folder"):
        record.read(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("file", "text"), [("summary.json", '{"snapshots": ['), ("manifest.json", "[]"), ("config.yaml", "a: [")]
)
def test_a_broken_file_is_named(a_run, file, text):
    run = a_run()
    (run / file).write_text(text, encoding="utf-8")
    with pytest.raises(ReportError, match=file):
        record.read(run)


def test_stages_come_in_the_order_in_which_they_began(a_run):
    run = a_run("pipe")
    a_run("pipe/preference", manifest_json={"created": "2026-01-01T02:00:00"})
    a_run("pipe/sft", manifest_json={"created": "2026-01-01T01:00:00"})
    seen = record.read(run)
    assert [stage.name for stage in seen.stages] == ["sft", "preference"] and seen.last_stage.name == "preference"


def test_a_stage_that_was_moved_aside_is_no_part_of_the_run(a_run):
    run = a_run("pipe")
    a_run("pipe/sft", manifest_json={"created": "2026-01-01T01:00:00"})
    a_run("pipe/preference-replaced-20260101-020000", manifest_json={"created": "2026-01-01T02:00:00"})
    assert [stage.name for stage in record.read(run).stages] == ["sft"]


def test_a_run_of_an_older_version_is_read(a_run):
    """Whose summary says `looks` and whose gate says `strange_chosen`."""
    before, after = ({"perplexity": value, "logp_accuracy": 0.5, "by_length": []} for value in (4.0, 3.0))
    strange = [{"prompt": "Why?", "chosen": "So.", "logps_per_token": -9.1}]
    gate = {"perplexity": 4.0, "passed": True, "pairs": 8, "strange_chosen": strange, "strange_count": 1}
    seen = record.read(a_run(summary_json={"looks": [before, after]}, gate_json=gate))
    assert seen.snapshots == [before, after]
    assert "Outliers among the chosen answers, by log-prob per token: 1" in page.html(seen)
