"""What commands print: JSON, tables, numbers in words, a progress bar on terminals."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

WIDTH = 110
"""Columns where stdout is no terminal."""


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


def table(columns: Sequence[str], rows: Sequence[Sequence[str]], *, right: Sequence[int] = (), title: str = "") -> None:
    """Print a table on stdout.

    Args:
        columns: their headings.
        rows: texts, as many as columns; `[green]...[/]` marks colours.
        right: numbers of the columns that are aligned to the right.
        title: printed above.
    """
    from rich import box
    from rich.table import Table

    made = Table(box=box.SIMPLE_HEAD, title=title or None, title_justify="left", title_style="bold", pad_edge=False)
    for at, column in enumerate(columns):
        made.add_column(column, justify="right" if at in right else "left", overflow="fold")
    for row in rows:
        made.add_row(*row)
    console().print(made)


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
        yield lambda done, total, remark="": bar.update(task, completed=done, total=total, remark=remark)


def _ignore(*_: Any) -> None:
    """Show nothing."""
