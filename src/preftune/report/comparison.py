"""Several runs beside each other: ranked by held-out accuracy at matched KL, and once more with length controlled for.

A policy that has moved further from its reference separates pairs better and has lost more, so accuracies are compared
where the policies have moved equally far:

1. How far a policy has moved is measured on the held-out answers, in nats per token, in one way for all runs: by
   `kl/per_token` (docs/losses.md) if every run logged it, else by the mean of |log-ratio per token| of chosen and
   rejected. For a loss without a reference the log-ratio is that to the model before its first step.
2. Of every run there are its evaluations: the held-out rows of metrics.jsonl, and as the last one the summary's
   evaluation of the held-out pairs. Distances that count are those of evaluations of runs that moved at all (FLOOR).
3. The common distance is that at which the run ended that ended nearest to its reference, or else the distance next to
   it, at which every such run has an evaluation within a factor (NEAR). The one nearest to it stands for the run.
4. Where there is no such distance, nothing is matched: all are ranked by their final values, and the notes say so.

Length is controlled for by the summary's `length_controlled_accuracy` if it has one, else by the mean of the accuracies
in its length buckets, so that long and short answers weigh the same.
"""

import math
from dataclasses import dataclass, field
from pathlib import Path

from preftune.evaluate.statistics import interval
from preftune.report import record
from preftune.report.record import Record, ReportError, accuracy_name, finite, pairs, runs_in
from preftune.report.verdict import BAD, GOOD, verdict

KL, LOG_RATIO = "kl/per_token", "mean |log-ratio| per token"
FLOOR = {KL: 5e-5, LOG_RATIO: 0.01}  # nats per token: less is no movement (KL grows as the log-ratio's square over 2)
NEAR = {KL: 2.25, LOG_RATIO: 1.5}  # the factor within which two distances count as equal
SIDES = ("chosen", "rejected")


@dataclass(frozen=True)
class Point:
    """A policy at a step, on the held-out pairs; `distance` in nats per token, None where it is not known."""

    step: int
    accuracy: float | None
    margin: float | None
    distance: float | None


@dataclass
class Entry:
    """One run: what it is, its evaluations in order of steps, and after `rank_all` the one that stands for it."""

    record: Record  # of a pipeline, its last stage
    name: str
    loss: str
    beta: float | None
    learning_rate: float | None
    points: list[Point]
    pairs: int | None
    length_controlled: float | None
    words: tuple[float, float] | None  # mean length of the sampled answers before and after
    healthy: bool | None  # None: it was not watched, or its held-out pairs do not say
    at: Point | None = None
    rank: int | None = None  # None: no held-out accuracy, or no movement
    rank_length_controlled: int | None = None

    @property
    def final(self) -> Point:
        return self.points[-1]

    @property
    def reach(self) -> float:
        return max((each.distance for each in known(self.points)), default=0.0)

    @property
    def interval(self) -> tuple[float, float] | None:
        return interval(self.at.accuracy if self.at else None, self.pairs)


@dataclass
class Comparison:
    """Runs, the best first. `common`: the distance at which they are compared; None: their final values are."""

    entries: list[Entry]
    measure: str
    common: float | None
    notes: list[str] = field(default_factory=list)


def compare(folders: list[Path]) -> Comparison:
    """The comparison of run directories, or of folders of runs (a sweep). Raises ReportError naming a malformed one."""
    records = [record.read(run) for folder in folders for run in runs_in(Path(folder))]
    if len(records) < 2:
        raise ReportError(f"{', '.join(map(str, folders))}: one run; name two or more to compare")
    finished, notes = [], []
    for each in records:
        if len(each.last_stage.looks) > 1:
            finished.append(each)
        else:
            why = "it held no pairs out" if each.last_stage.summary else verdict(each).headline
            notes.append(f"{each.path} is left out: {why}.")
    if not finished:
        raise ReportError("No run to compare:\n  " + "\n  ".join(notes))
    measure = KL if all(_has_kl(each.last_stage) for each in finished) else LOG_RATIO
    names = _names(finished)
    entries = [_entry(each, name, measure) for each, name in zip(finished, names, strict=True)]
    found = Comparison(entries, measure, None, notes + _unlike(entries))
    rank_all(found)
    return found


def rank_all(found: Comparison) -> None:
    """Choose the evaluation that stands for each run, rank by its accuracy, and say what had to be done to it."""
    scored = [each for each in found.entries if each.final.accuracy is not None]
    moved = [each for each in scored if each.reach >= FLOOR[found.measure]]
    for each in found.entries:
        each.at = each.final
    for each in scored:
        if each not in moved:
            found.notes.append(f"{each.name} did not move ({each.reach:.2g} nats per token), and is not ranked.")
    if moved:
        match(found, moved)
    for each in moved:  # equals share a rank
        each.rank = 1 + sum(merit(other) > merit(each) for other in moved)
    controlled = [each for each in moved if each.length_controlled is not None]
    for each in controlled:
        each.rank_length_controlled = 1 + sum(o.length_controlled > each.length_controlled for o in controlled)
    best = sorted(moved, key=lambda each: (each.rank, each.name))
    near = [each.name for each in best[1:] if best[0].interval and each.at.accuracy >= best[0].interval[0]]
    if near:
        found.notes.append(
            f"{best[0].pairs} held-out pairs do not tell {best[0].name} apart from {', '.join(near)}: within its 95% "
            "interval."
        )
    rest = [each for each in found.entries if each.rank is None]
    found.entries = best + sorted(rest, key=lambda each: each.name)


def merit(entry: Entry) -> tuple[float, float]:
    """What a run is ranked by: its accuracy, and among equals the length-controlled one."""
    return entry.at.accuracy, entry.length_controlled or 0.0


def match(found: Comparison, moved: list[Entry]) -> None:
    """Set `at` of each to its evaluation at the common distance, or leave all at their final ones."""
    floor, near = FLOOR[found.measure], NEAR[found.measure]
    seen = {point.distance for each in moved for point in known(each.points) if point.distance >= floor}
    ends = min((each.final.distance for each in moved if each.final.distance), default=floor)
    for common in sorted(seen, key=lambda distance: abs(math.log(distance / ends))):
        nearest = [nearest_to(common, each.points) for each in moved]
        if all(common / near <= point.distance <= common * near for point in nearest):
            found.common = common
            for each, point in zip(moved, nearest, strict=True):
                each.at = point
            found.notes.extend(filter(None, map(_other_accuracy, moved)))
            return
    found.notes.append(
        "Not at matched KL: at no distance from the reference do all runs have an evaluation, so final values are "
        "ranked, and a run that moved further looks better. More evaluations: train.eval_strategy=steps "
        "train.eval_steps=20."
    )


def known(points: list[Point]) -> list[Point]:
    return [point for point in points if point.distance and point.accuracy is not None]


def nearest_to(distance: float, points: list[Point]) -> Point:
    """The point at the least ratio to a distance; of equals the later."""
    return min(reversed(known(points)), key=lambda point: abs(math.log(point.distance / distance)))


def _entry(run: Record, name: str, measure: str) -> Entry:
    stage = run.last_stage
    look, loss = stage.last_look, stage.config.get("loss") or {}
    controlled = finite(look.get("length_controlled_accuracy"))
    return Entry(
        record=stage,
        name=name,
        loss=stage.choice("loss") or "-".join(map(str, _listed(loss.get("loss_type")))) or "?",
        beta=finite(loss.get("beta")),
        learning_rate=finite((stage.config.get("train") or {}).get("learning_rate")),
        points=_points(stage, measure),
        pairs=pairs(look),
        length_controlled=evenly_by_length(look) if controlled is None else controlled,
        words=_words(stage.summary.get("samples") or []),
        healthy={GOOD: True, BAD: False}.get(verdict(run).tone),
    )


def evenly_by_length(look: dict) -> float | None:
    """The accuracy if all buckets of length held as many pairs: the mean of the buckets' accuracies."""
    found = [finite(bucket.get(accuracy_name(look))) for bucket in look.get("by_length") or []]
    shares = [share for share in found if share is not None]
    return sum(shares) / len(shares) if shares else None


def _points(stage: Record, measure: str) -> list[Point]:
    look = stage.last_look
    accuracy, margin = (stage.series(f"rewards/{name}", held_out=True) for name in ("accuracies", "margins"))
    far = _distances(stage, measure)
    if not stage.series("logratios/chosen_per_token", held_out=True):
        margin = {}  # without a reference, TRL's is of log-probs, and no reward that others' could be compared with
    points = {step: Point(step, finite(accuracy[step]), finite(margin.get(step)), far.get(step)) for step in accuracy}
    last = stage.last_step
    points[last] = Point(last, finite(look.get("reward_accuracy")), finite(look.get("reward_margin")), far.get(last))
    return [points[step] for step in sorted(points)]


def _distances(stage: Record, measure: str) -> dict[int, float]:
    """{step: how far the policy was from its reference}, on held-out answers, in nats per token."""
    last, kept = stage.last_step, stage.summary.get("held_out") or {}
    if measure == KL:
        far = stage.series(KL, held_out=True) | {last: finite(kept.get(f"eval_{KL}"))}
        return {step: value for step, value in far.items() if finite(value) is not None}
    first, sides = stage.looks[0], []
    for side in SIDES:
        ratios = stage.series(f"logratios/{side}_per_token", held_out=True)
        start = finite(first.get(f"logps_{side}_per_token"))
        if start is not None:
            logps = stage.series(f"logps/{side}_per_token", held_out=True)
            logps[last] = finite(stage.last_look.get(f"logps_{side}_per_token"))
            ratios.pop(last, None)  # the end is known from the summary
            ratios = {step: value - start for step, value in logps.items() if finite(value) is not None} | ratios
        sides.append({step: abs(value) for step, value in ratios.items() if finite(value) is not None})
    chosen, rejected = sides
    return {step: (chosen[step] + rejected[step]) / 2 for step in chosen if step in rejected}


def _has_kl(stage: Record) -> bool:
    return finite((stage.summary.get("held_out") or {}).get(f"eval_{KL}")) is not None


def _words(samples: list[dict]) -> tuple[float, float] | None:
    if not samples:
        return None
    before, after = (sum(len(str(each.get(side, "")).split()) for each in samples) for side in ("before", "after"))
    return before / len(samples), after / len(samples)


def _other_accuracy(entry: Entry) -> str | None:
    """What an evaluation before the last counts as right, where it is not the implicit reward of pairs."""
    if entry.at is entry.final:
        return None
    if (entry.record.config.get("loss") or {}).get("view") == "unpaired":
        return f"{entry.name}, before its end: the accuracy of all (good, bad) answers of a batch, not of pairs."
    if not entry.record.series("logratios/chosen_per_token", held_out=True):
        return f"{entry.name}, before its end: the accuracy by log-prob, for its trainer has no reference."
    return None


def _names(records: list[Record]) -> list[str]:
    """Folder names, longer ones where two are the same."""
    short = [each.name for each in records]
    return [str(each.path) if short.count(name) > 1 else name for each, name in zip(records, short, strict=True)]


def _unlike(entries: list[Entry]) -> list[str]:
    """What makes the numbers of these runs incomparable."""
    notes = []
    data = {str(_held_out_source(each.record)) for each in entries}
    if len(data) > 1:
        notes.append(
            "The runs held out different rows (data.*, train.seed): their accuracies are not of the same pairs."
        )
    starts = [finite(each.record.looks[0].get("perplexity")) for each in entries]
    if None not in starts and max(starts) > 1.01 * min(starts):
        notes.append(
            f"The runs start from different models (perplexity {min(starts):.4g} to {max(starts):.4g}): equal KL is no "
            "equal distance from one model."
        )
    return notes


def _held_out_source(stage: Record) -> tuple:
    data = stage.config.get("data") or {}
    if data.get("eval_split"):
        return data.get("path"), data.get("eval_split")
    seed = (stage.config.get("train") or {}).get("seed")
    return data.get("path"), data.get("eval_fraction"), data.get("max_rows"), seed


def _listed(value: object) -> list:
    return value if isinstance(value, list) else [] if value is None else [value]
