"""What the benchmarks compare: every path steps on every kind of model, and what a batch costs is what was counted."""

import numpy as np
import pytest

from benchmarks import data, flops, gpu, limit
from benchmarks.paths import Case, Way, build

PATHS = ("trl_default", "trl_tuned", "preftune", "limit")


@pytest.mark.parametrize(
    ("method", "path"),
    [*(("dpo", path) for path in PATHS), ("kto", "preftune"), ("orpo", "preftune"), ("orpo", "limit")],
)
def test_every_path_steps_and_its_cost_is_linear_in_its_features(method, path, tmp_path):
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


@pytest.mark.parametrize("path", ["trl tuned", "forked"])
def test_a_cell_of_the_gpu_benchmark_runs_on_tiny_shapes(path):
    found = gpu.cell(gpu.ROWS[0], path, tiny=True)
    assert found["tokens_per_s"] > 0 and found["form"] == (path if path == "forked" else None)
    assert found["loss"][0] == pytest.approx(0.693, abs=1e-3)


def test_what_was_not_measured_is_called_so():
    assert gpu.table({}) == "Not measured: no GPU was at hand."
    row = {"row": gpu.ROWS[0].name, "path": "trl", "tokens_per_s": 1000.0, "mfu": 0.4, "peak_gb": 20.0, "startup_s": 30}
    lines = gpu.table({(row["row"], "trl"): row | {"device": "H100"}}).splitlines()
    assert "1,000 (40%, 20.0, 30)" in lines[2] and "not measured" in lines[2]
