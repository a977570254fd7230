"""The view `prompts`: each prompt once, out of any data, with a good answer's text beside it where there is one."""

import json

import pytest
from base_section import BASE
from omegaconf import OmegaConf
from transformers import AutoTokenizer

from preftune.data.findings import DataError
from preftune.data.load import load
from preftune.models import embedded


@pytest.fixture
def prompts(tmp_path):
    """prompts(rows, max_length): the rows of a file as prompts, and the whole Data."""

    def read(rows, view="prompts", max_length=None, **more):
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        tokenizer = AutoTokenizer.from_pretrained(embedded.folder("embedded://tiny"))
        data = OmegaConf.merge(BASE.data, {"path": str(path), "eval_fraction": 0.0, "skipped_file": None, **more})
        found = load(data, view=view, tokenizer=tokenizer, max_length=max_length, seed=0)
        return [{k: row[k] for k in row if k != "id"} for row in found.train], found

    return read


def asks(text):
    return [{"role": "user", "content": text}]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Why?"},
        {"instruction": "Why?"},
        {"prompt": asks("Why?")},
        {"prompt": "Why?", "topic": "causes"},
        {"prompt": "Why?", "completion": None},
    ],
    ids=str,
)
def test_a_prompt_alone_is_a_row(row, prompts):
    assert prompts([row])[0] == [{"prompt": asks("Why?")}]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Why?", "chosen": "Because.", "rejected": "No."},
        {"prompt": "Why?", "completion": "Because."},
        {"question": "Why?", "solution": "Because."},
        {"messages": [*asks("Why?"), {"role": "assistant", "content": "Because."}]},
    ],
    ids=str,
)
def test_a_good_answer_stands_beside_its_prompt_for_the_rewards(row, prompts):
    assert prompts([row])[0] == [{"prompt": asks("Why?"), "solution": "Because."}]


def test_labelled_answers_give_their_prompts_and_no_answer(prompts):
    rows = [
        {"prompt": "Why?", "completion": "No.", "label": False},
        {"prompt": "How?", "completion": "So.", "label": True},
    ]
    assert prompts(rows)[0] == [{"prompt": asks("Why?")}, {"prompt": asks("How?")}]


def test_a_prompt_that_stands_there_twice_is_drawn_for_once(prompts):
    assert len(prompts([{"prompt": "Why?"}, {"prompt": "Why? "}, {"prompt": "How?"}])[0]) == 2


def test_prompts_that_leave_no_room_are_counted_and_left_out(prompts):
    rows, found = prompts([{"prompt": "Why?"}, {"prompt": "Why? " * 40}], max_length=64)
    assert len(rows) == 1
    (lost,) = [each for each in found.findings if each.code == "loses_everything"]
    assert lost.count == 1


def test_prompts_alone_are_no_rows_of_a_preference_loss(prompts):
    with pytest.raises(DataError, match="columns are prompt; wanted are prompt"):
        prompts([{"prompt": "Why?"}], view="paired")


def test_prompts_alone_can_be_inspected(typed, tmp_path):
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "Why?"}\n{"prompt": "How?"}\n')
    done = typed(
        "recipes.inspect_data", "model=tiny", "data=file", "data.path=prompts.jsonl", "view=prompts", "output_dir=seen"
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "seen" / "report.html").exists()
