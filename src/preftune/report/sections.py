"""The parts of a run's page that are words and tables. Each returns markup, empty where the run has nothing to show."""

from html import escape

from preftune.evaluate.statistics import interval, percent
from preftune.report.held_out import accuracy, accuracy_name, last_look
from preftune.report.record import Record, finite
from preftune.report.terminal import ROWS


def section(title: str, body: str) -> str:
    return f'<section><h3 class="part">{escape(title)}</h3>{body}</section>' if body else ""


def cards(record: Record) -> str:
    """The main numbers, large."""
    look = last_look(record) or last_look(record.last_stage)
    speed = record.last_stage.speed()
    facts = [
        ("held-out accuracy", percent(accuracy(look)) if accuracy(look) is not None else None),
        ("held-out margin", short(look.get("reward_margin"))),
        ("KL to the reference", short(look.get("kl"))),
        ("perplexity of chosen", short(look.get("perplexity"))),
        ("steps", f"{record.last_stage.last_step:,}"),
        ("time", clock(record.summary.get("seconds") or record.last_stage.summary.get("seconds"))),
        ("tokens a second", short(speed.get("tokens_per_second"))),
    ]
    known = [(name, value) for name, value in facts if value]
    body = "".join(f"<div><dt>{name}</dt><dd>{escape(value)}</dd></div>" for name, value in known)
    return f'<dl class="cards">{body}</dl>' if len(known) > 1 else ""


def findings(record: Record) -> str:
    """findings.json as a table; its numbers are those of the marks in the curves."""
    if record.findings is None:
        return ""
    if not record.findings:
        return section("Findings", "<p>None.</p>")
    rows = ""
    for place, each in enumerate(record.findings, start=1):
        seen = escape(shown(each.get("value")))
        if each.get("threshold") is not None:
            seen += f"<small> threshold {escape(shown(each['threshold']))}</small>"
        when = f'<td class="when">step {escape(shown(each.get("step")))}</td><td>{seen}</td>'
        rows += finding_row(each, "error", str(place), "meaning", when)
    head = "<tr><th></th><th>finding</th><th>when</th><th>value</th><th>what to do</th></tr>"
    return section("Findings", f'<div class="wide"><table class="findings">{head}{rows}</table></div>')


def finding_row(each: dict, tone: str, tag: str, text: str, middle: str) -> str:
    """A row of a table of findings: its tag, its code with the words under `text`, `middle` as markup, its remedy."""
    code, words, remedy = (escape(str(each.get(key, ""))) for key in ("code", text, "remedy"))
    return (
        f'<tr><td><span class="tag {escape(tone)}">{escape(tag)}</span></td><td><code>{code}</code><p>{words}</p></td>'
        f"{middle}<td>{remedy}</td></tr>"
    )


def proofs(record: Record) -> str:
    """proofs.json as a table: what was measured to hold, with its number."""
    if not record.proofs:
        return ""
    rows = "".join(
        f"<tr><td><code>{escape(str(each.get('name')))}</code><p>{escape(str(each.get('meaning')))}</p></td>"
        f"<td>{escape(shown(each.get('value')))}</td><td>{escape(shown(each.get('wanted')))}</td></tr>"
        for each in record.proofs
    )
    head = "<tr><th>what holds</th><th>measured</th><th>wanted</th></tr>"
    return section("Proofs", f'<div class="wide"><table class="findings">{head}{rows}</table></div>')


def gate(record: Record) -> str:
    """The perplexity of the held-out chosen answers before the stage, and the gate where the stage has one."""
    value = finite(record.gate.get("perplexity") or record.summary.get("perplexity"))
    if value is None:
        return ""
    limit = finite(record.gate.get("max_perplexity"))
    if limit is None:
        told = (
            f"<p>Before training, the held-out chosen answers had a perplexity of {value:.2f} per token (no gate).</p>"
        )
        return section("Perplexity", told)
    passed = value <= limit
    tone, word = ("good", "passed") if passed else ("bad", "above the limit")
    on_fail = (record.config.get("gate") or {}).get("on_fail")
    told = f"Before training, the held-out chosen answers had a perplexity of {value:.2f} per token; limit {limit:g}"
    told += f" (gate.on_fail={on_fail})." if on_fail else "."
    body = f'<p><span class="tag {tone}">{word}</span> {escape(told)}</p>' + strange(record.gate)
    return section("Perplexity gate", body)


def strange(report: dict) -> str:
    """The chosen answers that the model finds strangest."""
    listed = report.get("strange_chosen") or []
    if not listed:
        return ""
    rows = "".join(
        f"<tr><td><b>{escape(str(each.get('prompt', '')))}</b><p>{escape(str(each.get('chosen', '')))}</p></td>"
        f'<td class="number">{escape(short(each.get("logps_per_token")) or "–")}</td></tr>'
        for each in listed
    )
    count = report.get("strange_count", len(listed))
    told = f"Chosen answers that are far stranger to it than the rest: {count}"
    head = '<tr><th>answer</th><th class="number">log-prob per token</th></tr>'
    return f'<details><summary>{escape(told)}</summary><div class="wide"><table>{head}{rows}</table></div></details>'


def looks(record: Record) -> str:
    """The held-out pairs before and after, in the terminal's rows."""
    seen = record.summary.get("looks") or []
    if not seen:
        return ""
    head = "".join(f'<th class="number">{escape(str(look.get("name", "")))}</th>' for look in seen)
    rows = ""
    for key, (label, form) in ROWS.items():
        values = [finite(look.get(key)) for look in seen]
        if any(value is not None for value in values):
            cells = "".join(f'<td class="number">{"–" if v is None else format(v, form)}</td>' for v in values)
            rows += f"<tr><td>{escape(label)}</td>{cells}</tr>"
    return section(
        "Held-out pairs", f'<div class="wide"><table class="looks"><tr><th></th>{head}</tr>{rows}</table></div>'
    )


def by_length(record: Record) -> str:
    """Held-out accuracy in buckets of length, each with its 95% interval."""
    look = last_look(record)
    buckets, name = look.get("by_length") or [], accuracy_name(look)
    rows = ""
    for bucket in buckets:
        share, pairs = finite(bucket.get(name)), int(bucket["pairs"])
        low, high = interval(share, pairs) or (0, 0)
        place = f"--share: {share or 0:.3f}; --low: {low:.3f}; --high: {high:.3f}"
        bar = "" if share is None else f'<span class="bar" style="{place}"><i></i><b></b></span>'
        rows += (
            f'<tr><td>{escape(str(bucket.get("tokens", "")))}</td><td class="number">{pairs}</td>'
            f'<td class="bars">{bar}</td><td class="number">{escape(percent(share, pairs))}</td></tr>'
        )
    if not rows:
        return ""
    what = "by implicit reward" if name == "accuracy" else "by log-prob per token"
    head = f'<tr><th>tokens</th><th class="number">pairs</th><th>accuracy {what}</th><th class="number">(95%)</th></tr>'
    return section(
        "Held-out accuracy by length", f'<div class="wide"><table class="lengths">{head}{rows}</table></div>'
    )


def samples(record: Record) -> str:
    """Answers before and after, side by side."""
    listed = record.summary.get("samples") or record.last_stage.summary.get("samples") or []
    body = ""
    for each in listed:
        answers = "".join(
            f'<div><h4>{side}</h4><p class="answer">{escape(str(each.get(side, ""))) or "<i>nothing</i>"}</p></div>'
            for side in ("before", "after")
        )
        answers += answers_between(record.last_stage, each.get("prompt"))
        body += f'<article><h3>{escape(str(each.get("prompt", "")))}</h3><div class="sides">{answers}</div></article>'
    return f"<section><h2>Answers before and after</h2>{body}</section>" if body else ""


def answers_between(stage: Record, prompt: object) -> str:
    """Answers to the same prompt while the stage trained, folded."""
    rows = "".join(
        f'<h4>step {escape(shown(each["step"]))}</h4><p class="answer">{escape(str(each.get("answer", "")))}</p>'
        for each in stage.samples
        if each.get("prompt") == prompt
    )
    return f"<details><summary>while it trained</summary>{rows}</details>" if rows else ""


def data(record: Record) -> str:
    """data_findings.json: the verdict on the data that the run was trained on."""
    if record.data_findings is None:
        return ""
    if not record.data_findings:
        return section("Data", "<p>The data check found nothing.</p>")
    rows = ""
    for each in record.data_findings:
        severity, of = str(each.get("severity", "")), each.get("of")
        count = shown(each.get("count")) + (f" of {shown(of)}" if of else "")
        places = "".join(f"<li>{escape(str(place))}</li>" for place in each.get("examples") or [])
        where = f'<td class="number count">{escape(count)}</td><td><ul>{places}</ul></td>'
        rows += finding_row(each, severity, severity, "says", where)
    head = "<tr><th></th><th>finding</th><th>rows</th><th>seen at</th><th>what to do</th></tr>"
    return section("Data", f'<div class="wide"><table class="findings">{head}{rows}</table></div>')


def speed(record: Record) -> str:
    """Time and memory, beside the plan where the run had one."""
    plan, measured = record.summary.get("plan") or record.manifest.get("plan") or {}, record.speed()
    memory = plan.get("memory_gb") if isinstance(plan.get("memory_gb"), dict) else {}
    seconds, tokens = finite(plan.get("seconds")), finite(plan.get("tokens"))
    lines = [
        ("seconds", short(seconds), short(measured.get("seconds"))),
        ("tokens", short(tokens), short(measured.get("tokens"))),
        (
            "tokens a second",
            short(tokens / seconds if tokens and seconds else None),
            short(measured.get("tokens_per_second")),
        ),
        ("peak memory, GB", short(memory.get("total")), short(measured.get("peak_memory_gb"))),
    ]
    rows = "".join(
        f'<tr><td>{name}</td><td class="number">{planned or "–"}</td><td class="number">{seen or "–"}</td></tr>'
        for name, planned, seen in lines
        if planned or seen
    )
    if not rows:
        return ""
    head = '<tr><th></th><th class="number">planned</th><th class="number">measured</th></tr>'
    parts = ", ".join(f"{name} {short(size)}" for name, size in memory.items() if name != "total" and finite(size))
    below = f'<p class="shape">Planned memory by part, GB: {escape(parts)}.</p>' if parts else ""
    return section("Speed and memory", f'<div class="wide"><table class="looks">{head}{rows}</table></div>{below}')


def short(value: object) -> str | None:
    """Four digits of a number; None where there is none."""
    number = finite(value)
    if number is None:
        return None
    return f"{number:,.0f}" if abs(number) >= 1000 else f"{number:.4g}"


def shown(value: object) -> str:
    return short(value) or str("–" if value is None else value)


def clock(seconds: object) -> str | None:
    """3 min 20 s."""
    number = finite(seconds)
    if number is None:
        return None
    minutes, rest = divmod(round(number), 60)
    hours, minutes = divmod(minutes, 60)
    return " ".join(f"{n} {unit}" for n, unit in ((hours, "h"), (minutes, "min"), (rest, "s")) if n) or "0 s"
