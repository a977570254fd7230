"""The recipes as a user types them: from any folder."""

import json

import pytest

CPU = ["hardware=cpu", "hardware.bf16=false", "tracking=none", "train.max_steps=1", "samples=1", "gate.on_fail=warn"]


def test_the_users_line_composes_as_typed(typed):
    shown = typed("recipes.dpo", "loss=ipo", "model=mistral7b", "--cfg", "job")
    assert shown.returncode == 0, shown.stderr
    assert "loss_type:\n  - ipo" in shown.stdout
    assert "path: mistralai/Mistral-7B-Instruct-v0.3" in shown.stdout


@pytest.mark.parametrize("offline", ["1", pytest.param("0", marks=pytest.mark.slow)])
def test_a_model_that_cannot_be_had_is_one_clear_line(typed, offline):
    unreachable = {"HF_HUB_OFFLINE": offline, "HF_ENDPOINT": "http://127.0.0.1:9"}
    failed = typed("recipes.dpo", "loss=ipo", "model=mistral7b", *CPU, **unreachable)
    assert failed.returncode == 1
    assert "Traceback" not in failed.stderr
    [line] = [line for line in failed.stderr.splitlines() if "mistralai" in line]
    assert "hf download" in line and "model=path model.path=FOLDER" in line


@pytest.mark.parametrize("recipe", ["kto", pytest.param("sft_dpo", marks=pytest.mark.slow)])
def test_recipes_run_from_any_folder(typed, pairs_file, tmp_path, recipe):
    done = typed(f"recipes.{recipe}", "model=tiny", "data=file", f"data.path={pairs_file}", "output_dir=here", *CPU)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "here" / "summary.json").read_text())["snapshots"]
    assert "Warning" not in done.stderr and "Traceback" not in done.stderr


@pytest.mark.slow
def test_one_new_file_a_group_is_all_that_a_new_choice_needs(typed, pairs_file, tmp_path):
    files = {
        "loss/cdpo.yaml": "# mine\ndefaults: [robust]\nlabel_smoothing: 0.2\n",
        "model/mine.yaml": "# mine\npath: embedded://tiny\n",
        "data/mine.yaml": f"# mine\npath: {pairs_file}\neval_fraction: 0.2\n",
        "hardware/laptop.yaml": "# mine\ndefaults: [cpu]\nbf16: false\nper_device_train_batch_size: 3\n",
        "lora/thin.yaml": "# mine\ndefaults: [lora]\nr: 2\n",
    }
    for name, text in files.items():
        (tmp_path / "mine" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "mine" / name).write_text(text)
    choices = ["loss=cdpo", "model=mine", "data=mine", "hardware=laptop", "lora=thin"]
    rest = ["tracking=none", "train.max_steps=1", "samples=1", "gate.on_fail=warn", "output_dir=run"]
    done = typed("recipes.dpo", "--config-dir", str(tmp_path / "mine"), *choices, *rest)
    assert done.returncode == 0, done.stderr
    config = (tmp_path / "run" / "config.yaml").read_text()
    assert "label_smoothing: 0.2" in config and "per_device_train_batch_size: 3" in config and "r: 2" in config
