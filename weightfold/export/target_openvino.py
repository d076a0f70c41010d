"""Target `openvino`: an OpenVINO IR in fp32, `.xml` and `.bin`, by way of ONNX."""

from __future__ import annotations

import tempfile
from pathlib import Path

from weightfold.errors import ExportError
from weightfold.export.check import Exported, verified
from weightfold.export.onnx_graph import save_onnx, to_onnx
from weightfold.export.source import Source
from weightfold.runtime.openvino_runtime import load_openvino
from weightfold.runtime.require import quiet, require

SUFFIX = ".xml"
IN_SINGLE = True
COMPANIONS = (".bin",)
RELATIVE = 1e-4


def write(source: Source, path: Path) -> None:
    """Write both files.

    Raises:
        ExportError: OpenVINO is not installed, or lacks an operator.
    """
    openvino = require("openvino")
    model = to_onnx(source)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "model.onnx")
        save_onnx(model, file)
        try:
            with quiet():
                converted = openvino.convert_model(str(file))
        except Exception as error:  # the converter raises classes of its own
            raise ExportError(
                f"OpenVINO cannot express the model: {str(error).strip()[:300]}",
                remedy="Export it as onnx, the nearest target that can.",
            ) from error
        openvino.save_model(converted, str(path), compress_to_fp16=False)


def verify(source: Source, path: Path, tolerance: float | None = None) -> Exported:
    """Run the file in OpenVINO and compare."""
    return verified(source, load_openvino(path), "openvino", largest=RELATIVE if tolerance is None else tolerance)
