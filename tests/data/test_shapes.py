import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from base_section import pair

from preftune.data.findings import DataError


def user(text):
    return {"role": "user", "content": text}


def says(text):
    return {"role": "assistant", "content": text}


SYSTEM = {"role": "system", "content": "Be brief."}
ASKED, GOOD, BAD = [user("Why?")], [says("Because.")], [says("No.")]
PAIR = {"prompt": ASKED, "chosen": GOOD, "rejected": BAD}
DIALOGUE = [user("Hi"), says("Hello"), user("Why?")]
HH = "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: Why?\n\nAssistant:"

PAIRS = {
    "prompt, chosen and rejected as texts": ({"prompt": "Why?", "chosen": "Because.", "rejected": "No."}, PAIR),
    "prompt, chosen and rejected as message lists": (PAIR, PAIR),
    "a prompt text with answers as message lists": ({"prompt": "Why?", "chosen": GOOD, "rejected": BAD}, PAIR),
    "a prompt as a message list with answers as texts": (
        {"prompt": ASKED, "chosen": "Because.", "rejected": "No."},
        PAIR,
    ),
    "whole dialogues in chosen and rejected, as message lists": (
        {"chosen": DIALOGUE + GOOD, "rejected": DIALOGUE + BAD},
        PAIR | {"prompt": DIALOGUE},
    ),
    "whole dialogues in chosen and rejected, as Human/Assistant texts": (
        {"chosen": f"{HH} Because.", "rejected": f"{HH} No."},
        PAIR | {"prompt": DIALOGUE},
    ),
    "a prompt beside whole dialogues": ({"prompt": "Why?", "chosen": ASKED + GOOD, "rejected": ASKED + BAD}, PAIR),
    "rated answers": ({"prompt": "Why?", "completions": ["No.", "Hm.", "Because."], "scores": [1, 2, 9.5]}, PAIR),
}


@pytest.mark.parametrize("name", PAIRS)
def test_each_shape_of_pairs_becomes_the_one_form_and_is_named(name, loaded):
    row, wanted = PAIRS[name]
    data = loaded([row])
    assert data.shape == name
    assert {key: data.train[0][key] for key in wanted} == wanted
    assert data.line.startswith(name)


@pytest.mark.parametrize(
    ("row", "shape", "wanted"),
    [
        ({"messages": ASKED + GOOD}, "messages", {"prompt": ASKED, "completion": GOOD}),
        ({"messages": [SYSTEM, *DIALOGUE, *GOOD]}, "messages", {"prompt": [SYSTEM, *DIALOGUE], "completion": GOOD}),
        ({"prompt": "Why?", "completion": "Because."}, "prompt and completion", {"prompt": ASKED, "completion": GOOD}),
        (
            {"messages": [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "Because."}]},
            "messages",
            {"prompt": ASKED, "completion": GOOD},
        ),
    ],
)
def test_each_shape_of_demonstrations(row, shape, wanted, loaded):
    data = loaded([row], view="demonstrations")
    assert data.shape == shape
    assert {key: data.train[0][key] for key in wanted} == wanted


@pytest.mark.parametrize(
    ("given", "label"),
    [(True, True), (0, False), (1.0, True), ("thumbs_up", True), ("Thumbs Down", False), ("-1", False), ("GOOD", True)],
)
def test_labels_are_read_from_booleans_numbers_and_words(given, label, loaded):
    row, other = ({"prompt": "Why?", "completion": "Because.", "label": each} for each in (given, not label))
    data = loaded([row, other | {"prompt": "How?"}], view="unpaired")
    assert data.shape == "prompt, completion and label"
    assert {each["prompt"][0]["content"]: each["label"] for each in data.train}["Why?"] is label


def test_system_prompts_come_from_their_own_column_or_from_the_dialogue(loaded):
    row = {"system": "Be brief.", "prompt": "Why?", "chosen": "Because.", "rejected": "No."}
    assert loaded([row]).train[0]["prompt"] == [SYSTEM, *ASKED]
    whole = {"chosen": [SYSTEM, *ASKED, *GOOD], "rejected": [SYSTEM, *ASKED, *BAD]}
    assert loaded([whole]).train[0]["prompt"] == [SYSTEM, *ASKED]


def test_columns_are_renamed_and_left_unread_by_config(loaded):
    row = {"question": "Why?", "good": "Because.", "bad": "No.", "prompt": "Something else", "key": 7}
    columns = {"prompt": "question", "chosen": "good", "rejected": "bad", "id": "key"}
    data = loaded([row], columns=columns)
    assert data.train[0] == {"id": "7"} | PAIR
    whole = {"prompt": "another form", "chosen": ASKED + GOOD, "rejected": ASKED + BAD}
    assert loaded([whole], columns={"prompt": None}).train[0]["prompt"] == ASKED


def test_dialogues_that_part_early_keep_their_later_turns_in_the_answers(loaded):
    later = [user("Sure?"), says("Yes.")]
    data = loaded([{"chosen": ASKED + GOOD + later, "rejected": ASKED + BAD + later}])
    assert data.train[0] == {"id": "rows.jsonl:1", "prompt": ASKED, "chosen": GOOD + later, "rejected": BAD + later}
    assert [finding.code for finding in data.findings] == ["user_turn_in_answer"]


@pytest.mark.parametrize(
    ("rule", "wanted"),
    [
        ("best_worst", [("a", "d")]),
        ("best_rest", [("a", "b"), ("a", "c"), ("a", "d")]),
        ("neighbours", [("a", "b"), ("c", "d")]),
        ("all", [("a", "b"), ("a", "c"), ("a", "d"), ("b", "d"), ("c", "d")]),
    ],
)
def test_rated_answers_make_pairs_by_the_stated_rule_and_ties_make_none(rule, wanted, loaded):
    rated = {"prompt": "Why?", "completions": ["d", "b", "a", "c"], "scores": [0, 3, 5, 3], "id": "x"}
    rows = loaded([rated], pairs_rule=rule).train
    assert [(row["chosen"][0]["content"], row["rejected"][0]["content"]) for row in rows] == wanted
    assert rows["id"][:] == (["x"] if len(wanted) == 1 else [f"x/{place}" for place in range(1, len(wanted) + 1)])


def test_best_random_draws_the_same_pair_in_every_run(loaded):
    rated = {"prompt": "Why?", "completions": list("abcdef"), "scores": [5, 1, 2, 3, 4, 0]}
    drawn = [loaded([rated], pairs_rule="best_random", seed=seed).train[0]["rejected"] for seed in (0, 1)]
    assert drawn[0] == drawn[1] != says("a")


def rows_as(kind, rows):
    if kind == "parquet":
        sink = pa.BufferOutputStream()
        pq.write_table(pa.Table.from_pylist(rows), sink)
        return sink.getvalue().to_pybytes()
    if kind == "csv":
        cells = [[row["prompt"], json.dumps(row["chosen"]), str(row["rejected"])] for row in rows]
        lines = [",".join('"' + cell.replace('"', '""') + '"' for cell in line) for line in cells]
        return "\n".join(["prompt,chosen,rejected", *lines])
    if kind == "json":
        return json.dumps(rows, indent=1)
    text = "".join(json.dumps(row) + "\n" for row in rows)
    return gzip.compress(text.encode()) if kind == "jsonl.gz" else text


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "json", "csv", "parquet"])
def test_every_file_format_gives_the_same_rows_with_their_lines(kind, write, loaded):
    rows = [{"prompt": f"Why {i}?\nSay.", "chosen": GOOD, "rejected": BAD} for i in range(3)]
    data = loaded(write(f"rows.{kind}", rows_as(kind, rows)))
    assert [row["prompt"][0]["content"] for row in data.train] == [row["prompt"] for row in rows]
    assert [row["rejected"] for row in data.train] == [BAD] * 3
    lines = {"json": [2, 17, 32], "csv": [2, 4, 6]}.get(kind, [1, 2, 3])
    assert data.train["id"][:] == [f"rows.{kind}:{line}" for line in lines]


def test_globs_folders_and_lists_read_every_file_in_order(write, loaded, tmp_path):
    paths = [write(f"many/{name}.jsonl", [PAIR | {"id": name}]) for name in "bac"]
    assert loaded(str(tmp_path / "many")).train["id"][:] == ["a", "b", "c"]
    assert loaded(str(tmp_path / "many" / "[ab].jsonl")).train["id"][:] == ["a", "b"]
    from omegaconf import ListConfig

    assert loaded(ListConfig(paths)).train["id"][:] == ["b", "a", "c"]


def test_json_is_read_as_a_list_as_an_object_that_holds_one_and_as_lines(write, loaded):
    rows = [{"prompt": f"Wh{'y' * i}? ü", "chosen": GOOD, "rejected": BAD} for i in range(4)]
    listed, lines = json.dumps(rows, ensure_ascii=False, indent=2), "\n".join(map(json.dumps, rows))
    for text in (listed, "\ufeff" + listed, f'{{"data": {listed}}}', lines):
        data = loaded(write("rows.json", text))
        assert [row["prompt"][0]["content"] for row in data.train] == [row["prompt"] for row in rows]


def test_rows_behind_fifty_that_no_shape_fits_are_read(loaded):
    pairs = [pair(f"Why {i}?") for i in range(3)]
    assert len(loaded([{"x": 1}] * 60 + pairs, on_bad_rows="skip").train) == 3


def test_a_hub_data_set_that_is_not_to_be_had_is_told_with_a_remedy(loaded):
    with pytest.raises(DataError, match="hf download --repo-type dataset nobody/nothing"):
        loaded("nobody/nothing")


def test_demonstrations_cannot_become_pairs(loaded):
    with pytest.raises(DataError, match="holds demonstrations, and this loss wants paired rows"):
        loaded([{"messages": ASKED + GOOD}])
