"""Batches on a device: the fast path reads them from their copies in host memory and asks the device for nothing."""

import pytest
import torch
from equality import batch_of
from tiny_models import tiny_model
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer, SFTConfig, SFTTrainer
from trl.experimental.cpo import CPOConfig, CPOTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer

from preftune.fastpath.host import BOX, Host

READS = {getattr(torch.Tensor, name) for name in ("cpu", "item", "tolist", "numpy", "nonzero", "__bool__", "__int__")}


class OnDevice(torch.Tensor):
    """Stands for a tensor of a GPU: what would wait for it fails."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        assert function not in READS, f"{function.__name__} waits for the device"
        return super().__torch_function__(function, types, args, kwargs or {})


def thumbs(pairs):
    sides = [(row, side) for side in ("chosen", "rejected") for row in pairs]
    return [{"prompt": row["prompt"], "completion": row[side], "label": side == "chosen"} for row, side in sides]


def learned(trainer, batch):
    """What the loss asks of the policy."""
    if hasattr(trainer, "concatenated_forward"):
        return trainer.concatenated_forward(trainer.model, batch)[0]
    if "labels" in batch:
        return trainer.model(**batch, fused_lm_head=True).log_probs
    return torch.cat([each for each in trainer.compute_ref_log_probs(trainer.model, batch) if each is not None])


@pytest.mark.parametrize(
    ("cls", "config", "arguments"),
    [
        (DPOTrainer, DPOConfig, {}),
        (KTOTrainer, KTOConfig, {}),
        (SFTTrainer, SFTConfig, {"completion_only_loss": True}),
        (ORPOTrainer, ORPOConfig, {}),
        (CPOTrainer, CPOConfig, {"loss_type": "simpo", "cpo_alpha": 0.0}),
    ],
)
def test_no_forward_waits_for_the_device(cls, config, arguments, trainers, pairs):
    rows = {KTOTrainer: thumbs(pairs), SFTTrainer: thumbs(pairs)}.get(cls, pairs)
    rows = [{k: v for k, v in row.items() if k != "label"} for row in rows] if cls is SFTTrainer else rows
    reference = {"ref_model": tiny_model("llama", 1)} if cls in (DPOTrainer, KTOTrainer) else {}
    _, ours = trainers(cls, config, tiny_model("llama"), rows, **reference, **arguments)
    assert ours.form == "packed"
    ours.model.eval()
    expected = learned(ours, batch_of(ours))  # the first shows that labels made of the copies are TRL's
    collated = ours.data_collator(list(ours.train_dataset))
    moved = {name: each.as_subclass(OnDevice) for name, each in collated.items() if isinstance(each, torch.Tensor)}
    ours.host.keep(moved, collated)
    with pytest.raises(AssertionError, match="waits for the device"):
        bool(next(iter(moved.values())).any())
    found = learned(ours, moved)
    assert torch.equal(found.as_subclass(torch.Tensor), expected)


def test_batches_come_with_their_copy_and_leave_it_before_trl_sees_them(trainers, pairs):
    reference = tiny_model("llama", 1)
    _, ours = trainers(DPOTrainer, DPOConfig, tiny_model("llama"), pairs, ref_model=reference, dataloader_num_workers=1)
    batch = next(iter(ours.get_train_dataloader()))
    assert torch.equal(batch[BOX].batch["input_ids"], batch["input_ids"])
    assert BOX not in ours._prepare_inputs(batch)
    assert ours.host.kept["input_ids"] is batch[BOX].batch["input_ids"]
    for without in ({"form": "off"}, {"accelerator_config": {"dispatch_batches": True}}):
        plain = trainers(DPOTrainer, DPOConfig, tiny_model("llama"), pairs, ref_model=reference, **without)[1]
        assert BOX not in next(iter(plain.get_train_dataloader()))


def test_labels_that_are_not_those_of_the_completion_mask_are_read_themselves():
    host, ids, mask = Host(), torch.tensor([[3, 4, 5]]), torch.tensor([[0, 1, 1]])
    host.keep({"input_ids": ids, "completion_mask": mask}, {"input_ids": ids, "completion_mask": mask})
    others = torch.tensor([[-100, -100, 5]])
    assert torch.equal(host.copy({"input_ids": ids, "labels": others})["labels"], others)
    assert not host.proved
