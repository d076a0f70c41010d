"""`weightfold tune`: measure the widths that a target's kernels like, for methods to plan with."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from weightfold.cli import show
from weightfold.cli.door import Json, guarded


@guarded
def tune(
    source: Annotated[
        str,
        typer.Argument(
            metavar="RUN|MODEL", help="The network before it is made smaller; of a run, its dense one. See export."
        ),
    ],
    out: Annotated[Path, typer.Option(help="The JSON to write: fold and prune take it as --tuned.")],
    target: Annotated[str, typer.Option(help="What it will run on: onnx-cpu.")] = "onnx-cpu",
    batch: Annotated[int, typer.Option(min=1, help="Inputs a call.")] = 1,
    threads: Annotated[int, typer.Option(min=1, help="Threads of the runtime.")] = 1,
    seconds: Annotated[float, typer.Option(min=0.01, help="Of timing, for each width.")] = 0.4,
    group: Annotated[list[str] | None, typer.Option(help="A channel group; all by default.")] = None,
    weights: Annotated[Path | None, typer.Option(metavar="FILE", help="Weights of the model.")] = None,
    example: Annotated[
        list[str] | None, typer.Option(metavar="SHAPE", help="An input: 1x3x32x32, 1x128:int64.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(metavar="MODULE:FUNCTION", help="Makes the module of a saved model of your own.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Measure the latency of every channel group at every width, on this machine, and keep the table."""
    from weightfold.bench.tune import tune as measure
    from weightfold.cli.bench import DENSE
    from weightfold.export.opened import open_model

    dense = Path(source, DENSE)
    opened = open_model(str(dense) if dense.is_file() else source, weights=weights, example=example or [], maker=model)
    with show.progress("tune", quiet=as_json) as update:
        table = measure(opened, target, batch=batch, threads=threads, seconds=seconds, groups=group, progress=update)
    table.save(out)
    if as_json:
        show.print_json({"out": str(out), "target": table.target, "liked": table.all_liked()})
        return
    print_table(source, table)
    show.console().print(f"table  {out}")


def print_table(title: str, table: Any) -> None:
    """Print the widths that are worth having, with their times."""
    rows = []
    for name, times in table.groups.items():
        liked = table.liked(name)
        best = "  ".join(f"{width} ({show.quantity(times[width], 'ms')})" for width in liked)
        rows.append([show.plain(name), str(max(times)), str(len(times)), best])
    heads = ("group", "channels", "measured", f"widths worth having, ms on {table.target}")
    label = f"{title}: batch {table.shape[0]}, {table.threads} thread(s), {table.machine.get('cpu', '')}"
    show.table(heads, rows, right=(1, 2), title=show.plain(label))
