"""Models and data sets from a hub that runs on this machine: what it gives is trained, what it refuses is one line."""

import json

import pytest
from hub_server import COMMITS, Hub, served

from preftune.models import embedded

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def hub():
    folder = embedded.folder("embedded://tiny")
    Hub.files["models/tiny/model"] = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    for revision, word in (("main", "cat"), ("v1", "dog")):
        Hub.files[f"datasets/tiny/pairs@{COMMITS[revision]}"] = data_set(word)
    Hub.files["datasets/late/pairs"] = Hub.files["datasets/gated/pairs"] = data_set("cat")
    with served() as address:
        yield address


def data_set(word):
    """A data set with the splits train and test, and a second configuration; `word` stands in every row."""

    def rows(count, kind):
        return "".join(
            json.dumps({"prompt": f"{kind} {i}, a {word}?", "chosen": f"Yes, {i}", "rejected": "No"}) + "\n"
            for i in range(count)
        ).encode()

    card = """---
configs:
- config_name: default
  data_files: [{split: train, path: a/train.jsonl}, {split: test, path: a/test.jsonl}]
- config_name: other
  data_files: b/train.jsonl
---
"""
    files = {"a/train.jsonl": rows(12, "train"), "a/test.jsonl": rows(5, "test"), "b/train.jsonl": rows(8, "other")}
    return {"README.md": card.encode(), **files}


@pytest.fixture
def place(hub, tmp_path):
    """place("0"): an environment with that hub, and a cache that starts empty; HF_HUB_OFFLINE is what is given."""
    return lambda offline: {"HF_ENDPOINT": hub, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": offline}


@pytest.fixture
def command(small, pairs_file):
    """recipes.dpo with a model of the hub."""
    given = ["data=file", f"data.path={pairs_file}", "output_dir=run", "train.max_steps=1", "samples=0"]
    return ["recipes.dpo", *small, *given, "model=path"]


@pytest.fixture
def run(typed, command, place):
    """run(*overrides, offline=…): the finished process of that command."""

    def start(*overrides, offline="0"):
        done = typed(*command, *overrides, timeout=120, **place(offline))
        assert "Traceback" not in done.stderr, done.stderr
        return done

    return start


def test_a_model_of_the_hub_is_trained_and_then_without_it(run, tmp_path):
    done = run("model.path=tiny/model", "model.revision=v1")
    assert done.returncode == 0, done.stderr
    assert any((tmp_path / "hf").rglob(f"{COMMITS['v1']}/config.json"))
    done = run("model.path=tiny/model", "model.revision=v1", "output_dir=again", offline="1")
    assert done.returncode == 0, done.stderr


REFUSED = {
    "private/model": "no such repository, or a private one",
    "gated/model": "a gated repository",
    "nobody/model": "no such repository, or a private one",
    "slow/model": "not in the local hub cache",
}


def test_what_the_hub_refuses_is_one_line(in_turn, command, place):
    said = in_turn(*([*command, f"model.path={name}"] for name in REFUSED), **place("0"))
    for (name, why), done in zip(REFUSED.items(), said, strict=True):  # the one that stalls is the last
        assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
        [line] = [line for line in done.stderr.splitlines() if f"model.path={name}" in line]
        assert why in line


def test_a_revision_that_is_not_there_and_a_cold_cache_are_one_line(run):
    done = run("model.path=tiny/model", "model.revision=nowhere")
    assert done.returncode == 1 and "no such branch, tag or commit" in done.stderr
    done = run("model.path=tiny/model", offline="1")
    assert done.returncode == 1 and "not in the local hub cache" in done.stderr


def test_a_download_that_is_cut_is_one_line_and_goes_on_later(run):
    Hub.cut = True
    try:
        done = run("model.path=tiny/model")
    finally:
        Hub.cut = False
    assert done.returncode == 1 and "did not give all of it" in done.stderr
    done = run("model.path=tiny/model")
    assert done.returncode == 0, done.stderr


@pytest.fixture
def inspect(in_turn, place):
    """inspect("tiny/pairs data.name=other", …, offline=…): recipes.inspect_data on each data set of that hub."""

    def start(*asked, offline="0"):
        given = ["recipes.inspect_data", "data=file", "data.eval_fraction=0"]
        said = in_turn(*([*given, *f"data.path={each}".split()] for each in asked), **place(offline))
        assert not [done.stderr for done in said if "Traceback" in done.stderr]
        return said

    return start


def test_a_data_set_of_the_hub_is_trained_on_and_then_without_it(run, tmp_path):
    theirs = ["model=tiny", "data.path=tiny/pairs", "data.revision=v1", "data.eval_split=test"]
    done = run(*theirs)
    assert done.returncode == 0, done.stderr
    assert "12 rows to train on (paired), 5 held out" in done.stdout + done.stderr
    done = run(*theirs, "output_dir=again", offline="1")
    assert done.returncode == 0, done.stderr


def test_configuration_revision_and_streaming_choose_the_rows(inspect):
    rows = {
        "tiny/pairs": "train 0, a cat?",
        "tiny/pairs data.revision=v1": "train 0, a dog?",
        "tiny/pairs data.name=other": "other 0, a cat?",
        "tiny/pairs data.streaming=true": "train 0, a cat?",
    }
    for done, row in zip(inspect(*rows), rows.values(), strict=True):
        assert row in done.stdout


def test_offline_never_takes_another_revision_than_was_asked_for(inspect):
    assert inspect("tiny/pairs")[0].returncode == 0
    there, other = inspect("tiny/pairs data.revision=main", "tiny/pairs data.revision=v1", offline="1")
    assert there.returncode == 0, there.stderr
    assert other.returncode == 1 and "(revision v1): not a folder or file here" in other.stderr


NOT_GIVEN = {
    "private/pairs": "no such repository, or a private one",
    "gated/pairs": "a gated repository",
    "nobody/pairs": "no such repository, or a private one",
    "slow/pairs": "not in the local hub cache",
    "tiny/pairs data.revision=nope": "no such branch, tag or commit",
    "tiny/pairs data.name=nope": "Available: ['default', 'other']. data.name names the configuration",
    "tiny/pairs data.train_split=nope": "Should be one of ['train', 'test']. data.name names",
    "tiny/pairs data.eval_split=nope": "Should be one of ['train', 'test']. data.name names",
    "tiny/pairs data.train_split=nope data.streaming=true": "Available splits: ['train', 'test']. data.name names",
    "late/pairs": "not in the local hub cache",  # answers at first, then stalls
}


def test_a_data_set_that_is_not_given_is_one_line(inspect):
    stalled = [asked for asked in NOT_GIVEN if asked.startswith(("slow", "late"))]  # the process then stays offline
    answered = [asked for asked in NOT_GIVEN if asked not in stalled]
    said = dict(zip(answered, inspect(*answered), strict=True)) | {asked: inspect(asked)[0] for asked in stalled}
    for asked, why in NOT_GIVEN.items():
        done = said[asked]
        assert done.returncode == 1, (asked, done.stdout)
        [line] = [line for line in done.stderr.splitlines() if line.startswith(f"data.path={asked.split()[0]}")]
        assert why in line


def test_a_cold_cache_and_a_cut_download_of_a_data_set_are_one_line(inspect):
    [done] = inspect("tiny/pairs", offline="1")
    assert done.returncode == 1 and "not in the local hub cache" in done.stderr
    Hub.cut = True
    try:
        [done] = inspect("tiny/pairs")
    finally:
        Hub.cut = False
    assert done.returncode == 1 and "did not give all of it" in done.stderr
    assert inspect("tiny/pairs")[0].returncode == 0


def test_an_export_is_pushed_in_private_and_kept_where_the_hub_refuses_it(run, in_turn, place, tmp_path):
    done = run("model=tiny")
    assert done.returncode == 0, done.stderr

    def pushed(token, *owners):
        asked = [["recipes.export", "run=run", f"output={owner}{token}", f"push={owner}/aligned"] for owner in owners]
        return in_turn(*asked, **place("0"), HF_HUB_DISABLE_XET="1", HF_TOKEN=token)

    refused = {"mereader": (pushed("reader", "me"), "403"), "me": (pushed("", "me"), "401")}
    assert not Hub.pushed
    late, done = pushed("writer", "slow", "me")
    refused["slowwriter"] = ([late], "Timeout")
    for folder, ([each], why) in refused.items():
        assert each.returncode == 1 and "Traceback" not in each.stderr, each.stderr
        [line] = [line for line in each.stderr.splitlines() if line.startswith("push=")]
        assert why in line and f"The export stays in {folder}" in line
        assert (tmp_path / folder / "model.safetensors").exists()
    assert done.returncode == 0, done.stderr
    assert Hub.made["models/me/aligned"]["visibility"] == "private"
    there = {path.name: path.read_bytes() for path in (tmp_path / "mewriter").iterdir()}
    assert Hub.pushed == there and len(there) >= 4
