"""Target `safetensors`: the weights, with what is needed to rebuild the module; the format that `load` reads."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from weightfold.export.check import Exported, verified
from weightfold.export.source import Source

SUFFIX = ".safetensors"


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
    )


def verify(source: Source, path: Path, tolerance: float | None = None) -> Exported:
    """Rebuild the module from the file alone and compare."""
    from weightfold.export.saved import load

    rebuilt: nn.Module = load(path, source.fresh() if source.fresh else None)
    config = getattr(rebuilt, "config", None)
    if getattr(config, "use_cache", None):
        setattr(config, "use_cache", False)  # noqa: B010 (a configuration of any class)
    return verified(
        source, rebuilt, "safetensors", largest=tolerance or 0.0, any_batch=True, runtime="weightfold.load", sizes=False
    )
