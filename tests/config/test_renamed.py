"""What TRL and transformers have renamed or dropped gets what to write instead, in place of a guess."""

import pytest

from preftune.config.keys import trainers
from preftune.config.renamed import KEYS
from preftune.config.stages import config_class
from preftune.config.trainer_fields import fields


def test_every_entry_is_gone_from_dpo_and_says_what_to_write(told):
    assert not set(KEYS) & set(fields("trl.DPOConfig"))
    found = told(*(f"loss.{name}=1" for name in KEYS))
    assert found == {f"loss.{name}": text for name, text in KEYS.items()}


@pytest.mark.parametrize(
    "name", ["evaluation_strategy", "no_cuda", "group_by_length", "max_prompt_length", "tokenizer"]
)
def test_a_renamed_key_is_told_wherever_it_is_written(told, name):
    for typed in (f"train.{name}=1", f"+hardware.{name}=1", f"{name}=1"):
        assert list(told(typed).values()) == [KEYS[name]]


def test_what_a_trainer_still_has_is_not_refused(told):
    assert told("loss=simpo", "loss.max_completion_length=64") == {}
    assert told("loss=orpo", "loss.padding_value=0") == {}


def test_advice_names_keys_and_choices_that_exist():
    known = {name for trainer in trainers().values() for name in fields(config_class(trainer))}
    for text in KEYS.values():
        for word in text.replace(";", " ").replace(":", " ").replace(",", " ").split():
            section, dot, rest = word.partition(".")
            if dot and section in ("train", "hardware"):
                assert rest.partition("=")[0].rstrip(".") in known, text
