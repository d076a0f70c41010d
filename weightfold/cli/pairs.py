"""What commands that look at two models or more take."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from weightfold.cli.inputs import open_with_example

if TYPE_CHECKING:
    from torch import nn

First = Annotated[str, typer.Argument(metavar="A", help="A model; or a file of weights, with --model.")]
Second = Annotated[str, typer.Argument(metavar="B", help="Another, of the same architecture.")]
Maker = Annotated[
    str | None, typer.Option("--model", metavar="SPEC", help="What A and B are weights of: built-in name or function.")
]
RawLogits = Annotated[
    bool, typer.Option("--raw-outputs", help="Outputs are no logits: what all have in common counts too.")
]


def open_one(spec: str, maker: str | None, example: list[str] | None, data: str | None) -> tuple[nn.Module, Any]:
    """Open a model, or a file of weights for the model that ``maker`` makes, in eval mode."""
    if maker is None:
        model, inputs = open_with_example(spec, example, data, None)
    else:
        model, inputs = open_with_example(maker, example, data, Path(spec))
    return model.eval(), inputs


def write_weights(model: nn.Module, path: Path) -> None:
    """Write a model's weights as safetensors, at one stroke."""
    from safetensors.torch import save

    from weightfold.artifact import write_bytes

    write_bytes(path, save({name: value.contiguous().clone() for name, value in model.state_dict().items()}))
