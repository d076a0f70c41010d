"""Small plots as SVG text. Colours come from the page's style sheet, so that they follow its light and dark look."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

Points = Sequence[tuple[float, float]]

WIDTH, HEIGHT = 460, 260
LEFT, RIGHT, TOP, BOTTOM = 52, 14, 14, 40


@dataclass(frozen=True)
class Line:
    """One line of a plot.

    Args:
        name: what it shows, for the tooltip.
        style: class in the style sheet.
        points: (x, y), ascending in x.
    """

    name: str
    style: str
    points: Points


@dataclass(frozen=True)
class Axis:
    """A linear or logarithmic scale from data to pixels."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def at(self, value: float) -> float:
        """Place a value; outside the range it lies beyond the plot, which cuts it off."""
        low, high, value = (self._scaled(v) for v in (self.low, self.high, value))
        share = (value - low) / (high - low) if high > low else 0.5
        return self.start + min(max(share, -9.0), 9.0) * (self.end - self.start)

    def _scaled(self, value: float) -> float:
        return math.log10(max(value, 1e-300)) if self.log else value

    def ticks(self, n: int = 5) -> list[float]:
        """Choose round values inside the range."""
        if self.log:
            powers = range(math.ceil(math.log10(self.low) - 1e-9), math.floor(math.log10(self.high) + 1e-9) + 1)
            stride = max(1, math.ceil(len(powers) / n))
            return [10.0**power for power in powers][::stride]
        return nice_ticks(self.low, self.high, n)


def nice_ticks(low: float, high: float, n: int = 5) -> list[float]:
    """Choose about n round values between two numbers.

    Example:
        >>> nice_ticks(0, 9.3, 4)
        [0.0, 2.5, 5.0, 7.5]
    """
    if not high > low:
        return [low]
    raw = (high - low) / n
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(k * step, 12) for k in range(first, math.floor(high / step + 1e-9) + 1)]


def line_plot(
    title: str,
    lines: Sequence[Line],
    *,
    x_label: str,
    percent: bool = False,
    log: bool = False,
    faint: Sequence[Line] = (),
    marks: Sequence[tuple[float, str]] = (),
) -> str:
    """Draw lines over a grid.

    Args:
        title: read out by screen readers.
        lines: what is compared.
        x_label: under the axis.
        percent: write y as percent.
        log: logarithmic y.
        faint: drawn thinly behind the lines.
        marks: (x, text) of vertical lines.
    """
    everything = [point for line in (*lines, *faint) for point in line.points if math.isfinite(point[1])]
    if not everything:
        return '<p class="none">Nothing was measured.</p>'
    xs = [x for x, _ in everything]
    x_axis = Axis(min(0.0, *xs), max(xs), LEFT, WIDTH - RIGHT)
    y_axis = _y_axis([y for line in lines for _, y in line.points if math.isfinite(y)], percent=percent, log=log)
    parts = [
        *_grid(x_axis, y_axis, x_label, percent=percent),
        *(_mark(x_axis, x, text) for x, text in marks),
        f'<svg x="{LEFT}" y="{TOP - 4}" width="{WIDTH - RIGHT - LEFT}" height="{HEIGHT - BOTTOM - TOP + 4}" '
        f'viewBox="{LEFT} {TOP - 4} {WIDTH - RIGHT - LEFT} {HEIGHT - BOTTOM - TOP + 4}">',
        *(_path(line, x_axis, y_axis, "faint") for line in faint),
        *(_path(line, x_axis, y_axis, "") for line in lines),
        "</svg>",
        *(_end_dot(line, x_axis, y_axis, percent=percent) for line in lines),
    ]
    return _svg(title, WIDTH, HEIGHT, parts)


def _y_axis(ys: list[float], *, percent: bool, log: bool) -> Axis:
    if log:
        positive = [y for y in ys if y > 0] or [0.1, 1.0]
        low, high = min(positive), max(positive)
        low, high = (low / 1.25, high * 1.25) if high / low < 1e6 else (high / 1e6, high * 1.25)
        return Axis(low, high, HEIGHT - BOTTOM, TOP, log=True)
    late = sorted(ys)[len(ys) // 10 :]
    low, high = min(late), max(ys)
    margin = (high - low) * 0.15 or abs(high) * 0.05 or 0.5
    top = min(high + margin, 1.0) if percent and high <= 1 else high + margin
    return Axis(low - margin, top, HEIGHT - BOTTOM, TOP)


def _grid(x_axis: Axis, y_axis: Axis, x_label: str, *, percent: bool) -> Iterable[str]:
    for tick in y_axis.ticks():
        y = y_axis.at(tick)
        yield f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
        text = label(tick, percent=percent)
        yield f'<text class="tick" x="{LEFT - 7}" y="{y + 4:.1f}" text-anchor="end">{text}</text>'
    for tick in x_axis.ticks():
        x = x_axis.at(tick)
        yield f'<text class="tick" x="{x:.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{label(tick)}</text>'
    base = HEIGHT - BOTTOM
    yield f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{base}" y2="{base}"/>'
    middle, text = (LEFT + WIDTH - RIGHT) / 2, escape(x_label)
    yield f'<text class="tick" x="{middle}" y="{HEIGHT - 5}" text-anchor="middle">{text}</text>'


def _mark(x_axis: Axis, at: float, text: str) -> str:
    x = x_axis.at(at)
    anchor, shift = ("start", 5) if x < WIDTH * 0.7 else ("end", -5)
    return (
        f'<line class="mark" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>'
        f'<text class="tick" x="{x + shift:.1f}" y="{TOP + 10}" text-anchor="{anchor}">{escape(text)}</text>'
    )


def _path(line: Line, x_axis: Axis, y_axis: Axis, extra: str) -> str:
    points = " ".join(f"{x_axis.at(x):.1f},{y_axis.at(y):.1f}" for x, y in line.points if math.isfinite(y))
    return (
        f'<polyline class="line {line.style} {extra}" points="{points}"><title>{escape(line.name)}</title></polyline>'
    )


def _end_dot(line: Line, x_axis: Axis, y_axis: Axis, *, percent: bool) -> str:
    finite = [point for point in line.points if math.isfinite(point[1])]
    if not finite:
        return ""
    x, y = finite[-1]
    if not min(y_axis.low, y_axis.high) <= y <= max(y_axis.low, y_axis.high):
        return ""
    text = f"{line.name}: {label(y, percent=percent, exact=True)} at {label(x)}"
    return (
        f'<circle class="dot {line.style}" cx="{x_axis.at(x):.1f}" cy="{y_axis.at(y):.1f}" r="4">'
        f"<title>{escape(text)}</title></circle>"
    )


def interval_plot(
    title: str, low: float | None, mean: float, high: float, limit: float, span: tuple[float, float]
) -> str:
    """Draw a mean with its interval on a line from `span[0]` to `span[1]`, with 0 and a limit marked."""
    axis = Axis(*span, 6, 174)
    low = mean if low is None else low
    style = "good" if high <= limit else "bad"
    parts = [
        f'<line class="axis" x1="{axis.at(0):.1f}" x2="{axis.at(0):.1f}" y1="3" y2="21"/>',
        f'<line class="limit" x1="{axis.at(limit):.1f}" x2="{axis.at(limit):.1f}" y1="1" y2="23"/>',
        f'<line class="whisker {style}" x1="{axis.at(low):.1f}" x2="{axis.at(high):.1f}" y1="12" y2="12"/>',
        f'<circle class="dot {style}" cx="{axis.at(mean):.1f}" cy="12" r="4"/>',
    ]
    return _svg(title, 180, 24, parts, style="interval")


def _svg(title: str, width: int, height: int, parts: Iterable[str], style: str = "plot") -> str:
    return (
        f'<svg class="{style}" viewBox="0 0 {width} {height}" role="img" aria-label="{escape(title)}">'
        f"<title>{escape(title)}</title>{''.join(parts)}</svg>"
    )


def label(value: float, *, percent: bool = False, exact: bool = False) -> str:
    """Write a number shortly.

    Example:
        >>> label(0.985, percent=True), label(1500), label(0.001), label(2.5)
        ('98.5 %', '1500', '0.001', '2.5')
    """
    if percent:
        return f"{100 * value:.2f} %" if exact else f"{100 * value:.5g} %"
    text = f"{value:.4g}" if not exact else f"{value:.3g}"
    return text.replace("-", "−")


def smooth(points: Points, n: int = 45) -> list[tuple[float, float]]:
    """Average neighbouring points so that about n are left; y by its logarithm, for a logarithmic scale.

    Example:
        >>> smooth([(1, 1.0), (2, 4.0), (3, 6.0), (4, 6.0)], 2)
        [(1.5, 2.0), (3.5, 6.0)]
    """
    points = [(x, y) for x, y in points if math.isfinite(y) and y > 0]
    size = max(1, math.ceil(len(points) / n))
    parts = [points[at : at + size] for at in range(0, len(points), size)]
    return [(sum(x for x, _ in part) / len(part), _geometric([y for _, y in part])) for part in parts]


def _geometric(values: Sequence[float]) -> float:
    return round(math.exp(sum(math.log(value) for value in values) / len(values)), 12)
