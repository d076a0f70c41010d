"""Target `onnx-int2`: ONNX with matrices of 2 bits, for networks that have learned to live with four values."""

from __future__ import annotations

from pathlib import Path

from weightfold.export import target_onnx_int4
from weightfold.export.check import Exported, verified
from weightfold.export.source import Source
from weightfold.runtime.onnx_runtime import load_onnx

SUFFIX = ".onnx"
IN_SINGLE = True
BITS = 2


def write(source: Source, path: Path) -> None:
    """Write the file; see `target_onnx_int4.write`."""
    target_onnx_int4.write(source, path, bits=BITS)


def verify(source: Source, path: Path, tolerance: float | None = None) -> Exported:
    """Run the file in ONNX Runtime and compare."""
    allowed = target_onnx_int4.RELATIVE if tolerance is None else tolerance
    return verified(source, load_onnx(path), "onnx-int2", rms=allowed)
