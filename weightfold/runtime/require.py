"""Import a package that only one runtime needs, or say the line that installs it."""

from __future__ import annotations

import importlib
import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

from weightfold.errors import ExportError

INSTALL = {
    "onnx": 'pip install "weightfold[export]"',
    "onnxscript": 'pip install "weightfold[export]"',
    "onnxruntime": 'pip install "weightfold[export]"',
    "openvino": 'pip install "weightfold[openvino]"',
}
"""The line that installs a package."""

NAMES = {"onnx": "ONNX", "onnxscript": "ONNX", "onnxruntime": "ONNX", "openvino": "OpenVINO"}


def require(name: str) -> Any:
    """Import a package of a runtime.

    Raises:
        ExportError: it is not installed; says the line that installs it.
    Example:
        >>> require("json").dumps(1)
        '1'
    """
    try:
        with quiet():
            return importlib.import_module(name)
    except ImportError:
        raise ExportError(
            f"{NAMES.get(name, 'This')} needs the package '{name.partition('.')[0]}', which is not installed.",
            remedy=INSTALL.get(name.partition(".")[0], f"pip install {name.partition('.')[0]}"),
        ) from None


@contextmanager
def quiet() -> Iterator[None]:
    """Keep the exporters' remarks, logs and progress away from the user; errors still come through."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with (
            warnings.catch_warnings(),
            Path(os.devnull).open("w") as sink,
            redirect_stdout(sink),
            redirect_stderr(sink),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
