"""Rows read while training: nothing is stored, and memory holds one block of them."""

from collections.abc import Iterator
from itertools import islice

import numpy as np
from datasets import Dataset, Features, IterableDataset, concatenate_datasets, interleave_datasets

from preftune.data import views
from preftune.data.findings import Findings
from preftune.data.sources import Source
from preftune.data.table import Table, columns_of
from preftune.data.views import KINDS, UNPAIRED, ordered

BLOCK = 1000  # rows that are converted and shuffled together


def blocks(source: Source, view: str, seed: int, skipped_file: str | None) -> Iterator[dict]:
    """A source as rows of a view, by blocks: each is converted, shuffled and (unpaired) mixed by itself.

    Raises DataError at the first bad row, unless there is a file for skipped ones.
    """
    findings = Findings(skipped_file is not None, skipped_file)
    read = Table(source, findings, view)
    found = read.each(streaming=True)
    while block := list(islice(found, BLOCK)):
        findings.stop_on_errors()
        rows = views.view(Dataset.from_list(block, columns_of(read.kind, view)), read.kind, view, findings)
        if view != UNPAIRED:
            rows = rows.select(np.random.default_rng(seed).permutation(len(rows)))
        yield from ordered(rows, view, seed).remove_columns("origin")
        seed += 1
    findings.stop_on_errors()


def stream(sources: list[Source], view: str, seed: int, skipped_file: str | None) -> IterableDataset:
    """All sources as one stream: one after the other, or with weights drawn from in their proportion until one ends."""
    features = Features({name: kind for name, kind in columns_of(KINDS[view], view).items() if name != "origin"})
    given = {"view": view, "seed": seed, "skipped_file": skipped_file}
    sets = [IterableDataset.from_generator(blocks, features, {"source": source} | given) for source in sources]
    weights = [source.weight for source in sources]
    if len(sets) == 1:
        return sets[0]
    if None in weights:
        return concatenate_datasets(sets)
    shares = [weight / sum(weights) for weight in weights]
    return interleave_datasets(sets, probabilities=shares, seed=seed, stopping_strategy="first_exhausted")
