"""`weightfold sharing`: what a model shares by construction, and how many parameters that saves."""

from __future__ import annotations

from typing import Any

from weightfold.cli import show
from weightfold.cli.door import Json, guarded
from weightfold.cli.inputs import Data, Model, Shapes, Weights, open_with_example


@guarded
def sharing(
    model: Model,
    example: Shapes = None,
    data: Data = None,
    weights: Weights = None,
    as_json: Json = False,
) -> None:
    """List what a model shares: kernels over space, time steps, tokens, tied tensors, modules called again, heads."""
    from weightfold.sharing.report import sharing as report

    network, inputs = open_with_example(model, example, data, weights)
    facts = {"model": model, **collect(report(network, inputs))}
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
