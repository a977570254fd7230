"""Containers: folders with splits, Arrow files of save_to_disk, compressed files; what is not read is said."""

import json

import pyarrow as pa
import pytest
from base_section import pair
from datasets import Dataset, DatasetDict
from shared_cases import case

from preftune.data.findings import DataError


def line(row):
    return json.dumps(row) + "\n"


def says_unread(data):
    return [finding.says for finding in data.findings if finding.code == "unread_files"]


@pytest.fixture
def folder(write, tmp_path):
    """folder({"train.jsonl": ["a"], …}): a folder with pairs of these ids."""

    def make(files, readme=None):
        for name, ids in files.items():
            write(f"set/{name}", [pair(f"Why {each}?", id=each) for each in ids])
        if readme:
            write("set/README.md", readme)
        return str(tmp_path / "set")

    return make


README = """---
configs:
- config_name: default
  data_files:
  - {split: train_prefs, path: "data/train_prefs*"}
  - {split: test_prefs, path: "data/test_prefs*"}
---
# Pairs
"""
FILES = {"data/train_prefs.jsonl": "ab", "data/test_prefs.jsonl": "c", "data/train_sft.jsonl": "de"}


def test_a_readme_gives_the_splits_of_a_folder(folder, loaded):
    path = folder(FILES, README)
    data = loaded(path)
    assert data.train["id"][:] == ["a", "b"]
    assert says_unread(data) == ["not read: the split test_prefs, files of no split (1)"]
    assert "not read: the split test_prefs" in data.line
    data = loaded(path, eval_split="test_prefs")
    assert (data.train["id"][:], data.eval["id"][:]) == (["a", "b"], ["c"])
    assert loaded(path, train_split="test_prefs").train["id"][:] == ["c"]


def test_file_names_give_the_splits_of_a_folder(folder, loaded):
    path = folder({"train.jsonl": "ab", "test.jsonl": "c"})
    data = loaded(path, eval_split="test")
    assert (data.train["id"][:], data.eval["id"][:]) == (["a", "b"], ["c"])
    assert says_unread(data) == []
    with pytest.raises(
        DataError, match=r"has the splits train, test, and not tset: data.train_split=test .or data.eval_split"
    ):
        loaded(path, eval_split="tset")


def test_several_splits_to_train_on_ask_for_one(folder, loaded):
    with pytest.raises(DataError, match=r"has the splits .*, and not train: data.train_split=train_prefs"):
        loaded(folder({f"data/{name}-00000-of-00001.jsonl": "a" for name in ("train_prefs", "train_sft", "test")}))


def test_files_beside_a_held_out_one_are_trained_on(folder, loaded):
    data = loaded(folder({"pairs.jsonl": "ab", "eval.jsonl": "c"}))
    assert data.train["id"][:] == ["a", "b"]
    assert says_unread(data) == ["not read: the split test"]


CALL = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": {"x": 1}}}]}
ROWS = [pair(chosen=[CALL]), pair("How?", chosen=[{"role": "assistant", "content": "So."}])]


def test_data_sets_that_save_to_disk_wrote_are_read(loaded, tmp_path):
    rows = [{key: value if isinstance(value, list) else [{"role": "user" if key == "prompt" else "assistant",
             "content": value}] for key, value in row.items()} for row in ROWS]  # fmt: skip
    one = Dataset.from_list(rows)
    one.save_to_disk(tmp_path / "one")
    DatasetDict(train=one, test=one.select([0])).save_to_disk(tmp_path / "both")
    data = loaded(str(tmp_path / "one"))
    assert [row["chosen"] for row in data.train] == [row["chosen"] for row in rows]
    data = loaded(str(tmp_path / "both"), eval_split="test")
    assert (len(data.train), len(data.eval)) == (2, 1)
    assert says_unread(loaded(str(tmp_path / "both"))) == ["not read: the split test"]


def test_zstd_byte_order_marks_and_windows_line_ends_are_read(write, loaded, tmp_path):
    text = "\ufeff" + "".join(line(pair(f"Why {i}?")).replace("\n", "\r\n") for i in range(3))
    with pa.output_stream(str(tmp_path / "rows.jsonl.zst"), compression="zstd") as file:
        file.write(text.encode())
    assert len(loaded(str(tmp_path / "rows.jsonl.zst")).train) == 3
    assert len(loaded(write("rows.csv", text.encode()[:3] + b"prompt,chosen,rejected\r\nWhy?,a,b\r\n")).train) == 1


@pytest.mark.parametrize(("name", "held_out"), [("repo", "test_prefs"), ("simple", "test")])
def test_cloned_data_sets_of_the_cases_are_not_trained_on_their_test_split(name, held_out, loaded):
    path = str(case(f"01-hub-clone/{name}"))
    data = loaded(path, eval_split=held_out)
    assert (len(data.train), len(data.eval)) == (40, 20)
    assert held_out in says_unread(loaded(path))[0]
