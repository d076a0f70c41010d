"""`weightfold sharing`: what a model shares by construction, and how many parameters that saves."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from weightfold.cli import show
from weightfold.cli.door import Json, guarded


@guarded
def sharing(
    model: Annotated[
        str, typer.Argument(help="Built-in name, package.module:function, Hugging Face folder, or folder of a run.")
    ],
    example: Annotated[
        list[str] | None,
        typer.Option(metavar="SHAPE", help="An input: 1x3x32x32, 1x128:int64, NAME=1x128:bool; once for each input."),
    ] = None,
    data: Annotated[str | None, typer.Option(metavar="PATH", help="Take the example from a data set.")] = None,
    weights: Annotated[Path | None, typer.Option(metavar="FILE", help="Weights of the model.")] = None,
    as_json: Json = False,
) -> None:
    """List what a model shares: kernels over space, time steps, tokens, tied tensors, modules called again, heads."""
    from weightfold.errors import ConfigError
    from weightfold.export.example import zeros
    from weightfold.export.opened import open_model
    from weightfold.sharing.report import sharing as report

    task = None
    if data is not None:
        from weightfold.data import load

        task = load(data).task
    source = open_model(model, weights=weights, example=example or [], task=task)
    if not source.inputs:
        raise ConfigError(f"Tracing '{model}' needs an example input.", remedy="Pass --example 1x3x32x32, or --data.")
    facts = {"model": model, **collect(report(source.model, zeros(source.inputs)))}
    if as_json:
        show.print_json(facts)
    else:
        print_facts(facts)


def collect(report: Any) -> dict[str, Any]:
    """Put a report into plain data."""
    from dataclasses import asdict

    return {
        "rows": [asdict(row) for row in report.rows],
        "saved": report.by_kind(),
        "parameters": report.parameters,
        "applied": report.applied,
        "unknown": dict(report.unknown),
    }


def print_facts(facts: dict[str, Any]) -> None:
    """Print every kind of sharing with its places, and the totals."""
    from weightfold.sharing.report import KINDS

    console = show.console()
    if facts["rows"]:
        rows = [
            [
                row["kind"],
                show.plain(where(row["places"])),
                show.plain(", ".join(name.rpartition(".")[2] for name in row["tensors"])),
                f"{row['uses']:,}",
                f"{row['parameters']:,}",
                f"{row['saved']:,}",
            ]
            for row in facts["rows"]
        ]
        show.table(("shared by", "where", "tensors", "uses", "parameters", "saved"), rows, right=(3, 4, 5))
        for kind, saved in facts["saved"].items():
            console.print(f"{kind}: {KINDS[kind]}; saves {saved:,} parameters")
    else:
        console.print("Nothing is shared: every parameter is used once a sample.")
    for tensor, name in facts["unknown"].items():
        console.print(
            f"[dim]the use of '{show.plain(tensor)}' by {show.plain(name)} is not understood; counted once[/]"
        )
    console.print(
        f"{facts['parameters']:,} parameters do the work of {facts['applied']:,}, were each used in one place only."
    )


def where(places: list[str]) -> str:
    """Name modules; the model's own forward by words.

    Example:
        >>> where(["token", ""])
        "token, the model's forward"
    """
    return ", ".join(place or "the model's forward" for place in places)
