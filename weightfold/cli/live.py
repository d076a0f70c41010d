"""A run in the terminal while it goes on: a bar, the scores, and where bits are learned, what each layer takes now."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    from weightfold.training.looks import Look

EIGHTHS = " ▏▎▍▌▋▊▉"
WIDTH = 18
"""Cells of a bar in the table; half as many where the terminal is narrow."""
NARROW = 92
FRAME = 8
"""Lines besides the layers."""
NAMES = {"self_compress": "compressed", "prune": "pruned"}

Tell = Callable[["Look"], None]


@contextmanager
def board(method: str, *, quiet: bool = False) -> Iterator[Tell]:
    """Show where a run stands, on stderr and in place, if that is a terminal; it is gone afterwards.

    Args:
        method: what the second network is made smaller by.
        quiet: show nothing.
    Yields:
        tell: to be called with every look.
    """
    if quiet or not sys.stderr.isatty():
        yield _ignore
        return
    import time

    from rich.console import Console
    from rich.live import Live

    console, start = Console(stderr=True), time.monotonic()
    with Live(console=console, transient=True, refresh_per_second=4) as live:

        def tell(look: Look) -> None:
            live.update(picture(look, method, time.monotonic() - start, console.width, console.height))

        yield tell


def _ignore(_: Look) -> None:
    """Show nothing."""


def picture(look: Look, method: str, seconds: float, width: int, height: int) -> Group:
    """Draw a look.

    Args:
        seconds: since the run was begun, or taken up.
        width, height: of the terminal, in characters.
    """
    from rich.console import Group
    from rich.text import Text

    head = _progress(look, method, seconds)
    if look.record is None or look.start is None:
        waiting = "  bits are learned after the first part of the run" if look.start is not None else ""
        return Group(head, Text(waiting, style="dim")) if waiting else Group(head)
    cells = WIDTH if width >= NARROW else WIDTH // 2
    return Group(head, Text(), _layers(look, cells, max(3, height - FRAME)), _file(look))


def _progress(look: Look, method: str, seconds: float) -> Text:
    from rich.text import Text

    share = look.step / max(look.total_steps, 1)
    left = f"{seconds * (1 - share) / share:.0f} s left" if 0 < share < 1 else f"{seconds:.0f} s"
    line = Text("training ")
    line.append(bar(share, 24), "green on grey23")
    line.append(f"  epoch {min(look.epoch + 1, look.epochs)} of {look.epochs}, {left}", "dim")
    for name, found in look.scores.items():
        known = NAMES.get(method, name) if name == "folded" else name
        line.append(f"   {known} ")
        line.append(f"{found['score']:.3f}", "bold")
    return line


def _layers(look: Look, cells: int, most: int) -> Table:
    from rich import box
    from rich.table import Table

    assert look.start is not None
    assert look.record is not None
    layers: Mapping[str, Mapping[str, Any]] = look.record["tensors"]
    names = shown(layers, most)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for title, side in (("layer", "left"), ("channels", "right"), ("bits", "left"), ("weights left", "left")):
        table.add_column(title, justify="right" if side == "right" else "left", no_wrap=True)
    table.add_column("bytes", justify="right", no_wrap=True)
    peak = max([4.0, *(layer["bits"] for layer in layers.values())])
    for name in names:
        table.add_row(*_layer(name, layers[name], look.start.shapes[name], peak, cells))
    if len(names) < len(layers):
        rest = sum(layer["bytes"] for name, layer in layers.items() if name not in names)
        table.add_row(f"and {len(layers) - len(names)} smaller ones", "", "", "", f"{rest:,.0f}", style="dim")
    return table


def _layer(
    name: str, layer: Mapping[str, Any], shape: tuple[int, ...], peak: float, cells: int
) -> tuple[str | Text, ...]:
    from rich.text import Text

    full = math.prod(shape)
    share = layer["weights"] / full
    bits = Text.assemble((bar(layer["bits"] / peak, cells), "cyan on grey23"), f" {layer['bits']:4.1f}")
    left = f" {layer['weights']:>9,} {_percent(share):>6}"
    return (
        name.removesuffix(".weight"),
        f"{layer['rows']:,} of {shape[0]:,}",
        bits,
        Text.assemble((bar(share, cells), "green on grey23"), left),
        f"{layer['bytes']:,.0f}",
    )


def shown(layers: Mapping[str, Mapping[str, Any]], most: int) -> list[str]:
    """The layers there is room for: those that take most bytes, in the order of the network.

    Example:
        >>> shown({"a": {"bytes": 3}, "b": {"bytes": 1}, "c": {"bytes": 9}}, 2)
        ['a', 'c']
    """
    largest = sorted(layers, key=lambda name: -layers[name]["bytes"])[:most]
    return [name for name in layers if name in largest]


def _file(look: Look) -> Text:
    """The file against the target and the float file."""
    from rich.text import Text

    assert look.start is not None
    assert look.record is not None
    size, full, target = look.record["bytes"], look.start.float_bytes, look.start.target
    line = Text("\nfile  ")
    line.append(f"{size:,.0f} bytes", "bold")
    line.append(f", {_percent(size / full)} of the float file")
    if target is not None:
        times = size / target
        line.append(f"; asked for {target:,}: ")
        line.append("met" if times <= 1 else f"{times:.2f} times that", "green" if times <= 1 else "yellow")
    line.append(f"   λ {look.record['price']:.2g}", "dim")
    return line


def _percent(share: float) -> str:
    """A share in percent, with one digit behind the point where that says enough."""
    return f"{100 * share:.2f} %" if 0 < share < 0.01 else f"{100 * share:.1f} %"


def bar(share: float, cells: int) -> str:
    """A bar in eighths of a character; a share that is not zero shows.

    Example:
        >>> bar(0.5, 3), bar(0.001, 3), bar(1.0, 3)
        ('█▌ ', '▏  ', '███')
    """
    n = round(min(max(share, 0.0), 1.0) * cells * 8)
    n = max(n, 1) if share > 0 else 0
    whole, rest = divmod(n, 8)
    return ("█" * whole + (EIGHTHS[rest] if rest else "")).ljust(cells)
