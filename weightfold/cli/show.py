"""What commands print: JSON, tables, numbers in words, a progress bar on terminals."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

WIDTH = 110
"""Columns where stdout is no terminal."""
GAP, GIVING = 3, 12
"""Columns between those of a table; to how many a column is narrowed before others are left out."""
REMARK = 24
"""Characters of a remark beside a progress bar: its end is shown."""


def print_json(value: Any) -> None:
    """Print JSON on stdout; numbers that are not finite become text."""
    sys.stdout.write(json.dumps(finite(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def finite(value: Any) -> Any:
    """Copy plain data with nan and infinity as text, which JSON has no numbers for."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return value


def console() -> Any:
    """Make a console for stdout."""
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else WIDTH, highlight=False, soft_wrap=False)


def table(
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    right: Sequence[int] = (),
    title: str = "",
    spare: Sequence[int] = (),
    gives: int | None = None,
    cut: bool = False,
) -> None:
    """Print a table on stdout.

    Args:
        columns: their headings.
        rows: texts, as many as columns; `[green]...[/]` marks colours.
        right: numbers of the columns that are aligned to the right.
        title: printed above.
        spare: columns to leave out, in this order, while a row would not fit into a line.
        gives: the column that becomes narrower before all others.
        cut: whether that one is cut to a line; else it goes on in the next.
    """
    from rich import box
    from rich.table import Table
    from rich.text import Text

    target = console()
    kept = list(range(len(columns)))
    widths = [max(Text.from_markup(row[at]).cell_len for row in [columns, *rows]) for at in kept]
    if gives is not None:
        widths[gives] = min(widths[gives], max(GIVING, len(columns[gives])))
    for at in spare:
        if sum(widths[at] + GAP for at in kept) > target.width:
            kept.remove(at)
    fits = gives is not None and sum(widths[at] + GAP for at in kept) <= target.width
    made = Table(box=box.SIMPLE_HEAD, title=title or None, title_justify="left", title_style="bold", pad_edge=False)
    for at in kept:
        justify: Literal["left", "right"] = "right" if at in right else "left"
        made.add_column(columns[at], justify=justify, overflow="fold", no_wrap=fits and at != gives)
    for row in rows:
        cells: list[str | Text] = [row[at] for at in kept]
        if gives in kept and cut:
            line = Text.from_markup(row[gives], overflow="ellipsis")
            line.no_wrap = True
            cells[kept.index(gives)] = line
        made.add_row(*cells)
    target.print(made)


def counted(number: int, one: str, many: str | None = None) -> str:
    """A number and what is counted.

    Example:
        >>> counted(1, "model"), counted(1200, "model"), counted(2, "family", "families")
        ('1 model', '1,200 models', '2 families')
    """
    return f"{number:,} {one if number == 1 else many or one + 's'}"


def plain(text: object) -> str:
    """Keep square brackets of foreign text from being read as colours."""
    from rich.markup import escape

    return escape(str(text))


def quantity(value: float | None, unit: str) -> str:
    """Write a number for people.

    Example:
        >>> quantity(1147722, "count"), quantity(0.98751, "share"), quantity(0.0123, "ms"), quantity(None, "ms")
        ('1,147,722', '98.75 %', '0.012', '–')
    """
    if value is None:
        return "–"
    if unit == "count":
        return f"{value:,.0f}"
    if unit == "share":
        return f"{100 * value:.2f} %"
    if unit == "ms":
        return f"{value:.3f}" if value < 10 else f"{value:.1f}"
    if unit == "seconds":
        return f"{value:.1f}"
    return f"{value:.4g}"


def change(row: Mapping[str, Any]) -> str:
    """Write a difference with its sign, green where it is for the better and red where it is for the worse."""
    value = row["change"]
    if value is None:
        return "–"
    if row["change_unit"] == "percent":
        text = f"{value:+.1f} %"
    else:
        text = f"{value:+.2f} {'pp' if row['change_unit'] == 'points' else '/100'}"
    text = text.replace("-", "−")
    if abs(value) < 0.05:
        return text
    if not row.get("beyond_chance", True):
        return text
    good = (value < 0) == (row["better"] == "less")
    return f"[green]{text}[/]" if good else f"[red]{text}[/]"


@contextmanager
def progress(description: str, *, quiet: bool = False) -> Iterator[Any]:
    """Show a progress bar on stderr while a block runs, if stderr is a terminal.

    Yields:
        update: called with what is done, what there is to do, and a remark.
    """
    if quiet or not sys.stderr.isatty():
        yield _ignore
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=30),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("[dim]{task.fields[remark]}"),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(description, total=None, remark="")
        yield lambda done, total, remark="": bar.update(task, completed=done, total=total, remark=ending(remark))


def ending(text: str) -> str:
    """A remark, or its end if it is too long to stand beside a bar; square brackets are no colours.

    Example:
        >>> ending("nets/a.pt"), ending("some/long/path/that/goes/on/model.pt")
        ('nets/a.pt', '…h/that/goes/on/model.pt')
    """
    return plain(text if len(text) <= REMARK else "…" + text[1 - REMARK :])


def _ignore(*_: Any) -> None:
    """Show nothing."""
