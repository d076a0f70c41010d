"""Target `pt2`: PyTorch's own exported program, which `torch.export.load` runs without the model's code."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import torch

from weightfold.export.check import Exported, verified
from weightfold.export.program import takes_any_batch, to_program
from weightfold.export.source import Source
from weightfold.runtime.opened import load_program
from weightfold.runtime.require import quiet

SUFFIX = ".pt2"
RELATIVE = 1e-5


def write(source: Source, path: Path) -> None:
    """Write the file."""
    program = to_program(source)
    buffer = io.BytesIO()  # a file's own name would go into it
    with quiet():
        torch.export.save(program, buffer)
    path.write_bytes(buffer.getvalue())


def verify(source: Source, path: Path, tolerance: float | None = None) -> Exported:
    """Load the file and compare."""
    program = load_program(path)
    module: Any = program.module()
    relative = RELATIVE if tolerance is None else tolerance
    return verified(
        source,
        lambda *args, **named: module(*args, **named),
        "pt2",
        largest=relative,
        any_batch=takes_any_batch(program),
        runtime=f"torch.export {torch.__version__}",
    )
