"""Target `onnx`: a graph in fp32 that ONNX Runtime and many others run."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import torch

from weightfold.errors import ExportError
from weightfold.export.check import Exported, compare, trials
from weightfold.export.example import Arguments
from weightfold.export.program import quiet, to_program
from weightfold.export.source import Source

SUFFIX = ".onnx"
RELATIVE = 1e-4
_NEEDS = ("onnx", "onnxscript", "onnxruntime")


def write(source: Source, path: Path) -> None:
    """Write the file; the weights lie inside it.

    Raises:
        ExportError: a package is missing, or an operator has no counterpart in ONNX.
    """
    for name in _NEEDS:
        require(name)
    program = to_program(source)
    try:
        with quiet():
            onnx_program = torch.onnx.export(program, dynamo=True, verbose=False)
            assert onnx_program is not None
            onnx_program.save(path, external_data=False)
    except OSError:
        raise
    except Exception as error:
        text = str(error).strip().partition("\n")[0]
        raise ExportError(
            f"The model cannot be expressed in ONNX: {type(error).__name__}: {text}", remedy="Export it as pt2 instead."
        ) from error


def verify(source: Source, path: Path) -> Exported:
    """Run the file in ONNX Runtime, in fp32 on the CPU, and compare."""
    runtime = require("onnxruntime")
    try:
        session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    except Exception as error:  # the runtime raises classes of its own
        raise ExportError(f"ONNX Runtime cannot read what was written: {error}") from error
    any_batch = all(not isinstance(item.shape[0], int) for item in session.get_inputs() if item.shape)
    names = [item.name for item in session.get_inputs()]

    def run(arguments: Arguments) -> Any:
        values = (*arguments[0], *arguments[1].values())
        return session.run(None, {name: value.numpy() for name, value in zip(names, values, strict=True)})

    arguments = trials(source.inputs, any_batch=any_batch)
    difference, tolerance = compare(source.model, run, arguments, relative=RELATIVE)
    return Exported(
        path, "onnx", path.stat().st_size, difference, tolerance, any_batch, f"onnxruntime {runtime.__version__} fp32"
    )


def require(name: str) -> Any:
    """Import a package that only this target needs.

    Raises:
        ExportError: it is not installed; says the line that installs it.
    """
    try:
        with quiet():
            return importlib.import_module(name)
    except ImportError:
        raise ExportError(
            f"Export to ONNX needs the package '{name}', which is not installed.",
            remedy='pip install "weightfold[export]"',
        ) from None
