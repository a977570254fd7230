"""Runs of the tiny model that are evaluated, exported and talked to, each trained once."""

import pytest
from hydra import compose, initialize_config_module
from hydra.core.global_hydra import GlobalHydra

SMALL = ["model=tiny", "hardware=cpu", "hardware.bf16=false", "tracking=none", "samples=1", "gate.on_fail=warn"]
STEPS = ["hardware.per_device_train_batch_size=4", "train.learning_rate=2e-2", "train.max_steps=3"]
DATA = ["data=file", "data.eval_fraction=0.25"]
ONLY_TRAINED = ["pipeline.stages=[sft,preference]"]


def composed_once(recipe, *overrides):
    GlobalHydra.instance().clear()
    with initialize_config_module("preftune.conf", version_base="1.3"):
        return compose(recipe, list(overrides))


@pytest.fixture(scope="session")
def trained(tmp_path_factory, pairs_file):
    """trained("dpo", "lora=none"): the directory of that recipe's run, three steps of the tiny model."""
    done = {}

    def train_once(recipe, *overrides):
        if (recipe, overrides) not in done:
            from preftune.pipeline import run_stages
            from preftune.training import train

            run = tmp_path_factory.mktemp(recipe) / "run"
            given = [f"data.path={pairs_file}", f"output_dir={run}", *overrides]
            given += ONLY_TRAINED if recipe == "sft_dpo" else []
            cfg = composed_once(recipe, *SMALL, *STEPS, *DATA, *given)
            (run_stages if recipe == "sft_dpo" else train)(cfg)
            done[recipe, overrides] = run
        return done[recipe, overrides]

    return train_once


@pytest.fixture
def settings():
    """settings("evaluate", "kl_prompts=2"): the composed config of a recipe that trains nothing."""
    return composed_once
