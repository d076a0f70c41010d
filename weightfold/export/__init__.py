"""Saved models and files for other runtimes, each loaded back and compared before it gets its name."""

from weightfold.blueprint import Blueprint
from weightfold.export.check import Exported
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
    "load",
    "load_packed",
    "promised_packed_bytes",
    "save_compressed",
    "save_model",
    "save_packed",
]
