"""Small charts as inline SVG: no script, no font, no network. Colours come from the page's CSS classes."""

from collections.abc import Sequence
from html import escape

import numpy as np

WIDTH, HEIGHT, LEFT, BOTTOM, TOP = 380, 190, 44, 34, 10
INSIDE = WIDTH - LEFT - 10
DOWN = HEIGHT - BOTTOM - TOP


def svg(body: str, label: str) -> str:
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(label)}">{body}</svg>'


def text(x: float, y: float, words: str, anchor: str = "middle", css: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" class="{css}">{escape(words)}</text>'


def line(x1: float, y1: float, x2: float, y2: float, css: str) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" class="{css}"/>'


def bar(x: float, y: float, width: float, height: float, css: str, told: str) -> str:
    """A rectangle that tells its figure under the pointer."""
    size = f'x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}"'
    return f'<rect {size} class="{css}"><title>{escape(told)}</title></rect>'


def short(number: float) -> str:
    """A number for an axis: 1,200 as 1.2k."""
    return f"{number / 1000:g}k" if abs(number) >= 1000 else f"{number:g}"


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers between two limits, some five of them."""
    raw = max(high - low, 1e-9) / about
    size = 10.0 ** np.floor(np.log10(raw))
    step = next(size * factor for factor in (1, 2, 2.5, 5, 10) if size * factor >= raw)
    return [float(tick) for tick in np.arange(np.ceil(low / step) * step, high + step / 1e6, step)]


def axes(low: float, high: float, top: float, x_label: str, unit: str = "") -> str:
    """Both axes with round ticks; y from 0 to `top`."""
    body = ""
    for tick in ticks(0, top, 4):
        y = TOP + DOWN * (1 - tick / top)
        body += line(LEFT, y, LEFT + INSIDE, y, "grid")
        body += text(LEFT - 6, y + 4, short(tick) + unit, "end")
    for tick in ticks(low, high):
        body += text(LEFT + INSIDE * (tick - low) / max(high - low, 1e-9), HEIGHT - BOTTOM + 14, short(tick))
    return body + text(LEFT + INSIDE / 2, HEIGHT - 4, x_label, css="label")


def histogram(values: np.ndarray, x_label: str, css: str, signed: bool = False, mark: float | None = None) -> str:
    """How often values occur, the top half percent of them gathered at the end; `mark` draws a line (a limit).

    `signed` puts zero in the middle and colours the two sides apart.
    """
    far = float(max(np.quantile(np.abs(values), 0.995), 1))
    low, high = (-far, far) if signed else (0.0, far)
    counts, edges = np.histogram(np.clip(values, low, high), bins=32 if signed else 28, range=(low, high))
    top = max(counts.max() * 1.05, 1)
    body, width = axes(low, high, top, x_label), INSIDE / len(counts)
    for place, count in enumerate(counts):
        side = ("b" if edges[place + 1] <= 0 else "a") if signed else css
        tall = DOWN * count / top
        told = f"{edges[place]:,.0f} to {edges[place + 1]:,.0f}: {count:,} rows"
        body += bar(LEFT + place * width + 0.5, TOP + DOWN - tall, width - 1, tall, side, told)
    if mark is not None and low < mark < high:
        x = LEFT + INSIDE * (mark - low) / (high - low)
        body += line(x, TOP, x, TOP + DOWN, "mark")
        body += text(x - 4, TOP + 10, f"max_length {mark:,.0f}", "end", "label")
    return svg(body, x_label)


def accuracies(bars: Sequence[tuple[str, float, float]], x_label: str) -> str:
    """Accuracies as bars from the 50% of a coin, each (name, accuracy, standard error), with ±2 errors."""
    low, high, body = 0.0, 1.0, ""
    for tick in (0, 0.25, 0.5, 0.75, 1):
        y = TOP + DOWN * (1 - tick)
        body += line(LEFT, y, LEFT + INSIDE, y, "mark" if tick == 0.5 else "grid")
        body += text(LEFT - 6, y + 4, f"{tick:.0%}", "end")
    width = INSIDE / len(bars)
    for place, (name, accuracy, error) in enumerate(bars):
        x, y = LEFT + width * (place + 0.5), TOP + DOWN * (1 - accuracy)
        begin, tall = min(y, TOP + DOWN / 2), abs(y - TOP - DOWN / 2)
        thick = min(width * 0.6, 44)
        told = f"{name}: {accuracy:.1%} ± {2 * error:.1%}"
        body += bar(x - thick / 2, begin, thick, max(tall, 1), "a" if accuracy >= 0.5 else "b", told)
        ends = [TOP + DOWN * (1 - min(max(accuracy + sign * 2 * error, low), high)) for sign in (-1, 1)]
        body += line(x, ends[0], x, ends[1], "error")
        body += text(x, (min(ends) if accuracy >= 0.5 else max(ends) + 14) - 4, f"{accuracy:.0%}", css="label")
        body += text(x, HEIGHT - BOTTOM + 14, name)
    return svg(body + text(LEFT + INSIDE / 2, HEIGHT - 4, x_label, css="label"), x_label)
