"""Folders that cannot be written to, files that are none, a full disk, rows longer than a model: one line each."""

import resource
import signal
import subprocess
import sys

import pytest
import shared_cases

pytestmark = pytest.mark.slow

TINY = ["model=tiny", "hardware=cpu", "tracking=none", "data.max_rows=16", "train.max_steps=1", "gate.on_fail=warn"]
TINY += ["fit_check=false", "samples=1"]


@pytest.fixture
def places(tmp_path):
    """A file, and a link to nowhere, where a folder is wanted."""
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere" / "at-all")
    return tmp_path


@pytest.mark.parametrize(
    ("given", "code", "told"),
    [
        ("output_dir=file", 2, "file is a file; name a folder"),
        ("output_dir=file/run", 2, "file is a file; name a folder"),
        ("output_dir=link", 2, "link is a link to nowhere"),
        ("output_dir=/proc/run", 1, "output_dir=/proc/run: no folder can be made there"),
        ("fastpath.reference_cache=file", 2, "file is a file; name a folder"),
        ("fastpath.reference_cache=/proc/x", 1, "/proc/x: No such file or directory. Name another place"),
        ("data=file data.path=./link", 1, "is a link to nowhere"),
        (f"train.max_steps={'9' * 5000}", 2, "wants a whole number"),
        (f"train.seed={2**32}", 2, "below 4294967296"),
    ],
)
def test_a_place_or_number_that_cannot_be_used_is_one_line(typed, places, given, code, told):
    done = typed("recipes.dpo", *TINY, *given.split())
    assert done.returncode == code and told in " ".join(done.stderr.split()), done.stderr
    assert "Traceback" not in done.stderr and max(map(len, done.stderr.splitlines())) < 1000


def test_a_home_that_cannot_be_written_to_costs_a_line(typed):
    given = {"HOME": "/proc", "PREFTUNE_CACHE": "", "HF_HOME": ""}
    done = typed("recipes.dpo", *TINY, "output_dir=run", **given)
    assert done.returncode == 0 and "cannot be written to" in done.stderr, done.stderr


def test_wandb_disabled_is_honoured_in_a_line(typed):
    done = typed("recipes.dpo", *TINY, "tracking=wandb", "output_dir=run", WANDB_DISABLED="true")
    assert done.returncode == 0 and "W&B: off (WANDB_DISABLED)" in done.stdout
    assert "wandb sync" not in done.stdout


def test_an_export_below_a_file_is_one_line(typed, places):
    assert typed("recipes.dpo", *TINY, "output_dir=run").returncode == 0
    done = typed("recipes.export", "run=run", "output=file/exported")
    assert done.returncode == 1 and "Name another place" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("most", [1000, 4000, 120_000], ids=["config", "report", "cache"])
def test_a_disk_that_is_full_from_the_start_is_one_line_and_the_remedy_works(tmp_path, monkeypatch, most):
    monkeypatch.setenv("PREFTUNE_CACHE", str(tmp_path / "cache"))
    command = [sys.executable, "-m", "recipes.dpo", *TINY, "lora=none", f"output_dir={tmp_path / 'run'}"]

    def little_room():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))  # bytes of one file

    done = subprocess.run(command, capture_output=True, text=True, preexec_fn=little_room)
    assert done.returncode == 1 and "the disk is full" in done.stderr and "Traceback" not in done.stderr, done.stderr
    assert "resume=true" not in done.stderr  # nothing was begun: the same command does it
    assert subprocess.run(command, capture_output=True).returncode == 0


def test_a_row_longer_than_the_positions_that_a_model_has_learned_is_one_line(typed, tmp_path):
    model = shared_cases.checkpoints(tmp_path / "models") / "gpt2short"
    given = [*TINY, "model=path", f"model.path={model}", "output_dir=run"]
    done = typed("recipes.dpo", *given, "train.max_length=1024")
    assert done.returncode == 1 and "train.max_length=128" in done.stderr and "Traceback" not in done.stderr
    assert typed("recipes.dpo", *given, "train.max_length=128").returncode == 0


def test_dropping_the_last_batch_of_too_few_rows_is_one_line(typed):
    given = [*TINY, "data.eval_fraction=0", "hardware.per_device_train_batch_size=32", "output_dir=run"]
    done = typed("recipes.dpo", *given, "train.dataloader_drop_last=true")
    assert done.returncode == 1 and "drops all 16 rows" in done.stderr and "Traceback" not in done.stderr
    assert typed("recipes.dpo", *given, "train.dataloader_drop_last=false").returncode == 0
