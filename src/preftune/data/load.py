"""load(): a `data` config in, checked rows out, in the form that the trainer takes; inspect() says all about them."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import xxhash
from datasets import Dataset, IterableDataset, concatenate_datasets
from omegaconf import DictConfig, OmegaConf
from transformers import PreTrainedTokenizerBase

from preftune.config.errors import advice
from preftune.data import bias, images, set_checks, template_checks, token_checks, views
from preftune.data.findings import DataError, Finding, Findings
from preftune.data.kinds import WARNING
from preftune.data.shapes import DEMONSTRATIONS, LABELLED, PAIRS, PROMPTS
from preftune.data.sources import eval_sources, sources, unread
from preftune.data.streams import BLOCK, stream
from preftune.data.table import Table, table
from preftune.data.views import KINDS, PAIRED, SHOWN, UNPAIRED, keys, mixture, ordered, with_demonstrations

if TYPE_CHECKING:  # data is read without torch
    from transformers import ProcessorMixin

    Reader: TypeAlias = PreTrainedTokenizerBase | ProcessorMixin

UNREAD = ("unread_files", "unread_columns")  # findings that the run's line repeats


@dataclass
class Data:
    """The rows of one run, and what was found in them.

    `train`, `eval` and the `eval_sets` by name are in the view's form (see views.py); `eval_pairs` are held-out pairs
    for evaluation, whatever the view. They are None where there are none. `images`: whether rows hold any. `line` is
    the one line that the run prints, `kinds` are the rows to train on as they were read, by kind, with their origins;
    `sets` and `words` are figures by kind.
    """

    train: Dataset | IterableDataset | None = None
    eval: Dataset | None = None
    eval_pairs: Dataset | None = None
    eval_sets: dict[str, Dataset] = field(default_factory=dict, repr=False)
    path: str = ""
    shape: str = ""
    line: str = ""
    findings: list[Finding] = field(default_factory=list, repr=False)
    fingerprint: str = ""
    images: bool = False
    kto_weights: dict[str, float] | None = None
    read: int = 0
    skipped: int = 0
    kinds: dict[str, Dataset] = field(default_factory=dict, repr=False)
    sets: dict[str, set_checks.SetFigures] = field(default_factory=dict, repr=False)
    words: dict[str, bias.WordFigures] = field(default_factory=dict, repr=False)
    tokens: token_checks.TokenFigures | None = field(default=None, repr=False)


def load(data: DictConfig, view: str, tokenizer: Reader | None, max_length: int | None, seed: int) -> Data:
    """The rows that `data` describes, as `view` (see views.py), checked before a model is loaded.

    `tokenizer` is the processor of a model that sees images; None leaves the checks on tokens out. Raises DataError,
    with every error, its rows and remedy; with
    data.on_bad_rows=skip rows that are wrong are written to data.skipped_file and left out instead.
    """
    found, findings = examined(data, view, tokenizer, max_length, seed)
    findings.stop_on_errors()
    if empty := [name for name, rows in found.eval_sets.items() if not rows]:
        raise DataError(f"data.eval_sets.{empty[0]}={data.eval_sets[empty[0]]}: no row that can be evaluated")
    balance = ""
    if view == UNPAIRED:
        good = sum(found.train["label"])
        if good in (0, len(found.train)):
            raise DataError(
                f"data.path={found.path}: all {len(found.train):,} answers are {'good' if good else 'bad'}, and this "
                "loss learns from the difference to the other label. Add such rows, or train on good ones alone: "
                "python -m recipes.sft"
            )
        found.kto_weights = views.kto_weights(good, len(found.train) - good)
        balance = f", {good:,} good and {len(found.train) - good:,} bad"
    held_out = f"{len(found.eval):,} held out" if found.eval else "none held out"
    held_out += "".join(f", {len(rows):,} {name}" for name, rows in found.eval_sets.items())
    parts = [found.shape, f"{len(found.train):,} rows to train on ({view}{balance}), {held_out}"]
    parts += [f"{found.skipped:,} bad rows left out"] if found.skipped else []
    parts += ["with images"] if found.images else []
    warnings = ", ".join(finding.code for finding in found.findings if finding.severity == WARNING)
    parts += [f"warnings: {warnings}"] if warnings else []
    found.line = "; ".join(parts + [each.says for each in found.findings if each.code in UNREAD])
    told = f"{found.fingerprint}\n{view} {len(found.train)} {seed}"
    found.fingerprint = xxhash.xxh3_128_hexdigest(told.encode())
    if data.streaming:
        found.train = stream(sources(data), view, seed, findings.skipped_file, found.images)
    keep = ("images",) if found.images else ()
    for name in ("train", "eval", "eval_pairs"):
        if (rows := getattr(found, name)) is not None and not isinstance(rows, IterableDataset):
            setattr(found, name, views.without_empty(rows.remove_columns("origin"), keep))
    for name, rows in found.eval_sets.items():
        found.eval_sets[name] = views.without_empty(rows.remove_columns("origin"), keep)
    return found


def inspect(data: DictConfig, view: str | None, tokenizer: Reader | None, max_length: int | None, seed: int) -> Data:
    """Look at the data that a `data` section describes, as `view` or in the form nearest to its own.

    What is wrong with the data is in the findings; DataError is raised only for a section that means nothing, or names
    data that is not there.
    """
    found, findings = examined(data, view, tokenizer, max_length, seed)
    if "no_rows" not in findings.found:
        judged = {kind: rows for kind, rows in found.kinds.items() if kind in (PAIRS, LABELLED)}
        words = {kind: bias.check(rows, kind, findings) for kind, rows in judged.items()}
        found.words = {kind: figures for kind, figures in words.items() if figures}
    found.findings = findings.all()
    return found


def examined(
    data: DictConfig, view: str | None, tokenizer: Reader | None, max_length: int | None, seed: int
) -> tuple[Data, Findings]:
    """Read, check and shape the data; `view` None takes the form nearest to the data's own."""
    skipping = data.on_bad_rows == "skip"  # only then is the file looked up: it may lie in no run
    findings = Findings(skipping, data.skipped_file if skipping else None)
    found, tables, apart = gathered(data, findings, seed, view)
    if found.kinds and "no_rows" not in findings.found:
        view = view or next(name for name, kind in KINDS.items() if kind in found.kinds)
        kind = KINDS[view]
        for each, rows in found.kinds.items():
            with advice("data check"):
                found.sets[each] = set_checks.check(rows, each, findings)
        weights = [each.source.weight for each in tables]
        train = mixture([views.view(each.rows, each.kind, view, findings) for each in tables], weights, seed)
        found.train = ordered(train, view, seed)
        held_out = combined([views.view(each.rows, each.kind, view, Findings()) for each in apart])
        found.eval = held_out and ordered(held_out, view, seed)
        found.eval_pairs = combined([each.rows for each in apart if each.kind == PAIRS])
        sets = {name: eval_set(data, name, view, findings) for name in data.eval_sets}
        found.eval_sets = {name: rows and ordered(rows, view, seed) for name, rows in sets.items()}
        if found.eval is not None:
            with advice("leakage check"):
                set_checks.leakage(found.train, found.eval, findings)
        if tokenizer is not None:
            if images.sees(tokenizer):
                found.images = any(images.held(rows).any() for rows in (found.train, found.eval, *sets.values()))
                tokenizer = tokenizer if found.images else tokenizer.tokenizer
            (seen if found.images else in_tokens)(found, kind, data.token_rows, tokenizer, max_length, findings)
            with advice("token check"):
                fields = sum((each.fields for each in tables), Counter())
                template_checks.unread_fields(fields, found.read, tokenizer, findings)
            if not len(found.train):
                findings.add("no_rows", [each.source.line() for each in tables])
        if data.sft_fraction and view == PAIRED:
            shown = demonstrations(data, tokenizer, max_length, findings)
            found.train = with_demonstrations(found.train, shown, data.sft_fraction, seed)
    found.findings, found.skipped = findings.all(), findings.skipped
    return found, findings


def in_tokens(
    found: Data,
    kind: str,
    some: int | None,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int | None,
    findings: Findings,
) -> None:
    """Leave out the rows that cannot be rendered or hold images, and look at the tokens of `some` rows."""
    found.train = token_checks.accepted(images.left_out(found.train, findings), kind, tokenizer, findings)
    if kind == PROMPTS:
        found.train = token_checks.with_room(found.train, tokenizer, max_length, findings)
    else:
        with advice("token check"):
            looked_at = token_checks.spread_over(found.train, some)
            found.tokens = token_checks.check(looked_at, kind, tokenizer, max_length, findings)
            found.tokens.of = len(found.train)
            template_checks.check(looked_at, kind, tokenizer, findings)
    found.eval = usable(found.eval, kind, tokenizer, max_length, findings)
    for name, rows in found.eval_sets.items():
        found.eval_sets[name] = usable(rows, kind, tokenizer, max_length, findings)
    found.eval_pairs = usable(found.eval_pairs, PAIRS, tokenizer, max_length, Findings())


def seen(
    found: Data, kind: str, some: int | None, processor: ProcessorMixin, max_length: int | None, findings: Findings
) -> None:
    """Try some rows of a set with images on the processor; its held-out pairs are TRL's to score, in evaluation."""
    found.eval_pairs = None
    found.train = tried(found.train, kind, some, processor, max_length, findings)
    found.eval = found.eval and tried(found.eval, kind, some, processor, max_length, findings)
    for name, rows in found.eval_sets.items():
        found.eval_sets[name] = rows and tried(rows, kind, some, processor, max_length, findings)


def tried(
    rows: Dataset, kind: str, some: int | None, processor: ProcessorMixin, max_length: int | None, findings: Findings
) -> Dataset:
    """The rows that can be trained on: all are tried where bad ones are left out, else some, for one ends the run."""
    if findings.skipping:
        bad = images.check(rows, kind, processor, max_length, findings)
        return rows.select(np.setdiff1d(np.arange(len(rows)), bad)) if bad else rows
    looked_at = token_checks.spread_over(rows, min(some or images.TRIED, images.TRIED))
    images.check(looked_at, kind, processor, max_length, findings)
    return rows


def gathered(
    data: DictConfig, findings: Findings, seed: int, view: str | None
) -> tuple[Data, list[Table], list[Table]]:
    """(what is known so far, rows to train on, held-out rows): every source read once, in the order of the config.

    Held out are the rows of the eval split, else those of a fraction of the prompts. Of streams the first rows are
    read, to be checked, and nothing is held out of them.
    """
    given = sources(data)
    first = (data.token_rows or BLOCK) if data.streaming else None
    tables = [table(each, findings, first, view) for each in given]
    for each in tables:
        if not len(each.rows):
            findings.add("no_rows", [each.source.line()])
    held_out = eval_sources(data)
    apart = [table(each, findings, view=view) for each in held_out]
    if rest := unread(given + held_out):
        findings.add("unread_files", says=f"not read: {rest}")
    marks = [each.fingerprint for each in tables + apart]
    if data.eval_fraction and not apart and not data.streaming:
        marks.append(str(data.eval_fraction))
        apart = hold_out(tables, data.eval_fraction, seed)
    found = Data(
        path=", ".join(each.line() for each in given),
        shape="; ".join(dict.fromkeys(each.line() for each in tables)),
        fingerprint="\n".join(marks),
        read=sum(each.read for each in tables),
    )
    for kind in dict.fromkeys(each.kind for each in tables if len(each.rows)):
        found.kinds[kind] = combined([each.rows for each in tables if each.kind == kind])
    return found, tables, [each for each in apart if len(each.rows)]


def hold_out(tables: list[Table], fraction: float, seed: int) -> list[Table]:
    """Take a fraction of the prompts out of all tables, drawn by seed and prompt alone: their order does not matter."""
    prompts = np.unique(np.concatenate([keys(each.rows) for each in tables]))
    drawn = np.array([xxhash.xxh3_64_intdigest(key.tobytes(), seed=seed) for key in prompts], dtype=np.uint64)
    cut = prompts[np.argsort(drawn)[: round(fraction * len(prompts))]]
    apart = []
    for each in tables:
        mask = np.isin(keys(each.rows), cut)
        apart.append(replace(each, rows=each.rows.select(np.flatnonzero(mask))))
        each.rows = each.rows.select(np.flatnonzero(~mask))
    return apart


def combined(sets: list[Dataset]) -> Dataset | None:
    """Sets one after the other; None where they have no row."""
    return concatenate_datasets(sets) if sum(map(len, sets)) else None


def usable(
    rows: Dataset | None, kind: str, tokenizer: PreTrainedTokenizerBase, max_length: int | None, findings: Findings
) -> Dataset | None:
    """The held-out rows that can be evaluated; None where there are none."""
    rows = images.left_out(rows, findings)
    if rows and kind == PROMPTS:
        rows = token_checks.accepted(rows, kind, tokenizer, Findings())
        return token_checks.with_room(rows, tokenizer, max_length, findings) or None
    rows = rows and token_checks.answered(rows, kind, tokenizer, max_length, findings)
    return rows if rows else None


def eval_set(data: DictConfig, name: str, view: str, findings: Findings) -> Dataset | None:
    """One set of data.eval_sets, read by the settings of `data` where it has none of its own; None without a row."""
    given = data.eval_sets[name]
    own = given if isinstance(given, DictConfig) else {"path": given, "name": None, "revision": None}
    tables = [table(each, findings, view=view) for each in sources(OmegaConf.merge(data, own))]
    return combined([views.view(each.rows, each.kind, view, findings) for each in tables if len(each.rows)])


def demonstrations(
    data: DictConfig, tokenizer: PreTrainedTokenizerBase, max_length: int | None, findings: Findings
) -> Dataset:
    """The demonstrations of data.sft_path, which go through the same checks. Raises DataError where there are none."""
    if data.streaming:
        raise DataError("data.sft_fraction mixes whole sets; write data.streaming=false")
    tables = [table(each, findings) for each in sources(data, "sft_path")]
    shown = combined([views.view(each.rows, each.kind, SHOWN, findings) for each in tables if len(each.rows)])
    if shown is not None and images.sees(tokenizer):
        shown = tried(shown, DEMONSTRATIONS, data.token_rows, tokenizer, max_length, findings)
    elif shown is not None and tokenizer is not None:
        shown = token_checks.accepted(images.left_out(shown, findings), DEMONSTRATIONS, tokenizer, findings)
        looked_at = token_checks.spread_over(shown, data.token_rows)
        token_checks.check(looked_at, DEMONSTRATIONS, tokenizer, max_length, findings)
    if not shown:
        findings.stop_on_errors()
        raise DataError(f"data.sft_path={tables[0].source.line()}: no usable demonstrations")
    return shown
