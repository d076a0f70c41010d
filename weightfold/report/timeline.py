"""The picture of a run: one row a group whose filled part is what lives, marks where it was decided, the loss below."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from html import escape
from pathlib import Path

from weightfold.audit.timeline import Mark, Row, Timeline
from weightfold.report.svg import Axis, label, smooth

CSS = Path(__file__).with_name("timeline.css")
STYLE = Path(__file__).with_name("style.css")

WIDTH, LEFT, RIGHT = 940, 190, 92
LEGEND, ROW, GAP, LOSS, BOTTOM = 34, 26, 30, 150, 44
LANE = 24
MAX_ROWS = 40
MAX_NAME = 24
APART = 11
"""Pixels between marks that would lie on each other."""

LOSSES = (1e-9, 1e30)
"""What lies beyond is not drawn."""

STYLES = {
    "accepted": ("t-accepted", "edit kept"),
    "reduced": ("t-reduced", "a smaller one kept"),
    "rolled back": ("t-rolled", "tried, taken back at once"),
    "refused": ("t-refused", "proposal refused"),
    "undone": ("t-undone", "undone later"),
    "other": ("t-other", "other entry"),
}


def picture(timeline: Timeline, *, alone: bool = False, names: Mapping[str, str] | None = None) -> str:
    """Draw a run as SVG.

    Args:
        timeline: what to draw.
        alone: with its own colours, light and dark, a background and a heading; else the page gives the colours.
        names: what the networks of the loss curves are called.
    Returns:
        svg: text.
    Example:
        >>> row = Row("fc1", 8, ((0, 8), (40, 4)))
        >>> svg = picture(Timeline("net", (row,), (Mark(2, 40, "accepted", ("fc1",), "fold 8 → 4"),), 100, "steps", {}))
        >>> "fold 8 → 4" in svg, "8 → 4</text>" in svg
        (True, True)
    """
    rows, hidden = _chosen(timeline)
    x_axis = Axis(0, timeline.total or 1.0, LEFT, WIDTH - RIGHT)
    head = 30 if alone else 0
    whole = [mark for mark in timeline.marks if not mark.groups]
    top = head + LEGEND + (LANE if whole else 0)
    bottom = top + ROW * len(rows) + (16 if hidden else 0)
    every = {arm: [point for point in points if _drawable(point[1])] for arm, points in timeline.losses.items()}
    losses = {arm: points for arm, points in every.items() if points}
    end = bottom + (GAP + LOSS if losses else 0)
    parts = [
        *_heading(timeline, alone=alone),
        *_legend(timeline, head + 18),
        *_events(timeline, x_axis, head + LEGEND, end),
        *(_lane(whole, x_axis, head + LEGEND + 11) if whole else ()),
        *(part for at, row in enumerate(rows) for part in _draw_row(row, timeline, x_axis, top + ROW * at)),
        *_hidden_note(hidden, bottom),
        *(_draw_losses(losses, names or {}, x_axis, bottom + GAP) if losses else ()),
        *_x_axis(x_axis, timeline.unit, end),
    ]
    return _svg(timeline, end + BOTTOM, parts, alone=alone)


def _chosen(timeline: Timeline) -> tuple[list[Row], int]:
    """Rows to draw; where there are too many those that nothing happened to are left out first."""
    rows = list(timeline.rows)
    if len(rows) <= MAX_ROWS:
        return rows, 0
    busy = {name for mark in timeline.marks for name in mark.groups}
    order = sorted(range(len(rows)), key=lambda at: (rows[at].group not in busy, at))[:MAX_ROWS]
    return [rows[at] for at in sorted(order)], len(rows) - MAX_ROWS


def _heading(timeline: Timeline, *, alone: bool) -> Iterator[str]:
    if alone:
        text = f"{timeline.title}: width of every channel group over the run"
        yield f'<text class="t-name t-head" x="16" y="26">{escape(text)}</text>'


def _legend(timeline: Timeline, y: float) -> Iterator[str]:
    """Explain the marks that occur, and the filled part of a row."""
    x = 16.0
    yield f'<rect class="t-gone" x="{x}" y="{y - 9}" width="26" height="12" rx="2"/>'
    yield f'<rect class="t-live" x="{x}" y="{y - 9}" width="17" height="12"/>'
    yield f'<line class="t-edge" x1="{x}" x2="{x + 17}" y1="{y - 9}" y2="{y - 9}"/>'
    yield f'<text class="t-tick" x="{x + 33}" y="{y + 2}">channels alive</text>'
    x += 148
    for kind, (_, words) in STYLES.items():
        if any(mark.kind == kind for mark in timeline.marks):
            yield _glyph(kind, x, y - 3)
            yield f'<text class="t-tick" x="{x + 11}" y="{y + 2}">{words}</text>'
            x += 34 + 6.5 * len(words)


def _events(timeline: Timeline, x_axis: Axis, start: float, end: float) -> Iterator[str]:
    """A dotted line through everything at each step at which the network changed."""
    for at in sorted({mark.at for mark in timeline.marks if mark.kind in ("accepted", "reduced", "undone")}):
        x = x_axis.at(at)
        yield f'<line class="t-event" x1="{x:.1f}" x2="{x:.1f}" y1="{start}" y2="{end}"/>'


def _lane(marks: Sequence[Mark], x_axis: Axis, y: float) -> Iterator[str]:
    yield f'<text class="t-tick" x="{LEFT - 10}" y="{y + 4}" text-anchor="end">whole network</text>'
    yield from _spread(marks, x_axis, y)


def _draw_row(row: Row, timeline: Timeline, x_axis: Axis, y: float) -> Iterator[str]:
    top, base = y + 4.0, y + ROW - 3.0
    right = WIDTH - RIGHT
    corners = _steps(row, x_axis, top, base, right)
    path = " ".join(f"{x:.1f},{level:.1f}" for x, level in corners)
    name = row.group if len(row.group) <= MAX_NAME else f"…{row.group[1 - MAX_NAME :]}"
    words = f"{row.start} → {row.end}" if row.end != row.start else f"{row.start}"
    history = ", ".join(f"{width} from {timeline.unit.removesuffix('s')} {at:g}" for at, width in row.points)
    yield f"<g><title>{escape(row.group)}: {history}</title>"
    yield f'<text class="t-name" x="{LEFT - 10}" y="{base - 5:.1f}" text-anchor="end">{escape(name)}</text>'
    yield f'<rect class="t-gone" x="{LEFT}" y="{top}" width="{right - LEFT}" height="{base - top}"/>'
    yield f'<polygon class="t-live" points="{LEFT},{base} {path} {right},{base}"/>'
    yield f'<polyline class="t-edge" points="{path}"/>'
    yield f'<text class="t-name" x="{right + 10}" y="{base - 5:.1f}">{words}</text></g>'
    yield from _spread(timeline.of_group(row.group), x_axis, (top + base) / 2)


def _steps(row: Row, x_axis: Axis, top: float, base: float, right: float) -> list[tuple[float, float]]:
    """Corners of the upper edge of a row's filled part."""
    largest = max(row.start, *(width for _, width in row.points)) or 1
    corners: list[tuple[float, float]] = []
    level = base
    for at, width in row.points:
        x = x_axis.at(at)
        if corners:
            corners.append((x, level))
        level = base - (base - top) * width / largest
        corners.append((x, level))
    return [*corners, (right, level)]


def _spread(marks: Iterable[Mark], x_axis: Axis, y: float) -> Iterator[str]:
    """Draw marks beside each other where they would lie on each other; each tells in words what it is."""
    free = -math.inf
    for mark in marks:
        x = max(x_axis.at(mark.at), free)
        free = x + APART
        text = f"entry {mark.seq}, {STYLES[mark.kind][1]}: {mark.text}"
        yield f"<g><title>{escape(text)}</title>{_glyph(mark.kind, x, y)}</g>"


def _glyph(kind: str, x: float, y: float) -> str:
    """A shape for each kind, so that none is told by its colour alone."""
    style, name = f"t-mark {STYLES[kind][0]}", kind
    if name == "accepted":
        return f'<circle class="{style}" cx="{x:.1f}" cy="{y:.1f}" r="5.2"/>'
    if name == "reduced":
        half = f"M {x:.1f} {y - 4.6:.1f} A 4.6 4.6 0 0 0 {x:.1f} {y + 4.6:.1f} Z"
        return f'<circle class="t-mark t-half" cx="{x:.1f}" cy="{y:.1f}" r="4.6"/><path class="{style}" d="{half}"/>'
    if name == "rolled back":
        return f'<path class="{style}" d="M {x - 4:.1f} {y - 4:.1f} l 8 8 m 0 -8 l -8 8"/>'
    if name == "refused":
        return f'<rect class="{style}" x="{x - 4:.1f}" y="{y - 4:.1f}" width="8" height="8"/>'
    if name == "undone":
        return f'<path class="{style}" d="M {x + 4.5:.1f} {y + 4.5:.1f} l -9 -4.5 l 9 -4.5 Z"/>'
    return f'<path class="{style}" d="M {x:.1f} {y - 5:.1f} l 4.5 5 l -4.5 5 l -4.5 -5 Z"/>'


def _hidden_note(hidden: int, bottom: float) -> Iterator[str]:
    if hidden:
        text = f"and {hidden} more groups"
        yield f'<text class="t-tick" x="{LEFT - 10}" y="{bottom - 3}" text-anchor="end">{text}</text>'


def _draw_losses(
    losses: Mapping[str, Sequence[tuple[float, float]]], names: Mapping[str, str], x_axis: Axis, top: float
) -> Iterator[str]:
    lines = {arm: smooth(points, 120) for arm, points in losses.items()}
    values = [y for points in lines.values() for _, y in points]
    low, high = min(values), max(values)
    log = high / low > 8
    margin = 1.15 if log else (high - low) * 0.08 or high * 0.05
    span = (low / margin, high * margin) if log else (low - margin, high + margin)
    y_axis = Axis(*span, top + LOSS, top, log=log)
    for tick in y_axis.ticks(4):
        y = y_axis.at(tick)
        yield f'<line class="t-grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
        yield f'<text class="t-tick" x="{LEFT - 10}" y="{y + 4:.1f}" text-anchor="end">{label(tick)}</text>'
    yield f'<text class="t-name" x="16" y="{top + LOSS / 2:.1f}">Training loss</text>'
    ends = _apart([(arm, y_axis.at(points[-1][1])) for arm, points in lines.items()])
    for arm, points in lines.items():
        style = "t-dense" if arm == "dense" else "t-folded"
        path = " ".join(f"{x_axis.at(x):.1f},{y_axis.at(y):.1f}" for x, y in points)
        name = escape(names.get(arm, arm))
        yield f'<polyline class="t-loss {style}" points="{path}"><title>{name}</title></polyline>'
        end = f'x="{WIDTH - RIGHT + 10}" y="{ends[arm] + 4:.1f}"'
        yield f'<text class="t-tick {style}-text" {end}>{name}</text>'


def _apart(places: list[tuple[str, float]], least: float = 14) -> dict[str, float]:
    """Move labels that would lie on each other apart."""
    found: dict[str, float] = {}
    free = -math.inf
    for name, y in sorted(places, key=lambda item: item[1]):
        found[name] = max(y, free)
        free = found[name] + least
    return found


def _x_axis(x_axis: Axis, unit: str, y: float) -> Iterator[str]:
    yield f'<line class="t-base" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}"/>'
    words = "training steps" if unit == "steps" else "decisions, in order"
    ticks = [tick for tick in x_axis.ticks(8) if unit == "steps" or tick == int(tick)]
    for tick in ticks:
        yield f'<text class="t-tick" x="{x_axis.at(tick):.1f}" y="{y + 17}" text-anchor="middle">{label(tick)}</text>'
    yield f'<text class="t-tick" x="{(LEFT + WIDTH - RIGHT) / 2}" y="{y + 36}" text-anchor="middle">{words}</text>'


def _drawable(value: float) -> bool:
    return LOSSES[0] < value < LOSSES[1]


def _svg(timeline: Timeline, height: float, parts: Iterable[str], *, alone: bool) -> str:
    return standing(f"Timeline of {timeline.title}", timeline.summary(), WIDTH, height, parts, alone=alone)


def standing(title: str, summary: str, width: float, height: float, parts: Iterable[str], *, alone: bool) -> str:
    """Put a picture together that can stand alone: with its own style, size and ground, or as part of a page."""
    namespace = ' xmlns="http://www.w3.org/2000/svg"' if alone else ""
    ground = f"<style>{_own_style()}</style>" if alone else ""
    page = f'<rect class="t-page" width="{width}" height="{height}"/>' if alone else ""
    size = f' width="{width}" height="{height:g}"' if alone else ""
    return (
        f'<svg{namespace}{size} class="plot" viewBox="0 0 {width} {height:g}" role="img" '
        f'aria-label="{escape(title)}. {escape(summary)}"><title>{escape(title)}</title><desc>{escape(summary)}</desc>'
        f"{ground}{page}{''.join(parts)}</svg>\n"
    )


def _own_style() -> str:
    """The rules with the page's colours put in: light ones, and dark ones for who prefers those."""
    rules = re.sub(r"/\*.*?\*/\s*", "", CSS.read_text(encoding="utf-8"), flags=re.DOTALL)
    light, dark = (dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", block)) for block in _palettes())
    return f"{_coloured(rules, light)}@media (prefers-color-scheme: dark) {{{_coloured(rules, dark)}}}"


def _palettes() -> list[str]:
    return re.findall(r":root \{([^}]*)\}", STYLE.read_text(encoding="utf-8"))


def _coloured(rules: str, palette: Mapping[str, str]) -> str:
    return re.sub(r"var\(--([\w-]+)\)", lambda match: palette[match[1]], rules)
