import copy
import random
from pathlib import Path

import malformed
import pytest
from base_section import pair

from preftune.data.findings import DataError
from preftune.data.kinds import KINDS
from preftune.data.load import inspect

LONG = "word " * 60


def many(count=24, **changes):
    """Pairs of different prompts, of which neither length nor words tell the better answer."""
    draw = random.Random(0)
    said = ["".join(draw.choice("abcdefgh ") for _ in range(draw.randint(10, 40))) for _ in range(2 * count)]
    return [pair(f"Why {i}?", f"x{said[2 * i]}", f"x{said[2 * i + 1]}", **changes) for i in range(count)]


def labelled(good, bad):
    answers = [(f"Answer {i}", i < good) for i in range(good + bad)]
    return [{"prompt": f"Why {i}?", "completion": text, "label": label} for i, (text, label) in enumerate(answers)]


SIX = labelled(3, 3)
TIED = {"prompt": "Why?", "completions": ["a", "b"], "scores": [1, 1]}
TOKENS = {"max_length": 100}

# code: rows, settings, and the origins that the finding must name
FOUND = {
    "identical_pair": ([pair(), pair("How?", "So.", "So.")], {}, ["rows.jsonl:2"]),
    "extra_message_fields": (
        [pair(chosen=[{"role": "assistant", "content": "So.", "mood": "glad"}])],
        {},
        [],
    ),
    "unread_columns": ([pair() | {"source": "a", "input": "b"}, pair("How?") | {"source": "a"}], {}, []),
    "one_label": (labelled(3, 0), {}, []),
    "replacement_character": ([pair(), pair("How?", "M\ufffdbius.")], {}, ["rows.jsonl:2: in chosen"]),
    "tied_scores": ([TIED, TIED | {"prompt": "How?", "scores": [1, 2]}], {}, ["rows.jsonl:1"]),
    "unmatched_labels": ([*SIX, SIX[0] | {"completion": "Bad.", "label": 0}], {"view": "paired"}, ["rows.jsonl:2"]),
    "duplicate_rows": ([pair(), pair("How?"), pair()], {}, ["rows.jsonl:3"]),
    "contradictory_pairs": (
        [pair(), pair("How?"), pair(chosen="No.", rejected="Because.")],
        {},
        ["rows.jsonl:1", "rows.jsonl:3"],
    ),
    "contradictory_labels": ([*SIX, SIX[0] | {"label": 0}], {}, ["rows.jsonl:1", "rows.jsonl:7"]),
    "label_imbalance": (labelled(5, 3), {}, []),
    "few_prompts": ([pair(f"Why {i % 4}?", f"Answer {i}") for i in range(40)], {}, ["rows.jsonl:1"]),
    "length_bias": ([row | {"chosen": row["chosen"] * (1 + (i % 4 > 0))} for i, row in enumerate(many(60))], {}, []),
    "length_explains": ([row | {"chosen": row["chosen"] + LONG} for row in many()], {}, []),
    "words_explain": ([row | {"rejected": f"sorry {row['rejected']}"} for row in many(60)], {}, []),
    "special_tokens_in_text": ([pair(), pair("How?", "So.<|im_end|> No.")], TOKENS, ["rows.jsonl:2: '<|im_end|>'"]),
    "loses_end": ([pair(), pair("How?", LONG)], TOKENS, ["rows.jsonl:2"]),
    "loses_everything": ([pair(), pair(LONG)], TOKENS, ["rows.jsonl:2"]),
    "nothing_left": ([pair(LONG), pair(LONG + "?")], TOKENS, []),
    "cut_alike": ([pair(), pair("How?", LONG + "a", LONG + "b")], TOKENS, ["rows.jsonl:2"]),
    "long_tail": ([*many(), pair("How?", LONG * 10)], {"max_length": None}, ["rows.jsonl:25"]),
}

# repeated_prompt, rendered_text, images, two_verdicts: test_forms; what a template drops: test_rendering;
# unread_files: test_folders; images_cut: trainers/test_images
# user_turn_in_answer: test_shapes; suspected_swaps: test_label_noise; held_out_loses_everything: test_template_tokens
ELSEWHERE = {
    "user_turn_in_answer",
    "prompt_leakage",
    "template_refuses",
    "prompt_not_prefix",
    "double_bos",
    "missing_eos",
}
ELSEWHERE |= {"repeated_prompt", "rendered_text", "images", "two_verdicts", "system_ignored", "reasoning_stripped"}
ELSEWHERE |= {"unread_files", "tools_ignored", "alike_in_template", "nothing_differs", "images_cut"}
ELSEWHERE |= {"mixed_shapes", "unknown_label", "suspected_swaps", "held_out_loses_everything"}


@pytest.fixture
def inspected(write, section, byte_tokenizer):
    def make(rows, view=None, max_length=None, tokenizer=byte_tokenizer, **changes):
        return inspect(section(write("rows.jsonl", rows), **changes), view, tokenizer, max_length, 0)

    return make


def by_code(seen):
    return {finding.code: finding for finding in seen.findings}


def test_every_kind_of_finding_has_a_test():
    assert set(FOUND) | ELSEWHERE | {file.code for file in malformed.files()} == set(KINDS)


@pytest.mark.parametrize("code", FOUND)
def test_what_is_wrong_is_found_counted_and_shown(code, inspected):
    rows, settings, origins = FOUND[code]
    finding = by_code(inspected(rows, **settings))[code]
    assert finding.severity == KINDS[code].severity
    assert finding.count >= 1
    for origin in origins:
        assert any(example.startswith(origin) for example in finding.examples)
    assert finding.remedy


def test_sound_data_has_no_finding(inspected):
    assert inspected(many(60), max_length=200).findings == []


def test_a_set_that_length_alone_explains_is_named_so(inspected):
    rows, _, _ = FOUND["length_explains"]
    finding = by_code(inspected(rows))["length_explains"]
    assert "length alone explains this set" in finding.says


def test_leakage_between_splits_is_found_whatever_the_case_and_white_space(write, inspected):
    held_out = write("held.jsonl", [pair("why  0?"), pair("Never seen")])
    finding = by_code(inspected(many(), eval_split=held_out))["prompt_leakage"]
    assert (finding.count, finding.of, finding.examples) == (1, 2, ["held.jsonl:1"])


def test_rows_of_another_kind_and_strange_labels_are_errors(loaded):
    with pytest.raises(DataError, match=r"mixed_shapes, 1: .*rows.jsonl:3"):
        loaded([pair(), pair("How?"), SIX[0]])
    with pytest.raises(DataError, match=r"unknown_label, 1: .*rows.jsonl:2: label is 'maybe'"):
        loaded([SIX[0], SIX[1] | {"label": "maybe"}], view="unpaired")


def with_template(tokenizer, template, **tokens):
    changed = copy.deepcopy(tokenizer)
    changed.chat_template = template
    for name, token in tokens.items():
        setattr(changed, name, token)
    return changed


TURN = "{% for m in messages %}{{ m.role[0] + m.content + '<|im_end|>' }}{% endfor %}"
TURN += "{% if add_generation_prompt %}a{% endif %}"


@pytest.mark.parametrize(
    ("code", "template", "tokens"),
    [
        ("prompt_not_prefix", TURN.replace("%}a{%", "%}A: {%"), {}),
        ("double_bos", "{{ bos_token * 2 }}" + TURN, {"bos_token": "<|im_start|>"}),
        ("missing_eos", TURN.replace("+ '<|im_end|>'", ""), {}),
        ("template_refuses", "{{ raise_exception('no system prompts') if messages[0].role == 'system' }}" + TURN, {}),
    ],
)
def test_faults_of_chat_templates_are_found(code, template, tokens, inspected, byte_tokenizer):
    rows = [pair(), pair("How?", system="Be brief.")]
    seen = inspected(rows, tokenizer=with_template(byte_tokenizer, template, **tokens))
    finding = by_code(seen)[code]
    assert finding.count == (1 if code == "template_refuses" else 2)
    assert not by_code(inspected(rows, tokenizer=with_template(byte_tokenizer, TURN)))


def test_rows_that_the_template_refuses_are_left_out_on_demand(loaded, byte_tokenizer):
    refusing = "{{ raise_exception('no system prompts') if messages[0].role == 'system' }}" + TURN
    rows = [pair(), pair("How?", system="Be brief.")]
    tokenizer = with_template(byte_tokenizer, refusing)
    with pytest.raises(DataError, match=r"template_refuses, 1: .*rows.jsonl:2: no system prompts"):
        loaded(rows, tokenizer=tokenizer)
    assert loaded(rows, tokenizer=tokenizer, on_bad_rows="skip").train["id"][:] == ["rows.jsonl:1"]


def test_the_row_that_is_shown_marks_what_is_scored_and_what_is_cut(inspected):
    seen = inspected([pair("Why?", "Because.", "No.")], max_length=60)
    example = seen.tokens.example
    text = {column: "".join(token.text for token in tokens) for column, tokens in example.items()}
    assert text["prompt"].endswith("<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n")
    assert text["chosen"] == "Because.<|im_end|>\n"
    assert {token.state for token in example["prompt"]} == {"read"}
    scored = min(60 - len(example["prompt"]), len(example["chosen"]))
    left = len(example["chosen"]) - scored
    assert [token.state for token in example["chosen"]] == ["scored"] * scored + ["cut"] * left


def test_token_counts_and_masks_are_those_of_trl(loaded, byte_tokenizer, tmp_path):
    from trl import DPOConfig, DPOTrainer

    from preftune.data.token_checks import tokenized
    from preftune.models.embedded import folder

    rows = loaded([pair("Why?", "Because of ü.", "No."), pair("How?", "So.", "Not so.", system="Be brief.")]).train
    args = DPOConfig(str(tmp_path), use_cpu=True, bf16=False, report_to="none", max_length=None)
    trainer = DPOTrainer(str(folder("embedded://tiny")), args=args, train_dataset=rows, processing_class=byte_tokenizer)
    ours = list(tokenized(rows.add_column("origin", ["a", "b"]), "pairs", byte_tokenizer))
    for mine, theirs in zip(ours, trainer.train_dataset, strict=True):
        assert mine.prompt == theirs["prompt_ids"]
        assert mine.answers == {"chosen": theirs["chosen_ids"], "rejected": theirs["rejected_ids"]}


def test_the_docs_list_every_code():
    listed = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
    assert [code for code, kind in KINDS.items() if f"| `{code}` | {kind.severity} | {kind.says} |" not in listed] == []


def test_columns_that_are_not_read_are_listed_once_with_their_counts(inspected):
    rows = [pair() | {"source": "a", "input": "b", "note": ""}, pair("How?") | {"source": "a", "id": 3}]
    assert by_code(inspected(rows))["unread_columns"].says == "not read: source (2), input (1)"


def test_a_weight_of_0_in_an_answer_of_a_pair_is_reported(inspected):
    turn = {"role": "assistant", "content": "So."}
    found = by_code(inspected([pair(chosen=[turn | {"weight": 0}]), pair("How?")]))["extra_message_fields"]
    assert found.says == "fields of messages that the chat template does not name: weight: 0 (1)"
    assert "extra_message_fields" not in by_code(inspected([pair(chosen=[turn | {"weight": 1}]), pair("How?")]))
