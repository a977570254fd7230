"""Benchmarks of lm-eval from a task file on this machine: policy and reference in one table."""

import json

import pytest

from preftune.evaluate import evaluation

pytest.importorskip("lm_eval")
pytestmark = pytest.mark.slow

TASK = """task: tiny_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""


def test_a_table_has_a_benchmark_before_and_after(trained, settings, tmp_path):
    rows = [{"question": f"Is {n} odd?", "choices": ["yes", "no"], "answer": (n + 1) % 2} for n in range(8)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "tiny_choice.yaml").write_text(TASK.format(rows=tmp_path / "rows.jsonl"))
    given = [
        f"models=[{trained('dpo')}]",
        "kl_prompts=0",
        "generations=0",
        "tasks=[tiny_choice]",
        f"tasks_path={tmp_path}",
    ]
    told = json.loads(evaluation.run(settings("evaluate", *given, "format=json")))[0]
    assert all(0 <= told[key]["tiny_choice"]["acc,none"] <= 1 for key in ("tasks", "reference_tasks"))
    table = evaluation.run(settings("evaluate", *given))
    assert "tiny_choice acc,none" in table and "the reference's" in table
