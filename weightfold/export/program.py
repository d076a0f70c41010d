"""Turn a module into PyTorch's exported program, for batches of any size where the model allows it."""

from __future__ import annotations

from typing import Any

import torch
from torch.export import Dim, ExportedProgram

from weightfold.errors import ExportError
from weightfold.export.example import draw
from weightfold.export.source import Source
from weightfold.runtime.require import quiet


def to_program(source: Source) -> ExportedProgram:
    """Export a module, first for any batch size, then for that of the example.

    Raises:
        ExportError: the forward cannot be expressed as a graph.
    """
    args, named = draw(source.inputs, batch=2)
    batch = {0: Dim.DYNAMIC}
    shapes = (*(batch for _ in args), *(batch for _ in named))
    try:
        return _export(source, args, named, shapes)
    except Exception:  # the batch size is fixed somewhere in the model: export it for the example's
        args, named = draw(source.inputs)
    try:
        return _export(source, args, named, None)
    except Exception as error:
        text = str(error).strip().partition("\n")[0]
        raise ExportError(
            f"The model cannot be expressed as a graph: {type(error).__name__}: {text}",
            remedy="Take branches on data out of the forward, and pass the example input that it expects.",
        ) from error


def _export(source: Source, args: tuple[Any, ...], named: dict[str, Any], shapes: Any) -> ExportedProgram:
    dynamic = None
    if shapes is not None:
        dynamic = _by_name(source, args, named, shapes)
    with quiet():
        return torch.export.export(source.model, args, named, dynamic_shapes=dynamic, strict=False)


def _by_name(source: Source, args: tuple[Any, ...], named: dict[str, Any], shapes: tuple[Any, ...]) -> Any:
    """Shapes in the form that torch.export asks for: by position, or all by parameter name."""
    if not named:
        return shapes
    import inspect

    parameters = list(inspect.signature(source.model.forward).parameters)
    return dict(zip([*parameters[: len(args)], *named], shapes, strict=True))


def takes_any_batch(program: ExportedProgram) -> bool:
    """Tell whether every input's first size is free."""
    users = set(program.graph_signature.user_inputs)
    nodes = [node for node in program.graph.nodes if node.op == "placeholder" and node.name in users]
    return bool(nodes) and all(isinstance(node.meta["val"].shape[0], torch.SymInt) for node in nodes)
