"""One network in one runtime: a file written for it, loaded back there, ready to be called."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from weightfold.export.packed import save_packed
from weightfold.export.source import Source
from weightfold.export.targets import export
from weightfold.runtime import load_file

ENGINES = ("torch", "torch.compile", "onnx", "onnx-int8", "openvino")
FILES = {"torch": "safetensors", "torch.compile": "pt2", "onnx": "onnx", "onnx-int8": "onnx", "openvino": "xml"}
LOOSE = 1.0
"""Tolerance of files whose outputs are only timed."""


@dataclass(frozen=True, eq=False)
class Ready:
    """A network in a runtime.

    Args:
        path: its file.
        file_bytes: of all files that it needs.
        run: called with an input.
        difference: of its outputs to the module's, as a share of their norm; None where nothing was written.
    """

    path: Path
    file_bytes: int
    run: Callable[[Any], Any]
    difference: float | None


def ready(source: Source, engine: str, folder: Path, name: str, *, threads: int) -> Ready:
    """Write a network for a runtime and load it.

    Args:
        engine: one of `ENGINES`; "torch.compile" is only written, and runs in a process of its own.
        folder: where files go.
        name: of the file, without ending.
    Raises:
        ExportError: the runtime is missing, or cannot express the network.
    """
    path = folder / f"{name}-{engine}.{FILES[engine]}"
    if engine == "torch":
        return Ready(path, _saved_bytes(source, path), _module(source), None)
    target = {"torch.compile": "pt2"}.get(engine, engine)
    tolerance = LOOSE if engine == "onnx-int8" else None
    if engine == "onnx-int8" and not source.real:
        source = replace(source, calibration="drawn")
    exported = export(source, target, path, tolerance=tolerance)
    run = load_file(path, threads=threads) if engine != "torch.compile" else load_file(path)
    return Ready(path, exported.size_bytes, run, exported.relative_difference)


def _module(source: Source) -> Callable[[Any], Any]:
    def run(x: Any) -> Any:
        with torch.inference_mode():
            return source.model(x)

    return run


def _saved_bytes(source: Source, path: Path) -> int:
    """Bytes of the network as weightfold saves it: packed where it has codes."""
    if source.coded:
        return save_packed(source, source.coded, path.with_suffix(".wfp")).total_bytes
    export(replace(source, calibration=()), "safetensors", path)
    return path.stat().st_size
