"""`weightfold export`: write a model for a runtime, and see that it computes the same there."""

from __future__ import annotations

import itertools
from dataclasses import asdict, replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from weightfold.cli import show
from weightfold.cli.door import Json, guarded

if TYPE_CHECKING:
    from weightfold.export import Source

N_CALIBRATION = 8
"""Batches of 32 training inputs that ranges are calibrated on."""


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


class Prefer(StrEnum):
    """What counts where a target trades one for the other."""

    speed = "speed"
    size = "size"


class Calibrate(StrEnum):
    """What ranges of 8 bits are found on."""

    data = "data"
    drawn = "drawn"


ROUNDING = (Target.onnx_int8, Target.onnx_int4, Target.onnx_int2)
"""Targets whose files answer otherwise than the module, so that they are scored."""


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
    data: Annotated[
        str | None,
        typer.Option(
            metavar="PATH",
            help="Real inputs to calibrate and score with.",
            show_default="the run's, where 8 bits round",
        ),
    ] = None,
    calibrate: Annotated[
        Calibrate, typer.Option(help="What ranges of 8 bits are found on: real inputs, or random numbers.")
    ] = Calibrate.data,
    prefer: Annotated[
        Prefer | None,
        typer.Option(help="Whether onnx-int8 may leave in floats what is slower in 8 bits.", show_default="speed"),
    ] = None,
    license_name: Annotated[str | None, typer.Option("--license", help="Licence, for the model card.")] = None,
    tolerance: Annotated[
        float | None, typer.Option(min=0, help="Allowed difference of outputs.", show_default="the target's own")
    ] = None,
    as_json: Json = False,
) -> None:
    """Write a model for a runtime, with its model card; load it back there, compare, and only then keep it."""
    from weightfold.errors import ExportError
    from weightfold.export.card import make_card, run_facts, write_card
    from weightfold.export.opened import open_model
    from weightfold.export.targets import export as write

    opened = open_model(source, weights=weights, example=example or [], maker=model)
    facts = {"spec": source, **run_facts(source)}
    needed = to is Target.onnx_int8 and calibrate is Calibrate.data
    dataset, remark = _dataset(data, facts, to, needed=needed)
    real = real_inputs(dataset, opened) if dataset is not None and len(opened.inputs) == 1 else []
    if needed and dataset is not None and not real:
        raise ExportError(
            f"The model takes {len(opened.inputs)} inputs, and data give one: no ranges of 8 bits are found on them.",
            remedy="Ask for random numbers by name: --calibrate drawn. Or pass calibration=[...] in Python.",
        )
    opened = replace(opened, facts=facts, calibration="drawn" if calibrate is Calibrate.drawn else real)
    exported = write(opened, to.value, out, tolerance=tolerance, prefer=prefer and prefer.value)
    measured = None if dataset is None else score(opened, out, dataset)
    card, _ = write_card(make_card(opened, exported, measured=measured, license_name=license_name), out)
    if as_json:
        found = {**asdict(exported), "path": str(exported.path), "card": str(card), "measured": measured}
        show.print_json(found)
        return
    console = show.console()
    batches = "any batch size" if exported.any_batch else "the batch size of the example only"
    console.print(f"[green]written[/]   {exported.path}, {exported.size_bytes:,} bytes, for {batches}")
    console.print(
        f"[green]verified[/]  loaded by {exported.runtime}; {exported.differences}, on {exported.compared_on}"
    )
    for note in (*exported.notes, *([remark] if remark else [])):
        console.print(f"[yellow]note[/]      {show.plain(note)}")
    if measured is not None:
        console.print(
            f"scored    {measured['score']} {measured['file']:.4f} in its runtime, {measured['module']:.4f} as a "
            f"module, on {measured['samples']:,} test samples of {show.plain(measured['data'])}"
        )
    console.print(f"card      {card}")


def _dataset(data: str | None, facts: dict[str, Any], target: Target, *, needed: bool) -> tuple[Any, str]:
    """The data to calibrate and score with: what the user names, else the run's own where the target rounds.

    Args:
        needed: whether the file cannot be made without them.
    """
    from weightfold.data import load
    from weightfold.errors import ExportError, WeightfoldError

    if data is not None:
        return load(data, seed=0, limit=facts.get("limit")), ""
    if target not in ROUNDING or (needed and "data_source" not in facts):
        return None, ""
    if "data_source" not in facts:
        return None, "on drawn numbers; with real inputs (--data) it is compared and scored on these"
    try:
        return load(facts["data_source"], seed=0, limit=facts.get("limit")), ""
    except WeightfoldError as error:
        if not needed:
            return None, f"on drawn numbers, for the run's data are not there: {error.message}"
        raise ExportError(
            f"There are no real inputs to calibrate on, for the run's data are not there: {error.message}",
            remedy="Name them with --data PATH, or ask for random numbers by name: --calibrate drawn.",
        ) from error


def real_inputs(dataset: Any, source: Source) -> list[Any]:
    """Batches of training inputs, as arguments of a model of one input."""
    import torch

    from weightfold.export.example import as_taken

    batches = dataset.batches("train", 32, generator=torch.Generator().manual_seed(0))
    return [((as_taken(source.inputs[0], x),), {}) for x, _ in itertools.islice(batches, N_CALIBRATION)]


def score(source: Source, path: Path, dataset: Any) -> dict[str, Any]:
    """Score a written file in its own runtime, and the module that it was made from."""
    import torch

    from weightfold.export.example import as_taken
    from weightfold.export.saved import load
    from weightfold.training.measure import evaluate, score_name

    made = load(path, source.fresh() if source.fresh and path.suffix in (".safetensors", ".wfp") else None)

    class Called(torch.nn.Module):
        def __init__(self, run: Any) -> None:
            super().__init__()
            self.run = run

        def forward(self, x: torch.Tensor) -> Any:
            return self.run(as_taken(source.inputs[0], x))

    cpu = torch.device("cpu")
    runs = {"module": source.model, "file": made}
    found = {name: evaluate(Called(run), dataset, "test", cpu) for name, run in runs.items()}
    return {
        "data": dataset.name,
        "split": "test",
        "samples": len(dataset.test),
        "score": score_name(dataset.task),
        **{name: one.value for name, one in found.items()},
    }
