"""Write files so that a reader sees the old one or the whole new one, never a half."""

from __future__ import annotations

import json
import os
import re
import secrets
import socket
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from weightfold.errors import ArtifactError

_REMEDY = "Free space, check the permissions, or choose another folder; nothing half-written was left behind."


_DRAFT = re.compile(r"\.(?P<stem>.+)\.(?P<pid>\d+)-(?P<host>[0-9a-f]{4})[0-9a-f]{4}(?P<suffix>(\.[\w-]*)?)")


@contextmanager
def drafting(path: Path) -> Iterator[Path]:
    """Give a path beside the wanted one to write to; on success the draft takes the wanted name at one stroke.

    The draft keeps the ending of the wanted name: some writers choose the format by it. What a process that was killed
    has left of the same file goes.

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
    draft = path.with_name(f".{path.stem}.{os.getpid()}-{_host()}{secrets.token_hex(2)}{path.suffix}")
    try:
        for old in drafts_in(path.parent):
            if drafted(old.name) == path.name and _is_dead(old.name):
                _discard(old)
        yield draft
        sync(draft)
        draft.replace(path)
        if os.name == "posix":
            sync(path.parent)
    except OSError as error:
        raise unwritable(path, error) from None
    finally:
        _discard(draft)


def drafts_in(folder: Path) -> list[Path]:
    """The drafts in a folder, of whatever file and process."""
    try:
        return [Path(entry.path) for entry in os.scandir(folder) if drafted(entry.name)]
    except OSError:
        return []


def drafted(name: str) -> str:
    """The name that a draft is to take; empty for any other file.

    Example:
        >>> drafted(".model.4711-ab12cd34.safetensors"), drafted(".ledger.db.4711-ab12cd34.tmp-wal"), drafted(".bashrc")
        ('model.safetensors', 'ledger.db', '')
    """
    found = _DRAFT.fullmatch(name)
    if found is None:
        return ""
    whole = found["stem"] + ("" if found["suffix"].startswith(".tmp") else found["suffix"])
    return drafted(whole) or whole


def _is_dead(name: str) -> bool:
    """Whether the process of a draft was one of this machine and is gone."""
    found = _DRAFT.fullmatch(name)
    if found is None or found["host"] != _host() or os.name != "posix":
        return False
    try:
        os.kill(int(found["pid"]), 0)
    except ProcessLookupError:
        return True
    except (OSError, OverflowError):
        return False
    return False


def _host() -> str:
    """Four digits of the machine: processes of others cannot be seen from here."""
    return f"{zlib.crc32(socket.gethostname().encode()) & 0xFFFF:04x}"


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
