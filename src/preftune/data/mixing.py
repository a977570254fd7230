"""Sources in proportion, and demonstrations among pairs."""

import numpy as np
from datasets import Dataset, concatenate_datasets

from preftune.data.findings import DataError


def spread(sizes: list[int]) -> np.ndarray:
    """An order of the rows of several sets laid end to end that spreads each evenly: row i of n stands at i/n."""
    place = np.concatenate([(np.arange(size) + 0.5) / max(size, 1) for size in sizes])
    return np.argsort(place, kind="stable")


def shares(sizes: list[int], weights: list[float]) -> list[int]:
    """How many rows of each set make a mixture in proportion to `weights`, as large as it can be with no row twice."""
    total = min(size * sum(weights) / weight for size, weight in zip(sizes, weights, strict=True))
    return [min(size, round(total * weight / sum(weights))) for size, weight in zip(sizes, weights, strict=True)]


def mixture(sets: list[Dataset], weights: list[float | None], seed: int) -> Dataset:
    """Several sets as one: all rows one after the other, or with weights, in their proportion, drawn and spread evenly.

    Raises DataError where some have a weight and others none, or where a weight is not above 0.
    """
    if len(sets) == 1:
        return sets[0]
    if all(weight is None for weight in weights):
        return concatenate_datasets(sets)
    if any(weight is None or weight <= 0 for weight in weights):
        raise DataError("data.path: each source of a mixture needs a weight above 0, or none of them has one")
    rng = np.random.default_rng(seed)
    counts = shares([len(rows) for rows in sets], weights)
    drawn = [rows.select(np.sort(rng.permutation(len(rows))[:count])) for rows, count in zip(sets, counts, strict=True)]
    return concatenate_datasets(drawn).select(spread(counts))


def with_demonstrations(pairs: Dataset, shown: Dataset, fraction: float, seed: int) -> Dataset:
    """Pairs, with demonstrations spread among them so that they are `fraction` of all rows; ids begin with `sft:`.

    A demonstration stands there as the pair (answer, the same answer). Every loss that depends on the difference of the
    two answers alone is constant on it: the difference is 0 by identity and its gradients cancel exactly, so what is
    left is the gradient of the loss's SFT term on the answer. TRL's DPO has that term as loss type `sft`, ORPO and CPO
    have it always. Where there are too few demonstrations they come again.

    Raises DataError where `fraction` is not between 0 and 1.
    """
    if not 0 < fraction < 1:
        raise DataError(f"data.sft_fraction={fraction}: must be at least 0 and below 1; 0.1 to 0.2 is usual")
    count = round(len(pairs) * fraction / (1 - fraction))
    rng = np.random.default_rng(seed)
    picks = np.concatenate([rng.permutation(len(shown)) for _ in range(-(-count // len(shown)))])[:count]
    drawn = shown.select(picks)

    def as_pairs(batch: dict[str, list]) -> dict[str, list]:
        return {
            "id": [f"sft:{name}" for name in batch["id"]],
            "chosen": batch["completion"],
            "rejected": batch["completion"],
        }

    drawn = drawn.map(as_pairs, batched=True, remove_columns=["completion"], features=pairs.features)
    return concatenate_datasets([pairs, drawn]).select(spread([len(pairs), len(drawn)]))
