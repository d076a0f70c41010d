"""What commands that look at a model take: the model, an example or data to take one from, weights."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from torch import nn

Model = Annotated[
    str, typer.Argument(help="Built-in name, package.module:function, Hugging Face folder, or folder of a run.")
]
Shapes = Annotated[
    list[str] | None,
    typer.Option(
        "--example", metavar="SHAPE", help="An input: 1x3x32x32, 1x128:int64, NAME=1x128:bool; once for each input."
    ),
]
Data = Annotated[str | None, typer.Option("--data", metavar="PATH", help="Take the example from a data set.")]
Weights = Annotated[Path | None, typer.Option("--weights", metavar="FILE", help="Weights of the model.")]


def open_with_example(
    model: str, example: list[str] | None, data: str | None, weights: Path | None
) -> tuple[nn.Module, Any]:
    """Open a model and make an example input for it.

    Raises:
        ConfigError: nothing says what the model takes.
    """
    from weightfold.errors import ConfigError
    from weightfold.export.example import zeros
    from weightfold.export.opened import open_model

    task = None
    if data is not None:
        from weightfold.data import load

        task = load(data).task
    source = open_model(model, weights=weights, example=example or [], task=task)
    if not source.inputs:
        raise ConfigError(f"Tracing '{model}' needs an example input.", remedy="Pass --example 1x3x32x32, or --data.")
    return source.model, zeros(source.inputs)
