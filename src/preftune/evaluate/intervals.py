"""Held-out accuracies with what chance alone does to them."""

import math

Z = 1.959964  # of a normal distribution: 95% lie within


def interval(share: float | None, pairs: int | None) -> tuple[float, float] | None:
    """Wilson's 95% interval (1927) of a share of so many pairs; None where either is not known.

    Unlike share ± 2 standard errors it keeps within 0 and 1, and is not empty at them.
    """
    if share is None or not pairs:
        return None
    middle = share + Z * Z / (2 * pairs)
    half = Z * math.sqrt(share * (1 - share) / pairs + Z * Z / (4 * pairs * pairs))
    whole = 1 + Z * Z / pairs
    return max((middle - half) / whole, 0.0), min((middle + half) / whole, 1.0)


def percent(share: float | None, pairs: int | None = None) -> str:
    """97.3% (92–99%); without the interval where the number of pairs is not known, and – without a share."""
    if share is None:
        return "–"
    around = interval(share, pairs)
    return f"{share:.1%}" + (f" ({100 * around[0]:.0f}–{around[1]:.0%})" if around else "")
