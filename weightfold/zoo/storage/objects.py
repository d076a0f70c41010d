"""Blobs under the SHA-256 of their bytes: written whole or not at all, verified on every read, swept beside writers.

A writer holds a shared lock from its first blob until the catalogue names it; the sweep takes the lock alone. So no
blob that a running writer is about to name is ever swept, and the kernel drops the lock of a process that was killed.
Where files cannot be locked (no `fcntl`), only blobs older than a day are swept.

    blobs/3f/3f8a…  | lock
"""

from __future__ import annotations

import hashlib
import os
import secrets
import time
from collections.abc import Callable, Iterator, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from weightfold.artifact.files import make_folder, sync, unwritable
from weightfold.errors import ArtifactError

try:
    import fcntl
except ImportError:  # not a POSIX system
    fcntl = None

OLD_S = 86_400.0
"""Age in seconds beyond which a blob may be swept where files cannot be locked."""
WAIT_S = 30.0
"""How long a sweep waits for writers."""
_FANS = tuple(f"{n:02x}" for n in range(256))
_PARALLEL = 16


@dataclass(frozen=True)
class Swept:
    """What a sweep took away.

    Args:
        n_files: blobs that nothing names, and drafts of writers that were killed.
        n_bytes: their size.
    """

    n_files: int = 0
    n_bytes: int = 0


class Objects:
    """The blobs of one folder.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     objects = Objects(Path(folder))
        ...     objects.prepare()
        ...     with objects.lease():
        ...         digest = objects.put(b"whole")
        ...     objects.read(digest), objects.sweep(set).n_files
        (b'whole', 1)
    """

    def __init__(self, folder: Path, *, readonly: bool = False) -> None:
        self.folder, self.readonly = folder, readonly
        self._blobs = folder / "blobs"
        self._lock = folder / "lock"

    def prepare(self) -> None:
        """Make the folders; harmless where they are there.

        Raises:
            ArtifactError: they cannot be made; names the folder.
        """
        made = [fan for fan in _FANS if not (self._blobs / fan).is_dir()]
        for fan in made:
            make_folder(self._blobs / fan)
        try:
            self._lock.touch()
            if made:
                sync(self._blobs)
                sync(self.folder)
        except OSError as error:
            raise unwritable(self._lock, error) from None

    @contextmanager
    def lease(self) -> Iterator[None]:
        """Keep the sweep away while blobs are written and not yet named, or named and being read."""
        if self.readonly and not self._lock.is_file():  # nobody can sweep what nobody can write
            yield
            return
        with _locked(self._lock, alone=False):
            yield

    def path(self, digest: str) -> Path:
        """Where a blob lies."""
        return self._blobs / digest[:2] / digest

    def put(self, data: bytes) -> str:
        """Write one blob, durable on return; see `put_many`."""
        return self.put_many([data])[0]

    def put_many(self, blobs: Sequence[bytes]) -> list[str]:
        """Write blobs, durable on return. Call it within `lease`.

        A blob that is there already is kept if its bytes are right, and written anew if they are not.

        Returns:
            digests: SHA-256 of each, in hex.
        Raises:
            ArtifactError: the disk is full, or the folder cannot be written; drafts are gone then.
        """
        self._check_writable()
        digests = [hashlib.sha256(data).hexdigest() for data in blobs]
        wanted = dict(zip(digests, blobs, strict=True))
        missing = {d: data for d, data in wanted.items() if not self._holds(d, data)}
        drafts = {d: self.path(d).with_name(f".{d}.{os.getpid()}-{secrets.token_hex(4)}") for d in missing}
        try:
            _write_all([(drafts[d], data) for d, data in missing.items()])
            for digest, draft in drafts.items():
                draft.replace(self.path(digest))
            _each(sync, sorted({self.path(digest).parent for digest in wanted}))
        except OSError as error:
            raise unwritable(self._blobs, error) from None
        finally:
            for draft in drafts.values():
                draft.unlink(missing_ok=True)
        return digests

    def read(self, digest: str) -> bytes:
        """Read a blob and check it.

        Raises:
            ArtifactError: it is missing, cannot be read, or its bytes were changed; names the file.
        """
        path = self.path(digest)
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            raise ArtifactError(f"The blob '{path}' is missing.") from None
        except OSError as error:
            raise ArtifactError(f"The blob '{path}' cannot be read: {error.strerror or error}.") from None
        if hashlib.sha256(data).hexdigest() != digest:
            raise ArtifactError(f"The blob '{path}' was changed or cut off: its bytes have another digest.")
        return data

    def unnamed(self, named: Set[str]) -> list[Path]:
        """Files that are no blob among those named: left by writers that were killed, or of contents that moved."""
        return [file for fan in _FANS for file in _files(self._blobs / fan) if file.name not in named]

    def sweep(self, named: Callable[[], Set[str]], wait_s: float = WAIT_S) -> Swept | None:
        """Delete what nobody names.

        Args:
            named: reads the digests of all named blobs; called while no writer runs.
            wait_s: how long to wait for writers and readers to leave.
        Returns:
            swept: what was deleted; None where somebody was at work all the time.
        """
        self._check_writable()
        with _locked(self._lock, alone=True, wait_s=wait_s) as held:
            return self._delete(self.unnamed(named())) if held else None

    def _check_writable(self) -> None:
        if self.readonly:
            raise ArtifactError(
                f"The zoo '{self.folder}' was opened for reading only.",
                remedy="Copy it to a folder that can be written, and change the copy.",
            )

    def _delete(self, files: Sequence[Path]) -> Swept:
        n_files = n_bytes = 0
        for file in files:
            try:
                about = file.stat()
                if fcntl is None and time.time() - about.st_mtime < OLD_S:
                    continue
                file.unlink()
            except OSError:
                continue
            n_files, n_bytes = n_files + 1, n_bytes + about.st_size
        return Swept(n_files, n_bytes)

    def _holds(self, digest: str, data: bytes) -> bool:
        path = self.path(digest)
        try:
            return path.stat().st_size == len(data) and path.read_bytes() == data
        except OSError:
            return False


def _write_all(files: Sequence[tuple[Path, bytes]]) -> None:
    """Write files first and flush them afterwards, many at a time: the disk's journal then takes them together."""
    for path, data in files:
        path.write_bytes(data)
    _each(sync, [path for path, _ in files])


def _each(work: Callable[[Path], None], paths: Sequence[Path]) -> None:
    if len(paths) < 2:
        for path in paths:
            work(path)
        return
    with ThreadPoolExecutor(min(_PARALLEL, len(paths))) as pool:
        for _ in pool.map(work, paths):
            pass


def _files(folder: Path) -> list[Path]:
    try:
        return [Path(entry.path) for entry in os.scandir(folder) if entry.is_file(follow_symlinks=False)]
    except OSError:
        return []


@contextmanager
def _locked(path: Path, *, alone: bool, wait_s: float | None = None) -> Iterator[bool]:
    """Hold a lock on a file, shared or alone; without `wait_s` for as long as it takes."""
    if fcntl is None:
        yield True
        return
    try:
        handle = os.open(path, os.O_RDONLY)
    except OSError as error:
        raise ArtifactError(
            f"'{path}' cannot be opened: {error.strerror or error}.", remedy="Is the folder a zoo that you may read?"
        ) from None
    try:
        yield _lock(handle, fcntl.LOCK_EX if alone else fcntl.LOCK_SH, wait_s)
    finally:
        os.close(handle)


def _lock(handle: int, how: int, wait_s: float | None) -> bool:
    assert fcntl is not None
    if wait_s is None:
        fcntl.flock(handle, how)
        return True
    end = time.monotonic() + wait_s
    while True:
        try:
            fcntl.flock(handle, how | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() >= end:
                return False
            time.sleep(0.01)
