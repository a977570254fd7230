"""Curves as inline SVG by matplotlib: text stays text, and colours are the page's CSS variables, for light and dark."""

import io
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from html import escape

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

WIDTH, HEIGHT = 380, 200  # points, which the page scales: about what a phone shows
COLOURS = ("ink", "soft", "line", "red", "a", "b", "c", "d", "e", "f")  # variables of page.css
STAND_IN = {name: f"#0{number:x}beef" for number, name in enumerate(COLOURS)}  # what matplotlib draws them as
STYLE = {"svg.fonttype": "none", "svg.hashsalt": "preftune", "font.size": 11, "axes.linewidth": 0.8}


@dataclass
class Curve:
    """One line of a plot: {step: value} (NaN and infinity allowed), a colour of COLOURS, dashed if held out."""

    label: str
    values: dict[float, float]
    colour: str
    dashed: bool = False


@dataclass
class Plot:
    """What is drawn: curves, {height: words} of thresholds, (number, step) of findings, limits of y."""

    title: str
    curves: list[Curve]
    thresholds: dict[float, str] = field(default_factory=dict)
    findings: Iterable[tuple[int, int]] = ()
    limits: tuple[float, float] | None = None
    x_label: str = "step"

    def numbers(self) -> list[float]:
        return [value for curve in self.curves for value in curve.values.values() if math.isfinite(value)]


def figure(plot: Plot, legend: bool = True) -> str:
    """The plot as an HTML figure: title, legend, SVG, and in words what lies outside of the picture."""
    body, far = svg(plot)
    key = legend_of(plot.curves) if legend and len(plot.curves) > 1 else ""
    below = f'<p class="far">{escape("; ".join(far))}</p>' if far else ""
    return f"<figure><figcaption>{escape(plot.title)}</figcaption>{key}{body}{below}</figure>"


def legend_of(curves: list[Curve]) -> str:
    """What the colours and dashes of curves mean."""
    keys = "".join(
        f'<span><i class="key{" dashed" * curve.dashed}" style="--k: var(--{curve.colour})"></i>'
        f"{escape(curve.label)}</span>"
        for curve in curves
    )
    return f'<p class="legend">{keys}</p>'


def svg(plot: Plot) -> tuple[str, list[str]]:
    """(SVG, what lies outside of it in words)."""
    with matplotlib.rc_context(STYLE):
        drawing = Figure(figsize=(WIDTH / 72, HEIGHT / 72))
        axes = drawing.add_axes((0.145, 0.21, 0.835, 0.75))
        axes.patch.set_visible(False)
        drawing.patch.set_visible(False)
        for curve in plot.curves:
            _draw(axes, curve)
        low, high = _limits(plot)
        axes.set_ylim(low, high)
        if plot.x_label == "step" and len({step for curve in plot.curves for step in curve.values}) == 1:
            axes.set_xlim(step := next(iter(plot.curves[0].values), 1) - 1, step + 2)
        far = _thresholds(axes, plot, low, high)
        _findings(axes, plot)
        far += _not_finite(axes, plot)
        _dress(axes, plot)
        buffer = io.StringIO()
        drawing.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    return _inline(buffer.getvalue(), plot), far


def _draw(axes, curve: Curve) -> None:
    steps, values = list(curve.values), [v if math.isfinite(v) else math.nan for v in curve.values.values()]
    few = len(steps) <= 12 or curve.dashed
    axes.plot(
        steps,
        values,
        color=STAND_IN[curve.colour],
        linewidth=1.5,
        linestyle=(0, (3, 2)) if curve.dashed else "-",
        marker="o" if few else None,
        markersize=3.5 if curve.dashed else 2.5,
    )


def _limits(plot: Plot) -> tuple[float, float]:
    """Of y: the data, and thresholds that are not so far off that they would flatten it."""
    if plot.limits:
        low, high = plot.limits
        return low - 0.03 * (high - low), high + 0.03 * (high - low)
    numbers = plot.numbers() or [0.0, 1.0]
    low, high = min(numbers), max(numbers)
    span = max(high - low, 1e-3 * max(abs(low), abs(high)), 1e-12)
    near = [height for height in plot.thresholds if low - span <= height <= high + span]
    low, high = min([low, *near]), max([high, *near])
    pad = 0.07 * max(high - low, span)
    return low - pad, high + pad


def _thresholds(axes, plot: Plot, low: float, high: float) -> list[str]:
    far = []
    for height, words in plot.thresholds.items():
        if not low <= height <= high:
            far += [f"{words} ({height:,.4g}) lies {'above' if height > high else 'below'}"] if words else []
            continue
        ours = words.startswith("health.")
        colour = STAND_IN["red" if ours else "soft"]
        axes.axhline(height, color=colour, linewidth=0.9, linestyle=(0, (5, 3)), zorder=1)
        if words:
            top = height > low + 0.88 * (high - low)
            axes.annotate(
                words, (0.99 if ours else 0.01, height), xycoords=("axes fraction", "data"),
                xytext=(0, -3 if top else 3), textcoords="offset points", ha="right" if ours else "left",
                va="top" if top else "bottom", color=colour, fontsize=9.5,
            )  # fmt: skip
    return far


def _findings(axes, plot: Plot) -> None:
    """A line at the step of each finding, with its number in the table of findings; one line for all of a step."""
    at: dict[int, list[str]] = {}
    for place, step in plot.findings:
        at.setdefault(step, []).append(str(place))
    for step, places in at.items():
        axes.axvline(step, color=STAND_IN["red"], linewidth=1.2, zorder=1)
        axes.annotate(
            ",".join(places), (step, 1), xycoords=("data", "axes fraction"), xytext=(3, -2),
            textcoords="offset points", va="top", color=STAND_IN["red"], fontsize=11, fontweight="bold",
        )  # fmt: skip


def _not_finite(axes, plot: Plot) -> list[str]:
    """A cross at the bottom for every value that is NaN or infinite, and in words the first."""
    told = []
    for curve in plot.curves:
        steps = [step for step, value in curve.values.items() if not math.isfinite(value)]
        if steps:
            axes.plot(
                steps, [0.03] * len(steps), "x", color=STAND_IN["red"], transform=axes.get_xaxis_transform(),
                markersize=5,
            )  # fmt: skip
            told.append(f"{curve.label}: not a finite number at step {steps[0]}")
            told[-1] += f" and {len(steps) - 1} more" if len(steps) > 1 else ""
    return told


def _dress(axes, plot: Plot) -> None:
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(STAND_IN["line"])
    axes.grid(axis="y", color=STAND_IN["line"], linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(colors=STAND_IN["line"], labelcolor=STAND_IN["soft"], length=3)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=plot.x_label == "step"))
    axes.yaxis.set_major_locator(MaxNLocator(5))
    form = "{:.0%}" if plot.limits == (0.0, 1.0) else "{:g}"
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: form.format(_round(value)).replace("-", "−", 1)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{_round(value):g}"))
    axes.set_xlabel(plot.x_label, color=STAND_IN["soft"], labelpad=2)


def _round(value: float) -> float:
    return float(f"{value:.6g}") if abs(value) > 1e-12 else 0.0


def _inline(text: str, plot: Plot) -> str:
    """matplotlib's document as an element: no header, no metadata, colours as variables, a name for who cannot see."""
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.S)
    opening = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(_spoken(plot))}">'
    text = re.sub(r"<svg[^>]*>", lambda _: opening, text, count=1)
    text = re.sub(r'<g id="[^"]*"', "<g", text)  # every plot would have the same ones
    text = re.sub(r"font-family: [^;]*; ", "", text)  # the page's
    for name, colour in STAND_IN.items():
        text = text.replace(colour, f"var(--{name})")
    return text


def _spoken(plot: Plot) -> str:
    ends = []
    for curve in plot.curves:
        values = [value for value in curve.values.values() if math.isfinite(value)]
        if values:
            ends.append(f"{curve.label} from {values[0]:.3g} to {values[-1]:.3g}")
    return f"{plot.title}: {'; '.join(ends) or 'no finite value'}"
