"""The one file that an interrupted run goes on from: safetensors with JSON in its metadata, replaced at one stroke."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save

from weightfold.artifact import read_header, write_bytes
from weightfold.audit.folder import CHECKPOINT
from weightfold.errors import ArtifactError
from weightfold.training.nested import join, split

NAME = CHECKPOINT
KEY = "weightfold.checkpoint"
FORMAT = 1


def write_checkpoint(folder: Path, state: dict[str, Any]) -> None:
    """Write the state of a run, in place of an earlier one.

    Raises:
        ArtifactError: the disk is full or the folder cannot be written; the earlier checkpoint stays.
    """
    plain, tensors = split(state)
    text = json.dumps({"format": FORMAT, "state": plain})
    write_bytes(folder / NAME, save(tensors, metadata={KEY: text}))


def read_checkpoint(folder: Path) -> dict[str, Any] | None:
    """Read the state of an interrupted run; None if it was interrupted before the first checkpoint.

    Raises:
        ArtifactError: the file is corrupt or of another version.
    """
    path = folder / NAME
    if not path.exists():
        return None
    text = read_header(path).metadata.get(KEY)
    if text is None:
        raise ArtifactError(f"'{path}' is no checkpoint of a run.", remedy="Start the run anew with --force.")
    content = json.loads(text)
    if content.get("format") != FORMAT:
        raise ArtifactError(f"'{path}' has format {content.get('format')}, not {FORMAT}.", remedy="Start anew.")
    try:
        return join(content["state"], load_file(path))
    except (SafetensorError, OSError, KeyError) as error:
        raise ArtifactError(f"'{path}' is corrupt: {error}", remedy="Start the run anew with --force.") from None
