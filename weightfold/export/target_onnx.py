"""Target `onnx`: a graph in fp32 that ONNX Runtime and many others run."""

from __future__ import annotations

from pathlib import Path

from weightfold.export.check import Exported, verified
from weightfold.export.onnx_graph import save_onnx, to_onnx
from weightfold.export.source import Source
from weightfold.runtime.onnx_runtime import load_onnx

SUFFIX = ".onnx"
IN_SINGLE = True
"""Whether the runtime computes in float32 where the model computes in halves."""
RELATIVE = 1e-4


def write(source: Source, path: Path) -> None:
    """Write the file; the weights lie inside it.

    Raises:
        ExportError: a package is missing, or an operator has no counterpart in ONNX.
    """
    save_onnx(to_onnx(source), path)


def verify(source: Source, path: Path, tolerance: float | None = None) -> Exported:
    """Run the file in ONNX Runtime, in fp32 on the CPU, and compare."""
    return verified(source, load_onnx(path), "onnx", largest=RELATIVE if tolerance is None else tolerance)
