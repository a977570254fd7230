"""The forms of docs/data.md's table, each as its tools write it, and the one form that it becomes."""

import json

import pytest
from shared_cases import case

from preftune.data.findings import DataError


def user(text):
    return {"role": "user", "content": text}


def says(text):
    return {"role": "assistant", "content": text}


def human(text, who="human"):
    return {"from": who, "value": text}


ASKED, GOOD, BAD = [user("Why?")], [says("Because.")], [says("No.")]
PAIR = {"prompt": ASKED, "chosen": GOOD, "rejected": BAD}
BRIEF = {"role": "system", "content": "Be brief."}
SIDES = {"response_a": "Because.", "response_b": "No."}
NUMBERED = {"response_0": "No.", "response_1": "Because."}
ANNOTATED = [
    {"response": "No.", "annotations": {"honesty": {"Rating": "2"}, "truth": [{"Rating": "N/A"}]}},
    {"response": "Because.", "annotations": {"honesty": {"Rating": "5"}, "truth": [{"Rating": "3"}]}},
]

PAIRS = {  # what the run calls it: a row, and what it becomes
    "sharegpt": (
        {
            "conversations": [human("Be brief.", "system"), human("Why?")],
            "chosen": human("Because.", "gpt"),
            "rejected": human("No.", "gpt"),
        },
        PAIR | {"prompt": [BRIEF, *ASKED]},
    ),
    "sharegpt with texts": ({"conversations": [human("Why?")], "chosen": "Because.", "rejected": "No."}, PAIR),
    "sharegpt in a json text": (
        {"conversations": json.dumps([human("Why?")]), "chosen": "Because.", "rejected": "No."},
        PAIR,
    ),
    "alpaca": (
        {"instruction": "Sum up.", "input": "A text.", "chosen": "Because.", "rejected": "No.", "system": "Be brief."},
        PAIR | {"prompt": [BRIEF, user("Sum up.\nA text.")]},
    ),
    "alpaca, ranked": (
        {"instruction": "Why?", "input": "", "output": ["Because.", "No."], "history": [["Hi", "Hello"]]},
        PAIR | {"prompt": [user("Hi"), says("Hello"), *ASKED]},
    ),
    "openai": (
        {
            "input": {"messages": ASKED, "tools": [], "parallel_tool_calls": True},
            "preferred_output": GOOD,
            "non_preferred_output": BAD,
        },
        PAIR,
    ),
    "question": ({"system": "", "question": "Why?", "chosen": "Because.", "rejected": "No."}, PAIR),
    "response_a, winner": ({"prompt": "Why?", "winner": "model_a"} | SIDES, PAIR),
    "response_a, model names": ({"prompt": "Why?", "winner": "x-1", "model_a": "x-1", "model_b": "y-0"} | SIDES, PAIR),
    "response_0, better_response_id": ({"prompt": "Why?", "better_response_id": 1} | NUMBERED, PAIR),
    "response_1, response_2": (
        {"prompt": "Why?", "response_1": "No.", "response_2": "Because.", "preference": 2},
        PAIR,
    ),
    "signed strength": (
        {"context": ASKED, "response1": "Because.", "response2": "No.", "overall_preference": -2},
        PAIR,
    ),
    "shp": ({"history": "Why?", "human_ref_A": "Because.", "human_ref_B": "No.", "labels": 1}, PAIR),
    "scores per side": (
        {"prompt": "Why?", "answer_0": "No.", "answer_1": "Because.", "score_0": 1, "score_1": "2"},
        PAIR,
    ),
    "saferlhf": (
        {
            "prompt_source": "x",
            "response_0_source": "y",
            "response_1_source": "z",
            "prompt": "Why?",
            "better_response_id": 1,
            "is_response_0_safe": True,
            "is_response_1_safe": False,
        }
        | NUMBERED,
        PAIR,
    ),
    "helpsteer, with a reason": (
        {
            "prompt": "Why?",
            "response_1": "Because.",
            "response_2": "No.",
            "preference_strength": -1,
            "preference_statement": "Response 1 is much better than Response 2",
        },
        PAIR,
    ),
    "the winner's text": ({"prompt": "Why?", "preferred": "Because."} | SIDES, PAIR),
    "nectar": (
        {
            "prompt": "\n\nHuman: Why?\n\nAssistant: ",
            "answers": [
                {"answer": "No.", "model": "x", "rank": 7.0},
                {"answer": "Because.", "rank": 1.0},
            ],
            "turns": 1,
        },
        PAIR,
    ),
    "webgpt": (
        {
            "question": "Why?",
            "answer_0": "No.",
            "tokens_0": 3,
            "score_0": -0.5,
            "answer_1": "Because.",
            "tokens_1": 3,
            "score_1": 0.5,
        },
        PAIR,
    ),
    "arena": (
        {"conversation_a": ASKED + GOOD, "conversation_b": ASKED + BAD, "winner": "model_a", "model_a": "x"},
        PAIR,
    ),
    "one-hot": (
        {"prompt": "Why?", "winner_model_a": 1, "winner_model_b": 0, "winner_tie": 0} | SIDES,
        PAIR,
    ),
    "ultrafeedback": ({"instruction": "Why?", "completions": ANNOTATED, "models": ["a", "b"]}, PAIR),
    "ultrafeedback's scores": (
        {
            "instruction": "Why?",
            "completions": [
                {"response": "No.", "overall_score": 3},
                {"response": "Hm.", "overall_score": None},
                {"response": "Because.", "overall_score": "8.5"},
            ],
        },
        PAIR,
    ),
    "distilabel": (
        {"input": "Why?", "generations": ["No.", "Because.", "Hm."], "ratings": [2, 5.0, None], "model_name": "x"},
        PAIR,
    ),
    "ranks": ({"question": "Why?", "answers": ["No.", "Because."], "rank": [2, 1]}, PAIR),
    "ranked objects": (
        {"prompt": "Why?", "answers": [{"text": "No.", "rank": 1}, {"text": "Because.", "rank": 0}]},
        PAIR,
    ),
    "scores as texts": ({"prompt": "Why?", "completions": ["No.", "Because."], "scores": ["1", "N/A"]}, None),
    "a row in a text": (
        {"line": json.dumps({"prompt": "Why?", "chosen": "Because.", "rejected": "No."}), "n": 1},
        PAIR,
    ),
    "chatml": (
        {
            "prompt": "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWhy?<|im_end|>\n"
            "<|im_start|>assistant\n",
            "chosen": "Because.<|im_end|>\n",
            "rejected": "No.<|im_end|>",
        },
        PAIR | {"prompt": [BRIEF, *ASKED]},
    ),
    "llama 2": (
        {
            "chosen": "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nWhy? [/INST] Because. </s>",
            "rejected": "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nWhy? [/INST] No. </s>",
        },
        PAIR | {"prompt": [BRIEF, *ASKED]},
    ),
    "llama 3": (
        {
            "prompt": "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nWhy?<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n",
            "chosen": "Because.<|eot_id|>",
            "rejected": "No.<|eot_id|>",
        },
        PAIR,
    ),
    "gemma": (
        {
            "chosen": "<bos><start_of_turn>user\nWhy?<end_of_turn>\n<start_of_turn>model\nBecause.<end_of_turn>\n",
            "rejected": "<bos><start_of_turn>user\nWhy?<end_of_turn>\n<start_of_turn>model\nNo.<end_of_turn>\n",
        },
        PAIR,
    ),
}


@pytest.mark.parametrize("form", PAIRS)
def test_each_form_of_pairs_becomes_the_one_form(form, loaded):
    row, wanted = PAIRS[form]
    second = {"prompt": "How?", "chosen": "So.", "rejected": "No."}
    train = loaded([row, second]).train
    assert len(train) == (1 if wanted is None else 2)
    if wanted is not None:
        assert {key: train[0][key] for key in wanted} == wanted


DEMONSTRATION = {"prompt": ASKED, "completion": GOOD}
SHOWN = {
    "sharegpt": ({"conversations": [human("Why?"), human("Because.", "gpt")]}, DEMONSTRATION),
    "alpaca": ({"instruction": "Why?", "input": "", "output": "Because."}, DEMONSTRATION),
    "response": ({"question": "Why?", "response": "Because."}, DEMONSTRATION),
    "a rendered text": (
        {"text": "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\nBecause.<|im_end|>\n"},
        DEMONSTRATION,
    ),
    "a text of human and assistant": ({"text": "Human: Why?\n\nAssistant: Because."}, DEMONSTRATION),
    "openai, a turn of weight 0": (
        {"messages": [*ASKED, says("Hm.") | {"weight": 0}, user("So?"), *GOOD]},
        {"prompt": [*ASKED, says("Hm.") | {"weight": 0}, user("So?")], "completion": GOOD},
    ),
    "the last turn of weight 0": (
        {"messages": [*ASKED, says("Because.") | {"weight": 1}, user("So?"), says("Hm.") | {"weight": 0}]},
        {"prompt": ASKED, "completion": [says("Because.") | {"weight": 1}]},
    ),
    "axolotl's train": (
        {"messages": [*ASKED, says("Hm.") | {"train": False}, {"role": "tool", "content": "4"}, *GOOD]},
        {"prompt": [*ASKED, says("Hm.") | {"train": False}, {"role": "tool", "content": "4"}], "completion": GOOD},
    ),
    "sharegpt's calls": (
        {
            "conversations": [
                human("Why?"),
                human('{"name": "look", "arguments": {"x": 1}}', "function_call"),
                human("4", "observation"),
                human("Because.", "gpt"),
            ]
        },
        {
            "prompt": ASKED,
            "completion": [
                {
                    "role": "assistant",
                    "tool_calls": [{"type": "function", "function": {"name": "look", "arguments": {"x": 1}}}],
                },
                {"role": "tool", "content": "4"},
                *GOOD,
            ],
        },
    ),
}


@pytest.mark.parametrize("form", SHOWN)
def test_each_form_of_demonstrations(form, loaded):
    row, wanted = SHOWN[form]
    train = loaded([row], view="demonstrations").train
    assert {key: train[0][key] for key in wanted} == wanted


FEEDBACK = {
    "sharegpt": (
        [
            {"conversations": [human("Why?"), human(text, "gpt")], "kto_tag": tag}
            for text, tag in (("Because.", True), ("No.", False))
        ],
        {},
    ),
    "thumbs": (
        [{"question": "Why?", "answer": text, "thumbs": tag} for text, tag in (("Because.", "up"), ("No.", "👎"))],
        {},
    ),
    "stars": (
        [{"prompt": "Why?", "response": text, "stars": stars} for text, stars in (("Because.", 4), ("No.", 1))],
        {"good_at": 4},
    ),
    "a nested label": (
        [{"prompt": "Why?", "response": text, "fb": {"up": up}} for text, up in (("Because.", 1), ("No.", 0))],
        {"columns": {"label": "fb.up"}},
    ),
    "a log of json texts": (
        [
            {"time": 3, "body": json.dumps({"messages": [*ASKED, says(text)], "label": good})}
            for text, good in (("Because.", True), ("No.", False))
        ],
        {},
    ),
}


@pytest.mark.parametrize("form", FEEDBACK)
def test_each_form_of_feedback(form, loaded):
    rows, settings = FEEDBACK[form]
    train = loaded(rows, view="unpaired", **settings).train
    assert {row["completion"][0]["content"]: row["label"] for row in train} == {"Because.": True, "No.": False}
    assert train[0]["prompt"] == ASKED


@pytest.mark.parametrize(
    ("row", "settings", "words"),
    [
        ({"prompt": "Why?", "winner": "me"} | SIDES, {}, "winner is 'me'; it names a, b or a tie"),
        ({"prompt": "Why?"} | SIDES, {}, "no column tells the better one: data.verdict=COLUMN"),
        ({"prompt": "Why?", "labels": 1} | SIDES, {}, "labels is 1; it names a, b or a tie"),
        (
            {"prompt": "Why?", "better_response_id": 0, "safer_response_id": 1} | NUMBERED,
            {},
            "better_response_id says response_0, safer_response_id says response_1; data.verdict=better_response_id",
        ),
        ({"text": "Once upon a time."}, {}, "text holds no turns"),
        ({"prompt": "Why?", "preference": -1} | NUMBERED, {}, "preference is -1; it names 0, 1 or a tie"),
        (
            {"prompt": "Why?", "toxicity_score_a": 1, "toxicity_score_b": 0} | SIDES,
            {},
            "no column tells the better one",
        ),
        ({"title": {"text": "Why?"}, "winner": "a"} | SIDES, {}, "no prompt beside the answers: data.columns={prompt"),
        ({"prompt": '["Why?", "How?"]', "winner": "a"} | SIDES, {}, "prompt is a list"),
        (
            {"prompt": "Why?", "chosen": json.dumps(json.dumps(GOOD)), "rejected": "No."},
            {},
            "JSON text inside JSON text",
        ),
        ({"prompt": "Why?", "chosen": "So.", "rejected": "No.", "images": ["a.png"]}, {}, "images"),
        (
            {"prompt": [{"role": "user", "content": [{"type": "image"}]}], "chosen": "So.", "rejected": "No."},
            {},
            "images",
        ),
    ],
)
def test_what_is_ambiguous_or_not_trained_on_is_refused_by_name(row, settings, words, loaded):
    with pytest.raises(DataError) as told:
        loaded([row], **settings)
    assert words in str(told.value) and "rows.jsonl:1" in str(told.value)


def test_the_verdict_that_is_named_counts(loaded):
    row = {"prompt": "Why?", "better_response_id": 1, "safer_response_id": 0} | NUMBERED
    assert loaded([row], verdict="better_response_id").train[0]["chosen"] == GOOD
    assert loaded([row], verdict="safer_response_id").train[0]["chosen"] == BAD


def test_grades_beside_two_answers_are_no_verdict_whatever_their_number(loaded):
    rows = [
        {"prompt": f"Why {grade}?", "response_1": "So.", "response_2": "No.", "preference": grade} for grade in (2, 6)
    ]
    with pytest.raises(DataError, match=r"unknown_label, 2: .*one of several grades"):
        loaded(rows)


def test_ties_make_no_pair_and_are_counted(loaded):
    rows = [{"prompt": f"Why {word}?", "winner": word} | SIDES for word in ("model_a", "tie", "tie (bothbad)", "a")]
    data = loaded(rows)
    assert [row["prompt"][0]["content"] for row in data.train] == ["Why model_a?", "Why a?"]
    assert {finding.code: finding.count for finding in data.findings} == {"tied_scores": 2}


def test_feedback_of_one_kind_alone_is_an_error_that_says_what_to_do(loaded):
    with pytest.raises(DataError, match=r"all 2 answers are good.*python -m recipes.sft"):
        loaded([{"prompt": f"Why {i}?", "completion": "So.", "label": True} for i in range(2)], view="unpaired")


def test_the_line_of_a_run_names_the_columns_that_it_read(loaded):
    row = {"prompt": "Why?", "winner": "a", "turns": 3, "input": {"x": 1}} | SIDES
    data = loaded([row])
    assert data.shape == "rated answers (response_a, response_b, winner)"
    assert data.line.endswith("not read: turns (1), input (1)")


def test_a_prompt_that_both_answers_repeat_is_cut_off_and_counted(loaded):
    asked = "Why is the sky blue?"
    data = loaded([{"prompt": asked, "chosen": f"{asked}\nBecause.", "rejected": f"{asked} No."}])
    assert (data.train[0]["chosen"], data.train[0]["rejected"]) == ([says("Because.")], [says("No.")])
    assert [(finding.code, finding.count) for finding in data.findings] == [("repeated_prompt", 1)]


def test_marks_of_turns_inside_a_text_are_a_finding(loaded):
    rows = [{"prompt": "Why?<|im_end|>\n<|im_start|>assistant\n", "chosen": "So.", "rejected": "No."}]
    assert [finding.code for finding in loaded(rows).findings] == ["rendered_text"]


@pytest.mark.parametrize("columns", [{}, {"prompt": "instruction"}])
def test_alpaca_rows_of_the_cases_join_their_input(columns, loaded):
    train = loaded(str(case("08-alpaca-input/unique.jsonl")), columns=columns).train
    row = json.loads(case("08-alpaca-input/unique.jsonl").read_text().splitlines()[0])
    assert train[0]["prompt"] == [user(f"{row['instruction']}\n{row['input']}")]


@pytest.mark.parametrize(
    "name", ["08-alpaca-input/ranked-output.json", "12-shp-ab/x.jsonl", "12-shp-ab/balanced.jsonl"]
)
def test_ranked_and_two_sided_rows_of_the_cases_are_the_right_way_round(name, loaded):
    train = loaded(str(case(name))).train
    assert len(train) > 9
    for row in train:
        assert row["chosen"][0]["content"].startswith("Use warm water")
        assert row["rejected"][0]["content"].startswith("It depends on")


def test_a_system_prompt_beside_dialogues_is_kept_and_turns_behind_single_line_breaks_are_turns(loaded):
    pirate = loaded(str(case("27-prompt-and-dialogue/system-in-prompt.jsonl"))).train[0]
    assert pirate["prompt"][0] == {"role": "system", "content": "Answer like a pirate."}
    cat = loaded(str(case("29-single-newline/human-single-newline.jsonl"))).train[0]
    assert [turn["role"] for turn in cat["prompt"]] == ["user", "assistant", "user"]


def test_grades_need_to_be_told_from_which_number_on_an_answer_is_good(loaded):
    rows = [{"prompt": "Why?", "response": f"So {stars}.", "stars": stars} for stars in (5, 1)]
    with pytest.raises(DataError, match=r"holds demonstrations, .* data.good_at=4"):
        loaded(rows, view="unpaired")
    labels = [{"prompt": "Why?", "response": f"So {label}.", "label": label} for label in (1, 5)]
    with pytest.raises(DataError, match=r"unknown_label, 2: .*data.good_at=4"):
        loaded(labels, view="unpaired")
    for given in (rows, labels):
        found = loaded(given, view="unpaired", good_at=4).train
        assert {row["completion"][0]["content"]: row["label"] for row in found} == {"So 5.": True, "So 1.": False}


def test_nested_columns_are_named_with_a_dot(loaded):
    row = {"ask": {"turns": ASKED, "lang": "en"}, "best": {"text": "Because."}, "worst": {"text": "No."}}
    columns = {"prompt": "ask.turns", "chosen": "best.text", "rejected": "worst.text"}
    data = loaded([row], columns=columns)
    assert {key: data.train[0][key] for key in PAIR} == PAIR
    assert data.line.endswith("not read: ask.lang (1)")
    with pytest.raises(DataError, match="data.columns names ask.tunrs; there are ask, best, worst"):
        loaded([row], columns=columns | {"prompt": "ask.tunrs"})


def test_columns_that_only_look_like_labels_or_texts_leave_demonstrations_alone(loaded):
    rows = [
        {"prompt": "Why?", "completion": "So.", "feedback": "A good answer, I think.", "text": "Why? So."},
        {"prompt": "How?", "completion": "So.", "score": 0.93, "model_a": "x", "model_b": "y"},
    ]
    data = loaded(rows, view="demonstrations")
    assert len(data.train) == 2
    assert data.line.endswith("not read: feedback (1), text (1), score (1), model_a (1), model_b (1)")
