"""What no method can beat: each pair's unique tokens once, forward and backward, no padding, a head over answers alone.

The rejected answer follows the chosen one as if it were its continuation, so no mask is needed either: the numbers are
of no use, but any exact method computes at least this much.
"""

import time
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from accelerate.utils import is_peft_model

from benchmarks import flops
from benchmarks.measure import collate, hear, memory, reset_peak, say
from preftune.fastpath.layout import read_rows
from preftune.fastpath.packed import lay_out


class Limit:
    """Takes the place of a trainer's steps and of its reference pass."""

    form = "alone"

    def __init__(self, trainer):
        self.trainer = trainer
        self.model = trainer.model

    def run(self, inputs: dict, learn: bool) -> None:
        base = self.model.get_base_model() if is_peft_model(self.model) else self.model
        for forward in flops.forwards(self.trainer, inputs):
            for one in flops.alone(forward):
                layout = lay_out(read_rows(one.ids, one.labels, flops.ANY_WIDTH), base.config.hidden_size)
                with torch.set_grad_enabled(learn and one.learned), self.trainer.accelerator.autocast():
                    hidden = base.base_model(input_ids=layout.input_ids, use_cache=False).last_hidden_state[0]
                    logits = base.get_output_embeddings()(hidden[layout.picks])
                    loss = F.cross_entropy(logits.float(), layout.targets)
                if loss.requires_grad:
                    loss.backward()

    def prepare(self) -> None:
        """It is ready."""

    def step(self, inputs: dict) -> None:
        self.model.train()
        self.run(inputs, learn=True)

    def scored(self, inputs: dict) -> dict:
        return inputs

    def score(self, inputs: dict) -> None:
        with self.model.disable_adapter() if is_peft_model(self.model) else nullcontext():
            self.run(inputs, learn=False)

    def batches(self) -> list[dict]:
        size = self.trainer.args.per_device_train_batch_size
        return [
            collate(self.trainer, list(range(i, i + size))) for i in range(0, len(self.trainer.train_dataset), size)
        ]

    def reference(self) -> tuple[float, list]:
        batches = self.batches()
        began = time.perf_counter()
        for inputs in batches:
            self.score(inputs)
        return time.perf_counter() - began, [flops.features(self.trainer, inputs, self.form) for inputs in batches]

    def train(self, steps: int) -> None:
        optimizer = self.trainer.create_optimizer()
        for number, inputs in enumerate(self.batches()[:steps], 1):
            hear()
            reset_peak()
            began = time.perf_counter()
            self.step(inputs)
            optimizer.step()
            optimizer.zero_grad()
            say(step=number, seconds=time.perf_counter() - began, peak=memory("VmHWM"))
