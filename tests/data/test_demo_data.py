"""The shipped pairs are what their README says."""

import json
from pathlib import Path

from preftune.data import demo
from preftune.evaluate.scoring import short_answer

HERE = Path(demo.__file__).parent
ROWS = {
    name: [json.loads(line) for line in (HERE / f"{name}.jsonl").open(encoding="utf-8")]
    for name in ("train", "eval", "neutral")
}
PAIRS = ROWS["train"] + ROWS["eval"]


def test_every_chosen_answer_keeps_the_rule_and_every_rejected_one_breaks_it():
    for row in PAIRS:
        assert list(row) == ["prompt", "chosen", "rejected"]
        assert short_answer([], row["chosen"]) == 1 and row["chosen"][-1] in ".!?"
        assert short_answer([], row["rejected"]) == 0


def test_prompts_occur_once_and_no_held_out_one_is_in_train():
    prompts = [row["prompt"] for row in PAIRS]
    assert len(set(prompts)) == len(prompts)
    assert (len(ROWS["train"]), len(ROWS["eval"])) == (96, 48)


def test_the_request_for_a_short_answer_is_not_in_the_data():
    assert not any("short sentence" in row["prompt"] for row in PAIRS)


def test_neutral_rows_are_demonstrations_of_other_prompts():
    assert len(ROWS["neutral"]) == 50
    assert not {row["prompt"] for row in ROWS["neutral"]} & {row["prompt"] for row in PAIRS}
    assert all(row["completion"].strip() for row in ROWS["neutral"])
