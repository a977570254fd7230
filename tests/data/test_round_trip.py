"""Each recogniser is as strict as its parser: what is read, written again, is what stood there."""

import csv
import json

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from preftune.data.formats import csv_file, json_file, jsonl
from preftune.data.messages import format_of, from_dialogue_text

MANY = settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\x00\r"), max_size=20)
PIECES = st.lists(st.sampled_from(["Human:", "Assistant:", "\n", "\n\n", " ", "a", "b: c", "Human", ":"]), max_size=12)


def letters(text: str) -> str:
    return "".join(text.split())


@MANY
@given(PIECES.map("".join))
def test_a_dialogue_that_is_recognised_holds_every_letter_of_its_text(text):
    if format_of(text):
        turns = from_dialogue_text(text, "chosen")
        name = {"user": "Human:", "assistant": "Assistant:"}
        assert letters("".join(name[turn["role"]] + turn["content"] for turn in turns)) == letters(text)


def rows_of(reads):
    return [read.row for read in reads]


def test_a_table_reads_alike_as_jsonl_json_csv_and_tsv(tmp_path):
    @MANY
    @given(st.lists(st.fixed_dictionaries({"prompt": TEXT, "chosen": TEXT, "rejected": TEXT}), min_size=1, max_size=3))
    def same(rows):
        (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        (tmp_path / "a.json").write_text(json.dumps(rows), encoding="utf-8")
        assert rows_of(jsonl(tmp_path / "a.jsonl", "a")) == rows
        assert rows_of(json_file(tmp_path / "a.json", "a")) == rows
        for ending, delimiter in ((".csv", ","), (".tsv", "\t")):
            with open(tmp_path / f"a{ending}", "w", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(
                    file, ["prompt", "chosen", "rejected"], delimiter=delimiter, lineterminator="\n"
                )
                writer.writeheader()
                writer.writerows(rows)
            assert rows_of(csv_file(tmp_path / f"a{ending}", "a")) == rows

    same()


@MANY
@given(st.lists(st.dictionaries(st.sampled_from(["role", "content"]), TEXT, min_size=1), min_size=1, max_size=3))
def test_a_list_in_a_cell_is_read_as_json_and_pandas_write_it(tmp_path_factory, turns):
    path = tmp_path_factory.mktemp("cells") / "a.csv"
    for text in (json.dumps(turns), str(turns)):
        with open(path, "w", newline="", encoding="utf-8") as file:
            csv.writer(file, lineterminator="\n").writerows([["chosen"], [text]])
        assert rows_of(csv_file(path, "a")) == [{"chosen": turns}]
