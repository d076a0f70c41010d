"""Compare what a written file computes with what the module computes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from weightfold.artifact import Input
from weightfold.errors import ExportError
from weightfold.export.example import Arguments, draw
from weightfold.export.source import Source
from weightfold.quant.activations import Grid, running
from weightfold.runtime.loaded import Loaded

BATCHES = (1, 3)
"""Batch sizes that a file is tried with, if it takes any."""


@dataclass(frozen=True)
class Exported:
    """What was written, and how well it agrees.

    Args:
        path: the file.
        target: its kind.
        size_bytes: of the file, and of those beside it that belong to it.
        largest_difference: between any two outputs, absolute.
        relative_difference: norm of the differences over the norm of the outputs.
        tolerance: what was allowed: of the largest difference, absolute, or of the relative one.
        relative: whether the tolerance is of the relative difference.
        any_batch: whether the file takes batches of any size.
        runtime: what loaded and ran it.
        compared_on: "real inputs" or "drawn inputs".
        notes: what else is to be known of the file: what was cast, what stays in floats.
    """

    path: Path
    target: str
    size_bytes: int
    largest_difference: float
    relative_difference: float
    tolerance: float
    relative: bool
    any_batch: bool
    runtime: str
    compared_on: str
    notes: tuple[str, ...] = ()

    @property
    def agreement(self) -> str:
        """The differences, what was allowed, and the notes, in words."""
        return "; ".join((self.differences, *self.notes))

    @property
    def differences(self) -> str:
        """The differences and what was allowed, in words."""
        if self.relative:
            return (
                f"outputs differ by {100 * self.relative_difference:.2g} % of their norm "
                f"({100 * self.tolerance:.2g} % allowed), by {self.largest_difference:.2g} at most"
            )
        return f"largest difference of an output {self.largest_difference:.2g} ({self.tolerance:.2g} allowed)"


Run = Callable[..., Any]
"""Runs a loaded file on positional and keyword arguments."""


@dataclass(frozen=True)
class Difference:
    """How far two sets of outputs are apart.

    Args:
        largest: of any number, absolute.
        relative: norm of the differences over the norm of the outputs.
        scale: the largest output, at least 1.
    """

    largest: float
    relative: float
    scale: float


def trials(inputs: Sequence[Input], *, any_batch: bool, real: Sequence[Arguments] = ()) -> list[Arguments]:
    """The inputs that a file is tried with: real ones where there are any that it takes.

    Args:
        inputs: what to draw from otherwise.
        any_batch: whether the file takes other batch sizes than the example's.
    """
    fitting = in_batches(real, None if any_batch else inputs[0].shape[0])
    if fitting and any_batch:
        return [_part(fitting[0], 0, size) for size in BATCHES] + fitting[:2]
    sizes = BATCHES if any_batch else (None,)
    return fitting[:2] or [draw(inputs, seed=seed, batch=batch) for seed, batch in enumerate(sizes)]


def in_batches(real: Sequence[Arguments], size: int | None) -> list[Arguments]:
    """Cut real inputs into batches of the size that a file takes; what is left over is left out.

    Args:
        size: None where it takes any.
    Example:
        >>> [args[0].tolist() for args, _ in in_batches([((torch.arange(5),), {}), ((torch.arange(1),), {})], 2)]
        [[0, 1], [2, 3]]
    """
    if size is None:
        return list(real)
    return [_part(one, at, size) for one in real for at in range(0, _length(one) - size + 1, size)]


def _length(arguments: Arguments) -> int:
    args, named = arguments
    return min((len(value) for value in (*args, *named.values())), default=0)


def _part(arguments: Arguments, at: int, n: int) -> Arguments:
    args, named = arguments
    return tuple(value[at : at + n] for value in args), {name: value[at : at + n] for name, value in named.items()}


def verified(
    source: Source,
    run: Run,
    target: str,
    *,
    largest: float | None = None,
    rms: float | None = None,
    any_batch: bool | None = None,
    runtime: str = "",
    grids: Mapping[str, Grid] | None = None,
    sizes: bool = True,
) -> Exported:
    """Run a loaded file on trial inputs and say how well it agrees with the module; see `compare`.

    Args:
        largest: allowed difference of any output, as a share of the largest.
        rms: instead: allowed norm of the differences, as a share of the outputs' norm.
        any_batch: whether the file takes any batch; by default as the loaded file says.
        grids: of what layers read; the module computes with them.
        sizes: whether to try several batch sizes.
    """
    free = any_batch if any_batch is not None else isinstance(run, Loaded) and run.any_batch
    arguments = trials(source.inputs, any_batch=free and sizes, real=source.real)
    with running(source.model, grids or {}):
        difference = measure(source.model, run, arguments)
    tolerance = rms if rms is not None else (largest or 0.0) * difference.scale
    found = difference.relative if rms is not None else difference.largest
    if not found <= tolerance:
        raise ExportError(_complaint(difference, tolerance, relative=rms is not None), remedy=_remedy(target))
    return Exported(
        Path(),
        target,
        0,
        difference.largest,
        difference.relative,
        tolerance,
        rms is not None,
        free,
        runtime or (run.runtime if isinstance(run, Loaded) else ""),
        "real inputs"
        if in_batches(source.real, None if free and sizes else source.inputs[0].shape[0])
        else "drawn inputs",
    )


def _complaint(difference: Difference, tolerance: float, *, relative: bool) -> str:
    if relative:
        return (
            f"The written file computes something else: outputs differ by {100 * difference.relative:.3g} % of their "
            f"norm; {100 * tolerance:.3g} % is allowed."
        )
    return (
        f"The written file computes something else: outputs differ by up to {difference.largest:.3g}; "
        f"{tolerance:.3g} is allowed."
    )


def _remedy(target: str) -> str:
    finer = {"onnx-int2": "onnx-int4", "onnx-int4": "onnx-int8", "onnx-int8": "onnx", "onnx-fp16": "onnx"}
    if target in finer:
        return (
            f"The file was removed. Export it as {finer[target]}, give real inputs (--data), or train the network for "
            "it (self_compress); --tolerance allows more."
        )
    return "The file was removed. Please report the model that shows this."


def measure(model: nn.Module, run: Run, arguments: Sequence[Arguments]) -> Difference:
    """Find how far a loaded file is from a module.

    Args:
        model: in evaluation mode.
        run: the loaded file.
        arguments: what both are given.
    Raises:
        ExportError: the outputs differ in number or shape, or the model's are not finite.
    """
    largest, scale, apart, norm = 0.0, 1.0, 0.0, 0.0
    for args, named in arguments:
        with torch.no_grad():
            wanted = outputs_of(model(*args, **named))
            got = outputs_of(run(*args, **named))
        _check_alike(wanted, got)
        for ours, theirs in zip(wanted, got, strict=True):
            if ours.numel():
                scale = max(scale, ours.abs().max().item())
                worst = (ours - theirs).abs().max().item()
                largest = max(largest, worst) if worst == worst else float("nan")
                apart, norm = apart + float((ours - theirs).square().sum()), norm + float(ours.square().sum())
    return Difference(largest, (apart / norm) ** 0.5 if norm > 0 else apart**0.5, scale)


def outputs_of(result: Any) -> list[Tensor]:
    """List the tensors of any result as float64, in order."""
    leaves = pytree.tree_leaves(dict(result) if hasattr(result, "keys") else result)
    return [
        torch.as_tensor(leaf).detach().double() for leaf in leaves if leaf is not None and not isinstance(leaf, str)
    ]


def _check_alike(wanted: list[Tensor], got: list[Tensor]) -> None:
    shapes, other = [tuple(t.shape) for t in wanted], [tuple(t.shape) for t in got]
    if shapes != other:
        raise ExportError(f"The written file gives outputs of the shapes {other}; the model gives {shapes}.")
    if not all(bool(t.isfinite().all()) for t in wanted):
        raise ExportError("The model's own outputs are not finite.", remedy="Check its weights.")
