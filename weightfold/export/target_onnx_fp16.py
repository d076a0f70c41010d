"""Target `onnx-fp16`: ONNX with weights and sums in 16 bits, for hardware that has them; inputs and outputs in fp32.

ONNX Runtime's CPU kernels compute most of it in fp32 between casts: there it saves bytes, not time.
"""

from __future__ import annotations

from pathlib import Path

from weightfold.errors import ExportError
from weightfold.export.check import Exported, verified
from weightfold.export.onnx_graph import save_onnx, to_onnx
from weightfold.export.source import Source
from weightfold.runtime.onnx_runtime import load_onnx
from weightfold.runtime.require import quiet, require

SUFFIX = ".onnx"
IN_SINGLE = True
RELATIVE = 0.01
_LARGEST = 65504.0


def write(source: Source, path: Path) -> None:
    """Write the file.

    Raises:
        ExportError: a weight is too large for 16 bits; names it.
    """
    for name, tensor in source.model.state_dict().items():
        if tensor.is_floating_point() and tensor.numel() and float(tensor.abs().max()) > _LARGEST:
            raise ExportError(
                f"'{name}' holds {float(tensor.abs().max()):.3g}; 16 bits end at {_LARGEST:g}.",
                remedy="Export it as onnx, the nearest target that can.",
            )
    model = to_onnx(source)
    with quiet():
        convert = require("onnxruntime.transformers.float16").convert_float_to_float16
        save_onnx(convert(model, keep_io_types=True), path)


def verify(source: Source, path: Path, tolerance: float | None = None) -> Exported:
    """Run the file in ONNX Runtime and compare."""
    return verified(source, load_onnx(path), "onnx-fp16", rms=RELATIVE if tolerance is None else tolerance)
