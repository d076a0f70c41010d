"""`weightfold export`: write a model for a runtime, and see that it computes the same there."""

from __future__ import annotations

from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from weightfold.cli import show
from weightfold.cli.door import Json, guarded


class Target(StrEnum):
    """What is written."""

    safetensors = "safetensors"
    packed = "packed"
    pt2 = "pt2"
    onnx = "onnx"
    onnx_fp16 = "onnx-fp16"
    onnx_int8 = "onnx-int8"
    onnx_int4 = "onnx-int4"
    onnx_int2 = "onnx-int2"
    openvino = "openvino"


@guarded
def export(
    source: Annotated[
        str,
        typer.Argument(
            metavar="RUN|MODEL",
            help="Folder of a run, saved model, built-in name, package.module:function, or Hugging Face folder.",
        ),
    ],
    to: Annotated[Target, typer.Option(help="Kind of file.")],
    out: Annotated[Path, typer.Option(help="The file to write.")],
    weights: Annotated[Path | None, typer.Option(metavar="FILE", help="Weights of the model.")] = None,
    example: Annotated[
        list[str] | None, typer.Option(metavar="SHAPE", help="An input: 1x3x32x32, 1x128:int64; once for each input.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(metavar="MODULE:FUNCTION", help="Makes the module of a saved model of your own.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Write a model as safetensors, packed codes, PyTorch program or ONNX; load it back, compare, only then keep it."""
    from weightfold.export.opened import open_model
    from weightfold.export.targets import export as write

    opened = open_model(source, weights=weights, example=example or [], maker=model)
    exported = write(opened, to.value, out)
    if as_json:
        show.print_json({**asdict(exported), "path": str(exported.path)})
        return
    console = show.console()
    batches = "any batch size" if exported.any_batch else "the batch size of the example only"
    console.print(f"[green]written[/]   {exported.path}, {exported.size_bytes:,} bytes, for {batches}")
    console.print(f"[green]verified[/]  loaded by {exported.runtime}; {exported.agreement}, on {exported.compared_on}")
