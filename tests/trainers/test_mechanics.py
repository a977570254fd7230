"""The printed table is the closed forms', and its gradient weight is the slope of DPO's loss."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import closed_forms
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from preftune.trainers import mechanics

logps = st.floats(-200, 0)
pair = st.tuples(logps, logps, logps, logps)
betas = st.floats(0.001, 10)
GIVEN = dict(chosen=[-1.5, -2.0], rejected=[-3.0, -4.5], ref_chosen=[-2.0, -2.5], ref_rejected=[-2.8, -3.0])
CHECKOUT = os.pathsep.join(map(str, (Path(__file__).parents[2], Path(__file__).parents[2] / "src")))
COMMAND = [f"{key}=[{','.join(map(str, values))}]" for key, values in GIVEN.items()]


def run(*arguments: str, cwd) -> subprocess.CompletedProcess:
    """`python -m recipes.mechanics`, sure to start without torch."""
    command = [sys.executable, "-X", "importtime", "-m", "recipes.mechanics", *arguments]
    done = subprocess.run(command, cwd=cwd, env={**os.environ, "PYTHONPATH": CHECKOUT}, capture_output=True, text=True)
    lines = done.stderr.splitlines(keepends=True)
    assert not any(line.endswith("| torch\n") for line in lines)
    done.stderr = "".join(line for line in lines if not line.startswith("import time:"))
    return done


@given(st.lists(pair, min_size=1, max_size=4), betas)
@settings(max_examples=60, deadline=None)
def test_mechanics_prints_the_closed_forms(pairs, beta):
    series = [list(values) for values in zip(*pairs, strict=True)]
    chosen, rejected, ref_chosen, ref_rejected = (torch.tensor(values, dtype=torch.float64) for values in series)
    one = torch.ones_like(chosen)  # one token each: then TRL's per-token IPO is the paper's, on sums
    batch = closed_forms.Pairs(chosen, rejected, ref_chosen, ref_rejected, one, one, chosen, one)
    loss = mechanics.row(*series, beta, 0.1)["loss"]
    for name in ("dpo", "ipo", "hinge"):
        assert loss[name] == pytest.approx(getattr(closed_forms, name)(batch, beta).item(), rel=1e-9, abs=1e-9)
    assert loss["robust"] == pytest.approx(closed_forms.robust(batch, beta, 0.1).item(), rel=1e-9, abs=1e-9)


@given(pair, st.floats(0.01, 2))
@settings(max_examples=60, deadline=None)
def test_the_gradient_weight_times_beta_is_the_slope_of_dpos_loss(pair, beta):
    chosen, *rest = ([value] for value in pair)
    step = 1e-4
    above, below = (mechanics.row([chosen[0] + shift], *rest, beta, 0.1)["loss"]["dpo"] for shift in (step, -step))
    weight = mechanics.row(chosen, *rest, beta, 0.1)["gradient_weights"][0]
    assert (above - below) / (2 * step) == pytest.approx(-beta * weight, rel=1e-3, abs=1e-7)


def test_extreme_margins_do_not_overflow():
    row = mechanics.row([0.0], [-1e6], [-1e6], [0.0], 10.0, 0.1)
    assert row["loss"]["dpo"] == 0 and row["gradient_weights"] == [0.0]
    assert mechanics.row([-1e6], [0.0], [0.0], [-1e6], 10.0, 0.1)["loss"]["dpo"] == 2e7


def test_the_command_prints_one_row_a_beta_as_json(tmp_path):
    done = run(*COMMAND, "beta=[0.05,0.1]", "format=json", cwd=tmp_path)
    rows = json.loads(done.stdout)
    assert [row["beta"] for row in rows] == [0.05, 0.1]
    assert list(rows[0]) == ["beta", "loss", "chosen_rewards", "rejected_rewards", "margins", "gradient_weights"]
    assert rows[1]["chosen_rewards"] == pytest.approx([0.05, 0.05])
    assert rows[1]["rejected_rewards"] == pytest.approx([-0.02, -0.15])
    assert rows[1]["margins"] == pytest.approx([0.07, 0.2])
    assert rows[1]["gradient_weights"] == pytest.approx([1 / (1 + math.exp(0.07)), 1 / (1 + math.exp(0.2))])
    dpo = [math.log(1 + math.exp(-margin)) for margin in (0.07, 0.2)]
    flipped = [math.log(1 + math.exp(margin)) for margin in (0.07, 0.2)]
    assert rows[1]["loss"] == pytest.approx(
        {
            "dpo": sum(dpo) / 2,
            "ipo": ((0.7 - 5) ** 2 + (2.0 - 5) ** 2) / 2,
            "hinge": (0.93 + 0.8) / 2,
            "robust": sum((0.9 * a - 0.1 * b) / 0.8 for a, b in zip(dpo, flipped, strict=True)) / 2,
        }
    )


def test_the_command_prints_an_aligned_table_and_leaves_no_files(tmp_path):
    done = run("chosen=-1.5", "rejected=-3", "ref_chosen=-2", "ref_rejected=-2.8", "beta=0.1", cwd=tmp_path)
    header, values = done.stdout.splitlines()[-2:]
    assert header.split()[:5] == ["beta", "dpo", "ipo", "hinge", "robust"]
    assert len(header) == len(values)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("beta=[0.1,0]", "beta: 0 is not above 0"),
        ("beta=fast", "beta: 'fast' is not a finite number"),
        ("chosen=[-1,2]", "chosen: 2 is above 0, and a log-prob never is"),
        ("chosen=[-1,-2,-3]", "got 3 in chosen, 2 in rejected"),
        ("label_smoothing=0.5", "label_smoothing: 0.5 is not in [0, 0.5)"),
        ("format=xml", "format: 'xml' is not one of table, json"),
    ],
)
def test_a_wrong_argument_gets_one_line_that_names_it(argument, message, tmp_path):
    done = run(argument, cwd=tmp_path)
    assert done.returncode == 1 and not done.stdout
    assert message in done.stderr and len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("chosn=[-1]", "no such key; did you mean chosen?"),
        ("beta=0.1,0.2", "for a list write 'beta=[0.1,0.2]'"),
        ("beta=[0.1", "its brackets do not match"),
    ],
)
def test_a_command_line_that_cannot_be_read_is_told_as_in_every_recipe(argument, message, tmp_path):
    done = run(argument, cwd=tmp_path)
    assert done.returncode == 2 and not done.stdout
    assert message in " ".join(done.stderr.split())
