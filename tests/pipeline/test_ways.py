"""One start, several ways: the pipeline that compares DPO with RLHF, and pairs made from prompts and a scorer."""

import json
from pathlib import Path

import pytest

from preftune.pipeline.run import run_stages
from preftune.report.record import read
from preftune.runs.training import stage
from preftune.runs.work import Work

SHORT = [
    "pipeline.ways.prompts=4",
    "pipeline.ways.kl_prompts=2",
    "pipeline.ways.max_new_tokens=8",
    "pipeline.ways.flop=1e12",
]
SHORT += ["pipeline.rounds.number=1", "pipeline.rounds.max_new_tokens=8", "pipeline.rounds.length_ratio=9"]
PARTS = ("a", "b", "held_out")
SHORT += ["rloo.loss.max_completion_length=8", "online_dpo.loss.max_new_tokens=8", "train.max_steps=2"]


def letters(prompt, answer):
    return float(len(set(answer)))


@pytest.mark.slow
def test_the_ways_from_one_start_are_compared_and_kept(composed, capsys):
    given = ["pipeline=rlhf_or_dpo", *SHORT, f"pipeline.ways.rule={__name__}.letters"]
    cfg = composed("sft_dpo", *given)
    run_stages(cfg)
    run = read_rows(cfg)
    assert list(run) == ["sft", "preference", "rounds", "online_dpo", "rloo", "best of 4"]
    assert all(run[way]["flop"] > 0 for way in run if way != "sft")
    assert [run[way]["models"] for way in run] == [1, 1, 2, 2, 2, 2]
    halves = [
        {json.dumps(row["prompt"]) for row in rows(cfg, f"halves/{name}.jsonl")} for name in ("a", "b", "held_out")
    ]
    assert not any(halves[i] & halves[j] for i, j in ((0, 1), (0, 2), (1, 2))) and all(halves)
    for name, half in (("reward", "a"), ("judge_reward", "b"), ("preference", "a"), ("rloo", "a")):
        config = read(Path(cfg.output_dir) / name).config
        assert config["data"]["path"].endswith(f"halves/{half}.jsonl")
    capsys.readouterr()
    run_stages(composed("sft_dpo", *given, "resume=true"))
    assert capsys.readouterr().out.count("finished before of the same inputs, kept") >= 7


def rows(cfg, name):
    with open(f"{cfg.output_dir}/{name}", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def read_rows(cfg):
    with open(f"{cfg.output_dir}/ways.json", encoding="utf-8") as file:
        return {row["way"]: row for row in json.load(file)}


def test_a_budget_ends_the_training_and_its_count_goes_on_after_a_kill(composed, tmp_path):
    whole = stage(composed("dpo", "train.max_steps=4", "flop_budget=inf", f"output_dir={tmp_path / 'whole'}"))
    half = stage(composed("dpo", "train.max_steps=4", f"flop_budget={whole['flop'] * 0.6}"))
    assert whole["flop"] * 0.6 <= half["flop"] < whole["flop"]
    assert json.loads((tmp_path / "whole" / "summary.json").read_text())["flop"] == whole["flop"]


def test_work_counts_what_pytorchs_own_counter_counts():
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    layer, x = torch.nn.Linear(8, 16), torch.randn(4, 8)
    with FlopCounterMode(display=False) as theirs:
        layer(x).sum().backward()
    with Work() as ours:
        layer(x).sum().backward()
    assert ours.flop == theirs.get_total_flops() > 0
    with Work() as drawn, torch.inference_mode():
        layer(x)
    assert drawn.flop == 2 * 4 * 8 * 16


@pytest.mark.slow
def test_pairs_are_made_from_prompts_and_a_scorer(typed, tmp_path):
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "Why?"}\n{"prompt": "How?"}\n')
    (tmp_path / "rules.py").write_text("def letters(prompt, answer):\n    return float(len(set(answer)))\n")
    given = ["model=tiny", "hardware=cpu", "data=file", "data.path=prompts.jsonl", "output_dir=made"]
    given += ["pairs.rule=rules.letters", "pairs.max_new_tokens=8", "pairs.length_ratio=9"]
    done = typed("recipes.make_pairs", *given)
    assert done.returncode == 0, done.stderr
    assert "2 pairs of 2 prompts, 4 answers each" in done.stdout
    made = [json.loads(line) for line in (tmp_path / "made" / "pairs.jsonl").read_text().splitlines()]
    for row in made:
        chosen, rejected = (letters(None, row[side][0]["content"]) for side in ("chosen", "rejected"))
        assert chosen > rejected
    again = typed("recipes.make_pairs", *given)
    assert again.returncode == 1 and "holds pairs already" in again.stderr, again
    none = typed("recipes.make_pairs", *given[:-3], "output_dir=other")
    assert none.returncode == 1 and "give one of rule, reward_model, judge" in none.stderr
