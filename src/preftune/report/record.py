"""Reading a run directory: each of its files may be missing, because a run may stop anywhere."""

import contextlib
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from omegaconf import DictConfig, OmegaConf
from yaml import YAMLError

from preftune.config import files
from preftune.config.errors import UserError

MODEL_ONLY = "train.save_only_model=true"


class ReportError(UserError):
    """A folder holds no run, or a file in it cannot be read; the text names it."""


@dataclass(frozen=True)
class Record:
    """One run: its files as Python values, empty or None where a file is missing, and its stages in order."""

    path: Path
    config: dict
    manifest: dict
    summary: dict
    gate: dict
    status: dict
    findings: list[dict] | None  # None: the run's health was not watched
    data_findings: list[dict] | None
    proofs: list[dict] | None
    rows: list[dict]  # of metrics.jsonl
    unreadable: int  # lines of metrics.jsonl, cut off by a kill
    samples: list[dict]  # of samples.jsonl: answers while it trained
    stages: list["Record"] = field(default_factory=list)

    @property
    def name(self) -> str:
        return self.path.resolve().name

    @property
    def last_stage(self) -> "Record":
        """The run itself, or the stage that a pipeline came to last."""
        return self.stages[-1] if self.stages else self

    @property
    def last_step(self) -> int:
        """The step of the result: the last that was logged, or that which the run was rolled back to."""
        if kept := self.summary.get("rolled_back_to"):
            return int(kept.split("-")[1])
        return max((int(number(row.get("step")) or 0) for row in self.rows), default=0)

    @property
    def snapshots(self) -> list[dict]:
        """Evaluations of the model on the held-out pairs, before and after training."""
        return self.summary.get("snapshots") or self.summary.get("looks") or []  # as older runs call them

    @property
    def last_snapshot(self) -> dict:
        """The model after training on the held-out pairs; empty where it was not evaluated."""
        return self.snapshots[-1] if self.snapshots else {}

    @property
    def has_evaluations(self) -> bool:
        """Whether it was evaluated on held-out rows while it trained."""
        return any(name.startswith("eval_") for row in self.rows for name in row)

    def group(self, name: str) -> dict:
        """A group of the config; empty where the run has none of that name."""
        return self.config.get(name) or {}

    def choice(self, group: str) -> str | None:
        """The file of a config group that the run was composed of, as the manifest names it (loss: ipo)."""
        return (self.manifest.get("choices") or {}).get(group)

    def series(self, metric: str, held_out: bool = False) -> dict[int, float]:
        """{step: value} of a metric by TRL's name, in order of steps; values may be NaN or infinite.

        Of a step that was logged twice, because the run was resumed before it, the later value counts.
        """
        name = f"eval_{metric}" if held_out else metric
        values = {}
        for row in self.rows:
            if name in row and "train_runtime" not in row and (value := number(row[name])) is not None:
                values[int(row["step"])] = value
        return dict(sorted(values.items()))


def number(value: object) -> float | None:
    """A float, NaN and infinity among them (as a number, or as Python's json writes and str() prints them); or None."""
    try:
        return None if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        return None


def finite(value: object) -> float | None:
    """`number`, without NaN and infinity."""
    value = number(value)
    return None if value is None or not math.isfinite(value) else value


def accuracy_name(snapshot: dict) -> str:
    """The key of the accuracy by length: a run without rewards (SFT) has only the one by log-prob per token."""
    return "logp_accuracy" if finite(snapshot.get("reward_accuracy")) is None else "accuracy"


def pairs(snapshot: dict) -> int | None:
    """The number of held-out pairs, from the length buckets."""
    return sum(int(bucket["pairs"]) for bucket in snapshot.get("by_length") or []) or None


def short(value: object) -> str | None:
    """Four digits of a number; None where there is none."""
    value = finite(value)
    return None if value is None else f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def read(run: Path) -> Record:
    """The Record of a run directory. Raises ReportError where `run` is none, or where a file in it is broken."""
    if not run.is_dir():
        raise ReportError(f"{run}: no such folder. Name the directory of a run (output_dir), which holds config.yaml")
    if not (run / "config.yaml").exists():
        raise ReportError(f"{run}: no run directory (it holds no config.yaml). Name a run's output_dir")
    found = [path.parent for path in sorted(run.glob("*/config.yaml"))]
    stages = [read(folder) for folder in found if "-replaced-" not in folder.name]  # moved aside by a later run
    rows, unreadable = _rows(run / "metrics.jsonl")
    return Record(
        path=run,
        config=_load(run / "config.yaml", dict, lambda text: OmegaConf.to_container(OmegaConf.create(text))),
        **{name: _load(run / f"{name}.json", dict) or {} for name in ("manifest", "summary", "gate", "status")},
        **{name: _load(run / f"{name}.json", list) for name in ("findings", "data_findings", "proofs")},
        rows=rows,
        unreadable=unreadable,
        samples=_rows(run / "samples.jsonl")[0],
        stages=sorted(stages, key=lambda stage: stage.manifest.get("created", "9999")),
    )


def runs_in(folder: Path) -> Iterator[Path]:
    """`folder` where it is a run directory, else the run directories in it: those of a sweep."""
    inside = [] if (folder / "config.yaml").exists() else sorted(path.parent for path in folder.glob("*/config.yaml"))
    yield from inside or [folder]


def write_text(path: Path, text: str) -> Path:
    """Write a page and return its path. Raises ReportError where it cannot be written."""
    try:
        files.write_text(path, text)
    except OSError as error:
        raise ReportError(f"{path}: cannot be written ({error.strerror}). Name another place: --output FILE") from None
    return path


def _load(path: Path, kind: type, parse: Callable[[str], object] = json.loads) -> object:
    """The value in a file, None where there is no file. Raises ReportError where it holds no value of this kind."""
    if not path.exists():
        return None
    try:
        value = parse(path.read_text(encoding="utf-8"))
    except (ValueError, YAMLError) as error:
        text = " ".join(str(error).split())
        raise ReportError(f"{path}: cannot be read ({text}). Restore it or leave the run out") from None
    if not isinstance(value, kind):
        raise ReportError(f"{path}: holds no {kind.__name__}. Restore it or leave the run out")
    return value


def _rows(path: Path) -> tuple[list[dict], int]:
    """The rows of a .jsonl and the number of unreadable lines: a killed run may leave its last line unfinished."""
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    lines, rows = list(filter(str.strip, text.splitlines())), []
    for line in lines:
        with contextlib.suppress(json.JSONDecodeError):
            row = json.loads(line)
            if isinstance(row, dict) and number(row.get("step")) is not None:
                rows.append(row)
    return rows, len(lines) - len(rows)


def metrics(run: Path) -> list[dict]:
    """The rows of a run's metrics.jsonl, without half a line of a run that was killed while it wrote."""
    return _rows(run / "metrics.jsonl")[0]


def way_on(cfg: DictConfig) -> str:
    """How to continue a run that ended early: from its last checkpoint, if there is one that holds everything."""
    if not begun(Path(cfg.output_dir)):
        return "Then give the same command again"
    if cfg.train.get("save_only_model"):
        return f"Its checkpoints hold the model alone ({MODEL_ONLY}); start again with output_dir=ANOTHER"
    return "Go on with the same command and resume=true"


def begun(run: Path) -> bool:
    """Whether there is anything to lose: a run, or a stage of one, that got as far as its manifest.

    What failed before that (no model, bad data) left its config alone, and may be started again in its place.
    """
    return any(run.glob("manifest.json")) or any(run.glob("*/manifest.json"))
