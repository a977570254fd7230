"""Held-out shares with what chance alone does to them, and what they would be at equal length."""

import math
from collections.abc import Sequence

import numpy as np

Z = 1.959964  # of a normal distribution: 95% lie within
RIDGE = 0.1  # precision of the prior on the slope: finite where length alone tells the outcome


def interval(share: float | None, n: int | None) -> tuple[float, float] | None:
    """Wilson's 95% interval (1927) of a share of `n`, in which ties may count half; None where either is not known.

    Unlike share ± 2 standard errors it keeps within 0 and 1, and is not empty at them.
    """
    if share is None or not n:
        return None
    middle = share + Z * Z / (2 * n)
    half = Z * math.sqrt(share * (1 - share) / n + Z * Z / (4 * n * n))
    whole = 1 + Z * Z / n
    return max((middle - half) / whole, 0.0), min((middle + half) / whole, 1.0)


def percent(share: float | None, n: int | None = None) -> str:
    """97.3% (92–99%); without the interval where `n` is not known, and – without a share."""
    if share is None:
        return "–"
    around = interval(share, n)
    return f"{share:.1%}" + (f" ({100 * around[0]:.0f}–{around[1]:.0%})" if around else "")


def at_equal_length(outcomes: Sequence[float], longer_by: Sequence[float]) -> float:
    """The share of wins left at equal length, as length-controlled AlpacaEval has it (Dubois et al. 2024, 2404.04475).

    `outcomes` in [0, 1] and `longer_by`, the winner-to-be's tokens less the other's, have shape (n,). Fitted is
    P(win) = σ(θ + φ·tanh(longer_by / its standard deviation)); returned is σ(θ). A ranking by length alone comes out
    near a half, whichever answers are longer. Where every outcome is the same, that is the answer.
    """
    from sklearn.linear_model import LogisticRegression

    wins, longer = np.asarray(outcomes, dtype=float), np.asarray(longer_by, dtype=float)
    if (wins == wins[0]).all():
        return float(wins[0])
    feature = np.tanh(longer / (longer.std(ddof=1) or 1.0))[:, None]
    both = np.repeat([1, 0], len(wins))  # a tie is half a win and half a loss
    judge = LogisticRegression(C=1 / RIDGE, tol=1e-8, max_iter=1000)
    judge.fit(np.concatenate([feature, feature]), both, sample_weight=np.concatenate([wins, 1 - wins]))
    return float(1 / (1 + np.exp(-judge.intercept_[0])))
