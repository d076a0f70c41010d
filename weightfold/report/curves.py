"""Curves of a trade-off as one SVG file that stands alone: panels side by side, a legend, its own colours."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from weightfold.report.svg import Axis, label

COLOURS = ("#0b5fff", "#14866d", "#c2410c", "#7c3aed", "#a16207", "#be185d", "#475569", "#0e7490")
PANEL, HEIGHT, LEFT, TOP, BOTTOM, GAP = 300, 250, 52, 40, 44, 18


@dataclass(frozen=True)
class Curve:
    """One method's curve: its name, and points (x, y) ascending in x."""

    name: str
    points: Sequence[tuple[float, float]]


Panel = tuple[str, Sequence[Curve], float | None]
"""A heading, its curves, and a level to mark (the uncompressed network's)."""


def panels(title: str, parts: Sequence[Panel], x_label: str, y_label: str, low: float | None = 0.0) -> str:
    """Draw panels over one scale of y.

    Args:
        low: where the scale ends at the bottom at the latest; curves below it are cut off. None: wherever they end.
    Returns:
        svg: the text of the file.
    Example:
        >>> panels("t", [("a", [Curve("m", [(0.1, 0.2), (0.5, 0.9)])], 1.0)], "x", "y").count("<polyline")
        1
    """
    ys = [y for _, curves, _ in parts for c in curves for _, y in c.points if math.isfinite(y)]
    ys += [level for _, _, level in parts if level is not None]
    xs = [x for _, curves, _ in parts for c in curves for x, _ in c.points]
    if not ys or not xs:
        return f'<svg xmlns="http://www.w3.org/2000/svg" width="200" height="20"><title>{escape(title)}</title></svg>'
    bottom = min(ys) if low is None else max(min(ys), low)
    margin = 0.05 * (max(ys) - bottom or abs(max(ys)) or 1.0)
    scale = Axis(bottom - margin, max(ys) + margin, HEIGHT - BOTTOM, TOP)
    names = list(dict.fromkeys(c.name for _, curves, _ in parts for c in curves))
    colour = {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(names)}
    width = LEFT + len(parts) * (PANEL + GAP)
    height = HEIGHT + 20 * -(-len(names) // max(1, width // 210)) + 8
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        'font-family="sans-serif" font-size="11">',
        f"<title>{escape(title)}</title>",
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
        f'<text x="{LEFT}" y="16" font-size="13" font-weight="bold">{escape(title)}</text>',
        f'<text x="12" y="{HEIGHT / 2}" transform="rotate(-90 12 {HEIGHT / 2})" text-anchor="middle">'
        f"{escape(y_label)}</text>",
    ]
    for k, (heading, curves, level) in enumerate(parts):
        start = LEFT + k * (PANEL + GAP)
        across = Axis(min(xs), max(xs), start + 8, start + PANEL - 8)
        out += _frame(heading, start, scale, across, x_label, k == 0)
        if level is not None:
            y = scale.at(level)
            out.append(f'<path d="M{start} {y:.1f}h{PANEL}" stroke="#111827" stroke-dasharray="2 3"/>')
        out.append(f'<svg x="{start}" y="{TOP}" width="{PANEL}" height="{HEIGHT - BOTTOM - TOP}" ')
        out.append(f'viewBox="{start} {TOP} {PANEL} {HEIGHT - BOTTOM - TOP}">')
        out += [_line(c, across, scale, colour[c.name]) for c in curves]
        out.append("</svg>")
    columns = max(1, width // 210)
    for i, name in enumerate(names):
        x, y = LEFT + 210 * (i % columns), HEIGHT + 8 + 20 * (i // columns)
        out.append(f'<path d="M{x} {y}h22" stroke="{colour[name]}" stroke-width="2.5"/>')
        out.append(f'<text x="{x + 28}" y="{y + 4}">{escape(name)}</text>')
    return "\n".join([*out, "</svg>", ""])


def _frame(heading: str, start: float, scale: Axis, across: Axis, x_label: str, numbered: bool) -> list[str]:
    out = [f'<text x="{start}" y="{TOP - 8}" font-weight="bold">{escape(heading)}</text>']
    for tick in scale.ticks():
        y = scale.at(tick)
        out.append(f'<path d="M{start} {y:.1f}h{PANEL}" stroke="#e5e7eb"/>')
        if numbered:
            out.append(f'<text x="{start - 6}" y="{y + 4:.1f}" text-anchor="end">{label(tick)}</text>')
    for tick in across.ticks():
        x = across.at(tick)
        out.append(f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{label(tick)}</text>')
    middle = start + PANEL / 2
    out.append(f'<text x="{middle}" y="{HEIGHT - BOTTOM + 32}" text-anchor="middle">{escape(x_label)}</text>')
    return out


def _line(curve: Curve, across: Axis, scale: Axis, colour: str) -> str:
    points = [(across.at(x), scale.at(y)) for x, y in curve.points if math.isfinite(y)]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    dots = "".join(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.5" fill="{colour}"/>' for x, y in points)
    name = escape(curve.name)
    line = f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"><title>{name}</title></polyline>'
    return line + dots
