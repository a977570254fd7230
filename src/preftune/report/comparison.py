"""Several runs beside each other: ranked by held-out accuracy at matched KL, and once more with length controlled for.

A policy that has moved further from its reference separates pairs better and has lost more, so accuracies are compared
where the policies have moved equally far. docs/report.md says how that distance is measured and chosen.
"""

import json
import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import NamedTuple

from preftune.evaluate.statistics import interval
from preftune.report.record import Record, ReportError, accuracy_name, finite, pairs, read, runs_in
from preftune.report.verdict import BAD, GOOD, verdict

KL, LOG_RATIO = "kl/per_token", "mean |log-ratio| per token"
FLOOR = {KL: 5e-5, LOG_RATIO: 0.01}  # nats per token: less is no movement (KL grows as the log-ratio's square over 2)
OF_ONE_RUN = ("output_dir", "resume", "tracking", "fit_check")  # of a configuration: what does not change the result
NEAR = {KL: 2.25, LOG_RATIO: 1.5}  # the factor within which two distances count as equal


class Point(NamedTuple):
    """A policy at a step, on the held-out pairs; `kl`, its distance in nats per token, None where it is not known."""

    step: int
    accuracy: float | None
    margin: float | None
    kl: float | None


@dataclass
class Entry:
    """One run: its evaluations in order of steps, what else is known of it, and after `rank_all` how it ranks.

    `at` is the evaluation that stands for it. `values` have the names that docs/report.md gives them.
    """

    record: Record  # of a pipeline, its last stage
    name: str
    points: list[Point]
    at: Point
    values: dict
    rank: int | None = None  # None: no held-out accuracy, or no movement
    rank_length_controlled: int | None = None

    @property
    def known(self) -> list[Point]:
        """The evaluations of which accuracy and distance are known."""
        return [point for point in self.points if point.kl and point.accuracy is not None]

    @property
    def interval(self) -> tuple[float, float] | None:
        return interval(self.at.accuracy, self.values["pairs"])

    @property
    def merit(self) -> tuple[float | None, float]:
        """What it is ranked by: the accuracy, and among equals the length-controlled one."""
        return self.at.accuracy, self.values["length_controlled_accuracy"] or 0.0


@dataclass(frozen=True)
class Seeds:
    """Ranked runs that differ by train.seed alone, or one run without such others."""

    label: str
    runs: list[Entry]

    @property
    def mean(self) -> float:
        """The mean accuracy of the runs."""
        return fmean(each.at.accuracy for each in self.runs)

    @property
    def spread(self) -> float:
        """The standard deviation of their accuracies (of a sample: n − 1); NaN of one run."""
        return float(stdev(each.at.accuracy for each in self.runs)) if len(self.runs) > 1 else math.nan

    def better_than(self, other: "Seeds") -> bool:
        """Whether its interval, mean ± standard deviation, lies above the other's; never with a single run (NaN)."""
        return self.mean - self.spread > other.mean + other.spread


@dataclass
class Comparison:
    """Runs, the best first. `common`: the distance at which they are compared; None: their final values are.

    `seeds` are the ranked runs by what they share beside the seed; empty where no two differ by the seed alone.
    """

    entries: list[Entry]
    measure: str
    notes: list[str]
    common: float | None = None
    seeds: Sequence[Seeds] = ()

    @property
    def distance(self) -> str:
        """The name of the distance from the reference."""
        return "KL" if self.measure == KL else "|log-ratio|"

    @property
    def headline(self) -> str:
        if self.common is None:
            return "Held-out accuracy, final values (not at matched KL)"
        return f"Held-out accuracy at matched KL: {self.measure} near {self.common:.3g} nats"


def compare(folders: list[Path]) -> Comparison:
    """The comparison of run directories, or of folders of runs (a sweep). Raises ReportError naming a malformed one."""
    records = [read(run) for folder in folders for run in runs_in(Path(folder))]
    if len(records) < 2:
        raise ReportError(f"{', '.join(map(str, folders))}: one run; name two or more to compare")
    finished = [each for each in records if len(each.last_stage.snapshots) > 1]
    notes = [f"{each.path} is left out: {why_not(each)}." for each in records if each not in finished]
    if not finished:
        raise ReportError("No run to compare:\n  " + "\n  ".join(notes))
    kls = [finite((each.last_stage.summary.get("held_out") or {}).get(f"eval_{KL}")) for each in finished]
    measure, names = LOG_RATIO if None in kls else KL, [each.name for each in finished]
    entries = [entry(each, each.name if names.count(each.name) == 1 else str(each.path), measure) for each in finished]
    found = Comparison(entries, measure, notes + differences(entries))
    rank_all(found)
    return found


def why_not(run: Record) -> str:
    """Why a run that was not evaluated before and after training cannot be compared."""
    if not run.last_stage.summary:
        return verdict(run).headline
    if "task" in run.last_stage.group("loss"):
        return f"it is a reward model (python -m recipes.evaluate models=[{run.path},ANOTHER] compares such)"
    return "its result was measured by the next stage" if run.last_stage.snapshots else "it held no pairs out"


def rank_all(found: Comparison) -> None:
    """Choose the evaluation that stands for each run, rank by its accuracy, and say what had to be done to it."""
    moved = []
    for each in found.entries:
        reach = max((point.kl for point in each.known), default=0.0)
        if each.at.accuracy is not None and reach >= FLOOR[found.measure]:
            moved.append(each)
        elif each.at.accuracy is not None:
            found.notes.append(f"{each.name} did not move ({reach:.2g} nats per token), and is not ranked.")
    if moved:
        match(found, moved)
    for each in moved:  # equals share a rank
        each.rank = 1 + sum(other.merit > each.merit for other in moved)
        if each.values["length_controlled_accuracy"] is not None:
            each.rank_length_controlled = 1 + sum(other.merit[1] > each.merit[1] for other in moved)
    found.seeds = by_seed(moved)
    for group in found.seeds:
        for each in group.runs:
            each.rank = 1 + sum(len(other.runs) for other in found.seeds if other.better_than(group))
    found.entries.sort(key=lambda each: (each.rank or math.inf, each.name))
    if found.seeds:
        found.notes += overlaps(found.seeds)
        return
    best, others = found.entries[0], found.entries[1 : len(moved)]
    if near := [each.name for each in others if best.interval and each.at.accuracy >= best.interval[0]]:
        told = f"{best.values['pairs']} held-out pairs do not tell {best.name} apart from {', '.join(near)}"
        found.notes.append(f"{told}: within its 95% interval.")


def by_seed(moved: list[Entry]) -> list[Seeds]:
    """The runs by their configuration without the seed, the highest mean first; empty where each stands alone."""
    groups: dict[str, list[Entry]] = defaultdict(list)
    for each in moved:
        train = each.record.group("train")
        config = {key: value for key, value in each.record.config.items() if key not in OF_ONE_RUN}
        config["train"] = train | {"seed": None}
        alike = json.dumps(config, sort_keys=True, default=str).replace(str(each.record.config.get("output_dir")), "")
        if any(other.record.group("train").get("seed") == train.get("seed") for other in groups[alike]):
            alike += each.name  # the same run twice
        groups[alike].append(each)
    if all(len(runs) == 1 for runs in groups.values()):
        return []
    firsts = [runs[0] for runs in groups.values()]
    losses = [each.values["loss"] for each in firsts]
    labels = [loss if losses.count(loss) == 1 else each.name for loss, each in zip(losses, firsts, strict=True)]
    return sorted(map(Seeds, labels, groups.values()), key=lambda each: -each.mean)


def overlaps(seeds: list[Seeds]) -> list[str]:
    """Which of the others the best mean is better than, and which it is not told apart from."""
    best, others = seeds[0], seeds[1:]
    beaten = [each.label for each in others if best.better_than(each)]
    level = [each.label for each in others if not best.better_than(each)]
    notes = []
    if beaten:
        notes.append(f"{best.label} is better than {', '.join(beaten)}: mean ± standard deviation do not overlap.")
    if level:
        why = "mean ± standard deviation overlap, or one has a single seed"
        notes.append(f"{best.label} is not told apart from {', '.join(level)}: {why}.")
    return notes


def match(found: Comparison, moved: list[Entry]) -> None:
    """Set `at` of each to its evaluation at the common distance, or leave all at their final ones."""
    floor, near = FLOOR[found.measure], NEAR[found.measure]
    seen = {point.kl for each in moved for point in each.known if point.kl >= floor}
    ends = min((each.points[-1].kl for each in moved if each.points[-1].kl), default=floor)
    for common in sorted(seen, key=lambda kl: abs(math.log(kl / ends))):
        # of each run the point at the least ratio to the distance; of equals the later
        far = [min(reversed(each.known), key=lambda point: abs(math.log(point.kl / common))) for each in moved]
        if all(common / near <= point.kl <= common * near for point in far):
            found.common = common
            for each, point in zip(moved, far, strict=True):
                each.at = point
                if note := other_accuracy(each):
                    found.notes.append(f"{each.name}, before its end: {note}.")
            return
    found.notes.append(
        "Not at matched KL: at no distance from the reference do all runs have an evaluation, so final values are "
        "ranked, and a run that moved further looks better. More evaluations: train.eval_strategy=steps "
        "train.eval_steps=20."
    )


def other_accuracy(entry: Entry) -> str | None:
    """What an evaluation before the last counts as right, where it is not the implicit reward of pairs."""
    if entry.at is entry.points[-1]:
        return None
    if entry.record.group("loss").get("view") == "unpaired":
        return "the accuracy of all (good, bad) answers of a batch, not of pairs"
    logged = entry.record.series("logratios/chosen_per_token", held_out=True)
    return None if logged else "the accuracy by log-prob, for its trainer has no reference"


def entry(run: Record, name: str, measure: str) -> Entry:
    stage = run.last_stage
    snapshot, loss, samples = stage.last_snapshot, stage.group("loss"), stage.summary.get("samples") or []
    controlled = finite(snapshot.get("length_controlled_accuracy"))
    if controlled is None:  # as if all buckets of length held as many pairs
        shares = [finite(bucket.get(accuracy_name(snapshot))) for bucket in snapshot.get("by_length") or []]
        controlled = mean([share for share in shares if share is not None])
    types = loss.get("loss_type") or "?"
    values = {
        "loss": stage.choice("loss") or "-".join(map(str, types if isinstance(types, list) else [types])),
        "beta": finite(loss.get("beta")),
        "learning_rate": finite(stage.group("train").get("learning_rate")),
        "pairs": pairs(snapshot),
        "length_controlled_accuracy": controlled,
        "answer_words_before": mean([len(str(each.get("before", "")).split()) for each in samples]),
        "answer_words_after": mean([len(str(each.get("after", "")).split()) for each in samples]),
        "healthy": {GOOD: True, BAD: False}.get(verdict(run).tone),
    }
    points = evaluations(stage, measure)
    return Entry(stage, name, points, points[-1], values)


def mean(numbers: list[float]) -> float | None:
    return sum(numbers) / len(numbers) if numbers else None


def evaluations(stage: Record, measure: str) -> list[Point]:
    """A run's held-out evaluations in order of steps, the summary's last."""
    snapshot, last, far = stage.last_snapshot, stage.last_step, distances(stage, measure)
    accuracy, margin = (stage.series(f"rewards/{name}", held_out=True) for name in ("accuracies", "margins"))
    if not stage.series("logratios/chosen_per_token", held_out=True):
        margin = {}  # without a reference, TRL's is of log-probs, and no reward that others' could be compared with
    accuracy |= {last: snapshot.get("reward_accuracy")}
    margin |= {last: snapshot.get("reward_margin")}
    steps = sorted(step for step in accuracy if step <= last)  # of a run that was rolled back others follow
    return [Point(step, finite(accuracy[step]), finite(margin.get(step)), far.get(step)) for step in steps]


def distances(stage: Record, measure: str) -> dict[int, float]:
    """{step: how far the policy was from its reference}, on held-out answers, in nats per token."""
    if measure == KL:
        held_out = stage.summary.get("held_out") or {}
        far = stage.series(KL, held_out=True) | {stage.last_step: held_out.get(f"eval_{KL}")}
    else:
        chosen, rejected = (log_ratios(stage, side) for side in ("chosen", "rejected"))
        far = {step: (abs(chosen[step]) + abs(rejected[step])) / 2 for step in chosen if step in rejected}
    return {step: value for step, value in far.items() if finite(value) is not None}


def log_ratios(stage: Record, side: str) -> dict[int, float]:
    """{step: log-ratio per token}: as logged, else to the log-probs of the start; the end is known from the summary."""
    logged = stage.series(f"logratios/{side}_per_token", held_out=True)
    start, end = (finite(each.get(f"logps_{side}_per_token")) for each in (stage.snapshots[0], stage.last_snapshot))
    if start is None or end is None:
        return logged
    logps = stage.series(f"logps/{side}_per_token", held_out=True)
    return {step: value - start for step, value in logps.items()} | logged | {stage.last_step: end - start}


def differences(entries: list[Entry]) -> list[str]:
    """What makes the numbers of these runs incomparable."""
    notes, sources = [], set()
    for run in (each.record for each in entries):
        data, seed = run.group("data"), run.group("train").get("seed")
        drawn = (data.get("eval_fraction"), data.get("max_rows"), seed)
        sources.add(str((data.get("path"), data.get("eval_split") or drawn)))
    if len(sources) > 1:
        told = "The runs held out different rows (data.*, train.seed)"
        notes.append(f"{told}: their accuracies are not of the same pairs.")
    starts = [finite(each.record.snapshots[0].get("perplexity")) for each in entries]
    if None not in starts and max(starts) > 1.01 * min(starts):
        between = f"perplexity {min(starts):.4g} to {max(starts):.4g}"
        notes.append(f"The runs start from different models ({between}): equal KL is no equal distance from one model.")
    return notes
