"""What the terminal says at the end of a run is commands that work as they are printed."""

import shlex

from preftune.evaluate import evaluation
from preftune.report import comparison, comparison_report, terminal


def test_what_is_next_is_said_of_a_pipeline_in_a_folder_of_any_name(tmp_path):
    run = tmp_path / "my runs"
    (run / "sft").mkdir(parents=True)
    (run / "sft" / "lineage.json").write_text("{}")
    lines = terminal.table({"snapshots": [], "samples": []}, run).splitlines()
    commands = [
        shlex.split(line.split("   (")[0].removeprefix("Next").strip()) for line in lines if "python -m" in line
    ]
    assert [command[2:] for command in commands] == [
        ["recipes.chat", f"run={run}", "--compare"],
        ["recipes.export", f"run={run}", "output=exported/my runs"],
        ["recipes.inspect_data", "data=file", "data.path=YOURS.jsonl"],
    ]


def test_brackets_of_prompts_answers_and_paths_are_text(tmp_path):
    """rich would take [bold] for its markup, and end in a traceback at a model that says [/INST]."""
    said = {"prompt": "Why [/b] :tea:?", "before": "[INST] So [/INST]", "after": "[red]no"}
    text = terminal.table({"snapshots": [{"name": "start"}], "samples": [said]}, tmp_path)
    assert all(each in text for each in said.values())
    row = {"model": "runs/[a]", "reference": "x", "accuracy": 0.5}
    shown = {"prompt": said["prompt"], "policy": said["before"], "reference": said["after"]}
    text = evaluation.table([row | {"generations": [shown]}])
    assert all(each in text for each in (*said.values(), "runs/[a]"))


def test_a_remedy_of_a_comparison_keeps_its_brackets(a_run):
    """That of a reward model, which is compared elsewhere."""
    summary = {"snapshots": [], "accuracy_after": 0.6, "pairs": 8}
    run = a_run("reward", config={"loss": {"task": "SEQ_CLS"}}, summary_json=summary)
    text = comparison_report.as_text(comparison.compare([run, a_run("dpo")]))
    assert f"models=[{run},ANOTHER]" in "".join(text.split())
