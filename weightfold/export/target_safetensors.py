"""Target `safetensors`: the weights, with what is needed to rebuild the module; the format that `load` reads."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from weightfold.export.check import Exported, compare, trials
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


def verify(source: Source, path: Path) -> Exported:
    """Rebuild the module from the file alone and compare."""
    from weightfold.export.saved import load

    rebuilt: nn.Module = load(path, source.fresh() if source.fresh else None)
    config = getattr(rebuilt, "config", None)
    if getattr(config, "use_cache", None):
        setattr(config, "use_cache", False)  # noqa: B010 (a configuration of any class)
    arguments = trials(source.inputs, any_batch=False)
    difference, tolerance = compare(source.model, lambda a: rebuilt(*a[0], **a[1]), arguments, relative=0.0)
    return Exported(path, "safetensors", path.stat().st_size, difference, tolerance, True, "weightfold.load")
