"""What the benchmarks compare: every path steps on every kind of model, and what a batch costs is what was counted."""

import numpy as np
import pytest

from benchmarks import data, flops, limit
from benchmarks.paths import Case, Way, build

PATHS = ("trl_default", "trl_tuned", "preftune", "limit")


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("method", ["dpo", "kto", "orpo"])
def test_every_path_steps_and_its_cost_is_linear_in_its_features(path, method, tmp_path):
    case = Case(method, model="tiny", source="demo", dtype="float32", rows=24, batch=2, max_length=128)
    trainer = build(case, path, str(tmp_path))
    way = limit.Limit(trainer) if path == "limit" else Way(trainer, path)
    examples = data.calibration(trainer, 8)
    way.prepare()
    cost, error = flops.fit(way.step, examples, trainer, way.form)
    assert np.isfinite(cost).all() and error < 0.05


@pytest.mark.parametrize(("model", "form"), [("moe", "packed"), ("hybrid", "forked"), ("gemma3", "packed")])
def test_the_shapes_of_other_kinds_take_the_form_that_is_measured(model, form, tmp_path, monkeypatch):
    small = {"hidden_size": 64, "num_hidden_layers": 3, "full_attn_idxs": [2]}
    kind, sizes = data.SHAPES[model]
    monkeypatch.setitem(data.SHAPES, model, (kind, sizes | {k: v for k, v in small.items() if k in sizes}))
    case = Case(model=model, source="demo", dtype="float32", rows=24, batch=2, max_length=128)
    assert build(case, "preftune", str(tmp_path)).form == form
