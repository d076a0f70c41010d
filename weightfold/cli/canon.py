"""`weightfold canon`: one representative for all weights that are the same function."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from weightfold.cli import show
from weightfold.cli.door import Json, guarded
from weightfold.cli.inputs import Data, Model, Shapes, Weights, open_with_example
from weightfold.cli.pairs import RawLogits, write_weights


@guarded
def canon(
    model: Model,
    example: Shapes = None,
    data: Data = None,
    weights: Weights = None,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the canonical weights, as safetensors.")
    ] = None,
    raw_outputs: RawLogits = False,
    as_json: Json = False,
) -> None:
    """Bring a model to canonical form; print its semantic hash, blind to the order and scale of channels."""
    from weightfold.weights.canon import canonical, hash_keys, semantic_hash
    from weightfold.weights.symmetry import symmetries

    network, inputs = open_with_example(model, example, data, weights)
    found = symmetries(network, inputs)
    text = semantic_hash(network, inputs, found=found, centre_logits=not raw_outputs)
    if out is not None:
        form = canonical(network, inputs, found=found, centre_logits=not raw_outputs)
        write_weights(form, out)
    if as_json:
        show.print_json({"model": model, "hash": text, "keys": list(hash_keys(text)), "out": out and str(out)})
        return
    show.console().print(text, soft_wrap=True)
    if out is not None:
        show.console().print(f"wrote {show.plain(out)}")
