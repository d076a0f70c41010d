"""Saved models and files for other runtimes, each loaded back and compared before it gets its name.

The package is also a function, `weightfold.export(model, path, example)`: a network of one's own in one line.
"""

import sys
from types import ModuleType

from weightfold.blueprint import Blueprint
from weightfold.export.check import Exported
from weightfold.export.own import export_network
from weightfold.export.own import save as save_network
from weightfold.export.packed import load_packed, promised_packed_bytes, save_compressed, save_packed
from weightfold.export.saved import load, save_model
from weightfold.export.source import Source
from weightfold.export.targets import TARGETS, export

__all__ = [
    "TARGETS",
    "Blueprint",
    "Exported",
    "Source",
    "export",
    "export_network",
    "load",
    "load_packed",
    "promised_packed_bytes",
    "save_compressed",
    "save_model",
    "save_network",
    "save_packed",
]


class _Callable(ModuleType):
    """This package, called: `weightfold.export` names the package and the function alike."""

    __call__ = staticmethod(export_network)


sys.modules[__name__].__class__ = _Callable
