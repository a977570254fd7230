"""Rows read while training: nothing is stored, and memory holds one block of them."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

import numpy as np
from datasets import Dataset, Features, IterableDataset, concatenate_datasets, interleave_datasets

from preftune.data import views
from preftune.data.findings import Findings, stop_on_errors
from preftune.data.settings import Settings
from preftune.data.sources import Source
from preftune.data.table import FEATURES, Reader, Skipped, Table
from preftune.data.views import KINDS, UNPAIRED, ordered

BLOCK = 1000  # rows that are converted and shuffled together


def peek(source: Source, findings: Findings, limit: int | None) -> Table:
    """The first rows of a source, kept in memory, to be recognised and checked before training."""
    reader = Reader(source, findings, Skipped(None), streaming=True)
    rows = list(islice(reader.rows(), limit or BLOCK))
    kind = reader.kind or "demonstrations"
    return Table(Dataset.from_list(rows, FEATURES[kind]), kind, reader.shapes, reader.read, f"{source} {len(rows)}")


@dataclass(frozen=True)
class Blocks:
    """A source as rows of a view, by blocks: each is converted, shuffled and (unpaired) mixed by itself."""

    source: Source
    view: str
    seed: int
    skipped_file: str | None

    def rows(self) -> Iterator[dict]:
        """Raises DataError at the first bad row, unless there is a file for skipped ones."""
        findings = Findings()
        reader = Reader(self.source, findings, Skipped(self.skipped_file), streaming=True)
        found, number = reader.rows(), 0
        while block := list(islice(found, BLOCK)):
            stop_on_errors(findings.all(skipping=self.skipped_file is not None))
            rows = views.view(Dataset.from_list(block, FEATURES[reader.kind]), reader.kind, self.view, findings)
            seed, number = self.seed + number, number + 1
            mixed = np.random.default_rng(seed).permutation(len(rows)) if self.view != UNPAIRED else None
            rows = ordered(rows, self.view, seed) if mixed is None else rows.select(mixed)
            yield from rows.remove_columns("origin")
        stop_on_errors(findings.all(skipping=self.skipped_file is not None))


def stream(want: Settings, view: str, seed: int) -> IterableDataset:
    """All sources as one stream: one after the other, or with weights drawn from in their proportion until one ends."""
    features = Features({name: kind for name, kind in FEATURES[KINDS[view]].items() if name != "origin"})
    skipped_file = want.skipped_file if want.skipping else None
    sets = [
        IterableDataset.from_generator(Blocks(source, view, seed, skipped_file).rows, features)
        for source in want.sources
    ]
    weights = [source.weight for source in want.sources]
    if len(sets) == 1:
        return sets[0]
    if None in weights:
        return concatenate_datasets(sets)
    shares = [weight / sum(weights) for weight in weights]
    return interleave_datasets(sets, probabilities=shares, seed=seed, stopping_strategy="first_exhausted")
