"""Rows as TRL renders them: under every template that TRL ships, token ids equal plain TRL's, or both refuse."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import trl
from base_section import BASE, pair
from datasets import Dataset
from jinja2 import TemplateError
from omegaconf import OmegaConf
from shared_cases import case
from test_findings import TURN, with_template

from preftune.data.findings import DataError
from preftune.data.load import inspect
from preftune.data.token_checks import tokenized
from preftune.models.tokenizer import template

EXTRAS = ("tools", "chat_template_kwargs")
TEMPLATES = sorted((Path(trl.__file__).parent / "chat_templates").glob("*.jinja"))
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a place",
        "parameters": {"type": "object", "properties": {"place": {"type": "string"}}, "required": ["place"]},
    },
}


def user(text):
    return {"role": "user", "content": text}


def says(text, **more):
    return {"role": "assistant", "content": text} | more


def calls(*places, **more):
    made = [{"type": "function", "function": {"name": "weather", "arguments": {"place": each}}} for each in places]
    return {"role": "assistant", "tool_calls": made} | more


def result(text):
    return {"role": "tool", "name": "weather", "content": text}


ASKED = [user("Rain in Rome?")]
RAINS, DRY = says("It rains."), says("No.")
ROWS = {
    "plain": {"prompt": ASKED, "chosen": [RAINS], "rejected": [DRY]},
    "system": {"prompt": [{"role": "system", "content": "Be brief."}, *ASKED], "chosen": [RAINS], "rejected": [DRY]},
    "multi-turn": {"prompt": [user("Hi"), says("Hello"), *ASKED], "chosen": [RAINS], "rejected": [DRY]},
    "tools": {"prompt": ASKED, "chosen": [calls("Rome", content="")], "rejected": [DRY], "tools": [WEATHER]},
    "parallel calls, null content": {
        "prompt": ASKED,
        "chosen": [calls("Rome", "Oslo", content=None)],
        "rejected": [DRY],
        "tools": json.dumps([WEATHER]),
    },
    "call, result, answer": {
        "prompt": ASKED,
        "chosen": [calls("Rome", content=""), result("rain"), RAINS],
        "rejected": [calls("Oslo", content=""), result("sun"), DRY],
        "tools": [WEATHER],
    },
    "a call in the prompt": {
        "prompt": [*ASKED, calls("Rome"), result("rain")],
        "chosen": [RAINS],
        "rejected": [DRY],
        "tools": [WEATHER],
    },
    "reasoning": {
        "prompt": [user("Hi"), says("Hello", reasoning_content="Be polite."), *ASKED],
        "chosen": [says("It rains.", reasoning_content="Clouds.")],
        "rejected": [says("<think>\nSun.\n</think>\n\nNo.")],
    },
    "template arguments": {
        "prompt": ASKED,
        "chosen": [RAINS],
        "rejected": [DRY],
        "chat_template_kwargs": {"enable_thinking": False, "thinking": False},
    },
}


VIEWS = {  # a trainer of TRL, and what it makes of rows
    "paired": (trl.DPOTrainer, ("prompt_ids", "chosen_ids", "rejected_ids")),
    "unpaired": (trl.KTOTrainer, ("prompt_ids", "completion_ids", "label")),
    "demonstrations": (trl.SFTTrainer, ("input_ids", "labels")),
}


def ids(rows: Dataset, tokenizer, view="paired") -> list[tuple] | None:
    """What TRL's trainer makes of rows; None where the template refuses them."""
    trainer, names = VIEWS[view]
    args = SimpleNamespace(max_length=None, truncation_mode="keep_start", dataset_num_proc=None)
    args.dataset_text_field, args.assistant_only_loss, args.shuffle_dataset = "text", True, False
    this = SimpleNamespace(_tokenizer=tokenizer, calculate_KL=False, chat_template=None, completion_only_loss=True)
    this.desirable_weight = this.undesirable_weight = 1.0
    more = (False, None) if view == "demonstrations" else ()
    try:
        found = trainer._prepare_dataset(this, rows, tokenizer, args, *more, "train")
    except (TemplateError, ValueError, TypeError):
        return None
    return [tuple(row[name] for name in names) for row in found]


def plain(rows: list[dict]) -> Dataset:
    return Dataset.from_list(rows, on_mixed_types="use_json")


@pytest.mark.parametrize("path", TEMPLATES, ids=lambda path: path.stem)
def test_token_ids_equal_plain_trls_under_every_template(path, loaded, byte_tokenizer):
    settings = OmegaConf.merge(BASE.model, {"path": "embedded://tiny", "chat_template": str(path)})
    tokenizer = with_template(byte_tokenizer, None, bos_token="<|im_start|>")  # Llama 3's writes one
    tokenizer.chat_template = template(tokenizer, settings)
    rows = [row | {"id": name} for name, row in ROWS.items()]
    train = loaded(rows, tokenizer=tokenizer, on_bad_rows="skip").train
    taken = [row for row in rows if row["id"] in train["id"][:]]
    wanted = [each for row in taken for each in ids(plain([row]), tokenizer)]
    assert ids(train, tokenizer) == wanted
    ours = [(row.prompt, *row.answers.values()) for row in tokenized(train, "pairs", tokenizer)]
    assert ours == wanted
    assert all(ids(plain([row]), tokenizer) is None for row in rows if row not in taken)
    assert {"plain", "multi-turn"} <= set(train["id"])


@pytest.mark.parametrize("view", VIEWS)
def test_every_trainer_gets_tools_calls_reasoning_and_template_arguments(view, loaded, byte_tokenizer):
    tokenizer = with_template(byte_tokenizer, (TEMPLATES[0].parent / "qwen3_training.jinja").read_text())
    one = {"completion": "chosen"}
    rows = list(ROWS.values())
    if view == "paired":
        given = rows
    else:
        label = {"label": True} if view == "unpaired" else {}
        given = [
            {name: row[one.get(name, name)] for name in ("prompt", "completion", *EXTRAS) if one.get(name, name) in row}
            | label
            for row in rows
        ]
    more = [{"prompt": "Why?", "completion": "No.", "label": False}] if view == "unpaired" else []
    train = loaded(given + more, view=view, tokenizer=tokenizer).train
    wanted = [each for row in given for each in ids(plain([row]), tokenizer, view)]
    found = ids(train, tokenizer, view)
    assert sorted(map(repr, wanted)) == sorted(map(repr, [each for each in found if view != "unpaired" or each[-1]]))


def test_template_arguments_of_a_run_are_given_to_every_row_and_a_rows_own_win(loaded, byte_tokenizer):
    tokenizer = with_template(byte_tokenizer, TURN + "{{ mood }}")
    rows = [pair("Why?"), pair("How?", chat_template_kwargs={"mood": "sad"})]
    train = loaded(rows, tokenizer=tokenizer, chat_template_kwargs={"mood": "glad"}).train
    texts = [tokenizer.decode(row.answers["chosen"]) for row in tokenized(train, "pairs", tokenizer)]
    assert [text[-4:].strip(">") for text in texts] == ["glad", "sad"]


@pytest.fixture
def found(write, section, byte_tokenizer):
    """found(rows or a path, template): counts of findings by code."""

    def make(rows, text):
        path = write("rows.jsonl", rows) if isinstance(rows, list) else str(rows)
        seen = inspect(section(path), "paired", with_template(byte_tokenizer, text), None, 0)
        return {finding.code: finding.count for finding in seen.findings}

    return make


def test_tools_that_a_template_leaves_out_are_a_finding(found):
    rows = [ROWS["tools"] | {"chosen": [RAINS]}, ROWS["plain"] | {"prompt": [user("Why?")]}]
    assert found(rows, TURN)["tools_ignored"] == 1
    assert "tools_ignored" not in found(rows, (TEMPLATES[0].parent / "qwen3.jinja").read_text())


@pytest.mark.parametrize("name", ["x", "column"])
def test_a_system_message_that_a_template_leaves_out_is_a_finding(name, found):
    rows = case(f"06-system-dropped/{name}.jsonl")
    count = len(rows.read_text().splitlines())
    assert found(rows, case("06-system-dropped/phi3like.jinja").read_text())["system_ignored"] == count


def test_reasoning_that_a_template_strips_is_a_finding(found):
    text, rows = case("05-think-stripped/r1like.jinja").read_text(), case("05-think-stripped/x.jsonl")
    assert found(rows, text)["reasoning_stripped"] == len(rows.read_text().splitlines())
    assert "reasoning_stripped" not in found(rows, TURN)


def test_answers_that_a_template_writes_alike_are_an_error_where_all_are(found):
    text, rows = case("05-think-stripped/r1like.jinja").read_text(), case("05-think-stripped/same-final.jsonl")
    count = len(rows.read_text().splitlines())
    seen = found(rows, text)
    assert seen["alike_in_template"] == seen["nothing_differs"] == count
    assert "nothing_differs" not in found([*map(json.loads, rows.read_text().splitlines()), pair()], text)


def test_tools_and_arguments_of_the_cases_are_rendered_and_images_are_refused(loaded, byte_tokenizer):
    tokenizer = with_template(byte_tokenizer, (TEMPLATES[0].parent / "qwen3.jinja").read_text())
    rows = [json.loads(line) for line in case("03-tools-column/x.jsonl").read_text().splitlines()]
    train = loaded(str(case("03-tools-column/x.jsonl")), tokenizer=tokenizer).train
    assert ids(train, tokenizer) == ids(plain(rows), tokenizer)
    with pytest.raises(DataError, match=r"images, 40: .*data.columns=\{images: null\}"):
        loaded(str(case("03-tools-column/images.jsonl")))
    assert loaded(str(case("03-tools-column/images.jsonl")), columns={"images": None}).train
    parts = [{"type": "image"}, {"type": "text", "text": "What is shown?"}]
    train = loaded([pair([{"role": "user", "content": parts}])], columns={"images": None}).train
    assert train[0]["prompt"] == [user("What is shown?")]
