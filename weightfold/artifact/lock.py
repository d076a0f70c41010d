"""One writer a folder: a lock that dies with its process, and says who holds it.

The lock is the kernel's, on a file in the folder; so it is free the moment its process is gone, however it went. What
the file holds is for people, and a mark: where it was left behind, a process was killed at work here. Where files
cannot be locked (no `fcntl`), nobody is kept out.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from weightfold.artifact.files import unwritable
from weightfold.errors import ConfigError

try:
    import fcntl
except ImportError:  # not a POSIX system
    fcntl = None

PATIENCE_S = 0.5
"""How long to try: somebody may only be looking whether the lock is held."""
_LARGEST = 1 << 16


@dataclass(eq=False)
class Lock:
    """A lock that is held.

    Args:
        path: its file.
        left: what a process that was killed had stated; None where none was.
    """

    path: Path
    left: Mapping[str, Any] | None
    _handle: int

    def state(self, what: str, **facts: Any) -> None:
        """Write who works here and at what; on the disk when this returns."""
        since = datetime.now().astimezone().isoformat(sep=" ", timespec="seconds")
        data = json.dumps({"pid": os.getpid(), "since": since, "what": what, **facts}).encode()
        try:
            os.ftruncate(self._handle, 0)
            os.pwrite(self._handle, data, 0)
            os.fsync(self._handle)
        except OSError as error:
            raise unwritable(self.path, error) from None


@contextmanager
def locked(path: Path) -> Iterator[Lock]:
    """Hold the lock on a file for a block; the file is gone afterwards, unless the process was killed.

    Args:
        path: of the lock's own file, in a folder that is there.
    Raises:
        ConfigError: another process holds it; names it and since when.
        ArtifactError: the file cannot be made.
    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder, "lock")
        ...     with locked(path) as lock:
        ...         lock.state("train")
        ...         try:
        ...             with locked(path):
        ...                 pass
        ...         except ConfigError as error:
        ...             print(f"pid {os.getpid()}, weightfold train, since" in error.message)
        ...     path.exists()
        True
        False
    """
    handle = _taken(path)
    try:
        yield Lock(path, _stated(path), handle)
    finally:
        path.unlink(missing_ok=True)  # while it is held: who opened this very file before sees that it is gone
        os.close(handle)


def look(path: Path) -> Mapping[str, Any] | None:
    """What a process that was killed has left in a lock's file; None where there is no such file.

    Raises:
        ConfigError: a process holds the lock.
    """
    try:
        handle = os.open(path, os.O_RDONLY)
    except OSError:
        return None
    try:
        if fcntl is not None:
            fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return _stated(path)
    except BlockingIOError:
        raise _held(path) from None
    finally:
        os.close(handle)


def _taken(path: Path) -> int:
    """Open and lock a file that still has its name once it is locked."""
    end = time.monotonic() + PATIENCE_S
    while True:
        try:
            handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise unwritable(path, error) from None
        if _try(handle):
            if _is(path, handle):
                return handle
        elif time.monotonic() >= end:
            os.close(handle)
            raise _held(path)
        os.close(handle)
        time.sleep(0.01)


def _try(handle: int) -> bool:
    if fcntl is None:
        return True
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is(path: Path, handle: int) -> bool:
    """Whether a file still lies under its name: its last holder may have removed it."""
    with suppress(OSError):
        return os.path.samestat(path.stat(), os.fstat(handle))
    return False


def _stated(path: Path) -> Mapping[str, Any] | None:
    """What a lock's file holds; None where it is empty, for then nothing was begun."""
    with suppress(OSError, ValueError, RecursionError):
        if path.stat().st_size <= _LARGEST:
            found = json.loads(path.read_bytes())
            return found if isinstance(found, dict) else None
    return None


def _held(path: Path) -> ConfigError:
    for _ in range(10):  # its holder may be about to write who it is
        found = _stated(path)
        if found is not None:
            break
        time.sleep(0.02)
    else:
        found = {}
    who = f"pid {found['pid']}, weightfold {found.get('what')}, since {found.get('since')}" if "pid" in found else ""
    return ConfigError(
        f"Another process is at work in '{path.parent}'{f' ({who})' if who else ''}.",
        remedy="Wait until it has ended, or choose another folder.",
    )
