"""The recipe inspect_data: an inspection of a data set as lines for a terminal, as one JSON object and as a page."""

import dataclasses
import json
import sys
from pathlib import Path

import datasets
import numpy as np
import transformers
from omegaconf import DictConfig, OmegaConf

from preftune.config.files import write_text
from preftune.data.findings import DataError, Findings
from preftune.data.inspect import Inspection, Token, inspect
from preftune.data.label_noise import FOLDS, reading, swap_probabilities, write_suspects
from preftune.data.set_checks import SetFigures
from preftune.data.settings import one_of
from preftune.data.shapes import PAIRS
from preftune.data.views import KINDS
from preftune.models.load import load_model, load_tokenizer
from preftune.report.page import render

QUANTILES = {"median": 0.5, "p95": 0.95, "max": 1.0}
BINS = 30


def quantiles(values: np.ndarray) -> dict[str, int]:
    """Mean, median, 95th percentile and maximum, rounded."""
    if not len(values):
        return {}
    return {"mean": round(values.mean())} | {name: round(np.quantile(values, q)) for name, q in QUANTILES.items()}


def as_dict(seen: Inspection) -> dict:
    """What `format=json` prints: rows, shape, tokens, findings, and what length and words alone tell."""
    tokens = seen.tokens
    return {
        "path": seen.path,
        "rows": {"read": seen.read, "train": seen.kept, "eval": seen.held_out, "skipped": seen.skipped},
        "shape": seen.shape,
        "tokens": {} if tokens is None else {name: quantiles(values) for name, values in tokens.columns.items()},
        "token_rows": 0 if tokens is None else tokens.looked_at,
        "sets": {
            kind: {
                "rows": figures.rows,
                "prompts": figures.prompts,
                "labels": figures.labels,
                "longer_is_better": figures.longer_is_better,
                "longer_error": figures.longer_error,
                "bag_of_words": seen.words[kind].accuracy if kind in seen.words else None,
                "bag_of_words_error": seen.words[kind].error if kind in seen.words else None,
            }
            for kind, figures in seen.sets.items()
        },
        "findings": [dataclasses.asdict(finding) for finding in seen.findings],
        "errors": len(seen.errors()),
    }


def as_json(seen: Inspection) -> str:
    return json.dumps(as_dict(seen), indent=2, ensure_ascii=False)


def as_text(seen: Inspection) -> str:
    """The inspection in a screen or two."""
    left_out = f", {seen.skipped:,} of them bad" if seen.skipped else ""
    lines = [
        f"{seen.path}",
        f"  shape     {seen.shape}",
        f"  rows      {seen.read:,} read{left_out}; {seen.kept:,} to train on, {seen.held_out:,} held out",
    ]
    for kind, figures in seen.sets.items():
        lines.append(f"  {kind:<9} {figures.rows:,} rows, {figures.prompts:,} prompts{labels(figures.labels)}")
        if figures.longer_is_better is not None:
            told = f"{figures.longer_is_better:.1%} ± {2 * figures.longer_error:.1%}"
            lines.append(f"  length    'the longer answer is better' is right in {told} of cases")
        if kind in seen.words:
            told = f"{seen.words[kind].accuracy:.1%} ± {2 * seen.words[kind].error:.1%}"
            lines.append(f"  words     a bag of words is right in {told} of those that it has not seen")
    if seen.tokens is not None and seen.tokens.looked_at:
        lines.append(f"  tokens    of {seen.tokens.looked_at:,} rows {'mean':>16} {'median':>8} {'p95':>8} {'max':>8}")
        for name, values in seen.tokens.columns.items():
            lines.append(f"            {name:<16} " + " ".join(f"{value:>8,}" for value in quantiles(values).values()))
    lines += ["", *example(seen)]
    lines += [finding.line() for finding in seen.findings] or ["no findings"]
    return "\n".join(lines)


def labels(counts: dict[str, int] | None) -> str:
    return "" if counts is None else f", {counts['good']:,} good and {counts['bad']:,} bad"


def example(seen: Inspection) -> list[str]:
    """One row as the trainer sees it: scored tokens stand between bars."""
    if not seen.example:
        return []
    lines = [f"One row as the trainer sees it ({seen.example_origin}); |scored| tokens stand between bars:"]
    for column, tokens in seen.example.items():
        scored = sum(token.scored for token in tokens)
        lines.append(f"  {column} ({len(tokens)} tokens, {scored} scored): {written(tokens)}")
    return [*lines, ""]


def written(tokens: list[Token]) -> str:
    """Tokens as text, line breaks shown as ⏎; the scored ones between bars, those cut off in curly brackets."""
    text, inside = "", None
    for token in tokens:
        state = "cut" if token.cut else "scored" if token.scored else "read"
        if state == "scored":
            text += ("" if inside == "scored" else "|") + token.text + "|"
        else:
            text += ("{" if state == "cut" and inside != "cut" else "") + token.text
        inside = state
    return (text + ("}" if inside == "cut" else "")).replace("\n", "⏎")


def html(seen: Inspection) -> str:
    """The page of an inspection."""
    return render(
        "data.html.jinja",
        title=seen.path,
        kicker=["data inspection"],
        seen=seen,
        errors=len(seen.errors()),
        cards=cards(seen),
        findings=as_dict(seen)["findings"],
        baselines=baselines(seen),
        lengths=lengths(seen),
    )


def cards(seen: Inspection) -> dict[str, str]:
    """The main numbers, large."""
    facts = {"rows read": seen.read, "to train on": seen.kept, "held out": seen.held_out}
    facts |= {"bad rows": seen.skipped} if seen.skipped else {}
    cards = {name: f"{count:,}" for name, count in facts.items()}
    return cards | {f"prompts of {kind}": f"{s.prompts:,}{labels(s.labels)}" for kind, s in seen.sets.items()}


def baselines(seen: Inspection) -> list[tuple[str, float, float]]:
    """(rule, accuracy, standard error) of what length and words alone tell."""
    rules = []
    for kind, figures in seen.sets.items():
        of = f" ({kind})" if len(seen.sets) > 1 else ""
        if figures.longer_is_better is not None:
            rules.append((f"the longer answer is better{of}", figures.longer_is_better, figures.longer_error))
        if kind == PAIRS and figures.rows:
            rules += by_difference(figures)
        if kind in seen.words:
            rules.append((f"bag of words, on pairs not seen{of}", seen.words[kind].accuracy, seen.words[kind].error))
    return rules


def by_difference(figures: SetFigures) -> list[tuple[str, float, float]]:
    """How well the longer answer does by how much longer it is, in quarters of the pairs."""
    difference = figures.characters["chosen"] - figures.characters["rejected"]
    difference = difference[difference != 0]
    if len(difference) < 50:
        return []
    size, rules = np.abs(difference), []
    edges = np.quantile(size, [0, 0.25, 0.5, 0.75, 1])
    for low, high in zip(edges[:-1], edges[1:], strict=True):
        inside = difference[(size >= low) & (size <= high)] > 0
        rules.append(
            (f"… by {low:,.0f} to {high:,.0f} characters", float(inside.mean()), inside.std() / len(inside) ** 0.5)
        )
    return rules


def lengths(seen: Inspection) -> list[tuple[str, dict[str, int], dict]]:
    """(name, quantiles, histogram) of tokens, and of the difference between the answers of a pair."""
    rows = []
    if seen.tokens is not None and seen.tokens.looked_at:
        prompt, *answers = seen.tokens.columns.values()
        columns = {f"tokens of {name}": values for name, values in seen.tokens.columns.items()}
        columns["tokens of prompt + longest answer"] = prompt + np.maximum.reduce(answers)
        high = max(float(np.quantile(values, 0.995)) for values in columns.values())
        rows += [(name, quantiles(v), histogram(v, 0, high, seen.max_length)) for name, v in columns.items()]
    if PAIRS in seen.sets and seen.sets[PAIRS].rows:
        characters = seen.sets[PAIRS].characters
        difference = characters["chosen"] - characters["rejected"]
        far = float(max(np.quantile(np.abs(difference), 0.995), 1))
        rows.append(("characters of chosen − rejected", quantiles(difference), histogram(difference, -far, far, 0)))
    return rows


def histogram(values: np.ndarray, low: float, high: float, mark: float | None) -> dict:
    """Rows between two limits as shares of the fullest bin, and the place of a mark between them."""
    high = max(high, low + 1)
    counts, _ = np.histogram(np.clip(values, low, high), bins=BINS, range=(low, high))
    inside = mark is not None and low < mark < high
    return {
        "shares": [round(float(count), 4) for count in counts / max(counts.max(), 1)],
        "low": round(low),
        "high": round(high),
        "mark": (mark - low) / (high - low) if inside else None,
    }


PRINTED = {"text": as_text, "json": as_json}


def review(cfg: DictConfig) -> int:
    """Inspect the data of `cfg`, print what was found, write report.html and findings.json; 1 where there are errors.

    With `cfg.suspects` the model ranks the pairs by how much it doubts their labels, and the worst are written to
    suspects.jsonl. Raises DataError and ModelError where the data or the model is not to be had.
    """
    one_of("format", cfg.format, PRINTED)
    one_of("view", cfg.view, [None, *KINDS])
    datasets.disable_progress_bars()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    tokenizer = load_tokenizer(cfg.model)
    seen = inspect(cfg.data, cfg.view, tokenizer, cfg.train.max_length, cfg.train.seed)
    folder = Path(cfg.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    if cfg.suspects:
        doubt(cfg, seen, tokenizer, folder / "suspects.jsonl")
    write_text(folder / "report.html", html(seen))
    write_text(folder / "findings.json", as_json(seen) + "\n")
    print(PRINTED[cfg.format](seen))
    print(f"page: {folder / 'report.html'}", file=sys.stderr)
    return 1 if seen.errors() else 0


def doubt(cfg: DictConfig, seen: Inspection, tokenizer, path: Path) -> None:
    """Rank the training pairs by how probable swapped labels are, write the worst to `path`, and add the finding."""
    if seen.pairs is None or len(seen.pairs) < 2 * FOLDS:
        raise DataError(f"suspects={cfg.suspects}: only pairs have labels to doubt, ten of them at least")
    model = load_model(cfg.model, OmegaConf.create({}), cfg.hardware.use_cpu)
    if not cfg.hardware.use_cpu:
        model.to("cuda")
    doubts = swap_probabilities(reading(model, tokenizer, seen.pairs, cfg.train.max_length))
    origins = write_suspects(path, seen.pairs, doubts, cfg.suspects)
    found, swapped = Findings(), int((doubts > 0.5).sum())
    says = f"pairs that {cfg.model.path} would label the other way round; the first {len(origins):,} are in {path}"
    found.add("suspected_swaps", origins, count=swapped, of=len(doubts), says=says)
    seen.findings += found.all()
