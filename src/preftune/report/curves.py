"""Curves as inline SVG by matplotlib: text stays text, and colours are the page's CSS variables, for light and dark."""

import io
import math
import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field

import matplotlib
from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

WIDTH, HEIGHT = 380, 200  # points, which the page scales: about what a phone shows
CURVES = ("a", "b", "c", "d", "e", "f")  # colours of curves; these and the others are variables of style.css
STAND_IN = {name: f"#0{i:x}beef" for i, name in enumerate(("ink", "soft", "line", "red", *CURVES))}
LINE, SOFT, RED = (STAND_IN[name] for name in ("line", "soft", "red"))
STYLE = {"svg.fonttype": "none", "svg.hashsalt": "preftune", "font.size": 11, "figure.facecolor": "none"}
STYLE |= {"axes.facecolor": "none", "axes.linewidth": 0.8, "axes.edgecolor": LINE, "axes.axisbelow": True}
STYLE |= {"axes.spines.top": False, "axes.spines.right": False, "axes.labelcolor": SOFT, "axes.labelpad": 2}
STYLE |= {"axes.grid": True, "axes.grid.axis": "y", "grid.color": LINE, "grid.linewidth": 0.6}
STYLE |= {f"{axis}tick.{key}": value for axis in "xy" for key, value in
          {"color": LINE, "labelcolor": SOFT, "major.size": 3}.items()}  # fmt: skip


@dataclass
class Curve:
    """One line of a plot: {step: value} (NaN and infinity allowed), a colour of CURVES, dashed if held out."""

    label: str
    values: dict[float, float]
    colour: str
    dashed: bool = False

    @property
    def not_finite(self) -> list[float]:
        return [step for step, value in self.values.items() if not math.isfinite(value)]

    @property
    def finite(self) -> list[float]:
        return [value for value in self.values.values() if math.isfinite(value)]


@dataclass
class Plot:
    """What is drawn: curves, {height: words} of thresholds, (number, step) of findings, limits of y.

    The template shows `notes`: what lies outside of the picture, or is no number.
    """

    title: str
    curves: list[Curve]
    thresholds: dict[float, str] = field(default_factory=dict)
    findings: Iterable[tuple[int, int]] = ()
    limits: tuple[float, float] | None = None
    x_label: str = "step"
    legend: bool = True

    @property
    def y_range(self) -> tuple[float, float]:
        """Limits of y: the data, and thresholds that are not so far off that they would flatten it."""
        if self.limits:
            return self.limits[0] - 0.03, self.limits[1] + 0.03
        numbers = [value for curve in self.curves for value in curve.finite] or [0.0, 1.0]
        low, high = min(numbers), max(numbers)
        span = max(high - low, 1e-3 * max(abs(low), abs(high))) or 1.0
        near = [height for height in self.thresholds if low - span <= height <= high + span]
        low, high = min([low, *near]), max([high, *near])
        pad = 0.07 * max(high - low, span)
        return low - pad, high + pad

    @property
    def notes(self) -> list[str]:
        (low, high), told = self.y_range, []
        for height, words in self.thresholds.items():
            if words and not low <= height <= high:
                told.append(f"{words} ({height:,.4g}) lies {'above' if height > high else 'below'}")
        for curve in self.curves:
            if steps := curve.not_finite:
                more = f" and {len(steps) - 1} more" if len(steps) > 1 else ""
                told.append(f"{curve.label}: not a finite number at step {steps[0]}{more}")
        return told

    def svg(self) -> Markup:
        """The plot as an SVG element."""
        with matplotlib.rc_context(STYLE):
            drawing = Figure(figsize=(WIDTH / 72, HEIGHT / 72))
            axes = drawing.add_axes((0.145, 0.21, 0.835, 0.75), xlabel=self.x_label, ylim=self.y_range)
            for curve in self.curves:
                draw_curve(axes, curve)
            steps = {step for curve in self.curves for step in curve.values}
            if self.x_label == "step" and len(steps) == 1:
                axes.set_xlim(min(steps) - 1, min(steps) + 1)
            axes.xaxis.set_major_locator(MaxNLocator(6, integer=self.x_label == "step"))
            axes.yaxis.set_major_locator(MaxNLocator(5))
            height = "{:.0%}" if self.limits == (0, 1) else "{:.6g}"
            axes.xaxis.set_major_formatter(lambda value, _: tick(value, "{:.6g}"))
            axes.yaxis.set_major_formatter(lambda value, _: tick(value, height))
            draw_marks(axes, self)
            buffer = io.StringIO()
            drawing.savefig(buffer, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
        ends = [f"{c.label} from {c.finite[0]:.3g} to {c.finite[-1]:.3g}" for c in self.curves if c.finite]
        return inline(buffer.getvalue(), spoken=f"{self.title}: {'; '.join(ends) or 'no finite value'}")


def draw_curve(axes: Axes, curve: Curve) -> None:
    """The line, with a cross at the bottom for every value that is NaN or infinite."""
    values = [value if math.isfinite(value) else math.nan for value in curve.values.values()]
    dots = {"marker": "o", "markersize": 3.5 if curve.dashed else 2.5} if len(values) <= 12 or curve.dashed else {}
    dashes = (0, (3, 2)) if curve.dashed else "-"
    axes.plot(list(curve.values), values, color=STAND_IN[curve.colour], linewidth=1.5, linestyle=dashes, **dots)
    for step in curve.not_finite:
        axes.plot(step, 0.03, "x", color=RED, transform=axes.get_xaxis_transform(), markersize=5)


def draw_marks(axes: Axes, plot: Plot) -> None:
    """Thresholds, and a line at the step of each finding with its number; one line for all findings of a step."""
    low, high = plot.y_range
    for height, words in plot.thresholds.items():
        if not low <= height <= high:
            continue
        ours, top = words.startswith("health."), height > low + 0.88 * (high - low)
        colour, at, align = (RED, 0.99, "right") if ours else (SOFT, 0.01, "left")
        place = {"xycoords": axes.get_yaxis_transform(), "textcoords": "offset points", "xytext": (0, -3 if top else 3)}
        axes.axhline(height, color=colour, linewidth=0.9, linestyle=(0, (5, 3)), zorder=1)
        axes.annotate(words, (at, height), va="top" if top else "bottom", ha=align, color=colour, size=9.5, **place)
    numbers = defaultdict(list)
    for number, step in plot.findings:
        numbers[step].append(str(number))
    for step, places in numbers.items():
        place = {"xycoords": axes.get_xaxis_transform(), "textcoords": "offset points", "xytext": (3, -2)}
        axes.axvline(step, color=RED, linewidth=1.2, zorder=1)
        axes.annotate(",".join(places), (step, 1), va="top", color=RED, weight="bold", **place)


def tick(value: float, form: str) -> str:
    return form.format(value if abs(value) > 1e-12 else 0.0).replace("-", "−", 1)


def inline(text: str, spoken: str) -> Markup:
    """matplotlib's document as an element: no header, no metadata, colours as variables, a spoken name."""
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.S)
    opening = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(spoken)}">'
    text = re.sub(r"<svg[^>]*>", lambda _: opening, text, count=1)
    text = re.sub(r'<g id="[^"]*"', "<g", text)  # every plot would have the same ones
    text = re.sub(r"font-family: [^;]*; ", "", text)  # the page's
    for name, colour in STAND_IN.items():
        text = text.replace(colour, f"var(--{name})")
    return Markup(text)
