"""Where training moves base weights, the reference is the model before its first step, not the adapter switched off."""

import pytest
import torch

from preftune.runs.training import build_trainer


@pytest.mark.parametrize("how", ["bias=all", "modules_to_save=[norm]"])
def test_reference_log_probs_after_training_are_those_of_the_start(composed, how):
    cfg = composed("dpo", "loss.precompute_ref_log_probs=false", "train.learning_rate=0.01", f"++lora.{how}")
    trainer = build_trainer(cfg)
    rows = trainer.train_dataset
    before = [rows[name][:] for name in ("ref_chosen_logps", "ref_rejected_logps")]
    trainer.train()
    batch = trainer._prepare_inputs(trainer.data_collator([trainer.train_dataset[i] for i in range(4)]))
    assert batch["ref_chosen_logps"].tolist() == pytest.approx(before[0][:4])
    assert torch.isfinite(torch.tensor(before)).all()
    assert trainer.precompute_ref_logps
