"""Every field of TRL's configuration classes reaches the trainer under its own name, or is refused with a reason."""

import pytest
from omegaconf import OmegaConf, open_dict

from preftune.config.check import ConfigError, require
from preftune.config.renamed import OURS
from preftune.config.stages import config_class, home
from preftune.config.trainer_fields import UNREAD, fields
from preftune.trainers.build import trainer_arguments

REFUSED = set(OURS)  # preftune's own keys set these


@pytest.mark.parametrize("recipe", ["dpo", "kto", "orpo", "simpo", "sft", "reward", "rloo", "grpo", "online_dpo"])
def test_each_field_reaches_the_trainer_or_is_refused_by_name(recipe, composed):
    given = composed("dpo", f"loss={recipe}") if recipe in ("simpo", "online_dpo") else composed(recipe)
    plain, refused = OmegaConf.to_container(given, resolve=True), {}
    for name, field in fields(config_class(given.loss.trainer)).items():
        section = next((each for each in ("train", "loss", "hardware") if name in plain[each]), home(field))
        value = plain[section].get(name, None if field.default is UNREAD else field.default)
        cfg = OmegaConf.create(plain)
        with open_dict(cfg):
            cfg[section][name] = value
        try:
            require(cfg)
        except ConfigError as error:
            refused[name] = str(error)
            continue
        assert name in trainer_arguments(cfg), name
    assert all(name in reason for name, reason in refused.items())
    assert refused.keys() <= REFUSED, refused.keys() - REFUSED
