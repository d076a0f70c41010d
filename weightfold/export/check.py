"""Compare what a written file computes with what the module computes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from weightfold.artifact import Input
from weightfold.errors import ExportError
from weightfold.export.example import Arguments, draw

BATCHES = (1, 3)
"""Batch sizes that a file is tried with, if it takes any."""


@dataclass(frozen=True)
class Exported:
    """What was written, and how well it agrees.

    Args:
        path: the file.
        target: its kind.
        size_bytes: of the file.
        largest_difference: between any two outputs, absolute.
        tolerance: what was allowed.
        any_batch: whether the file takes batches of any size.
        runtime: what loaded and ran it.
    """

    path: Path
    target: str
    size_bytes: int
    largest_difference: float
    tolerance: float
    any_batch: bool
    runtime: str


Run = Callable[[Arguments], Any]
"""Runs a loaded file on positional and keyword arguments."""


def trials(inputs: Sequence[Input], *, any_batch: bool) -> list[Arguments]:
    """Draw the inputs that a file is tried with."""
    sizes = BATCHES if any_batch else (None,)
    return [draw(inputs, seed=seed, batch=batch) for seed, batch in enumerate(sizes)]


def compare(model: nn.Module, run: Run, arguments: Sequence[Arguments], *, relative: float) -> tuple[float, float]:
    """Find the largest difference between a module and a loaded file.

    Args:
        model: in evaluation mode.
        run: the loaded file.
        arguments: what both are given.
        relative: allowed difference, as a share of the largest output.
    Returns:
        difference, tolerance: absolute.
    Raises:
        ExportError: the outputs differ in number or shape, are not finite, or differ by more than the tolerance.
    """
    largest, scale = 0.0, 1.0
    for args, named in arguments:
        with torch.no_grad():
            wanted = outputs_of(model(*args, **named))
        got = outputs_of(run((args, named)))
        _check_alike(wanted, got)
        for ours, theirs in zip(wanted, got, strict=True):
            scale = max(scale, ours.abs().max().item() if ours.numel() else 0.0)
            largest = max(largest, (ours - theirs).abs().max().item() if ours.numel() else 0.0)
    tolerance = relative * scale
    if not largest <= tolerance:
        raise ExportError(
            f"The written file computes something else: outputs differ by up to {largest:.3g}; "
            f"{tolerance:.3g} is allowed.",
            remedy="The file was removed. Please report the model that shows this.",
        )
    return largest, tolerance


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
