"""The global batch stays what it is over any number of devices, or the run says why it cannot."""

import pytest

from preftune.trainers import global_batch
from preftune.trainers.global_batch import GlobalBatchError


@pytest.mark.parametrize(("rows", "devices", "steps"), [(8, 1, 16), (8, 8, 2), (2, 64, 1), (4, 2, 16)])
def test_accumulation_follows_from_the_global_batch(composed, rows, devices, steps):
    cfg = composed("dpo", "global_batch=128", f"hardware.per_device_train_batch_size={rows}")
    assert global_batch.accumulation(cfg, devices) == steps
    assert rows * devices * steps == 128


def test_without_a_global_batch_the_hardware_decides(composed):
    assert global_batch.accumulation(composed("dpo", "hardware.gradient_accumulation_steps=3"), 8) == 3


def test_a_batch_that_does_not_divide_names_the_one_that_does(composed):
    cfg = composed("dpo", "global_batch=32", "hardware.per_device_train_batch_size=6")
    with pytest.raises(GlobalBatchError, match=r"per_device_train_batch_size=4"):
        global_batch.accumulation(cfg, 8)
    with pytest.raises(GlobalBatchError, match=r"write global_batch=\d+, or take fewer devices"):
        global_batch.accumulation(cfg, 64)


def test_a_token_budget_has_no_global_batch(composed):
    cfg = composed("dpo", "global_batch=32", "fastpath.tokens_per_batch=4096")
    with pytest.raises(GlobalBatchError, match="tokens_per_batch"):
        global_batch.accumulation(cfg, 1)


def test_an_accumulation_typed_beside_it_must_agree(composed, monkeypatch):
    monkeypatch.setattr(global_batch, "typed", lambda key: True)
    cfg = composed("dpo", "global_batch=32", "hardware.gradient_accumulation_steps=3")
    with pytest.raises(GlobalBatchError, match=r"do not agree.*\(8 follows\)"):
        global_batch.accumulation(cfg, 1)
