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
from weightfold.export.single import in_single
from weightfold.export.source import Source

TARGETS = (
    "safetensors",
    "packed",
    "pt2",
    "onnx",
    "onnx-fp16",
    "onnx-int8",
    "onnx-int4",
    "onnx-int2",
    "openvino",
)


def export(
    source: Source,
    target: str,
    path: str | Path,
    *,
    tolerance: float | None = None,
    prefer: str | None = None,
) -> Exported:
    """Write a model as a file of one target.

    The file gets its name only after the target's own runtime has loaded it and computed what the module computes; on
    any failure nothing is left, and an older file of that name stays.

    Args:
        source: the model and what is known of it.
        target: one of `TARGETS`.
        path: the file.
        tolerance: allowed difference of the outputs, as a share of the largest one, or of their norm where the target
            rounds; by default the target's own.
        prefer: for a target that trades them ("onnx-int8"): "speed", by default, or "size".
    Returns:
        exported: sizes, how well outputs agree, and what else is to be known of the file.
    Raises:
        ConfigError: the target is unknown, the file's ending is that of another one, or there is nothing to prefer.
        ExportError: the model cannot be expressed, a runtime is not installed, or the file computes something else.
        ArtifactError: the file cannot be written.
    """
    path = Path(path)
    module = _target(target)
    if path.suffix != module.SUFFIX:
        raise ConfigError(f"A file of the target '{target}' must end in '{module.SUFFIX}'. Got '{path}' instead.")
    chosen = _chosen(target, module, prefer)
    if not source.inputs:
        raise ExportError(
            "There is no example input to compare outputs with.", remedy="Pass one with --example, such as 1x3x32x32."
        )
    make_folder(path.parent)
    with _without_cache(source.model), drafting(path) as draft, _beside(module, draft, path) as beside:
        given, notes = in_single(source) if getattr(module, "IN_SINGLE", False) else (source, ())
        told = module.write(given, draft, **chosen)
        exported: Exported = module.verify(given, draft, tolerance)
        size_bytes = sum(file.stat().st_size for file in (draft, *beside))
    return replace(exported, path=path, size_bytes=size_bytes, notes=(*notes, *(told or ())))


@contextmanager
def _beside(module: ModuleType, draft: Path, path: Path) -> Iterator[list[Path]]:
    """Files that belong to the draft: they take the wanted name when it is done, just before it does, or go."""
    endings = getattr(module, "COMPANIONS", ())
    files = [draft.with_suffix(ending) for ending in endings]
    try:
        yield files
        for file, ending in zip(files, endings, strict=True):
            file.replace(path.with_suffix(ending))
    finally:
        for file in files:
            file.unlink(missing_ok=True)


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


def _chosen(target: str, module: ModuleType, prefer: str | None) -> dict[str, str]:
    """What a target is told of the user's preference."""
    choices = getattr(module, "PREFERENCES", ())
    if prefer is None:
        return {}
    if not choices:
        raise ConfigError(
            f"The target '{target}' trades nothing: prefer='{prefer}' says nothing to it.", remedy="Leave it out."
        )
    if prefer not in choices:
        raise ConfigError(f"prefer must be one of {', '.join(choices)}. Got '{prefer}' instead.")
    return {"prefer": prefer}


def _target(name: str) -> ModuleType:
    if name not in TARGETS:
        raise ConfigError(f"There is no export target '{name}'.", remedy=nearest(name, TARGETS))
    return importlib.import_module(f"weightfold.export.target_{name.replace('-', '_')}")
