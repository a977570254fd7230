"""What the fast path's benchmark found, as a table and plots: python -m benchmarks.report writes both into docs/.

The table goes between the two comments of docs/performance.md that name it; the plots are SVG in docs/performance/.
"""

import json
from pathlib import Path

from benchmarks.fastpath import BATCHES, CASES, GROWTH, PATHS, RESULTS
from benchmarks.memory import publish

DOCS = Path(__file__).parents[1] / "docs"
MARKS = "<!-- table: python -m benchmarks.report -->", "<!-- end of table -->"
NAMES = {"trl_default": "TRL", "trl_tuned": "TRL tuned", "preftune": "preftune", "limit": "limit"}
COLOURS = {"trl_default": "#b0b7c3", "trl_tuned": "#7d8797", "preftune": "#2563eb", "limit": "#d97706"}
MEASURES = {
    "seconds_per_pair": "seconds per pair",
    "gflop_per_pair": "GFLOP per pair",
    "peak_gb": "peak memory, GB",
    "seconds_per_pair_first_run": "first run: seconds per pair",
    "gflop_per_pair_first_run": "first run: GFLOP per pair",
}


def results() -> dict[str, dict]:
    """The results at hand, by the name of their case, in the order of the cases."""
    files = {name: RESULTS / f"{name}.json" for name in ("quick", *CASES)}
    return {name: json.loads(file.read_text()) for name, file in files.items() if file.exists()}


def number(value: float) -> str:
    """Three digits, or all of a large number's."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def table(found: dict[str, dict]) -> str:
    """A line per case and measure: every path's number, and how many times preftune's TRL's two are."""
    heads = ["case", "", *NAMES.values(), "TRL ÷ preftune", "tuned ÷ preftune", "preftune ÷ limit"]
    lines = [f"| {' | '.join(heads)} |", "|---|---" + "|---:" * (len(heads) - 2) + "|"]
    for name, result in found.items():
        for measure, words in MEASURES.items():
            values = [result[measure][path] for path in PATHS]
            default, tuned, ours, limit = values
            ratios = [f"{default / ours:.2f}", f"{tuned / ours:.2f}", f"{ours / limit:.2f}"]
            first = name if measure == "seconds_per_pair" else ""
            lines.append(f"| {' | '.join([first, words, *map(number, values), *ratios])} |")
    return "\n".join(lines)


def bars(title: str, groups: dict[str, dict[str, float]], unit: str) -> str:
    """An SVG of horizontal bars, a group per case, a bar per path, each with its number."""
    width, left, height, gap = 720, 150, 18, 14
    most = max(value for group in groups.values() for value in group.values())
    parts, y = [f'<text x="{left}" y="20" font-weight="bold">{title}, {unit}</text>'], 34
    for label, group in groups.items():
        middle = y + len(group) * height / 2 + 4
        parts.append(f'<text x="{left - 10}" y="{middle}" text-anchor="end">{label}</text>')
        for path, value in group.items():
            length = value / most * (width - left - 150)
            parts.append(
                f'<rect x="{left}" y="{y}" width="{length:.1f}" height="{height - 3}" fill="{COLOURS[path]}"/>'
            )
            parts.append(f'<text x="{left + length + 6:.1f}" y="{y + 12}">{number(value)} {NAMES[path]}</text>')
            y += height
        y += gap
    style = 'font-family="sans-serif" font-size="12" fill="#374151"'
    body = "\n".join(parts)
    return f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {y}" {style}>\n{body}\n</svg>\n'


def plots(found: dict[str, dict]) -> dict[str, str]:
    """The plots that the results allow, by file name."""
    prefix = "dpo-lora-bf16"
    growth = {f"{p} + {a} tokens": f"{prefix}-{p}-{a}" for p, a in GROWTH}
    sizes = {f"batch {size}": f"{prefix}-demo-batch{size}" for size in BATCHES}
    losses = {
        "DPO": "quick",
        "KTO": "kto-lora-bf16",
        "ORPO, rows to 384": "orpo-lora-bf16",
        "DPO, checkpointing": f"{prefix}-checkpointing",
        "DPO, full, rows to 256": "dpo-full-bf16",
    }
    chosen = {
        "time": ("Training step", losses, "seconds_per_pair"),
        "memory": ("Training step", losses, "peak_gb"),
        "lengths": ("Prompt and answer length", growth, "gflop_per_pair"),
        "batch": ("Batch size", sizes, "gflop_per_pair"),
    }
    drawn = {}
    for file, (title, cases, measure) in chosen.items():
        groups = {label: found[name][measure] for label, name in cases.items() if name in found}
        if groups:
            drawn[f"{file}.svg"] = bars(title, groups, MEASURES[measure])
    return drawn


def main() -> None:
    found = results()
    page = DOCS / "performance.md"
    publish(page, MARKS, ["", table(found), ""])
    (DOCS / "performance").mkdir(exist_ok=True)
    for name, drawing in plots(found).items():
        (DOCS / "performance" / name).write_text(drawing, encoding="utf-8")


if __name__ == "__main__":
    main()
