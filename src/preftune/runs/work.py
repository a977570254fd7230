"""How much a training computes: floating point operations, counted as they run, and a budget of them."""

import contextlib

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, shape_wrapper

from preftune.plan.measure import COUNTED

COUNTS = flop_registry | {operation: shape_wrapper(count) for operation, count in COUNTED.items()}


class Work(TorchDispatchMode):
    """Counts as `flop` what runs within it, by PyTorch's formulas; unlike its counter it keeps no tensor or module."""

    def __init__(self, budget: float = float("inf")):
        super().__init__()
        self.budget, self.flop = budget, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, operation = kwargs or {}, func._overloadpacket
        if operation not in COUNTS and func is not torch.ops.prim.device.default:
            with self:
                out = func.decompose(*args, **kwargs)  # in inference mode an operation comes whole
            if out is not NotImplemented:
                return out
        out = func(*args, **kwargs)
        if operation in COUNTS:
            self.flop += COUNTS[operation](*args, **kwargs, out_val=out)
        return out


class Counted:
    """Mixin for every trainer: with `work`, its total_flos are what it computes, drawn answers and reference included.

    Trainer's own number is 6 · parameters · tokens. At the budget of `work` the training ends.
    """

    work: Work | None = None
    told = 0

    def train(self, *args, **kwargs):
        with self.work or contextlib.nullcontext():
            return super().train(*args, **kwargs)

    def evaluate(self, *args, **kwargs):
        before = self.work.flop if self.work else 0
        try:
            return super().evaluate(*args, **kwargs)
        finally:
            if self.work:
                self.work.flop = before  # what is measured is no part of the training

    def floating_point_ops(self, inputs):
        if self.work is None:
            return super().floating_point_ops(inputs)
        new, self.told = self.work.flop - self.told, self.work.flop
        if self.state.total_flos + self.current_flos + new >= self.work.budget:
            self.control.should_training_stop = True
        return new
