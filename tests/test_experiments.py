"""Every published recipe composes with its recipe, passes the checks, names its sources and can be planned."""

import re
from pathlib import Path

import pytest
import yaml
from hydra import compose, initialize_config_module
from hydra.core.global_hydra import GlobalHydra

from preftune.config import check
from preftune.plan import plan
from preftune.trainers import global_batch

FILES = sorted((Path(__file__).parents[1] / "conf" / "experiment").glob("*.yaml"))
PUBLISHED = [path.stem for path in FILES if path.stem != "demo"]


def text_of(name):
    return next(path for path in FILES if path.stem == name).read_text(encoding="utf-8")


def composed_experiment(name, *overrides):
    GlobalHydra.instance().clear()
    recipe = re.search(r"^# recipe: (\w+)$", text_of(name), re.M)[1]
    with initialize_config_module("preftune.conf", version_base="1.3"):
        return compose(recipe, [f"experiment={name}", "tracking=none", "output_dir=x", "hardware=gpu80gb", *overrides])


def test_there_are_the_recipes_that_were_promised():
    assert len(PUBLISHED) >= 12
    for word in ("zephyr", "qlora", "gemma", "simpo", "orpo", "kto", "tulu3", "smollm3", "pythia"):
        assert any(word in name for name in PUBLISHED)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_recipe_names_the_source_of_each_key(name):
    text = text_of(name)
    assert re.search(r"^# Hyperparameters from .+, not re-run\.$", text, re.M) and "https://" in text
    body = text.split("\n\n", 1)[1]
    for line in body.splitlines():
        if line.strip() and not line.startswith("#") and not line.rstrip().endswith(":"):
            assert "  # " in line, line


@pytest.mark.slow
@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_recipe_passes_the_checks_plans_and_keeps_its_global_batch(name):
    cfg = composed_experiment(name)
    assert [str(each) for each in check.check(cfg)] == []
    planned = plan.plan(cfg, world_size=1)
    whole = yaml.safe_load(text_of(name))["global_batch"]
    assert planned.steps > 100 and planned.global_batch == cfg.global_batch == whole
    cfg.hardware.per_device_train_batch_size = 1
    for devices in (1, 4):
        assert devices * global_batch.accumulation(cfg, devices) == whole
