"""A `data` section from base.yaml, files to point it at, and the byte tokenizer of the tiny model."""

import json

import datasets
import pytest
from base_section import BASE, HH
from omegaconf import OmegaConf

from preftune.data.load import load
from preftune.models.load import load_tokenizer


@pytest.fixture(autouse=True, scope="session")
def quiet_progress():
    datasets.disable_progress_bars()


@pytest.fixture(scope="session")
def byte_tokenizer():
    """One token a byte, ChatML, EOS <|im_end|>, no BOS."""
    return load_tokenizer(OmegaConf.merge(BASE.model, {"path": "embedded://tiny"}))


@pytest.fixture
def write(tmp_path):
    """write("a.jsonl", [row, …]) or write("a.csv", "text") or bytes: the file's path as text."""

    def file(name, content):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, list):
            content = "".join(json.dumps(row) + "\n" for row in content)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return str(path)

    return file


@pytest.fixture
def section(tmp_path):
    """section(path, eval_fraction=0.1, …): a `data` section, nothing held out unless it says so."""

    def make(path, **changes):
        skipped = {"path": path, "eval_fraction": 0.0, "skipped_file": str(tmp_path / "skipped.jsonl")}
        return OmegaConf.create(OmegaConf.to_container(BASE.data, resolve=False) | skipped | changes)

    return make


@pytest.fixture
def loaded(write, section):
    """loaded([row, …], view="paired", tokenizer=None, …): the Data of these rows, written as JSONL."""

    def make(rows, view="paired", tokenizer=None, max_length=None, seed=0, **changes):
        path = write("rows.jsonl", rows) if isinstance(rows, list) else rows
        return load(section(path, **changes), view, tokenizer, max_length, seed)

    return make


@pytest.fixture
def hh():
    """The 2,000 HH-RLHF dialogues."""
    if not HH.exists():
        pytest.skip("needs ../shared/data/hh-harmless-2000.jsonl.gz")
    return str(HH)
