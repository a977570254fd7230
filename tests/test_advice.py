"""What only advises may fail on what it does not know: one line, and the run goes on with the same losses."""

import json
from pathlib import Path

import pytest

from preftune.data import set_checks, token_checks
from preftune.evaluate.kept import Scorer
from preftune.fastpath import applies
from preftune.health import rules, start
from preftune.pipeline import export
from preftune.plan import plan
from preftune.report import model_card, page
from preftune.runs import samples, training

pytestmark = pytest.mark.slow

ADVISERS = {
    "plan": (plan, "plan", "plan: not available"),
    "data check": (set_checks, "check", "data check: not available"),
    "token check": (token_checks, "check", "token check: not available"),
    "probe": (applies, "_why_not_model", "could not be tried"),
    "step 0": (start, "check_mask", "step-0 check: not available"),
    "snapshot": (Scorer, "score", "held-out pairs (start): not available"),
    "monitor": (rules, "judged", "health: not available"),
    "samples": (samples, "length_drift", "samples: not available"),
    "report": (page, "write", "report: not written"),
}


def broken(*_, **__):
    raise LookupError("nobody has seen the like of it")


def losses(run: str) -> list[float]:
    rows = map(json.loads, (Path(run) / "metrics.jsonl").read_text().splitlines())
    return [row["loss"] for row in rows if "loss" in row]


@pytest.fixture(scope="module")
def undisturbed():
    return {}


@pytest.mark.parametrize("name", [None, *ADVISERS], ids=str)
def test_an_adviser_that_fails_costs_a_line(name, composed, monkeypatch, capsys, undisturbed):
    cfg = composed("dpo", "sample_steps=1", "fit_check=true")
    if name:
        module, attribute, line = ADVISERS[name]
        monkeypatch.setattr(module, attribute, broken)
    training.stage(cfg, {})
    told = capsys.readouterr()
    undisturbed.setdefault("losses", losses(cfg.output_dir))
    assert losses(cfg.output_dir) == pytest.approx(undisturbed["losses"], rel=1e-5)
    if name:
        assert line in told.err + told.out and "nobody has seen" in told.err + told.out


def test_without_the_fit_check_nothing_is_planned(composed, monkeypatch, capsys):
    monkeypatch.setattr(plan, "plan", broken)
    training.stage(composed("dpo", "fit_check=false", "train.max_steps=1"), {})
    assert "plan:" not in capsys.readouterr().err


def test_an_export_does_without_its_card(composed, monkeypatch, capsys, tmp_path):
    cfg = composed("dpo", "train.max_steps=1")
    training.stage(cfg, {})
    monkeypatch.setattr(model_card, "text", broken)
    export.export(cfg.output_dir, str(tmp_path / "out"), None, "trained")
    assert (tmp_path / "out" / "model.safetensors").exists()
    assert "model card: not available" in capsys.readouterr().err
