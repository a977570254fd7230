"""An inspection as a page: one HTML file with its tables, charts and styles, which needs nothing beside it."""

from html import escape
from pathlib import Path

import numpy as np

from preftune.data.findings import Finding
from preftune.data.inspect import Inspection, Token
from preftune.data.set_checks import SetFigures
from preftune.data.shapes import PAIRS
from preftune.report.data_charts import accuracies, histogram
from preftune.report.data_report import labels, quantiles

STYLE = Path(__file__).with_name("data_page.css")


def html(seen: Inspection) -> str:
    """The page of an inspection."""
    errors = len(seen.errors())
    verdict = f"{errors} error{'s' if errors > 1 else ''}: not fit for training" if errors else "fit for training"
    sections = [
        findings_table(seen.findings),
        charts_of(seen),
        token_table(seen),
        words_table(seen),
        example(seen),
    ]
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(seen.path)}: data inspection</title><style>{STYLE.read_text(encoding="utf-8")}</style></head>
<body><main>
<header><p class="kicker">preftune · data inspection</p><h1>{escape(seen.path)}</h1>
<p class="verdict {"bad" if errors else "good"}">{verdict}</p></header>
{cards(seen)}
{"".join(section for section in sections if section)}
</main></body></html>
"""


def cards(seen: Inspection) -> str:
    """The main numbers, large."""
    facts = [("rows read", f"{seen.read:,}"), ("to train on", f"{seen.kept:,}"), ("held out", f"{seen.held_out:,}")]
    if seen.skipped:
        facts.append(("bad rows", f"{seen.skipped:,}"))
    for kind, figures in seen.sets.items():
        facts.append((f"prompts of {kind}", f"{figures.prompts:,}{labels(figures.labels)}"))
        if figures.longer_is_better is not None:
            facts.append(("the longer answer is better", f"{figures.longer_is_better:.1%}"))
    facts += [("a bag of words is right", f"{words.accuracy:.1%}") for words in seen.words.values()]
    body = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in facts)
    return f'<dl class="cards">{body}</dl><p class="shape">Shape: {escape(seen.shape)}</p>'


def findings_table(findings: list[Finding]) -> str:
    if not findings:
        return "<section><h2>Findings</h2><p>None.</p></section>"
    rows = ""
    for finding in findings:
        places = "".join(f"<li>{escape(place)}</li>" for place in finding.examples)
        count = f"{finding.count:,}" + (f"<small> of {finding.of:,}</small>" if finding.of else "")
        rows += (
            f'<tr><td><span class="tag {finding.severity}">{finding.severity}</span></td>'
            f"<td><code>{finding.code}</code><p>{escape(finding.says)}</p></td>"
            f'<td class="number count">{count}</td><td><ul>{places}</ul></td><td>{escape(finding.remedy)}</td></tr>'
        )
    head = "<tr><th></th><th>finding</th><th>rows</th><th>seen at</th><th>what to do</th></tr>"
    return f'<section><h2>Findings</h2><div class="wide"><table class="findings">{head}{rows}</table></div></section>'


def charts_of(seen: Inspection) -> str:
    """Lengths, what length tells, and what words tell, as far as there are figures."""
    drawn = []
    if seen.tokens is not None and seen.tokens.looked_at:
        for css, (name, values) in zip("abc", seen.tokens.columns.items(), strict=False):
            label = f"tokens of {name}"
            drawn.append((f"Tokens: {name}", histogram(values, label, css, mark=seen.max_length)))
        prompt, *answers = seen.tokens.columns.values()
        whole = prompt + np.maximum.reduce(answers)
        drawn.append(("Tokens: prompt + longest answer", histogram(whole, "tokens", "d", mark=seen.max_length)))
    for kind, figures in seen.sets.items():
        if kind == PAIRS and figures.rows:
            drawn += length_charts(figures)
        bars = []
        if figures.longer_is_better is not None:
            bars.append(("longer is better", figures.longer_is_better, figures.longer_error))
        if kind in seen.words:
            bars.append(("bag of words", seen.words[kind].accuracy, seen.words[kind].error))
        if bars:
            chart = accuracies(bars, "accuracy (± 2 standard errors), 50% is a coin")
            drawn.append(("Judges that understand nothing", chart))
    body = "".join(f"<figure><figcaption>{escape(title)}</figcaption>{chart}</figure>" for title, chart in drawn)
    return f'<section><h2>Lengths and biases</h2><div class="charts">{body}</div></section>' if drawn else ""


def length_charts(figures: SetFigures) -> list[tuple[str, str]]:
    """The difference of the answers' lengths, and how well the longer one does by how much longer it is."""
    difference = figures.characters["chosen"] - figures.characters["rejected"]
    chart = histogram(difference, "characters; right of 0 the chosen is longer", "a", signed=True)
    drawn = [("Length of chosen less rejected", chart)]
    apart = difference[difference != 0]
    if len(apart) >= 50:
        size = np.abs(apart)
        edges = np.quantile(size, [0, 0.25, 0.5, 0.75, 1])
        bars = []
        for low, high in zip(edges[:-1], edges[1:], strict=True):
            mine = apart[(size >= low) & (size <= high)]
            share = float((mine > 0).mean())
            bars.append((f"{low:,.0f}–{high:,.0f}", share, (share * (1 - share) / len(mine)) ** 0.5))
        chart = accuracies(bars, "characters longer, in quarters of the pairs")
        drawn.append(("The longer is better, by how much longer", chart))
    return drawn


def token_table(seen: Inspection) -> str:
    if seen.tokens is None or not seen.tokens.looked_at:
        return ""
    rows = ""
    for name, values in seen.tokens.columns.items():
        cells = "".join(f'<td class="number">{value:,}</td>' for value in quantiles(values).values())
        rows += f"<tr><td>{name}</td>{cells}</tr>"
    head = "".join(f'<th class="number">{name}</th>' for name in ("mean", "median", "95%", "max"))
    of = f"{seen.tokens.looked_at:,} of {seen.tokens.of:,} rows, before train.max_length = {seen.max_length} cuts them."
    table = f'<div class="wide"><table><tr><th></th>{head}</tr>{rows}</table></div>'
    return f"<section><h2>Tokens</h2><p>{of}</p>{table}</section>"


def words_table(seen: Inspection) -> str:
    body = ""
    for kind, words in seen.words.items():
        for name, listed in (("good", words.good), ("bad", words.bad)):
            spans = " ".join(f"<code>{escape(word)}</code>" for word in listed)
            body += f"<tr><td>{kind}, {name}</td><td>{spans}</td></tr>"
    if not body:
        return ""
    told = "The words by which a bag of words tells good answers from bad ones, the most telling first."
    return f'<section><h2>Telling words</h2><p>{told}</p><div class="wide"><table>{body}</table></div></section>'


def example(seen: Inspection) -> str:
    if not seen.example:
        return ""
    body = ""
    for column, tokens in seen.example.items():
        scored = sum(token.scored for token in tokens)
        body += f"<h3>{column} <small>{len(tokens)} tokens, {scored} scored</small></h3>"
        body += f"<pre>{''.join(map(span, tokens))}</pre>"
    legend = '<span class="t read">read</span> <span class="t scored">scored</span> <span class="t cut">cut off</span>'
    where = escape(seen.example_origin)
    return f"<section><h2>One row as the trainer sees it</h2><p>{where}, token by token: {legend}</p>{body}</section>"


def span(token: Token) -> str:
    css = "cut" if token.cut else "scored" if token.scored else "read"
    return f'<span class="t {css}">{escape(token.text.replace(chr(10), "⏎" + chr(10)))}</span>'
