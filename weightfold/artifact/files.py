"""Write files so that a reader sees the old one or the whole new one, never a half."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from weightfold.errors import ArtifactError

_REMEDY = "Free space, check the permissions, or choose another folder; nothing half-written was left behind."


@contextmanager
def drafting(path: Path) -> Iterator[Path]:
    """Give a path beside the wanted one to write to; on success the draft takes the wanted name at one stroke.

    The draft keeps the ending of the wanted name: some writers choose the format by it.

    Raises:
        ArtifactError: the folder cannot be written, or the disk is full. The draft is gone then.
    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with drafting(Path(folder, "a.txt")) as draft:
        ...         _ = draft.write_text("whole")
        ...     [file.name for file in Path(folder).iterdir()]
        ['a.txt']
    """
    draft = path.with_name(f".{path.stem}.{os.getpid()}-{secrets.token_hex(4)}{path.suffix}")
    try:
        yield draft
        sync(draft)
        draft.replace(path)
        if os.name == "posix":
            sync(path.parent)
    except OSError as error:
        raise unwritable(path, error) from None
    finally:
        _discard(draft)


def write_bytes(path: Path, data: bytes) -> None:
    """Write a whole file at one stroke; see `drafting`."""
    with drafting(path) as draft:
        draft.write_bytes(data)


def write_json(path: Path, value: Any) -> None:
    """Write plain data as indented JSON at one stroke; see `drafting`."""
    write_bytes(path, (json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode())


def make_folder(path: Path) -> None:
    """Make a folder and those above it.

    Raises:
        ArtifactError: it cannot be made; names it.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise unwritable(path, error) from None


def unwritable(path: Path, error: OSError) -> ArtifactError:
    """Say in one line that a path could not be written, and why."""
    return ArtifactError(f"'{path}' could not be written: {error.strerror or error}.", remedy=_REMEDY)


def sync(path: Path) -> None:
    """Have what was written to a file or folder reach the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _discard(draft: Path) -> None:
    try:
        draft.unlink(missing_ok=True)
    except OSError:
        return
