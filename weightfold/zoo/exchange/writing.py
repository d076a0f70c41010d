"""Give a model of a zoo back as files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import Tensor

from weightfold.artifact.files import make_folder, write_bytes
from weightfold.artifact.format import KEY, parse_structure
from weightfold.errors import ArtifactError
from weightfold.fingerprint import digest as digest_of
from weightfold.zoo.exchange.imports import ENDINGS, KEPT

ENDING = ".safetensors"


def write_model(state: Mapping[str, Tensor], extras: Mapping[str, Any], path: Path) -> Path:
    """Write tensors, and what is known of how to rebuild the model; see `Zoo.get`.

    Args:
        extras: "metadata" of the file and "files" beside it, as they were when the model was added.
    """
    metadata = dict(extras.get("metadata", {}))
    aliases: Mapping[str, str] = {}
    if KEY in metadata:
        structure = parse_structure(metadata[KEY], str(path))
        aliases = structure.aliases
        metadata[KEY] = structure.model_copy(update={"fingerprint": digest_of(state)}).to_json()
    tensors = {name: value.contiguous() for name, value in state.items() if name not in aliases}
    file = path if path.suffix == ENDING else path / f"model{ENDING}"
    if path.suffix != ENDING and not path.is_dir() and (path.exists() or path.suffix in ENDINGS):
        raise ArtifactError(
            f"'{path}' is a file that does not end in {ENDING}.", remedy="Name a folder, or such a file."
        )
    make_folder(file.parent)
    if file is not path:
        for name in KEPT:
            if name in extras.get("files", {}):
                write_bytes(path / name, extras["files"][name].encode())
    write_bytes(file, save(_apart(tensors), metadata or None))
    return file


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copy tensors that are tied without a structure that says so: a file holds each under one name."""
    seen: set[int] = set()
    held = {}
    for name, value in tensors.items():
        held[name] = value.clone() if id(value) in seen else value
        seen.add(id(value))
    return held
