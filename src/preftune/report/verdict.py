"""A run in words: whether it is healthy, why, and what to do next."""

from dataclasses import dataclass, field

from omegaconf import OmegaConf

from preftune.evaluate.statistics import interval, percent
from preftune.report.record import Record, finite, pairs, way_on

GOOD, UNSURE, BAD = "good", "unsure", "bad"


@dataclass
class Verdict:
    """`tone` is one of GOOD, UNSURE, BAD; `why` and `next` are sentences, the most important first."""

    tone: str
    headline: str
    why: list[str] = field(default_factory=list)
    next: list[str] = field(default_factory=list)


def verdict(record: Record) -> Verdict:
    """The verdict on a run; on a pipeline, that of its worst stage, with the reasons of all."""
    if not record.stages:
        return of_stage(record)
    stages = [(stage.name, of_stage(stage)) for stage in record.stages]
    name, worst = max(stages, key=lambda stage: (GOOD, UNSURE, BAD).index(stage[1].tone))
    stages.sort(key=lambda stage: stage[1] is not worst)  # the others in their order
    why = [f"{name}: {reason}" for name, each in stages for reason in each.why]
    if worst.tone == BAD:
        return Verdict(BAD, f"{name}: {worst.headline}", why, worst.next)
    if not record.summary:
        names = ", ".join(stage.name for stage in record.stages)
        return Verdict(BAD, f"Not finished: {names} of the pipeline's stages, and no summary", why, [resume(record)])
    good = "Healthy: every stage finished, without a finding"
    headline = good if worst.tone == GOOD else f"{name}: {worst.headline}"
    return Verdict(worst.tone, headline, why, of_stage(record.last_stage).next)


def of_stage(record: Record) -> Verdict:
    """The verdict on one training run, from how it ended and from its findings."""
    findings = record.findings or []
    reasons = [f"{finding.get('code')}: {finding.get('meaning')}" for finding in findings]
    remedies = list(dict.fromkeys(str(finding["remedy"]) for finding in findings if finding.get("remedy")))
    of_data = [each.get("code") for each in record.data_findings or [] if each.get("severity") in ("error", "warning")]
    of_data = [f"The data: {', '.join(map(str, of_data))} (below)."] if of_data else []
    if not record.summary:
        return unfinished(record, reasons + of_data, remedies)
    told = results(record) + of_data
    if findings:
        count = "1 finding" if len(findings) == 1 else f"{len(findings)} findings"
        back = record.summary.get("rolled_back_to")
        count += f", and rolled back to {back}" if back else ""
        return Verdict(BAD, f"Not healthy: finished, with {count}", reasons + told, remedies)
    both = len(record.snapshots) > 1
    onward = [f"Compare it: python -m recipes.compare {record.path} ANOTHER."] if both else []
    if not record.has_evaluations and both:
        how = "train.eval_strategy=steps train.eval_steps=50 would show when it was best"
        onward.insert(0, f"Its held-out pairs were scored before and after only: {how}.")
    onward.insert(0, f"The result lies in {record.path / 'model'}.")
    accuracy, scored = held_out(record)
    low, _ = interval(accuracy, scored) or (accuracy, accuracy)
    if low is not None and low <= 0.5:  # chance explains it
        headline = "Finished without a finding, but tells held-out pairs apart no better than a coin"
        more = "More steps, more pairs or a higher train.learning_rate; the curves below show which way it went."
        return Verdict(UNSURE, headline, told, [more, *onward])
    if record.findings is None:
        return Verdict(UNSURE, "Finished; its health was not watched (no findings.json)", told, onward)
    return Verdict(GOOD, "Healthy: finished, without a finding", told, onward)


def unfinished(record: Record, told: list[str], remedies: list[str]) -> Verdict:
    """The verdict on a run that a guard stopped, that ended in another way, or that still runs."""
    state, known = record.status.get("state"), record.status.get("why") or ""
    guard = next((each for each in record.findings or [] if f"Stopped: {each.get('code')} at step" in known), None)
    if guard:
        when = f"at step {guard['step']}" if guard["step"] else "before the first step"
        return Verdict(BAD, f"Stopped {when}: {guard['code']}", told, remedies)
    if not record.manifest and state != "running":
        why = known or "There is no manifest.json: the model or the data could not be loaded, or were refused."
        remedy = "Fix what the command printed, and give the same command again: nothing is in its way."
        return Verdict(BAD, "Did not start", [why, *told], [remedy])
    why = known or "There is no summary.json: it broke off, or it still runs."
    verb = {"interrupted": "Interrupted", "failed": "Failed"}.get(state, "Not finished:")
    return Verdict(BAD, f"{verb} at step {record.last_step}", [why, *told], [resume(record), *remedies])


def held_out(record: Record) -> tuple[float | None, int | None]:
    """(accuracy, pairs) after training, by implicit rewards or a reward model's; None where there is none."""
    if record.snapshots:
        return finite(record.last_snapshot.get("reward_accuracy")), pairs(record.last_snapshot)
    return finite(record.summary.get("accuracy_after")), record.summary.get("pairs")


def resume(record: Record) -> str:
    cfg = OmegaConf.create({"train": record.group("train"), "output_dir": str(record.path)})
    return f"Where it no longer runs: {way_on(cfg)} (output_dir={record.path})."


def results(record: Record) -> list[str]:
    """What the training changed on the held-out pairs."""
    if len(record.snapshots) == 1:
        return ["The next stage measured the result, before it trained that further."]
    accuracy, count = held_out(record)
    told = [] if accuracy is None else [f"Held-out accuracy {percent(accuracy, count)}."]
    if not record.snapshots:
        return told or ["The data has no held-out pairs, so the result was not measured on any."]
    first, last = record.snapshots[0], record.snapshots[-1]
    if accuracy is not None:
        told = [f"Held-out accuracy {percent(accuracy, count)}, margin {last['reward_margin']:.3g}."]
    logp, chosen = "Accuracy by log-prob per token", "Perplexity of the chosen answers"
    for key, name, form in (("logp_accuracy", logp, ".1%"), ("perplexity", chosen, ".2f")):
        before, after = finite(first.get(key)), finite(last.get(key))
        if before is not None and after is not None:
            told.append(f"{name}: {before:{form}} before, {after:{form}} after.")
    return told
