"""What the terminal says at the end of a run is commands that work as they are printed."""

import shlex

from preftune.report import terminal


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
