"""`weightfold diff`: what really moved between two checkpoints."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from weightfold.cli import show
from weightfold.cli.door import Json, guarded
from weightfold.cli.inputs import Data, Shapes
from weightfold.cli.pairs import First, Maker, RawLogits, Second, open_one


@guarded
def diff(
    a: First,
    b: Second,
    model: Maker = None,
    example: Shapes = None,
    data: Data = None,
    top: Annotated[int, typer.Option(min=0, help="Units to list.")] = 10,
    raw_outputs: RawLogits = False,
    as_json: Json = False,
) -> None:
    """Compare two models once the order, scale and sign of channels are taken away: by layer, by unit."""
    from dataclasses import asdict

    from weightfold.weights.difference import difference

    (one, inputs), (two, _) = (open_one(spec, model, example, data) for spec in (a, b))
    found = difference(one, two, inputs, centre_logits=not raw_outputs)
    if as_json:
        show.print_json({"a": a, "b": b, **asdict(found)})
    else:
        print_difference(found, top)


def print_difference(found: Any, top: int) -> None:
    """Print totals, layers, and the units that moved most."""
    console = show.console()
    changed, total = found.reordered
    console.print(
        f"moved {found.moved:.2%} of the weights' norm, symmetries apart; {found.plain:.2%} as they are stored; "
        f"{changed:,} of {total:,} channels stand elsewhere"
    )
    rows = [
        [show.plain(x.name), f"{x.moved:.2%}", "" if x.plain is None else f"{x.plain:.2%}", f"{x.cosine:.4f}"]
        for x in found.layers
    ]
    show.table(("tensor", "moved", "as stored", "cosine"), rows, right=(1, 2, 3))
    if top and found.units:
        rows = [[show.plain(u.group), str(u.unit), str(u.was), f"{u.moved:.2%}"] for u in found.units[:top]]
        show.table(("group", "unit in A", "unit in B", "moved"), rows, right=(1, 2, 3), title="units that moved most")
