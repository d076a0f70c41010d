"""`weightfold ledger timeline`: the run as a picture, or in the terminal."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from weightfold.cli import show
from weightfold.cli.door import Json, guarded
from weightfold.cli.ledger.common import Source

if TYPE_CHECKING:
    from weightfold.audit.bits import Bits, Layer
    from weightfold.audit.timeline import Row, Timeline

BARS = " ▁▂▃▄▅▆▇█"
GLYPHS = {
    "accepted": ("●", "green"),
    "reduced": ("◐", "green"),
    "rolled back": ("×", "red"),
    "refused": ("□", "red"),
    "undone": ("◁", "yellow"),
    "other": ("◇", "cyan"),
}
COLUMNS = 60


@guarded
def timeline(
    source: Source,
    bits: Annotated[bool, typer.Option("--bits", help="Bits by layer, of a run of self-compression.")] = False,
    out: Annotated[Path | None, typer.Option(metavar="FILE.svg", help="Write the picture to this file.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Write over the file.")] = False,
    as_json: Json = False,
) -> None:
    """Show the width of every group over the run, what was decided when, and the loss; or the bits of every layer."""
    from weightfold.audit.bits import Bits, read_bits
    from weightfold.audit.timeline import read_timeline

    found = read_bits(source) if bits else read_timeline(source)
    if out is not None:
        _write(found, out, force=force)
    if as_json:
        show.print_json({**found.to_dict(), "file": None if out is None else str(out)})
        return
    if out is not None:
        show.console().print(f"picture  {show.plain(out)}", soft_wrap=True)
        return
    console = show.console()
    for line in drawn_bits(found) if isinstance(found, Bits) else drawn(found):
        console.print(line, soft_wrap=True)


def _write(found: Timeline | Bits, out: Path, *, force: bool) -> None:
    from weightfold.artifact import write_bytes
    from weightfold.audit.bits import Bits
    from weightfold.errors import ConfigError
    from weightfold.report.bits import bits_picture
    from weightfold.report.timeline import picture

    if out.exists() and not force:
        raise ConfigError(f"'{out}' exists.", remedy="Choose another --out, or pass --force to write over it.")
    drawing = bits_picture(found, alone=True) if isinstance(found, Bits) else picture(found, alone=True)
    write_bytes(out, drawing.encode())


def drawn_bits(found: Bits) -> Iterator[str]:
    """Draw the bits of every layer in characters: the height of a column is the mean over its living channels."""
    yield f"[bold]{show.plain(found.title)}[/], {found.total:,.0f} steps"
    width = max(len("file"), *(min(28, len(layer.name)) for layer in found.layers))
    peak = max(value for layer in found.layers for _, value in layer.series("bits")) or 1.0
    for layer in found.layers:
        name = layer.name if len(layer.name) <= width else f"…{layer.name[1 - width :]}"
        cells = _heights(layer.series("bits"), found.total, peak)
        yield f"{show.plain(f'{name:>{width}}')}  [green]{cells}[/]  {_end(layer)}"
    sizes = tuple((step, math.log(value)) for step, value in found.sizes)
    low = min(value for _, value in sizes)
    cells = _heights(tuple((x, y - low) for x, y in sizes), found.total, max(y for _, y in sizes) - low or 1.0)
    ends = f"{found.sizes[0][1]:,.0f} → {found.sizes[-1][1]:,.0f} bytes"
    aim = "" if found.target is None else f", {found.target:,.0f} asked for"
    yield f"{'file':>{width}}  [cyan]{cells}[/]  {ends}{aim}; {found.float_bytes:,.0f} as floats"


def _end(layer: Layer) -> str:
    first, last = layer.points[0], layer.points[-1]
    return f"{first[1]:.1f} → {last[1]:.1f} bits, {last[3]:,.0f} of {layer.weights:,} weights"


def _heights(points: Sequence[tuple[float, float]], total: float, peak: float) -> str:
    """A line as columns of characters; blank before its first point."""
    cells = []
    for column in range(COLUMNS):
        past = [y for x, y in points if x <= total * (column + 1) / COLUMNS]
        cells.append(BARS[max(1, round(past[-1] / peak * (len(BARS) - 1)))] if past else " ")
    return "".join(cells)


def drawn(found: Timeline) -> Iterator[str]:
    """Draw a run in characters: the height of a column is the share of channels that live."""
    name_width = max([len("network"), *(min(28, len(row.group)) for row in found.rows)])
    yield f"[bold]{show.plain(found.title)}[/], {found.total:,.0f} {found.unit}"
    whole = [mark for mark in found.marks if not mark.groups]
    if whole:
        yield f"{'network':>{name_width}}  {_cells([' '] * COLUMNS, found, '')}"
    for row in found.rows:
        share = f"{row.start} → {row.end}" if row.start != row.end else str(row.start)
        name = row.group if len(row.group) <= name_width else f"…{row.group[1 - name_width :]}"
        yield f"{show.plain(f'{name:>{name_width}}')}  {_cells(_bars(row, found.total), found, row.group)}  {share}"
    for arm, points in found.losses.items():
        values = [y for _, y in points if math.isfinite(y)]
        if values:
            ends = f"{values[0]:.3g} → {values[-1]:.3g}"
            yield f"{show.plain(f'{arm} loss'):>{name_width}}  {_loss(points, found.total)}  {ends}"
    yield _legend(found)


def _bars(row: Row, total: float) -> list[str]:
    largest = max(row.start, *(width for _, width in row.points)) or 1
    cells = []
    for column in range(COLUMNS):
        at = total * (column + 1) / COLUMNS
        width = [w for step, w in row.points if step <= at][-1]
        cells.append(BARS[max(1, round(width / largest * (len(BARS) - 1)))])
    return cells


def _cells(cells: list[str], found: Timeline, group: str) -> str:
    """Put the marks of a group, or those of the whole network, over its columns."""
    marks = found.of_group(group) if group else [mark for mark in found.marks if not mark.groups]
    out = [f"[dim]{cell}[/]" if cell.strip() else cell for cell in cells]
    free = 0
    for mark in marks:
        column = min(COLUMNS - 1, max(free, math.ceil(mark.at / (found.total or 1) * COLUMNS) - 1))
        glyph, colour = GLYPHS[mark.kind]
        out[column] = f"[bold {colour}]{glyph}[/]"
        free = column + 1
    return "".join(out)


def _loss(points: Sequence[tuple[float, float]], total: float) -> str:
    """The logarithm of a loss in characters."""
    means: list[float | None] = []
    for column in range(COLUMNS):
        low, high = total * column / COLUMNS, total * (column + 1) / COLUMNS
        inside = [math.log(y) for x, y in points if low < x <= high and math.isfinite(y) and y > 0]
        means.append(sum(inside) / len(inside) if inside else means[-1] if means else None)
    known = [value for value in means if value is not None]
    if not known:
        return " " * COLUMNS
    span = max(known) - min(known) or 1.0
    return "".join(" " if v is None else BARS[1 + round((v - min(known)) / span * (len(BARS) - 2))] for v in means)


def _legend(found: Timeline) -> str:
    words: Mapping[str, str] = {"accepted": "kept", "reduced": "kept at a smaller size", "undone": "undone later"}
    used = [kind for kind in GLYPHS if any(mark.kind == kind for mark in found.marks)]
    return "  ".join(f"[{GLYPHS[kind][1]}]{GLYPHS[kind][0]}[/] {words.get(kind, kind)}" for kind in used)
