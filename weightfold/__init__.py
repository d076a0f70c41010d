"""weightfold: networks that find what they hold twice, and fold it away while they train."""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_PUBLIC = {
    "Attract": "weightfold.methods.attract",
    "ChannelGraph": "weightfold.graph",
    "ChannelGroup": "weightfold.graph",
    "Compressor": "weightfold.compressor",
    "Event": "weightfold.history",
    "Fold": "weightfold.methods.fold",
    "Ledger": "weightfold.ledger",
    "Lump": "weightfold.methods.lump",
    "Palette": "weightfold.methods.palette",
    "Prune": "weightfold.methods.prune",
    "SelfCompress": "weightfold.methods.self_compress",
    "Tie": "weightfold.methods.tie",
    "export": "weightfold.export",
    "load": "weightfold.export",
    "palettize": "weightfold.methods.palette",
    "save": "weightfold.export.own",
    "save_compressed": "weightfold.export",
    "trace": "weightfold.graph",
}

__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str) -> Any:
    """Import the public names when they are first used: importing the package imports nothing heavy."""
    if name == "export":
        return importlib.import_module(_PUBLIC[name])
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'weightfold' has no attribute {name!r}")
