"""torch.compile: the layers are compiled once for every length of rows, and what is learned is the same."""

import random

import pytest
import torch
from tiny_models import tiny_model
from torch._dynamo.utils import counters
from transformers import TrainerCallback
from trl import DPOConfig, DPOTrainer

pytestmark = pytest.mark.slow


class Frames(TrainerCallback):
    """How many pieces of code PyTorch had compiled after each step."""

    def __init__(self):
        self.counts = []

    def on_step_end(self, args, state, control, **kwargs):
        self.counts.append(counters["frames"]["total"])


@pytest.mark.parametrize("form", ["packed", "forked"])
def test_a_compiled_run_learns_the_same_and_is_compiled_for_all_lengths_at_once(form, trainers):
    torch._dynamo.reset()
    counters.clear()
    draw = random.Random(0)
    rows = [
        {side: "".join(draw.choices("abcdef ", k=draw.randint(3, 60))) for side in ("prompt", "chosen", "rejected")}
        for _ in range(48)
    ]
    arguments = {"per_device_train_batch_size": 4, "max_length": 200, "max_steps": 12}
    losses, frames = [], Frames()
    for compiled in ({}, {"torch_compile": True, "torch_compile_backend": "eager"}):
        model, reference = tiny_model("llama"), tiny_model("llama", 1)
        _, ours = trainers(DPOTrainer, DPOConfig, model, rows, ref_model=reference, form=form, **arguments, **compiled)
        assert ours.form == form
        ours.add_callback(frames)
        ours.train()
        losses.append([row["loss"] for row in ours.state.log_history if "loss" in row])
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)
    plain, compiled = frames.counts[:12], frames.counts[12:]
    assert plain[-1] == 0 < compiled[0]
    assert compiled[-1] <= compiled[2] + 6, compiled  # of the nine later steps, few met a length of another kind
