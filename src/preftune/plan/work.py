"""How long a run takes: its floating-point operations over a stated speed."""

from dataclasses import dataclass

from preftune.plan.measure import Footprint
from preftune.plan.rows import Batch
from preftune.plan.sizes import Sizes


@dataclass(frozen=True)
class Work:
    """Steps and tokens of a run on all devices, its share of padding, FLOP of training and of the reference pass."""

    steps: int
    rows: int
    tokens: int
    padding: float
    flop: float
    reference_tokens: int
    reference_flop: float


def forward(size: Sizes, feet: Footprint, batch: Batch) -> float:
    """FLOP of one forward: the layers as measured, attention by the length of the rows, the head."""
    layers = feet.forward + feet.attention_forward * batch.columns
    return batch.tokens * layers + 2.0 * batch.scored * size.head


def training(size: Sizes, feet: Footprint, batch: Batch) -> float:
    """FLOP of a forward and backward over one batch, with what checkpointing computes again.

    The backward of the head computes its logits once more, its input's gradient, and its own in full fine-tuning.
    """
    layers = feet.step + feet.attention_step * batch.columns
    return batch.tokens * layers + 2.0 * batch.scored * size.head * (3 if size.adapter else 4)


@dataclass(frozen=True)
class Mean:
    """The mean of some batches: tokens, share of padding, FLOP of a training step and of a forward."""

    tokens: float
    padding: float
    training: float
    forward: float


def mean(size: Sizes, feet: Footprint, batches: list[Batch]) -> Mean:
    """What a batch takes on average."""
    tokens = sum(batch.tokens for batch in batches)
    return Mean(
        tokens=tokens / len(batches),
        padding=sum(batch.padding for batch in batches) / max(1, tokens),
        training=sum(training(size, feet, batch) for batch in batches) / len(batches),
        forward=sum(forward(size, feet, batch) for batch in batches) / len(batches),
    )
