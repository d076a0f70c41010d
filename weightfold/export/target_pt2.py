"""Target `pt2`: PyTorch's own exported program, which `torch.export.load` runs without the model's code."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from weightfold.errors import ExportError
from weightfold.export.check import Exported, compare, trials
from weightfold.export.program import quiet, takes_any_batch, to_program
from weightfold.export.source import Source

SUFFIX = ".pt2"
RELATIVE = 1e-5


def write(source: Source, path: Path) -> None:
    """Write the file."""
    program = to_program(source)
    with quiet():
        torch.export.save(program, path)


def verify(source: Source, path: Path) -> Exported:
    """Load the file and compare."""
    try:
        with quiet():
            program = torch.export.load(path)
    except Exception as error:  # a broken program fails in many ways
        raise ExportError(f"torch.export.load cannot read what was written: {error}") from error
    module: Any = program.module()
    any_batch = takes_any_batch(program)
    arguments = trials(source.inputs, any_batch=any_batch)
    difference, tolerance = compare(source.model, lambda a: module(*a[0], **a[1]), arguments, relative=RELATIVE)
    return Exported(
        path, "pt2", path.stat().st_size, difference, tolerance, any_batch, f"torch.export {torch.__version__}"
    )
