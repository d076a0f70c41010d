"""The picture of a self-compressing network: a row a layer with its bits and its living weights, the file below."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from html import escape

from weightfold.audit.bits import Bits, Layer, Points
from weightfold.report.svg import Axis, label
from weightfold.report.timeline import standing

WIDTH, LEFT, RIGHT, BETWEEN = 940, 168, 178, 26
HEAD, ROW, GAP, SIZE, BOTTOM = 34, 40, 30, 150, 44
MAX_ROWS = 40
MAX_NAME = 22
BITS_AXIS = Axis(0, 1, LEFT, LEFT + (WIDTH - LEFT - RIGHT - BETWEEN) / 2)
WEIGHTS_AXIS = Axis(0, 1, LEFT + (WIDTH - LEFT - RIGHT + BETWEEN) / 2, WIDTH - RIGHT)
SPAN = (LEFT, WIDTH - RIGHT)


def bits_picture(bits: Bits, *, alone: bool = False) -> str:
    """Draw bits by layer over a run as SVG.

    Args:
        alone: with its own colours, light and dark, a background and a heading; else the page gives the colours.
    Returns:
        svg: text.
    Example:
        >>> layer = Layer("fc1", 8, 64, ((10, 4.0, 8, 60, 40.0), (90, 2.0, 3, 12, 6.5)))
        >>> svg = bits_picture(Bits("net", (layer,), 100, ((10, 60.0), (90, 30.0)), 300, 32))
        >>> "4.0 → 2.0 bits" in svg, "12 of 64, 19 %" in svg, "asked for" in svg
        (True, True, True)
    """
    shown = _chosen(bits.layers)
    head = 30.0 if alone else 0.0
    top = head + HEAD
    hidden = len(bits.layers) - len(shown)
    foot = top + ROW * len(shown) + (18 if hidden else 0)
    peak = max(4, math.ceil(max(value for layer in shown for _, value in layer.series("bits")) - 0.25))
    parts = [
        *_heading(bits, alone=alone),
        *_columns(head + 16, peak),
        *(part for at, layer in enumerate(shown) for part in _row(layer, bits, peak, top + ROW * at)),
        *_floats(bits, shown, top),
        *_hidden(hidden, foot),
        *_file(bits, foot + GAP),
        *_steps_axis(bits, foot + GAP + SIZE),
    ]
    title, height = f"Bits by layer of {bits.title}", foot + GAP + SIZE + BOTTOM
    return standing(title, bits.summary(), WIDTH, height, parts, alone=alone)


def _chosen(layers: Sequence[Layer]) -> list[Layer]:
    """Layers to draw; where there are too many, those that held most weights."""
    order = sorted(range(len(layers)), key=lambda at: -layers[at].weights)[:MAX_ROWS]
    return [layers[at] for at in sorted(order)]


def _heading(bits: Bits, *, alone: bool) -> Iterator[str]:
    if alone:
        yield f'<text class="t-name t-head" x="16" y="26">{escape(bits.title)}: bits by layer over the run</text>'


def _columns(y: float, peak: int) -> Iterator[str]:
    """What the two columns show."""
    words = (
        (BITS_AXIS, f"Bits of a living channel, 0 to {peak}"),
        (WEIGHTS_AXIS, "Weights that are not zero, 0 to 100 %"),
    )
    for axis, text in words:
        yield f'<text class="t-name" x="{axis.start:.1f}" y="{y}">{text}</text>'
    yield f'<text class="t-name" x="{WIDTH - RIGHT + 14}" y="{y}">Bits, and weights left</text>'


def _floats(bits: Bits, shown: Sequence[Layer], top: float) -> Iterator[str]:
    """Say what the empty part of the rows is, where there is room."""
    first = min(layer.points[0][0] for layer in shown)
    for axis in (BITS_AXIS, WEIGHTS_AXIS):
        room = _along(axis, first, bits.total) - axis.start
        if room >= 28:
            x = axis.start + room / 2
            yield f'<text class="t-tick" x="{x:.1f}" y="{top + ROW / 2 + 3:.1f}" text-anchor="middle">float</text>'


def percent(share: float) -> str:
    """A share, with two figures that count.

    Example:
        >>> percent(0.00421), percent(0.7569), percent(1.0)
        ('0.42 %', '76 %', '100 %')
    """
    return f"{100 * share:.3g} %" if share >= 0.9995 else f"{100 * share:.2g} %"


def _row(layer: Layer, bits: Bits, peak: int, y: float) -> Iterator[str]:
    top, base = y + 3.0, y + ROW - 5.0
    name = layer.name.removesuffix(".weight")
    name = name if len(name) <= MAX_NAME else f"…{name[1 - MAX_NAME :]}"
    first, last = layer.points[0], layer.points[-1]
    text = f"{first[1]:.1f} → {last[1]:.1f} bits"
    count = f"{last[3]:,.0f} of {layer.weights:,}, {percent(last[3] / layer.weights)}"
    more = f"{last[2]:,.0f} of {layer.rows:,} channels, {last[4]:,.0f} bytes"
    x = WIDTH - RIGHT + 14
    yield f"<g><title>{escape(layer.name)}: {text}; weights: {count}; {more}</title>"
    yield f'<text class="t-name" x="{LEFT - 12}" y="{(top + base) / 2 + 4:.1f}" text-anchor="end">{escape(name)}</text>'
    heights = tuple((step, value / peak) for step, value in layer.series("bits"))
    yield from _area(heights, BITS_AXIS, bits.total, top, base)
    shares = tuple((step, value / layer.weights) for step, value in layer.series("weights"))
    yield from _area(shares, WEIGHTS_AXIS, bits.total, top, base)
    yield f'<text class="t-name" x="{x}" y="{(top + base) / 2 - 2:.1f}">{text}</text>'
    yield f'<text class="t-tick" x="{x}" y="{(top + base) / 2 + 12:.1f}">{count}</text></g>'


def _area(points: Points, axis: Axis, total: float, top: float, base: float) -> Iterator[str]:
    """Fill the space below a line; before the first look there is nothing to show."""
    corners = [(_along(axis, step, total), base - (base - top) * min(value, 1.0)) for step, value in points]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in corners)
    left, right = corners[0][0], corners[-1][0]
    width = axis.end - axis.start
    yield f'<rect class="t-gone" x="{axis.start:.1f}" y="{top}" width="{width:.1f}" height="{base - top}"/>'
    yield f'<polygon class="t-live" points="{left:.1f},{base} {path} {right:.1f},{base}"/>'
    yield f'<polyline class="t-edge" points="{path}"/>'


def _along(axis: Axis, step: float, total: float) -> float:
    return axis.start + (axis.end - axis.start) * min(step / (total or 1.0), 1.0)


def _hidden(hidden: int, foot: float) -> Iterator[str]:
    if hidden > 0:
        text = f"and {hidden} smaller layers"
        yield f'<text class="t-tick" x="{LEFT - 12}" y="{foot - 4}" text-anchor="end">{text}</text>'


def _file(bits: Bits, top: float) -> Iterator[str]:
    """The size of the file, from the float one down."""
    values = [size for _, size in bits.sizes]
    marks = [*values, *([bits.target] if bits.target else [])]
    axis = Axis(min(marks) / 1.5, bits.float_bytes * 1.3, top + SIZE, top, log=True)
    yield f'<text class="t-name" x="16" y="{top + SIZE / 2:.1f}">File</text>'
    yield f'<text class="t-tick" x="16" y="{top + SIZE / 2 + 16:.1f}">bytes, log scale</text>'
    for tick in axis.ticks(5):
        y = axis.at(tick)
        yield f'<line class="t-grid" x1="{SPAN[0]}" x2="{SPAN[1]}" y1="{y:.1f}" y2="{y:.1f}"/>'
        yield f'<text class="t-tick" x="{LEFT - 12}" y="{y + 4:.1f}" text-anchor="end">{_size(tick)}</text>'
    whole = Axis(0, 1, *SPAN)
    before = [(0.0, bits.float_bytes), (bits.sizes[0][0], bits.float_bytes)]
    points = [*before, *bits.sizes]
    path = " ".join(f"{_along(whole, step, bits.total):.1f},{axis.at(size):.1f}" for step, size in points)
    yield f'<polyline class="t-loss t-folded" points="{path}"><title>{escape(bits.summary())}</title></polyline>'
    yield from _file_marks(bits, axis)


def _file_marks(bits: Bits, axis: Axis) -> Iterator[str]:
    """The float file and the target as dashed lines, and where the file ends."""
    last = bits.sizes[-1][1]
    lines = [(bits.float_bytes, "t-dense", f"{_size(bits.float_bytes)} as floats")]
    if bits.target is not None:
        lines.append((bits.target, "t-aim", f"{_size(bits.target)} asked for"))
    for value, style, _ in lines:
        y = axis.at(value)
        yield f'<line class="t-loss {style}" x1="{SPAN[0]}" x2="{SPAN[1]}" y1="{y:.1f}" y2="{y:.1f}"/>'
    texts = [(axis.at(value), f"{style}-text", text) for value, style, text in lines]
    texts.append((axis.at(last), "t-folded-text", f"{last:,.0f} bytes, {percent(last / bits.float_bytes)}"))
    free = -math.inf
    for y, style, text in sorted(texts):
        free = max(y + 4, free)
        yield f'<text class="t-tick {style}" x="{SPAN[1] + 14}" y="{free:.1f}">{text}</text>'
        free += 15


def _size(n_bytes: float) -> str:
    """Bytes in words.

    Example:
        >>> _size(3000), _size(1_250_000), _size(640)
        ('3 kB', '1.25 MB', '640 B')
    """
    for unit, power in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if n_bytes >= power:
            return f"{n_bytes / power:.3g} {unit}"
    return f"{n_bytes:.3g} B"


def _steps_axis(bits: Bits, y: float) -> Iterator[str]:
    axis = Axis(0, bits.total or 1.0, *SPAN)
    yield f'<line class="t-base" x1="{SPAN[0]}" x2="{SPAN[1]}" y1="{y}" y2="{y}"/>'
    for tick in axis.ticks(8):
        yield f'<text class="t-tick" x="{axis.at(tick):.1f}" y="{y + 17}" text-anchor="middle">{label(tick)}</text>'
    yield f'<text class="t-tick" x="{sum(SPAN) / 2}" y="{y + 36}" text-anchor="middle">training steps</text>'
