"""ONNX files in ONNX Runtime, on the CPU."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from weightfold.errors import ArtifactError, ExportError
from weightfold.runtime.loaded import Loaded, Slot
from weightfold.runtime.require import require

_KINDS = {"tensor(float)": "float32", "tensor(float16)": "float16", "tensor(double)": "float64"}
_MISSING = re.compile(r"[Cc]ould not find an implementation for (?:the node )?(?:\S+:)?(\w+)\(\d+\)")


def load_onnx(path: str | Path, *, threads: int | None = None) -> Loaded:
    """Load an ONNX file.

    Args:
        path: the file.
        threads: of one operator; the runtime's own choice by default. With 1 nothing runs beside it.
    Raises:
        ArtifactError: the file is missing, or is no ONNX.
        ExportError: ONNX Runtime is not installed, or cannot run an operator; names it.
    """
    path = Path(path)
    if not path.is_file():
        raise ArtifactError(f"There is no model file '{path}'.", remedy="Check the path.")
    return session(str(path), path, threads=threads)


def session(data: str | bytes, path: Path, *, threads: int | None = None) -> Loaded:
    """Load an ONNX file by its path or its bytes; see `load_onnx`."""
    runtime = require("onnxruntime")
    options = runtime.SessionOptions()
    options.log_severity_level = 3
    if threads is not None:
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
    try:
        opened = runtime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # the runtime raises classes of its own
        raise _refusal(error, path) from error
    slots = tuple(
        Slot(item.name, tuple(_size(size) for size in item.shape), _KINDS.get(item.type, ""))
        for item in opened.get_inputs()
    )
    names = [slot.name for slot in slots]

    def run(values: list[Any]) -> list[Any]:
        return opened.run(None, dict(zip(names, values, strict=True)))

    return Loaded(path, f"onnxruntime {runtime.__version__}", slots, run)


def _size(size: Any) -> int | None:
    return size if isinstance(size, int) else None


def _refusal(error: Exception, path: Path) -> ExportError | ArtifactError:
    text = str(error).strip()
    missing = _MISSING.search(text)
    if missing:
        return ExportError(
            f"ONNX Runtime has no kernel on the CPU for the operator '{missing[1]}' with these types.",
            remedy="Compute that in float32 in the model, or export it as pt2, the nearest target that can.",
        )
    if "INVALID_PROTOBUF" in text or "Protobuf parsing failed" in text:
        return ArtifactError(f"'{path}' is no ONNX file, or is cut off.", remedy="Copy or write it again.")
    return ExportError(f"ONNX Runtime cannot read '{path}': {text[:300]}")
