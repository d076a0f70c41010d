"""OpenVINO IR (an .xml and its .bin) in OpenVINO, on the CPU, in float32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from weightfold.errors import ArtifactError, ExportError
from weightfold.runtime.loaded import Loaded, Slot
from weightfold.runtime.require import require


def load_openvino(path: str | Path, *, threads: int | None = None) -> Loaded:
    """Load an OpenVINO IR.

    Args:
        path: the .xml; the .bin lies beside it under the same name.
        threads: of the runtime; its own choice by default.
    Raises:
        ArtifactError: one of the two files is missing.
        ExportError: OpenVINO is not installed, or cannot read them.
    """
    path = Path(path)
    for file in (path, path.with_suffix(".bin")):
        if not file.is_file():
            raise ArtifactError(f"There is no model file '{file}'.", remedy="An IR is two files, .xml and .bin.")
    openvino = require("openvino")
    settings: dict[str, Any] = {"INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY"}
    if threads is not None:
        settings["INFERENCE_NUM_THREADS"] = threads
    try:
        core = openvino.Core()
        compiled = core.compile_model(core.read_model(str(path)), "CPU", settings)
    except Exception as error:  # the runtime raises classes of its own
        raise ExportError(f"OpenVINO cannot read '{path}': {str(error).strip()[:300]}") from error
    slots = tuple(
        Slot(item.get_any_name(), tuple(int(d.get_length()) if d.is_static else None for d in item.get_partial_shape()))
        for item in compiled.inputs
    )
    request = compiled.create_infer_request()

    def run(values: list[Any]) -> list[Any]:
        found = request.infer(values, share_inputs=True)
        return [found[output].copy() for output in compiled.outputs]

    return Loaded(path, f"openvino {openvino.__version__.partition('-')[0]}", slots, run)
