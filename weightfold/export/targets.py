"""Write a model for a runtime, load it back there, compare, and only then give the file its name."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import ModuleType

from torch import nn

from weightfold.artifact import drafting, make_folder
from weightfold.config import nearest
from weightfold.errors import ConfigError, ExportError
from weightfold.export.check import Exported
from weightfold.export.source import Source

TARGETS = ("onnx", "pt2", "safetensors")


def export(source: Source, target: str, path: str | Path) -> Exported:
    """Write a model as a file of one target.

    The file gets its name only after the target's own runtime has loaded it and computed what the module computes; on
    any failure nothing is left, and an older file of that name stays.

    Args:
        source: the model and what is known of it.
        target: "safetensors", "pt2" or "onnx".
        path: the file.
    Returns:
        exported: sizes, and the largest difference between the outputs.
    Raises:
        ConfigError: the target is unknown, or the file's ending is that of another one.
        ExportError: the model cannot be expressed, or the file computes something else.
        ArtifactError: the file cannot be written.
    """
    path = Path(path)
    module = _target(target)
    if path.suffix != module.SUFFIX:
        raise ConfigError(f"A file of the target '{target}' must end in '{module.SUFFIX}'. Got '{path}' instead.")
    if not source.inputs:
        raise ExportError(
            "There is no example input to compare outputs with.", remedy="Pass one with --example, such as 1x3x32x32."
        )
    make_folder(path.parent)
    with _without_cache(source.model), drafting(path) as draft:
        module.write(source, draft)
        exported: Exported = module.verify(source, draft)
    return replace(exported, path=path)


@contextmanager
def _without_cache(model: nn.Module) -> Iterator[None]:
    """Have a language model of Hugging Face give its outputs alone, without what it keeps for the next token."""
    config = getattr(model, "config", None)
    used = getattr(config, "use_cache", None)
    if not used:
        yield
        return
    setattr(config, "use_cache", False)  # noqa: B010 (a configuration of any class)
    try:
        yield
    finally:
        setattr(config, "use_cache", used)  # noqa: B010


def _target(name: str) -> ModuleType:
    if name not in TARGETS:
        raise ConfigError(f"There is no export target '{name}'.", remedy=nearest(name, TARGETS))
    return importlib.import_module(f"weightfold.export.target_{name}")
