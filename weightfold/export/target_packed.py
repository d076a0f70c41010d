"""Target `packed`: the codes and steps of a quantised network in as few bytes as they take."""

from __future__ import annotations

from pathlib import Path

from weightfold.artifact.packed import SUFFIX
from weightfold.errors import ExportError
from weightfold.export.check import Exported, verified
from weightfold.export.packed import load_packed, save_packed
from weightfold.export.source import Source

__all__ = ["SUFFIX", "verify", "write"]


def write(source: Source, path: Path) -> None:
    """Write the codes; the module must hold exactly their values.

    Raises:
        ExportError: the model has no codes, or other values than they say.
    """
    if not source.coded:
        raise ExportError(
            f"'{source.builder.name}' has no codes: its weights are floats, and a packed file holds whole numbers.",
            remedy="Train with: weightfold train DATA --method self-compress --target SIZE. Or pass --to safetensors.",
        )
    save_packed(source, source.coded, path)


def verify(source: Source, path: Path, tolerance: float | None = None) -> Exported:
    """Rebuild the module from the file alone and compare: not one bit may differ, unless so much is allowed."""
    rebuilt = load_packed(path, source.fresh() if source.fresh else None)
    return verified(
        source, rebuilt, "packed", largest=tolerance or 0.0, any_batch=True, runtime="weightfold.load", sizes=False
    )
