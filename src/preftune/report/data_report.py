"""The recipe inspect_data: an inspection of a data set as lines for a terminal, as one JSON object and as a page."""

import dataclasses
import json
import sys
from pathlib import Path

import numpy as np
import pandas as pd
from omegaconf import DictConfig, OmegaConf
from transformers import PreTrainedTokenizerBase

from preftune.config.files import write_json, write_text
from preftune.data.findings import DataError, Findings
from preftune.data.kinds import ERROR
from preftune.data.label_noise import FOLDS, reading, swap_probabilities, write_suspects
from preftune.data.load import Data, inspect
from preftune.data.set_checks import SetFigures
from preftune.data.shapes import PAIRS
from preftune.data.sources import one_of
from preftune.data.views import KINDS
from preftune.models.load import load_model, load_processor, load_tokenizer, quiet
from preftune.report.rendering import render

BINS = 30


def quantiles(values: np.ndarray) -> dict[str, int]:
    """Mean, median, 95th percentile and maximum, rounded."""
    if not len(values):
        return {}
    median, p95, most = (round(np.quantile(values, share)) for share in (0.5, 0.95, 1.0))
    return {"mean": round(values.mean()), "median": median, "p95": p95, "max": most}


def as_dict(seen: Data) -> dict:
    """What `format=json` prints: rows, shape, tokens, findings, and what length and words alone tell."""
    tokens, sizes = seen.tokens, [0 if rows is None else len(rows) for rows in (seen.train, seen.eval)]
    sets = {}
    for kind, figures in seen.sets.items():
        longer, longer_error = figures.longer_is_better or (None, None)
        words, words_error = seen.words[kind].accuracy if kind in seen.words else (None, None)
        sets[kind] = {"rows": figures.rows, "prompts": figures.prompts, "labels": figures.labels}
        sets[kind] |= {"longer_is_better": longer, "longer_error": longer_error}
        sets[kind] |= {"bag_of_words": words, "bag_of_words_error": words_error}
    return {
        "path": seen.path,
        "rows": {"read": seen.read, "train": sizes[0], "eval": sizes[1], "skipped": seen.skipped},
        "shape": seen.shape,
        "tokens": {name: quantiles(values) for name, values in tokens.columns.items()} if tokens else {},
        "token_rows": tokens.looked_at if tokens else 0,
        "sets": sets,
        "findings": [dataclasses.asdict(finding) for finding in seen.findings],
        "errors": sum(finding.severity == ERROR for finding in seen.findings),
    }


def as_text(seen: Data) -> str:
    """The inspection in a screen or two."""
    return render("data.txt.jinja", seen=seen, told=as_dict(seen), baselines=baselines(seen)).rstrip()


def html(seen: Data) -> str:
    """The page of an inspection."""
    values = {"seen": seen, "told": as_dict(seen), "baselines": baselines(seen), "lengths": lengths(seen)}
    return render("data.html.jinja", title=seen.path, kicker=["data inspection"], **values)


def baselines(seen: Data) -> list[tuple[str, float, float]]:
    """(rule, accuracy, standard error) of what length and words alone tell."""
    rules = []
    for kind, figures in seen.sets.items():
        of = f" ({kind})" if len(seen.sets) > 1 else ""
        if figures.longer_is_better:
            rules.append((f"the longer answer is better{of}", *figures.longer_is_better))
        if kind == PAIRS and figures.rows:
            rules += by_difference(figures)
        if kind in seen.words:
            rules.append((f"bag of words, on pairs not seen{of}", *seen.words[kind].accuracy))
    return rules


def by_difference(figures: SetFigures) -> list[tuple[str, float, float]]:
    """How well the longer answer does by how much longer it is, in quarters of the pairs."""
    difference = figures.characters["chosen"] - figures.characters["rejected"]
    difference = difference[difference != 0]
    if len(difference) < 50:
        return []
    quarters = pd.qcut(np.abs(difference), 4, duplicates="drop")
    by_size = pd.Series(difference > 0).groupby(quarters, observed=True).agg(["mean", "sem"])
    return [(f"… by {part.left:,.0f} to {part.right:,.0f} characters", *row) for part, row in by_size.iterrows()]


def lengths(seen: Data) -> list[tuple[str, dict[str, int], dict]]:
    """(name, quantiles, histogram) of tokens, and of the difference between the answers of a pair."""
    rows = []
    if seen.tokens is not None and seen.tokens.looked_at:
        prompt, *answers = seen.tokens.columns.values()
        columns = {f"tokens of {name}": values for name, values in seen.tokens.columns.items()}
        columns["tokens of prompt + longest answer"] = prompt + np.maximum.reduce(answers)
        high = max(float(np.quantile(values, 0.995)) for values in columns.values())
        rows += [(name, quantiles(v), histogram(v, 0, high, seen.tokens.max_length)) for name, v in columns.items()]
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
    shares = (counts / max(counts.max(), 1)).round(4).tolist()
    at = (mark - low) / (high - low) if mark is not None and low < mark < high else None
    return {"shares": shares, "low": round(low), "high": round(high), "mark": at}


PRINTED = {"text": as_text, "json": lambda seen: json.dumps(as_dict(seen), indent=2, ensure_ascii=False)}


def review(cfg: DictConfig) -> int:
    """Inspect the data of `cfg`, print what was found, write report.html and findings.json; 1 where there are errors.

    With `cfg.suspects` the model ranks the pairs by how much it doubts their labels, and the worst are written to
    suspects.jsonl. Raises DataError and ModelError where the data or the model is not to be had.
    """
    one_of("format", cfg.format, PRINTED)
    one_of("view", cfg.view, [None, *KINDS])
    quiet()
    tokenizer = load_tokenizer(cfg.model)
    reader = load_processor(cfg.model, tokenizer)
    seen = inspect(cfg.data, cfg.view, reader, cfg.train.max_length, cfg.train.seed)
    folder = Path(cfg.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    if cfg.suspects:
        rank_suspects(cfg, seen, tokenizer, folder / "suspects.jsonl")
    write_text(folder / "report.html", html(seen))
    write_json(folder / "findings.json", as_dict(seen))
    print(PRINTED[cfg.format](seen))
    print(f"page: {folder / 'report.html'}", file=sys.stderr)
    return 1 if any(finding.severity == ERROR for finding in seen.findings) else 0


def rank_suspects(cfg: DictConfig, seen: Data, tokenizer: PreTrainedTokenizerBase, path: Path) -> None:
    """Rank the training pairs by how probable swapped labels are, write the worst to `path`, and add the finding."""
    pairs = seen.kinds.get(PAIRS, ())
    if seen.images:
        raise DataError(f"suspects={cfg.suspects}: pairs with images are not ranked")
    if len(pairs) < 2 * FOLDS:
        raise DataError(f"suspects={cfg.suspects}: only pairs have labels to doubt, ten of them at least")
    model = load_model(cfg.model, OmegaConf.create({}), cfg.hardware.use_cpu)
    if not cfg.hardware.use_cpu:
        model.to("cuda")
    doubts = swap_probabilities(reading(model, tokenizer, pairs, cfg.train.max_length))
    origins = write_suspects(path, pairs, doubts, cfg.suspects)
    found, swapped = Findings(), int((doubts > 0.5).sum())
    says = f"pairs that {cfg.model.path} would label the other way round; the first {len(origins):,} are in {path}"
    found.add("suspected_swaps", origins, count=swapped, of=len(doubts), says=says)
    seen.findings += found.all()
