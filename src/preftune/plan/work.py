"""How long a run takes: its floating-point operations over a stated speed."""

from dataclasses import dataclass

from transformers import PreTrainedConfig

from preftune.checks import SELECTIVE
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


def forward(config: PreTrainedConfig, size: Sizes, batch: Batch) -> tuple[float, float, float]:
    """FLOP of one forward: its matrices, its attention (dense, as kernels compute a masked square), its head."""
    heads = config.num_attention_heads
    wide = heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)
    attention = 4.0 * batch.tokens * batch.columns * wide * config.num_hidden_layers
    return 2.0 * batch.tokens * size.matrices, attention, 2.0 * batch.scored * size.head


def training(config: PreTrainedConfig, size: Sizes, batch: Batch, checkpointing: bool | str) -> float:
    """FLOP of a forward and backward over one batch.

    A backward computes the gradients of hidden states (as much as the forward) and of what is trained; attention's is
    2.5 forwards, and TRL's head computes its logits once more. Checkpointing runs the layers once more, selective
    checkpointing an adapter's second products.
    """
    matrices, attention, head = forward(config, size, batch)
    full = not size.adapter
    layers = matrices * (3 if full else 2) + attention * 3.5 + 6.0 * batch.tokens * size.adapter
    again = {False: 0, SELECTIVE: batch.tokens * size.adapter}.get(checkpointing, matrices + attention)
    return layers + again + head * (4 if full else 3)


@dataclass(frozen=True)
class Mean:
    """The mean of some batches: tokens, share of padding, FLOP of a training step and of a forward."""

    tokens: float
    padding: float
    training: float
    forward: float


def mean(config: PreTrainedConfig, size: Sizes, batches: list[Batch], checkpointing: bool | str) -> Mean:
    """What a batch takes on average."""
    tokens = sum(batch.tokens for batch in batches)
    return Mean(
        tokens=tokens / len(batches),
        padding=sum(batch.padding for batch in batches) / max(1, tokens),
        training=sum(training(config, size, batch, checkpointing) for batch in batches) / len(batches),
        forward=sum(sum(forward(config, size, batch)) for batch in batches) / len(batches),
    )
