"""Load a file by what its name ends in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from weightfold.config import nearest
from weightfold.errors import ArtifactError, ConfigError
from weightfold.runtime.require import quiet

SUFFIXES = (".onnx", ".pt2", ".xml")
"""Files that a runtime of their own runs."""


def load_file(path: str | Path, *, threads: int | None = None) -> Any:
    """Load a file in its runtime.

    Args:
        path: `.onnx`, `.pt2`, or the `.xml` of an OpenVINO IR.
        threads: of ONNX Runtime or OpenVINO; PyTorch's are set for the process.
    Returns:
        loaded: called with what the module takes; a `Loaded`, for `.pt2` a module.
    Raises:
        ConfigError: the name ends otherwise.
        ArtifactError: the file is missing or damaged.
        ExportError: the runtime is not installed; says the line that installs it.
    """
    path = Path(path)
    if path.suffix == ".onnx":
        from weightfold.runtime.onnx_runtime import load_onnx

        return load_onnx(path, threads=threads)
    if path.suffix == ".xml":
        from weightfold.runtime.openvino_runtime import load_openvino

        return load_openvino(path, threads=threads)
    if path.suffix == ".pt2":
        return load_program(path).module()
    raise ConfigError(f"No runtime loads '{path}'.", remedy=nearest(path.suffix, SUFFIXES))


def load_program(path: Path) -> Any:
    """Load PyTorch's own exported program.

    Raises:
        ArtifactError: the file is missing or cannot be read.
    """
    import torch

    if not path.is_file():
        raise ArtifactError(f"There is no model file '{path}'.", remedy="Check the path.")
    try:
        with quiet():
            return torch.export.load(path)
    except Exception as error:  # a broken program fails in many ways
        text = str(error).strip().partition("\n")[0]
        raise ArtifactError(f"torch.export.load cannot read '{path}': {text}", remedy="Write it again.") from error
