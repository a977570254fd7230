"""What preftune relies on in TRL's trainers: one test per class, which names in a line what an upgrade has moved."""

import inspect

import pytest
from hydra.utils import get_class
from trl import BEMACallback
from trl.trainer import utils

from preftune.config.keys import trainers
from preftune.fastpath.head import TILE

ODDS = {  # method: its parameters, as the mixins give and take them
    "tokenize_row": ["feature", "model"],
    "concatenated_inputs": None,
    "concatenated_forward": ["model", "batch"],
    "get_batch_loss_metrics": ["model", "batch", "train_eval"],
    "store_metrics": ["metrics", "train_eval"],
    "evaluation_loop": None,
    "_stored_metrics": None,
    "aux_loss_enabled": None,
}
SCORED = {
    "_compute_loss": ["model", "inputs", "return_outputs"],
    "_prepare_dataset": ["dataset", "processing_class", "args", "dataset_name"],
    "_precompute_ref_logps": ["dataset", "name", "batch_size"],
    "compute_ref_log_probs": ["model", "inputs"],
    "precompute_ref_logps": None,
    "ref_model": None,
    "_metrics": None,
    "fused_lm_head": None,
}
SEAMS = {
    "trl.DPOTrainer": SCORED | {"loss_types": None, "loss_weights": None, "ld_alpha": None, "ref_chosen_logps": None},
    "trl.KTOTrainer": SCORED | {"calculate_KL": None, "KL_completion_ids": None, "ref_logps": None},
    "trl.SFTTrainer": {"compute_loss": ["model", "inputs", "return_outputs", "num_items_in_batch"], "_metrics": None},
    "trl.RewardTrainer": {
        "compute_loss": ["model", "inputs", "return_outputs", "num_items_in_batch"],
        "_metrics": None,
    },
    "trl.RLOOTrainer": {"reward_funcs": None, "reward_processing_classes": None, "_metrics": None},
    "trl.GRPOTrainer": {"reward_funcs": None, "reward_processing_classes": None, "_metrics": None},
    "trl.experimental.online_dpo.OnlineDPOTrainer": {"reward_funcs": None, "reward_processing_classes": None},
    "trl.experimental.orpo.ORPOTrainer": ODDS,
    "trl.experimental.cpo.CPOTrainer": ODDS | {"cpo_alpha": None, "loss_type": None},  # SimPO among its losses
}


def moved(cls: type, seams: dict[str, list[str] | None]) -> list[str]:
    """What of `seams` the class has no more, each with what it has instead."""
    source, found = inspect.getsource(inspect.getmodule(cls)), []
    for name, parameters in seams.items():
        if name not in source:
            found.append(f"{name} is gone")
        elif parameters and (now := list(inspect.signature(getattr(cls, name)).parameters)[1:]) != parameters:
            found.append(f"{name} takes {now}, not {parameters}")
    return found


@pytest.mark.parametrize("name", sorted(SEAMS))
def test_a_trainer_has_what_is_built_on_it(name):
    assert not moved(get_class(name), SEAMS[name]), f"{name}: " + "; ".join(moved(get_class(name), SEAMS[name]))


def test_every_trainer_of_a_loss_is_looked_at():
    assert set(trainers().values()) == SEAMS.keys()


def test_the_config_class_stands_beside_its_trainer():
    for name in SEAMS:
        assert get_class(name.removesuffix("Trainer") + "Config")


def test_the_average_is_made_by_what_the_rules_say_of_it():
    assert not moved(BEMACallback, {"running_model": None, "update_freq": None, "update_after": None})


def test_the_fused_head_takes_its_tile_from_where_it_is_made_small():
    assert f"\n                {TILE},\n" in inspect.getsource(utils.add_fused_lm_head)
