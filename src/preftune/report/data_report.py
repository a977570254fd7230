"""An inspection as lines for a terminal, and as one JSON object."""

import json

import numpy as np

from preftune.data.inspect import Inspection, Token

QUANTILES = {"median": 0.5, "p95": 0.95, "max": 1.0}


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
        "findings": [
            {
                "code": finding.code,
                "severity": finding.severity,
                "count": finding.count,
                "of": finding.of,
                "says": finding.says,
                "examples": finding.examples,
                "remedy": finding.remedy,
            }
            for finding in seen.findings
        ],
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
            words = seen.words[kind]
            told = f"{words.accuracy:.1%} ± {2 * words.error:.1%}"
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
