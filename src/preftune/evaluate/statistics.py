"""How sure a share is, and what it would be at equal length."""

import torch

from preftune.evaluate.intervals import interval

RIDGE = 0.1  # precision of the prior on the slope: finite where length alone tells the outcome


def wilson(successes: float, n: int) -> list[float]:
    """[low, high] of the 95% interval of a share, `successes` of `n` (Wilson 1927): holds near 0 and 1 and for few."""
    return list(interval(successes / n, n))


def at_equal_length(outcomes: torch.Tensor, longer_by: torch.Tensor) -> float:
    """The share of wins left at equal length, as length-controlled AlpacaEval has it (Dubois et al. 2024, 2404.04475).

    `outcomes` in [0, 1] and `longer_by`, the winner-to-be's tokens less the other's, have shape (n,). Fitted is
    P(win) = σ(θ + φ·tanh(longer_by / its standard deviation)); returned is σ(θ). A ranking by length alone comes out
    near a half, whichever answers are longer. Where every outcome is the same, that is the answer.
    """
    outcomes = outcomes.double()
    if (outcomes == outcomes[0]).all():
        return outcomes[0].item()
    spread = longer_by.double().std().item() or 1.0
    columns = torch.stack([torch.ones_like(outcomes), (longer_by.double() / spread).tanh()], 1)
    ridge = torch.diag(torch.tensor([1e-6, RIDGE], dtype=torch.float64))
    weights = torch.zeros(2, dtype=torch.float64)
    for _ in range(100):  # Newton's method on a convex function of two variables
        win = (columns @ weights).sigmoid()
        gradient = columns.T @ (win - outcomes) + ridge @ weights
        curvature = columns.T @ (columns * (win * (1 - win))[:, None]) + ridge
        step = torch.linalg.solve(curvature, gradient)
        weights = weights - step * min(1.0, 2.0 / step.norm().item())  # no leap over the minimum
        if step.norm() < 1e-10:
            break
    return weights[0].sigmoid().item()
