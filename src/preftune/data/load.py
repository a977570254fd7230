"""load(): a `data` config in, checked rows out, in the form that the trainer takes."""

from dataclasses import dataclass, field, replace

import numpy as np
import xxhash
from datasets import Dataset, IterableDataset, concatenate_datasets
from omegaconf import DictConfig

from preftune.config.errors import advice
from preftune.data import set_checks, settings, token_checks, views
from preftune.data.findings import DataError, Finding, Findings, stop_on_errors
from preftune.data.kinds import WARNING
from preftune.data.mixing import mixture, with_demonstrations
from preftune.data.set_checks import SetFigures, leakage
from preftune.data.settings import Settings
from preftune.data.shapes import DEMONSTRATIONS, PAIRS
from preftune.data.streams import peek, stream
from preftune.data.table import Skipped, Table, table
from preftune.data.token_checks import TokenFigures, answered, refused
from preftune.data.views import KINDS, PAIRED, SHOWN, UNPAIRED, keys, ordered


@dataclass(frozen=True)
class Data:
    """The rows of one run, and what was found in them.

    `train` and `eval` are in the view's form (see views.py); `eval_pairs` are held-out pairs for evaluation, whatever
    the view; `eval` and `eval_pairs` are None where there are none. `line` is the one line that the run prints.
    """

    train: Dataset | IterableDataset
    eval: Dataset | None
    eval_pairs: Dataset | None
    shape: str
    line: str
    findings: list[Finding] = field(repr=False)
    fingerprint: str
    skipped: int = 0
    kto_weights: dict[str, float] | None = None


@dataclass
class Parts:
    """The sources of one run as they were read: the tables, and for each its rows for training and those held out."""

    tables: list[Table]
    train: list[Dataset]
    held_out: list[tuple[str, Dataset]]  # (kind, rows)
    fingerprint: str

    def by_kind(self) -> dict[str, Dataset]:
        """The training rows of all sources of a kind, one after the other."""
        kinds: dict[str, list[Dataset]] = {}
        for read, rows in zip(self.tables, self.train, strict=True):
            if len(rows):
                kinds.setdefault(read.kind, []).append(rows)
        return {kind: concatenate_datasets(sets) for kind, sets in kinds.items()}

    def shapes(self) -> str:
        return "; ".join(dict.fromkeys(each.line() for each in self.tables))


@dataclass
class Examined:
    """What was read and what was found: `train` and `held_out` in the view's form, with their origins."""

    parts: Parts
    findings: Findings
    skipped: Skipped
    train: Dataset | None = None
    held_out: Dataset | None = None
    pairs: Dataset | None = None  # the held-out pairs, whatever the view
    sets: dict[str, SetFigures] = field(default_factory=dict)
    tokens: TokenFigures | None = None


def load(data: DictConfig, view: str, tokenizer, max_length: int | None, seed: int) -> Data:
    """The rows that `data` describes, as `view` (paired, unpaired or demonstrations), checked before a model is loaded.

    `tokenizer` None leaves the checks on tokens out. Raises DataError, with every error, its rows and remedy; with
    data.on_bad_rows=skip rows that are wrong are written to data.skipped_file and left out instead.
    """
    want = settings.read(data, view)
    found = examine(want, view, tokenizer, max_length, seed)
    told = found.findings.all(want.skipping)
    stop_on_errors(told)
    loaded = summed_up(found, view, told, seed)
    return replace(loaded, train=stream(want, view, seed)) if want.streaming else loaded


def examine(want: Settings, view: str | None, tokenizer, max_length: int | None, seed: int) -> Examined:
    """Read, check and shape the data; `view` None takes the form nearest to the data's own."""
    findings, skipped = Findings(), Skipped(want.skipped_file)
    parts = gather(want, findings, skipped, seed)
    found = Examined(parts, findings, skipped)
    kinds = parts.by_kind()
    if len(kinds) == 0 or "no_rows" in findings.counts:
        return found
    view = view or next(name for name, kind in KINDS.items() if kind in kinds)
    for kind, rows in kinds.items():
        with advice("data check"):
            found.sets[kind] = set_checks.check(rows, kind, findings)
    found.train, found.held_out = shaped(parts, want, view, findings, seed)
    pairs = [rows for kind, rows in parts.held_out if kind == PAIRS]
    found.pairs = concatenate_datasets(pairs) if pairs else None
    if found.held_out is not None:
        with advice("leakage check"):
            leakage(found.train, found.held_out, findings)
    if tokenizer is not None:
        found.train = accepted(found.train, view, tokenizer, findings)
        rows = want.token_rows
        with advice("token check"):
            found.tokens = token_checks.check(found.train, KINDS[view], tokenizer, max_length, findings, rows)
        found.held_out = usable(found.held_out, view, tokenizer, max_length, findings)
        found.pairs = usable(found.pairs, PAIRED, tokenizer, max_length, Findings())
        if not len(found.train):
            findings.add("no_rows", [source.line() for source in want.sources])
    if want.sft_fraction and view == PAIRED:
        shown = demonstrations(want, tokenizer, max_length, findings, skipped)
        found.train = with_demonstrations(found.train, shown, want.sft_fraction, seed)
    return found


def gather(want: Settings, findings: Findings, skipped: Skipped, seed: int) -> Parts:
    """Read every source once, and hold rows out: those of the eval split, else of a fraction of the prompts.

    Of streams the first rows are read, to be checked, and nothing is held out of them.
    """
    if want.streaming:
        tables = [peek(source, findings, want.token_rows) for source in want.sources]
    else:
        tables = [table(source, findings, skipped) for source in want.sources]
    for source, read in zip(want.sources, tables, strict=True):
        if not len(read.rows):
            findings.add("no_rows", source.line())
    train, held_out = [each.rows for each in tables], []
    apart = [table(source, findings, skipped) for source in want.eval_sources]
    fingerprint = "\n".join(each.fingerprint for each in [*tables, *apart])
    if apart:
        held_out = [(each.kind, each.rows) for each in apart if len(each.rows)]
    elif want.eval_fraction and not want.streaming:
        cut = held_out_prompts([each.rows for each in tables], want.eval_fraction, seed)
        fingerprint += f"\n{want.eval_fraction}"
        train = []
        for each in tables:
            mask = np.isin(keys(each.rows), cut)
            train.append(each.rows.select(np.flatnonzero(~mask)))
            if mask.any():
                held_out.append((each.kind, each.rows.select(np.flatnonzero(mask))))
    return Parts(tables, train, held_out, fingerprint)


def held_out_prompts(sets: list[Dataset], fraction: float, seed: int) -> np.ndarray:
    """The keys of a fraction of the prompts, drawn by seed and prompt alone: the order of rows does not matter."""
    prompts = np.unique(np.concatenate([keys(rows) for rows in sets]))
    drawn = np.array([xxhash.xxh3_64_intdigest(key.tobytes(), seed=seed) for key in prompts], dtype=np.uint64)
    return prompts[np.argsort(drawn)[: round(fraction * len(prompts))]]


def shaped(parts: Parts, want: Settings, view: str, findings: Findings, seed: int) -> tuple[Dataset, Dataset | None]:
    """(train, held out) in the form of the view, sources mixed, in an order fit for training."""
    weights = [source.weight for source in want.sources]
    sets = [views.view(rows, read.kind, view, findings) for read, rows in zip(parts.tables, parts.train, strict=True)]
    train = ordered(mixture(sets, weights, seed), view, seed)
    if not parts.held_out:
        return train, None
    held_out = concatenate_datasets([views.view(rows, kind, view, Findings()) for kind, rows in parts.held_out])
    return train, ordered(held_out, view, seed) if len(held_out) else None


def accepted(rows: Dataset, view: str, tokenizer, findings: Findings) -> Dataset:
    """The rows that the chat template takes; the others go into `findings`."""
    bad = refused(rows, KINDS[view], tokenizer, findings)
    return rows.select(np.setdiff1d(np.arange(len(rows)), bad)) if bad else rows


def usable(rows: Dataset | None, view: str, tokenizer, max_length: int | None, findings: Findings) -> Dataset | None:
    """The held-out rows that the chat template takes and that have an answer left; None where there are none."""
    if rows is not None:
        rows = accepted(rows, view, tokenizer, Findings())
        rows = answered(rows, KINDS[view], tokenizer, max_length, findings)
    return rows if rows is not None and len(rows) else None


def demonstrations(want: Settings, tokenizer, max_length: int | None, findings: Findings, skipped: Skipped) -> Dataset:
    """The demonstrations of data.sft_path, which go through the same checks. Raises DataError where there are none."""
    tables = [table(source, findings, skipped) for source in want.sft_sources]
    shown = concatenate_datasets([views.view(each.rows, each.kind, SHOWN, findings) for each in tables])
    if not len(shown):
        stop_on_errors(findings.all(want.skipping))
        raise DataError(f"data.sft_path={want.sft_sources[0].line()}: no usable demonstrations")
    if tokenizer is not None:
        shown = accepted(shown, SHOWN, tokenizer, findings)
        token_checks.check(shown, DEMONSTRATIONS, tokenizer, max_length, findings, want.token_rows)
    return shown


def summed_up(found: Examined, view: str, told: list[Finding], seed: int) -> Data:
    """The Data of a run, with the one line that names its shape, its rows and what was found."""
    train, held_out, skipped = found.train, found.held_out, found.skipped.count
    weights, balance = None, ""
    if view == UNPAIRED:
        good = sum(train["label"])
        weights = views.kto_weights(good, len(train) - good)
        balance = f", {good:,} good and {len(train) - good:,} bad"
    line = f"{found.parts.shapes()}; {len(train):,} rows to train on ({view}{balance})"
    line += f", {len(held_out):,} held out" if held_out is not None else ", none held out"
    line += f"; {skipped:,} bad rows left out" if skipped else ""
    warnings = [finding.code for finding in told if finding.severity == WARNING]
    line += f"; warnings: {', '.join(warnings)}" if warnings else ""
    line += "".join(f"; {finding.says}" for finding in told if finding.code == "unread_columns")
    return Data(
        train=train.remove_columns("origin"),
        eval=None if held_out is None else held_out.remove_columns("origin"),
        eval_pairs=None if found.pairs is None else found.pairs.remove_columns("origin"),
        shape=found.parts.shapes(),
        line=line,
        findings=told,
        fingerprint=xxhash.xxh3_128_hexdigest(f"{found.parts.fingerprint}\n{view} {len(train)} {seed}".encode()),
        skipped=skipped,
        kto_weights=weights,
    )
