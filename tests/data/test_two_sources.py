"""Nothing of two sources is dropped in silence, and what is recognised as a dialogue is parsed as one."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from preftune.data.findings import RowFault
from preftune.data.messages import as_prompt, format_of, from_dialogue_text
from preftune.data.shapes import shape_of

WORDS = st.text("abc xyz.", min_size=1).map(str.strip).filter(bool)


def message(role, content):
    return {"role": role, "content": content}


def converted(prompt) -> list[dict]:
    sides = {side: [message("user", "Where?"), message("assistant", text)] for side, text in
             (("chosen", "Here."), ("rejected", "There."))}  # fmt: skip
    row = {"prompt": prompt} | sides
    return shape_of(row).convert(row, "best_worst")


def test_a_system_message_and_history_of_the_prompt_column_are_kept():
    prompt = [
        message("system", "Be brief."),
        message("user", "Hi"),
        message("assistant", "Ho"),
        message("user", "Where?"),
    ]
    assert converted(prompt)[0]["prompt"] == prompt


def test_a_system_column_goes_before_the_history_of_the_prompt_column(loaded):
    history = [message("user", "Hi"), message("assistant", "Ho"), message("user", "Where?")]
    sides = {side: [history[-1], message("assistant", f"{side}.")] for side in ("chosen", "rejected")}
    train = loaded([{"system": "Be brief.", "prompt": history} | sides]).train
    assert train[0]["prompt"] == [message("system", "Be brief."), *history]


def test_a_turn_of_the_prompt_column_that_would_be_lost_is_an_error():
    with pytest.raises(RowFault, match="Be brief"):
        converted([message("system", "Be brief."), message("user", "Where?"), message("assistant", "Here.")])


@settings(max_examples=200, deadline=None)
@given(st.lists(WORDS, min_size=1, max_size=6), st.sampled_from(["\n", "\n\n"]))
def test_turns_of_a_recognised_dialogue_joined_again_give_the_text(contents, gap):
    names = ["Human", "Assistant"]
    text = gap.join(f"{names[i % 2]}: {content}" for i, content in enumerate(contents))
    assert format_of(text)
    roles = {"user": "Human", "assistant": "Assistant"}
    assert gap.join(f"{roles[turn['role']]}: {turn['content']}" for turn in from_dialogue_text(text, "prompt")) == text


def test_single_line_breaks_part_turns():
    found = as_prompt("Human: a\nAssistant: b\nHuman: c\nAssistant:")
    assert [(turn["role"], turn["content"]) for turn in found] == [("user", "a"), ("assistant", "b"), ("user", "c")]
