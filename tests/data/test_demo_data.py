import json
from collections import Counter
from pathlib import Path

from preftune.data import demo

HERE = Path(demo.__file__).parent
ROWS = {
    name: [json.loads(line) for line in (HERE / f"{name}.jsonl").open(encoding="utf-8")] for name in ("train", "eval")
}
ALL = ROWS["train"] + ROWS["eval"]


def text(row, side):
    return row[side][0]["content"]


def words(row, side):
    return tuple(word.strip(".,;:!?'\"").lower() for word in text(row, side).split())


def test_every_row_is_one_user_turn_with_two_assistant_replies():
    for row in ALL:
        assert list(row) == ["id", "prompt", "chosen", "rejected"]
        for side, role in (("prompt", "user"), ("chosen", "assistant"), ("rejected", "assistant")):
            assert row[side] == [{"role": role, "content": text(row, side).strip()}] and text(row, side).strip()


def test_ids_and_texts_occur_once():
    assert len({row["id"] for row in ALL}) == len(ALL)
    for side in ("prompt", "chosen", "rejected"):
        assert len({words(row, side) for row in ALL}) == len(ALL), side


def test_no_eval_prompt_and_no_near_copy_of_one_is_in_train():
    used = Counter(word for row in ALL for word in set(words(row, "prompt")))
    rare = {row["id"]: {word for word in words(row, "prompt") if used[word] <= 10} for row in ALL}
    for row in ROWS["eval"]:
        for other in ROWS["train"]:
            mine, theirs = rare[row["id"]], rare[other["id"]]
            assert len(mine & theirs) <= 0.5 * len(mine | theirs), (row["id"], other["id"])


def test_length_does_not_tell_chosen_from_rejected():
    for rows in ROWS.values():
        for length in (len, lambda reply: len(reply.split())):
            longer = [length(text(row, "chosen")) > length(text(row, "rejected")) for row in rows]
            assert 0.45 <= sum(longer) / len(longer) <= 0.55
