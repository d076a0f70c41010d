"""Target `safetensors`: the weights, with what is needed to rebuild the module; the format that `load` reads."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from weightfold.artifact import read_header
from weightfold.export.check import Exported, verified
from weightfold.export.embedded import PROGRAM, program_text
from weightfold.export.source import Source

SUFFIX = ".safetensors"
WITHOUT_CLASS = 1e-5
"""Allowed difference of the outputs of the graph in the file, as a share of the largest."""


def write(source: Source, path: Path) -> None:
    """Write the file."""
    from weightfold.export.saved import save_model

    save_model(
        source.model,
        path,
        before=source.before,
        builder=source.builder,
        inputs=source.inputs,
        ledger_head=source.ledger_head,
        program=None if source.builder.kind == "built-in" else program_text(source),
    )


def verify(source: Source, path: Path, tolerance: float | None = None) -> Exported:
    """Rebuild the module from the file alone and compare."""
    from weightfold.export.saved import load

    if source.builder.kind != "built-in" and PROGRAM in read_header(path).metadata:
        graph = load(path)
        found = verified(
            source,
            graph,
            "safetensors",
            largest=WITHOUT_CLASS,
            any_batch=False,
            runtime="weightfold.load, by its graph",
        )
        if source.fresh is None:
            return found
    rebuilt: nn.Module = load(path, source.fresh() if source.fresh else None)
    config = getattr(rebuilt, "config", None)
    if getattr(config, "use_cache", None):
        setattr(config, "use_cache", False)  # noqa: B010 (a configuration of any class)
    return verified(
        source, rebuilt, "safetensors", largest=tolerance or 0.0, any_batch=True, runtime="weightfold.load", sizes=False
    )
