"""The page of a run: whole whatever the run left, in words, and with its curves."""

import math
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from preftune.report import page, panels, record
from preftune.report.panels import PANELS, findings_on, thresholds


def rows(**metrics):
    values = {"rewards/chosen": 0.1, "rewards/rejected": -0.1, "rewards/accuracies": 0.8, "rewards/margins": 0.2}
    values |= {"logps/chosen_per_token": -2.0, "logps/rejected_per_token": -2.5, "loss": 0.6, "grad_norm": 1.0}
    values |= {"learning_rate": 1e-5} | metrics
    held_out = {f"eval_{name}": value for name, value in values.items() if name not in ("grad_norm", "learning_rate")}
    train = [{"step": step, "seconds": step, **values} for step in (1, 2, 3, 4)]
    return [*train[:2], {"step": 2, "seconds": 2, **held_out}, *train[2:], {"step": 4, "seconds": 4, **held_out}]


def finding(code="margin_explodes", step=3, value=25.0, threshold=20.0):
    return {
        "code": code,
        "step": step,
        "value": value,
        "threshold": threshold,
        "meaning": "It does.",
        "remedy": "Stop.",
    }


def page_of(run: Path) -> str:
    text = page.write(run).read_text(encoding="utf-8")
    Whole().feed(text)
    return text


class Whole(HTMLParser):
    """Fails where tags are not closed in the order in which they were opened."""

    EMPTY = {"meta", "br", "path", "use", "rect", "line", "!doctype"}

    def __init__(self):
        super().__init__()
        self.open = []

    def handle_starttag(self, tag, attrs):
        if tag not in self.EMPTY:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        pass

    def handle_endtag(self, tag):
        if tag not in self.EMPTY:
            assert self.open and self.open.pop() == tag, f"</{tag}> at {self.getpos()}"


def test_a_healthy_run_says_so_and_shows_every_part(a_run):
    text = page_of(a_run(rows=rows()))
    assert '<p class="verdict good">Healthy: finished, without a finding</p>' in text
    for part in ("Why", "What next", "Held-out accuracy by length", "Answers before and after", "Curves", "Perplexity"):
        assert f">{part}<" in text
    for title in (
        "Rewards",
        "Margin of the rewards",
        "Accuracy",
        "Log-probs per token (nats)",
        "Loss",
        "Learning rate",
    ):
        assert f"<figcaption>{title}</figcaption>" in text
    assert "Held-out accuracy 90.0% (83–94%)" in text and "<summary>manifest.json</summary>" in text


def test_findings_are_said_first_and_marked_at_their_step(a_run):
    text = page_of(a_run(rows=rows(), findings=[finding()]))
    assert "Not healthy: finished, with 1 finding" in text and "<li>Stop.</li>" in text
    seen = record.read(a_run("other", rows=rows(), findings=[finding(), finding("unheard_of", 2)]))
    shown = panels.shown(seen)
    marks = {panel.title: findings_on(panel, shown, seen.findings) for panel in shown}
    assert marks["Margin of the rewards"] == [(1, 3)]
    assert marks["Loss"] == [(2, 2)]  # a finding that no curve is about


def test_a_run_stopped_at_its_gate_has_a_page(a_run):
    gate = {"perplexity": 33.4, "max_perplexity": 10.0, "passed": False, "pairs": 112, "outlier_count": 1,
            "outliers": [{"prompt": "Why <b>?", "chosen": "So.", "logps_per_token": -9.1}]}  # fmt: skip
    findings = [finding("perplexity", 0, 33.4, 10.0)]
    status = {"state": "stopped", "why": "Stopped: perplexity at step 0 (33.4, threshold 10): It does. Stop."}
    text = page_of(a_run(findings=findings, gate_json=gate, summary_json=None, status_json=status))
    assert "Stopped before the first step: perplexity" in text
    assert "perplexity of 33.40 per token; limit 10" in text and "Nothing was logged: no step was taken." in text


@pytest.mark.parametrize(
    ("status", "said"),
    [
        ({"state": "interrupted", "why": "Interrupted: checkpoint-2 holds step 2"}, "Interrupted at step 4"),
        ({"state": "failed", "why": "RuntimeError: no memory"}, "RuntimeError: no memory"),
        ({"state": "running"}, "Not finished: at step 4"),
        (None, "Go on with the same command and resume=true (output_dir="),
    ],
)
def test_a_run_that_did_not_end_says_how(a_run, status, said):
    assert said in page_of(a_run(rows=rows(), summary_json=None, status_json=status))


def test_a_run_that_left_its_config_alone_did_not_start(a_run):
    nothing = {"manifest_json": None, "summary_json": None, "data_findings_json": None, "findings_json": None}
    assert "Did not start" in page_of(a_run(**nothing))


def test_an_accuracy_that_a_coin_may_have_is_not_called_healthy(a_run):
    assert "no better than a coin" in page_of(a_run(rows=rows(), accuracy=0.55))  # of 120 pairs


def test_what_comes_from_data_is_escaped(a_run):
    bad = "<script>alert(1)</script>"
    summary = {"snapshots": [], "samples": [{"prompt": bad, "before": bad, "after": bad}]}
    noted = [{"code": "c", "severity": "warning", "count": 1, "of": 2, "says": bad, "examples": [bad], "remedy": bad}]
    config = {"data": {"path": bad}}
    text = page_of(
        a_run("<i>run", findings=[finding(bad)], summary_json=summary, data_findings_json=noted, config=config)
    )
    assert "<script" not in text and "<i>run" not in text and "&lt;script&gt;" in text


def test_the_page_needs_no_network_and_no_script(a_run):
    text = page_of(a_run(rows=rows()))
    assert not re.search(r"<script|<link|<img|@import|\bsrc=|url\((?!#)", text)
    addresses = set(re.findall(r"https?://[^\s\"<]+", text))
    assert addresses <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}


def test_the_colours_of_curves_are_variables_of_the_page(a_run):
    drawings = re.findall(r"<svg.*?</svg>", page_of(a_run(rows=rows())), re.S)
    assert len(drawings) >= 7 and all("var(--" in each for each in drawings)
    assert not [each for each in drawings if re.search(r"(?:stroke|fill): #", each)]
    assert all("<text" in each for each in drawings)  # text stays text


def test_values_that_are_no_numbers_are_marked_and_said(a_run):
    text = page_of(a_run(rows=rows(loss=math.nan, grad_norm=math.inf)))
    assert "train: not a finite number at step 1 and 3 more" in text


def test_thresholds_are_drawn_where_they_are_near_and_said_where_they_are_far(a_run):
    near = page_of(a_run(rows=rows(), config={"health": {"margin_max": 0.2001}}))
    assert re.search(r"<text[^>]*>health.margin_max</text>", near)
    assert "health.margin_max (20) lies above" in page_of(a_run("far", rows=rows()))


def test_every_threshold_that_is_drawn_is_a_key_of_the_health_group(a_run):
    limits = OmegaConf.load(Path(__file__).parents[2] / "conf" / "health" / "default.yaml")
    metrics = {name: -1.0 for panel in PANELS for name in panel.lines}
    seen = record.read(a_run(rows=[{"step": 1, "seconds": 1, **metrics}], config={"health": limits}))
    words = {word for panel in PANELS for word in thresholds(panel, seen).values()}
    drawn = {word.removeprefix("health.") for word in words if word.startswith("health.")}
    assert len(drawn) >= 7 and drawn <= set(limits)


def test_a_pipeline_shows_every_stage_and_the_worst_first(a_run):
    run = a_run("pipe", rows=())
    a_run("pipe/sft", rows=rows(), accuracy=None, manifest_json={"created": "1"})
    a_run("pipe/preference", rows=rows(), findings=[finding()], manifest_json={"created": "2"})
    text = page_of(run)
    assert "preference: Not healthy: finished, with 1 finding" in text
    assert text.index("Stage 1: sft") < text.index("Stage 2: preference")
    assert "Config of sft" in text and "Config of preference" in text


def test_speed_and_memory_stand_beside_the_plan(a_run):
    plan = {"memory_gb": {"weights": 0.5, "total": 1.25}, "seconds": 60, "tokens": 6000}
    summary = {"snapshots": [], "seconds": 75.0, "peak_memory_gb": 1.5, "plan": plan}
    text = page_of(a_run(summary_json=summary))
    planned = '<td>peak memory, GB</td><td class="number">1.25</td><td class="number">1.5</td>'
    assert planned in text and "Planned memory by part, GB: weights 0.5." in text


def test_tokens_per_second_come_from_the_metrics(a_run):
    run = a_run(rows=[{"step": 3, "seconds": 20, "train_runtime": 20.0, "num_tokens": 5000.0}])
    measured = {name: value for name, (_, value) in page.speed(record.read(run)).items()}
    assert measured == {"seconds": 75.0, "tokens": 5000.0, "tokens per second": 250.0}


def test_the_recipe_rewrites_a_page_without_torch(a_run):
    run = a_run(rows=rows())
    code = f"import sys; sys.argv[1:] = [{str(run)!r}]; from recipes.report import main; main()"
    code += "; assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(run / "report.html") and (run / "report.html").exists()


def test_the_recipe_names_a_folder_that_is_no_run(typed, tmp_path):
    done = typed("recipes.report", str(tmp_path))
    assert done.returncode == 1 and "no run directory" in done.stderr and "Traceback" not in done.stderr


def test_a_real_run_ends_with_its_page(composed, tmp_path):
    from preftune.runs.training import train

    changes = ["train.eval_strategy=steps", "train.eval_steps=1", "gate.on_fail=warn", "gate.max_perplexity=1000"]
    train(composed("dpo", *changes))
    text = page_of(tmp_path / "run")
    assert "rewards/margins" in text  # of the held-out pairs
    for title in ("Rewards", "Accuracy", "Loss", "Gradient norm, before clipping"):
        assert f"<figcaption>{title}</figcaption>" in text
    assert "var(--a)" in text and "held-out</span>" in text


def test_a_reward_models_held_out_accuracy_is_told_and_judged(a_run):
    summary = {"snapshots": [], "accuracy_after": 2 / 3, "accuracy_ci": [0.3, 0.9], "pairs": 6}
    text = page_of(a_run(rows=rows(), summary_json=summary))
    assert "Held-out accuracy 66.7%" in text and "no better than a coin" in text
    assert "no held-out pairs" not in text and "recipes.compare" not in text
