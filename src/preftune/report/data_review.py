"""The recipe inspect_data: read, check, measure, and leave a page and a list of findings behind."""

import sys
from pathlib import Path

import datasets
import transformers
from omegaconf import DictConfig, OmegaConf

from preftune.config.files import write_text
from preftune.data.findings import DataError, Findings
from preftune.data.inspect import Inspection, inspect
from preftune.data.label_noise import FOLDS, reading, swap_probabilities, write_suspects
from preftune.data.settings import one_of
from preftune.data.views import KINDS
from preftune.models.load import load_model, load_tokenizer
from preftune.report.data_report import as_json, as_text, html

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
