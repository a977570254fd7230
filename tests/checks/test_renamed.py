"""What TRL and transformers have renamed or dropped gets what to write instead, in place of a guess."""

import pytest

from preftune.checks import renamed, stages
from preftune.checks.fields import fields
from preftune.checks.keys import trainers


def test_every_entry_is_gone_from_dpo_and_says_what_to_write(told):
    assert not set(renamed.KEYS) & set(fields("trl.DPOConfig"))
    found = told(*(f"loss.{name}=1" for name in renamed.KEYS))
    assert found == {f"loss.{name}": text for name, text in renamed.KEYS.items()}


@pytest.mark.parametrize(
    "name", ["evaluation_strategy", "no_cuda", "group_by_length", "max_prompt_length", "tokenizer"]
)
def test_a_renamed_key_is_told_wherever_it_is_written(told, name):
    for typed in (f"train.{name}=1", f"+hardware.{name}=1", f"{name}=1"):
        assert list(told(typed).values()) == [renamed.KEYS[name]]


def test_what_a_trainer_still_has_is_not_refused(told):
    assert told("loss=simpo", "loss.max_completion_length=64") == {}
    assert told("loss=orpo", "loss.padding_value=0") == {}


def test_advice_names_keys_and_choices_that_exist():
    known = {name for trainer in trainers().values() for name in fields(stages.config_class(trainer))}
    for text in renamed.KEYS.values():
        for word in text.replace(";", " ").replace(":", " ").replace(",", " ").split():
            section, dot, rest = word.partition(".")
            if dot and section in ("train", "hardware"):
                assert rest.partition("=")[0].rstrip(".") in known, text
