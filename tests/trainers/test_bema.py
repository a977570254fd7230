"""bema: {…} is TRL's BEMACallback: the same averaged weights as with the callback added by hand."""

import shutil
from pathlib import Path

import pytest
import torch
from trl import BEMACallback

from preftune.config.check import ConfigError, require
from preftune.evaluate.subjects import find, weights
from preftune.runs.training import build_trainer, train

FULL = ("lora=none", "train.max_steps=3")


def test_the_average_is_that_of_trls_callback_added_by_hand(composed):
    given = {"update_freq": 1, "ema_power": 0.7, "bias_power": 0.3, "lag": 2}
    cfg = composed("dpo", *FULL, *(f"+bema.{key}={value}" for key, value in given.items()))
    train(cfg)
    ours = weights(find(str(Path(cfg.output_dir) / "bema")))
    by_hand = build_trainer(composed("dpo", *FULL, f"output_dir={cfg.output_dir}-by-hand"))
    callback = BEMACallback(**given)
    by_hand.add_callback(callback)
    by_hand.train()
    trained = dict(by_hand.model.named_parameters())
    for (name, mine), theirs in zip(ours.named_parameters(), callback.running_model.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs.to(mine.dtype), rtol=1e-4, atol=1e-5)
        assert not torch.equal(mine, trained[name]), name


def test_a_resumed_run_goes_on_with_its_average(composed):
    """The last update is before the checkpoint: the weights that training goes on from are not what is saved."""
    given = (
        "lora=none",
        "train.max_steps=3",
        "train.save_steps=2",
        "train.save_total_limit=null",
        "+bema.update_freq=2",
    )
    cfg = composed("dpo", *given)
    train(cfg)
    run = Path(cfg.output_dir)
    unbroken = weights(find(str(run / "bema"))).state_dict()
    (run / "summary.json").unlink()
    for left in ("model", "bema", "checkpoint-3"):
        shutil.rmtree(run / left, ignore_errors=True)
    train(composed("dpo", *given, "resume=true"))
    resumed = weights(find(str(run / "bema"))).state_dict()
    assert all(torch.equal(resumed[name], kept) for name, kept in unbroken.items())


@pytest.mark.parametrize(
    "given, says",
    [
        (["+bema.update_freq=1"], "knows no adapters; write lora=none"),
        (["+bema.update_freq=1", "lora=none", "hardware.engine=zero3"], "hardware.engine=zero3 shards"),
        (["+bema.lag=5", "lora=none"], "400 is never reached in train.max_steps=2"),
        (["+bema.update_frequency=5", "lora=none"], "did you mean bema.update_freq"),
        (["+bema.update_freq=often", "lora=none"], "wants a whole number"),
    ],
)
def test_what_cannot_be_averaged_is_refused_before_torch(composed, given, says):
    with pytest.raises(ConfigError, match=says):
        require(composed("dpo", *given))
