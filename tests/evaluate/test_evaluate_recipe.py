import json
import sys

import pytest

from preftune.evaluate import evaluation
from preftune.evaluate.evaluation import EvaluationError
from preftune.evaluate.lm_tasks import TasksError, importlib

SHORT = ["kl_prompts=2", "max_new_tokens=8", "generations=1"]
CONTRACT = {
    "accuracy",
    "accuracy_ci",
    "margin",
    "kl",
    "logratio_chosen_per_token",
    "logratio_rejected_per_token",
    "length_controlled_accuracy",
    "perplexity",
}


def told_of(cfg):
    return json.loads(evaluation.run(cfg))


def test_a_run_is_evaluated_on_what_it_held_out_with_its_own_numbers(trained, settings):
    run = trained("dpo")
    told, checkpoint = told_of(settings("evaluate", *SHORT, f"models=[{run},{run}/checkpoint-3]", "format=json"))
    summary = json.loads((run / "summary.json").read_text())
    last = summary["snapshots"][-1]
    assert told.keys() > CONTRACT
    assert told["pairs"] == 6 and told["beta"] == 0.1 and told["reference"] == "embedded://tiny"
    assert told["accuracy"] == last["reward_accuracy"]
    assert told["margin"] == pytest.approx(last["reward_margin"], abs=1e-5)
    assert told["perplexity"] == pytest.approx(last["perplexity"], rel=1e-5)
    assert told["reference_perplexity"] == pytest.approx(summary["snapshots"][0]["perplexity"], rel=1e-5)
    low, high = told["accuracy_ci"]
    assert low <= told["accuracy"] <= high
    assert told["kl"] > 0 and 0 < told["kl_tokens"] <= 8
    assert told["kl_per_token"] == pytest.approx(told["kl"] / told["kl_tokens"])
    assert [row["pairs"] for row in told["by_length"]] == [2, 2, 2]
    assert told["by_length"][0].keys() == {"tokens", "pairs", "logp_accuracy", "accuracy"}
    assert {"prompt", "policy", "reference"} == told["generations"][0].keys()
    assert checkpoint["margin"] == pytest.approx(told["margin"])


def test_other_data_another_reference_and_a_judge_of_ones_own(trained, settings, pairs_file, tmp_path):
    (tmp_path / "own_judge.py").write_text("def first(prompt, first, second):\n    return 1.0\n")
    sys.path.insert(0, str(tmp_path))
    run, report = trained("dpo"), tmp_path / "report.json"
    printed = evaluation.run(
        settings(
            "evaluate",
            *SHORT,
            f"models=[{run},embedded://tiny]",
            "reference=embedded://tiny",
            f"eval_data={pairs_file}",
            f"sft_data={pairs_file}",
            "max_pairs=10",
            "judge=function",
            "judge.path=own_judge.first",
            "judged_prompts=4",
            f"output={report}",
        )
    )
    sys.path.remove(str(tmp_path))
    policy, base = json.loads(report.read_text())
    assert policy["pairs"] == 10 and policy["judged"] == 4
    assert policy["win_rate"] == base["win_rate"] == 0.5  # it looks at nothing but the place
    assert base["accuracy"] == 0 and base["margin"] == 0 and base["kl"] == pytest.approx(0, abs=1e-6)
    assert base["perplexity"] == base["reference_perplexity"] == policy["reference_perplexity"]
    assert "win rate against the reference" in printed and "embedded://tiny" in printed


def test_an_sft_run_is_evaluated_with_the_default_beta(trained, settings):
    run = trained("sft_dpo") / "sft"
    (told,) = told_of(settings("evaluate", f"models={run}", "kl_prompts=0", "generations=0", "format=json"))
    assert told["beta"] == 0.1 and told["kl"] is None and told["generations"] == []
    assert told["perplexity"] < told["reference_perplexity"]


def test_what_cannot_be_evaluated_says_why(settings):
    with pytest.raises(EvaluationError, match="is no run, and holds no data out"):
        evaluation.run(settings("evaluate", "models=[embedded://tiny]", "reference=embedded://tiny"))
    with pytest.raises(EvaluationError, match="wants table or json"):
        evaluation.run(settings("evaluate", "models=[embedded://tiny]", "format=yaml"))
    with pytest.raises(EvaluationError, match="name at least one"):
        evaluation.run(settings("evaluate", "models=[]"))


def test_benchmarks_without_lm_eval_say_what_to_install(settings, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(TasksError, match=r"pip install 'preftune\[lm-eval\]'"):
        evaluation.run(settings("evaluate", "models=[embedded://tiny]", "tasks=[arc_easy]"))
