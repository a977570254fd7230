"""Checkpoints: sealed when whole, and anything less is named and passed over for the one before."""

import json

import pytest

from preftune.runs import checkpoints
from preftune.runs.checkpoints import SEAL, save_whole


@pytest.fixture
def run(tmp_path):
    for step in (1, 2, 3):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(bytes(range(256)) * step)
        (folder / "training_args.bin").write_bytes(b"a pickle")
        checkpoints.seal(folder)
    return tmp_path


def test_the_newest_whole_checkpoint_is_taken(run, capsys):
    assert checkpoints.newest(run).name == "checkpoint-3"
    assert checkpoints.newest(run, before=3).name == "checkpoint-2"
    assert capsys.readouterr().out == ""


def test_a_pickle_that_nothing_reads_is_taken_out(run):
    assert not list(run.rglob("*.bin"))


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[100] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("what", "damage"),
    [
        ("model.safetensors is damaged", lambda folder: truncate(folder / "model.safetensors")),
        ("model.safetensors is damaged", lambda folder: flip_a_bit(folder / "model.safetensors")),
        ("model.safetensors is missing", lambda folder: (folder / "model.safetensors").unlink()),
        ("half written", lambda folder: (folder / SEAL).unlink()),
        ("hashes.json is damaged", lambda folder: truncate(folder / SEAL)),
    ],
)
def test_a_damaged_checkpoint_is_named_and_skipped_for_the_one_before(run, capsys, what, damage):
    if what.startswith("hashes"):
        (run / "checkpoint-3" / SEAL).write_text('{"model')
    else:
        damage(run / "checkpoint-3")
    assert checkpoints.newest(run).name == "checkpoint-2"
    assert f"checkpoint-3: {what}; skipped" in capsys.readouterr().out


def test_a_folder_is_in_place_only_when_it_is_whole(tmp_path):
    def fails(folder):
        raise RuntimeError("the disk is gone")

    with pytest.raises(RuntimeError):
        save_whole(tmp_path / "model", fails)
    assert not (tmp_path / "model").exists()

    def saves(folder):
        from pathlib import Path

        Path(folder).mkdir()
        (Path(folder) / "model.safetensors").write_bytes(b"weights")

    save_whole(tmp_path / "model", saves)
    assert checkpoints.damage(tmp_path / "model") is None
    assert json.loads((tmp_path / "model" / SEAL).read_text()).keys() == {"model.safetensors"}
