"""`weightfold bench`: latency, throughput, memory and bytes in every runtime, beside the original's."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from weightfold.cli import show
from weightfold.cli.door import Json, guarded

if TYPE_CHECKING:
    from weightfold.export import Source

DENSE = "dense.safetensors"


@guarded
def bench(
    source: Annotated[
        str,
        typer.Argument(
            metavar="RUN|MODEL",
            help="Folder of a run, saved model, built-in name, package.module:function, or Hugging Face folder.",
        ),
    ],
    against: Annotated[
        str | None, typer.Option(metavar="MODEL", help="The original.", show_default="the run's dense network")
    ] = None,
    batch: Annotated[
        list[int] | None, typer.Option(min=1, help="Inputs a call; repeat it.", show_default="1, 64")
    ] = None,
    engine: Annotated[
        list[str] | None,
        typer.Option(help="torch, torch.compile, onnx, onnx-int8, openvino; repeat it.", show_default="all"),
    ] = None,
    threads: Annotated[int, typer.Option(min=1, help="Threads of each runtime.")] = 1,
    seconds: Annotated[float, typer.Option(min=0.01, help="Of timing, for each runtime and batch size.")] = 2.0,
    memory: Annotated[bool, typer.Option("--memory/--no-memory", help="Measure memory in fresh processes.")] = True,
    strict: Annotated[
        bool, typer.Option("--strict", help="Fail where the network is slower than its original.")
    ] = False,
    example: Annotated[
        list[str] | None, typer.Option(metavar="SHAPE", help="An input: 1x3x32x32, 1x128:int64.")
    ] = None,
    data: Annotated[str | None, typer.Option(metavar="PATH", help="Real inputs to calibrate 8 bits with.")] = None,
    model: Annotated[
        str | None, typer.Option(metavar="MODULE:FUNCTION", help="Makes the module of a saved model of your own.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Time a network and its original in turns in every runtime that is installed."""
    from dataclasses import replace

    from weightfold.bench.compare import bench as measure
    from weightfold.bench.compare import refuse_slower
    from weightfold.bench.engines import ENGINES
    from weightfold.export.opened import open_model

    made = open_model(source, example=example or [], maker=model)
    original = _original(source, against, example or [], model)
    if data is not None:
        from weightfold.cli.export import real_inputs
        from weightfold.data import load

        real = real_inputs(load(data), made)
        made = replace(made, calibration=real)
        original = None if original is None else replace(original, calibration=real)
    with show.progress("bench", quiet=as_json) as update:
        found = measure(
            made,
            original,
            engines=engine or ENGINES,
            batches=batch or (1, 64),
            threads=threads,
            seconds=seconds,
            memory=memory,
            told=lambda name: update(0, None, name),
        )
    if as_json:
        show.print_json(found.to_record())
    else:
        print_bench(source, found)
    if strict:
        refuse_slower(found)


def _original(source: str, against: str | None, example: list[str], maker: str | None) -> Source | None:
    """The network to compare with: what the user names, else the dense one of the run."""
    from weightfold.export.opened import needs_maker, open_model

    if against is not None:
        return open_model(against, example=example, maker=maker if needs_maker(against) else None)
    beside = Path(source, DENSE) if Path(source).is_dir() else Path(source).with_name(DENSE)
    return open_model(str(beside), example=example, maker=maker) if beside.is_file() else None


def print_bench(title: str, found: Any) -> None:
    """Print what was measured as a table."""
    rows = [
        [
            row.engine,
            str(row.batch),
            row.network,
            show.quantity(row.p50_ms, "ms"),
            show.quantity(row.p95_ms, "ms"),
            f"{row.throughput:,.0f}",
            "" if row.speedup is None else f"{row.speedup:.2f}x",
            "–" if row.memory_bytes is None else f"{row.memory_bytes / 1e6:.1f}",
            f"{row.file_bytes:,}",
        ]
        for row in found.rows
    ]
    heads = ("runtime", "batch", "network", "p50 ms", "p95 ms", "a second", "speedup", "memory MB", "file bytes")
    label = f"{title}: {found.threads} thread(s), {found.machine.get('cpu', '')}, warm, in turns"
    show.table(heads, rows, right=(1, 3, 4, 5, 6, 7, 8), title=show.plain(label))
    console = show.console()
    for name, reason in found.skipped.items():
        console.print(f"[yellow]without[/] {name}: {show.plain(reason)}")
    for line in found.slower:
        console.print(f"[red]slower[/]  {line}")
