"""The arguments read from source are those that the classes have, and say what they want as the classes do."""

import dataclasses
import importlib
import inspect
import types
import typing

import pytest

from preftune.config.keys import trainers
from preftune.config.stages import config_class
from preftune.config.trainer_fields import UNREAD, fields
from preftune.config.values import PLAIN

CLASSES = [
    "trl.DPOConfig",
    "trl.KTOConfig",
    "trl.SFTConfig",
    "trl.experimental.orpo.ORPOConfig",
    "trl.experimental.cpo.CPOConfig",
    "transformers.TrainingArguments",
    "peft.LoraConfig",
]


def imported(dotted):
    module, name = dotted.rsplit(".", 1)
    return getattr(importlib.import_module(module), name)


@pytest.mark.parametrize("dotted", CLASSES)
def test_reading_equals_dataclasses_fields(dotted):
    real = {field.name: field for field in dataclasses.fields(imported(dotted)) if field.init}
    read = fields(dotted)
    assert list(read) == list(real)
    for name, field in real.items():
        default = field.default if field.default is not dataclasses.MISSING else UNREAD
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        if read[name].default is not UNREAD:
            assert read[name].default == default, name


@pytest.mark.parametrize("dotted", CLASSES)
def test_what_is_wanted_equals_the_annotation(dotted):
    for name, kind in typing.get_type_hints(imported(dotted)).items():
        if name in fields(dotted) and plain_kinds(kind) and name != "fsdp":  # true or false besides its str | None
            assert fields(dotted)[name].wants.kinds == plain_kinds(kind), name


def plain_kinds(kind):
    """The names of the plain types in an annotation; nothing where it holds a class of the library."""
    origin = typing.get_origin(kind)
    if origin in (typing.Union, types.UnionType):
        members = [plain_kinds(member) for member in typing.get_args(kind)]
        return frozenset().union(*members) if all(members) else frozenset()
    if origin is typing.Literal:
        return frozenset("None" if value is None else type(value).__name__ for value in typing.get_args(kind))
    plain = "None" if kind is type(None) else getattr(origin or kind, "__name__", "")
    return frozenset({plain} if plain in PLAIN else ())


def test_bits_and_bytes_arguments_are_those_of_its_init():
    parameters = inspect.signature(imported("transformers.BitsAndBytesConfig").__init__).parameters.values()
    named = {each.name: each.default for each in parameters if each.kind is each.POSITIONAL_OR_KEYWORD}
    named.pop("self")
    assert {name: field.default for name, field in fields("transformers.BitsAndBytesConfig").items()} == named


def test_choices_are_read_from_metadata_enums_literals_and_help():
    from transformers.trainer_utils import SchedulerType
    from transformers.training_args import OptimizerNames

    dpo = fields("trl.DPOConfig")
    assert set(dpo["lr_scheduler_type"].wants.words) == {each.value for each in SchedulerType}
    assert set(dpo["optim"].wants.words) == {each.value for each in OptimizerNames}
    assert dpo["train_sampling_strategy"].wants.words[:2] == ("random", "sequential")
    assert dpo["loss_type"].wants.items.words[:3] == ("sigmoid", "hinge", "ipo")
    assert dpo["f_divergence_type"].wants.words == ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence")
    assert fields("peft.LoraConfig")["bias"].wants.words == ("none", "all", "lora_only")


def test_every_loss_type_that_dpo_computes_is_among_its_choices():
    from trl import DPOTrainer

    computed = inspect.getsource(DPOTrainer._compute_loss)
    for name in fields("trl.DPOConfig")["loss_type"].wants.items.words:
        assert f'loss_type == "{name}"' in computed


def test_every_trainer_of_conf_has_a_readable_config_class():
    assert set(trainers()) >= {"dpo", "ipo", "kto", "orpo", "simpo", "sft"}
    for trainer in trainers().values():
        assert fields(config_class(trainer))


def test_a_class_that_is_not_there_is_a_lookup_error():
    for dotted in ("trl.DPOKonfig", "trl.nowhere.DPOConfig", "no_such_package.DPOConfig"):
        with pytest.raises(LookupError):
            fields(dotted)
