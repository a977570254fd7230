"""A run in words: whether it is healthy, why, and what to do next."""

from dataclasses import dataclass, field

from omegaconf import OmegaConf

from preftune.evaluate.statistics import interval, percent
from preftune.report import held_out
from preftune.report.held_out import last_look, pairs
from preftune.report.record import Record, finite, way_on

GOOD, UNSURE, BAD = "good", "unsure", "bad"


@dataclass
class Verdict:
    """`tone` is one of GOOD, UNSURE, BAD; `why` and `next` are sentences, the most important first."""

    tone: str
    headline: str
    why: list[str] = field(default_factory=list)
    next: list[str] = field(default_factory=list)


def verdict(record: Record) -> Verdict:
    """The verdict on a run; on a pipeline, that of its worst stage, with what the others say."""
    return of_pipeline(record) if record.stages else of_stage(record)


def of_pipeline(record: Record) -> Verdict:
    stages = [(stage.name, of_stage(stage)) for stage in record.stages]
    worst = max((each for _, each in stages), key=lambda each: (GOOD, UNSURE, BAD).index(each.tone))
    first = sorted(stages, key=lambda stage: stage[1] is not worst)  # the others in their order
    why = [f"{name}: {reason}" for name, each in first for reason in each.why]
    if record.summary or worst.tone == BAD:
        headline = worst.headline if worst.tone != GOOD else "Healthy: every stage finished, without a finding"
        named = next(name for name, each in stages if each is worst)
        onward = worst.next if worst.tone == BAD else stages[-1][1].next
        return Verdict(worst.tone, headline if worst.tone == GOOD else f"{named}: {headline}", why, onward)
    told = f"Not finished: {', '.join(name for name, _ in stages)} of the pipeline's stages, and no summary"
    return Verdict(BAD, told, why, [resume(record)])


def of_stage(record: Record) -> Verdict:
    """The verdict on one training run, from how it ended and from its findings."""
    findings = record.findings or []
    if not record.summary:
        return unfinished(record)
    told = results(record) + of_data(record)
    if findings:
        count = "1 finding" if len(findings) == 1 else f"{len(findings)} findings"
        back = record.summary.get("rolled_back_to")
        count += f", and rolled back to {back}" if back else ""
        why = [sentence(finding) for finding in findings]
        return Verdict(BAD, f"Not healthy: finished, with {count}", why + told, remedies(findings))
    if at_chance(record):
        headline = "Finished without a finding, but tells held-out pairs apart no better than a coin"
        more = "More steps, more pairs or a higher train.learning_rate; the curves below show which way it went."
        return Verdict(UNSURE, headline, told, [more, *onward(record)])
    if record.findings is None:
        return Verdict(UNSURE, "Finished; its health was not watched (no findings.json)", told, onward(record))
    return Verdict(GOOD, "Healthy: finished, without a finding", told, onward(record))


def unfinished(record: Record) -> Verdict:
    """A run that a guard stopped, or that ended in another way, or that is still under way."""
    findings, state = record.findings or [], record.status.get("state")
    reasons = [sentence(each) for each in findings] + of_data(record)
    guard = next((each for each in findings if stops(record, each)), None)
    if guard and state not in ("interrupted", "failed"):
        step = finite(guard.get("step"))
        when = f"at step {step:g}" if step else "before the first step"
        return Verdict(BAD, f"Stopped {when}: {guard.get('code')}", reasons, remedies(findings))
    said = [str(record.status["why"])] if record.status.get("why") else []
    if not record.manifest and state != "running":
        why = said or ["There is no manifest.json: the model or the data could not be had, or were refused."]
        remedy = "Set right what the command printed, and type it again: nothing is in its way."
        return Verdict(BAD, "Did not start", why + reasons, [remedy])
    why = said or ["There is no summary.json: it broke off, or is still under way."]
    verb = {"interrupted": "Interrupted", "failed": "Failed"}.get(state, "Not finished:")
    return Verdict(BAD, f"{verb} at step {record.last_step}", why + reasons, [resume(record), *remedies(findings)])


def stops(record: Record, finding: dict) -> bool:
    """Whether a run ends with this finding: a fault of its start or its numbers always, others as its config says."""
    code, health, gate = (finding.get("code", ""), record.config.get("health") or {}, record.config.get("gate") or {})
    if code == "perplexity":
        return gate.get("on_fail") == "stop"
    return code.startswith("step0_") or code.endswith("_not_finite") or health.get("action", "warn") != "warn"


def sentence(finding: dict) -> str:
    return f"{finding.get('code')}: {finding.get('meaning')}"


def remedies(findings: list[dict]) -> list[str]:
    return list(dict.fromkeys(str(finding["remedy"]) for finding in findings if finding.get("remedy")))


def resume(record: Record) -> str:
    cfg = OmegaConf.create({"train": record.config.get("train") or {}, "output_dir": str(record.path)})
    return f"Where it no longer runs: {way_on(cfg)} (output_dir={record.path})."


def results(record: Record) -> list[str]:
    """What the training changed on the held-out pairs."""
    looks = record.summary.get("looks") or []
    if len(looks) < 2:
        return ["The data has no held-out pairs, so what it learnt was not measured."]
    first, last = looks[0], looks[-1]
    told = []
    if (accuracy := held_out.accuracy(last)) is not None:
        margin = finite(last.get("reward_margin"))
        told.append(f"Held-out accuracy {percent(accuracy, pairs(last))}")
        told[-1] += f", margin {margin:.3g}." if margin is not None else "."
    for key, name, form in (
        ("logp_accuracy", "Accuracy by log-prob per token", ".1%"),
        ("perplexity", "Perplexity of the chosen answers", ".2f"),
    ):
        before, after = finite(first.get(key)), finite(last.get(key))
        if before is not None and after is not None:
            told.append(f"{name}: {before:{form}} before, {after:{form}} after.")
    return told


def of_data(record: Record) -> list[str]:
    noted = [each for each in record.data_findings or [] if each.get("severity") in ("error", "warning")]
    return [f"The data: {', '.join(str(each.get('code')) for each in noted)} (below)."] if noted else []


def at_chance(record: Record) -> bool:
    """Whether a coin may have done as well on the held-out pairs: 50% within the 95% interval, or above it."""
    look = last_look(record)
    accuracy = held_out.accuracy(look)
    around = interval(accuracy, pairs(look))
    return accuracy is not None and (around[0] if around else accuracy) <= 0.5


def onward(record: Record) -> list[str]:
    """What to do with a finished run."""
    told = [f"The result lies in {record.path / 'model'}."]
    if not any(name.startswith("eval_") for row in record.rows for name in row):
        told.append(
            "Its held-out pairs were scored before and after only: train.eval_strategy=steps train.eval_steps=50 would "
            "show when it was best."
        )
    told.append(f"Beside others: python -m recipes.compare {record.path} ANOTHER.")
    return told
