"""Rows read while training: nothing is stored, and memory holds one block of them."""

from collections.abc import Iterator
from itertools import islice

import numpy as np
from datasets import Dataset, Features, IterableDataset, concatenate_datasets, interleave_datasets

from preftune.data import images, views
from preftune.data.findings import Findings
from preftune.data.sources import Source
from preftune.data.table import Table, columns_of
from preftune.data.views import KINDS, UNPAIRED, ordered

BLOCK = 1000  # rows that are converted and shuffled together


def blocks(source: Source, view: str, seed: int, skipped_file: str | None, with_images: bool) -> Iterator[dict]:
    """A source as rows of a view, by blocks: each is converted, shuffled and (unpaired) mixed by itself.

    Raises DataError at the first bad row, unless there is a file for skipped ones. Rows with images are bad ones where
    the first, which were checked, had none.
    """
    findings = Findings(skipped_file is not None, skipped_file)
    read = Table(source, findings, view)
    found = read.each(streaming=True)
    while block := list(islice(found, BLOCK)):
        findings.stop_on_errors()
        rows = Dataset.from_list(block, columns_of(read.kind, view))
        if not with_images:
            rows = images.left_out(rows, findings).remove_columns("images")
            findings.stop_on_errors()
        rows = views.view(rows, read.kind, view, findings)
        if view != UNPAIRED:
            rows = rows.select(np.random.default_rng(seed).permutation(len(rows)))
        yield from ordered(rows, view, seed).remove_columns("origin")
        seed += 1
    findings.stop_on_errors()


def stream(sources: list[Source], view: str, seed: int, skipped_file: str | None, with_images: bool) -> IterableDataset:
    """All sources as one stream: one after the other, or with weights drawn from in their proportion until one ends."""
    left = ("origin",) if with_images else ("origin", "images")
    features = Features({name: kind for name, kind in columns_of(KINDS[view], view).items() if name not in left})
    given = {"view": view, "seed": seed, "skipped_file": skipped_file, "with_images": with_images}
    sets = [IterableDataset.from_generator(blocks, features, {"source": source} | given) for source in sources]
    weights = [source.weight for source in sources]
    if len(sets) == 1:
        return sets[0]
    if None in weights:
        return concatenate_datasets(sets)
    shares = [weight / sum(weights) for weight in weights]
    return interleave_datasets(sets, probabilities=shares, seed=seed, stopping_strategy="first_exhausted")
