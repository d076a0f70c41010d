"""The SQLite file under a ledger: its tables, how it is recognised, and the one door through which its errors leave.

The file is never opened but by SQLite: closing any other handle on it would drop the locks of this whole process.
"""

from __future__ import annotations

import os
import secrets
import sqlite3
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from weightfold.errors import LedgerError
from weightfold.ledger.entry import Row, decode
from weightfold.ledger.metric import Metric

APPLICATION_ID = 0x57464C47
"""'WFLG' in the file's header; `file` and SQLite show it."""

FORMAT = 1
"""Version of the tables below, kept in the header's user_version."""

STRUCTURE = "SELECT name, sql FROM sqlite_master WHERE sql IS NOT NULL AND name NOT LIKE 'sqlite%'"
ENTRY_COLUMNS = ", ".join(Row._fields)
METRIC_COLUMNS = ", ".join(Metric._fields)

BUSY_S = 10.0
"""How long a writer waits for another one before it gives up."""

PAGE = 256
"""Rows fetched at a time: no read stays open between two of them, so none holds up a checkpoint."""

SCHEMA = (
    """CREATE TABLE entries (
    seq INTEGER PRIMARY KEY, kind TEXT NOT NULL, time REAL NOT NULL, body TEXT NOT NULL, aside TEXT NOT NULL,
    prev TEXT NOT NULL, hash TEXT NOT NULL, checksum INTEGER NOT NULL)""",
    "CREATE TABLE blobs (id INTEGER PRIMARY KEY, digest TEXT NOT NULL UNIQUE, data BLOB NOT NULL)",
    """CREATE TABLE metrics (
    id INTEGER PRIMARY KEY, step INTEGER NOT NULL, name TEXT NOT NULL, value REAL, checksum INTEGER NOT NULL)""",
    "CREATE INDEX metrics_by_name ON metrics (name)",
    """CREATE TRIGGER entries_follow BEFORE INSERT ON entries
    WHEN NEW.seq IS NOT (SELECT coalesce(max(seq) + 1, 0) FROM entries)
    BEGIN SELECT RAISE(ABORT, 'an entry must follow the last one'); END""",
    """CREATE TRIGGER blobs_once BEFORE INSERT ON blobs
    WHEN EXISTS (SELECT 1 FROM blobs WHERE id = NEW.id OR digest = NEW.digest)
    BEGIN SELECT RAISE(ABORT, 'a blob is written once'); END""",
    """CREATE TRIGGER metrics_once BEFORE INSERT ON metrics
    WHEN EXISTS (SELECT 1 FROM metrics WHERE id = NEW.id)
    BEGIN SELECT RAISE(ABORT, 'a metric is written once'); END""",
    *(
        f"""CREATE TRIGGER {table}_refuse_{verb.lower()} BEFORE {verb} ON {table}
    BEGIN SELECT RAISE(ABORT, 'a ledger is append-only'); END"""
        for table in ("entries", "blobs", "metrics")
        for verb in ("UPDATE", "DELETE")
    ),
)
"""Tables, and the triggers that keep them append-only (INSERT OR REPLACE would pass by those on DELETE)."""

_CODES = {
    sqlite3.SQLITE_FULL: (
        "no space is left for {path}: this write is not recorded; no acknowledged entry was lost ({error}).",
        "Free space on that disk and append again.",
    ),
    sqlite3.SQLITE_IOERR: (
        "{path} could not be read or written: this call counts for nothing; no acknowledged entry was lost ({error}).",
        "Check the space left, the limit on file sizes and the disk, then try again.",
    ),
    sqlite3.SQLITE_BUSY: (
        "{path} is locked by another writer ({error}).",
        "Wait until the other process has finished its write; to read only, open with readonly=True.",
    ),
    sqlite3.SQLITE_READONLY: (
        "{path}, or the folder it is in, cannot be written ({error}).",
        "Open with readonly=True, or change the permissions.",
    ),
    sqlite3.SQLITE_CANTOPEN: (
        "{path} could not be opened ({error}).",
        "Check that the file and its folder exist and may be read.",
    ),
    sqlite3.SQLITE_NOTADB: (
        "{path} is not a ledger, or its header is damaged ({error}).",
        "Check the path; read JSON lines with Ledger.import_jsonl.",
    ),
    sqlite3.SQLITE_TOOBIG: ("a value is larger than {path} can hold ({error}).", "Split the blob."),
    sqlite3.SQLITE_MISUSE: ("a call on {path} was refused ({error}).", "Check the types of its arguments."),
    sqlite3.SQLITE_CONSTRAINT: ("{path} refused the write: {error}.", "Append a new entry instead."),
}
_CODES |= dict.fromkeys((sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_PROTOCOL), _CODES[sqlite3.SQLITE_BUSY])
_DAMAGED = (
    "{path} is damaged or cut short ({error}).",
    "Restore a copy, or import an export in JSON lines with Ledger.import_jsonl.",
)


@contextmanager
def door(path: Path) -> Iterator[None]:
    """Let errors of SQLite out as one LedgerError that names the file and what to do.

    In a damaged file SQLite may quote broken text in its message, and Python then fails to decode the message.
    """
    try:
        yield
    except (sqlite3.Error, UnicodeDecodeError) as error:
        raise explain(error, path) from None


def explain(error: sqlite3.Error | UnicodeDecodeError, path: Path) -> LedgerError:
    """Say in our words what SQLite complains of."""
    unnamed = sqlite3.SQLITE_CORRUPT if isinstance(error, UnicodeDecodeError) else sqlite3.SQLITE_MISUSE
    return _complaint(getattr(error, "sqlite_errorcode", unnamed), str(error), path)


def _complaint(code: int, detail: str, path: Path) -> LedgerError:
    message, remedy = _CODES.get(code & 0xFF, _DAMAGED)
    text = message.format(path=f"'{path}'", error=detail)
    return LedgerError(text[0].upper() + text[1:], remedy=remedy)


def connect(path: Path, *, readonly: bool) -> sqlite3.Connection:
    """Open an existing ledger file, after checking that it is one.

    Raises:
        LedgerError: the file is missing, foreign, damaged, or of a newer format.
    """
    _check_file(path, readonly=readonly)
    with door(path):
        db = _dial_reader(path) if readonly else _dial(path, "mode=rw")
        try:
            _identify(db, path)
            if not readonly:
                db.execute("PRAGMA journal_mode = WAL")
        except BaseException:
            db.close()
            raise
    return db


@contextmanager
def drafting(path: Path, *, replace: bool = False) -> Iterator[Path]:
    """Give a path beside the wanted one to write to; on success the draft takes the wanted name at one stroke.

    Raises:
        LedgerError: the path exists already (unless it may be replaced), or its folder cannot be written.
    """
    draft = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        if not replace:
            _refuse_existing(path)
        yield draft
        _publish(draft, path, replace=replace)
    except FileExistsError:
        raise LedgerError(
            f"'{path}' exists already.", remedy="Open it with Ledger.open, or choose another path."
        ) from None
    except OSError as error:
        raise LedgerError(f"'{path}' could not be written: {error.strerror or error}.") from None
    finally:
        for suffix in ("", "-wal", "-shm", "-journal"):
            _beside(draft, suffix).unlink(missing_ok=True)


@contextmanager
def building(draft: Path, path: Path) -> Iterator[sqlite3.Connection]:
    """Open a draft of the file with our empty tables, in one transaction that ends with the block."""
    with door(path), closing(_dial(draft, "mode=rwc")) as db:
        db.execute("BEGIN IMMEDIATE")
        db.execute(f"PRAGMA application_id = {APPLICATION_ID}")
        db.execute(f"PRAGMA user_version = {FORMAT}")
        for statement in SCHEMA:
            db.execute(statement)
        yield db
        db.execute("COMMIT")
        db.execute("PRAGMA journal_mode = WAL")


def expected_structure() -> dict[str, str]:
    """List the definitions that a file of this format has."""
    with closing(sqlite3.connect(":memory:")) as db:
        for statement in SCHEMA:
            db.execute(statement)
        return dict(db.execute(STRUCTURE))


def insert_entry(db: sqlite3.Connection, row: Row) -> None:
    db.execute(f"INSERT INTO entries ({ENTRY_COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, ?, ?)", row)


def insert_metrics(db: sqlite3.Connection, rows: Iterable[Metric]) -> None:
    db.executemany(f"INSERT INTO metrics ({METRIC_COLUMNS}) VALUES (?, ?, ?, ?)", rows)


def insert_blob(db: sqlite3.Connection, digest: str, data: bytes) -> None:
    db.execute("INSERT INTO blobs (digest, data) VALUES (?, ?)", (digest, data))


def _dial(path: Path, how: str) -> sqlite3.Connection:
    uri = f"{path.as_uri()}?{how}"
    db = sqlite3.connect(uri, uri=True, timeout=BUSY_S, isolation_level=None, check_same_thread=False)
    db.text_factory = decode
    db.execute("PRAGMA cell_size_check = ON")
    db.execute("PRAGMA trusted_schema = OFF")
    db.execute("PRAGMA fullfsync = ON")
    return db


def _dial_reader(path: Path) -> sqlite3.Connection:
    db = _dial(path, "mode=ro")
    try:
        db.execute("SELECT count(*) FROM sqlite_master").fetchone()
    except sqlite3.OperationalError as error:
        db.close()
        if error.sqlite_errorcode & 0xFF not in (sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_READONLY):
            raise
        return _dial_still(path)
    except BaseException:
        db.close()
        raise
    return db


def _dial_still(path: Path) -> sqlite3.Connection:
    """Open a file in a folder that we may not write: it must be at rest, with nothing left to be moved into it."""
    if _size(_beside(path, "-wal")):
        raise LedgerError(
            f"'{path}' was copied while it was written, and '{path.name}-wal' beside it cannot be joined here.",
            remedy="Copy both files to a folder that can be written, and open the ledger there.",
        )
    return _dial(path, "immutable=1")


def _identify(db: sqlite3.Connection, path: Path) -> None:
    (application,), (version,) = (
        db.execute(f"PRAGMA {name}").fetchone() for name in ("application_id", "user_version")
    )
    if application != APPLICATION_ID:
        raise LedgerError(
            f"'{path}' is not a ledger: it is an SQLite file of another program (application id {application:#x}).",
            remedy="Check the path; Ledger.create makes a new ledger.",
        )
    if version > FORMAT:
        raise LedgerError(
            f"'{path}' has ledger format {version}; this version of weightfold reads up to {FORMAT}.",
            remedy="Upgrade weightfold.",
        )
    if version < FORMAT or db.execute("SELECT 1 FROM entries LIMIT 1").fetchone() is None:
        raise LedgerError(f"'{path}' is damaged: format {version}, no first entry.", remedy=_DAMAGED[1])
    ((page_size,),) = db.execute("PRAGMA page_size")
    if _size(path) % page_size and not _size(_beside(path, "-wal")):
        raise _complaint(sqlite3.SQLITE_CORRUPT, "its last page is not whole", path)


def _check_file(path: Path, *, readonly: bool) -> None:
    if not path.exists():
        raise LedgerError(f"There is no ledger at '{path}'.", remedy="Make one with Ledger.create.")
    if not path.is_file():
        raise LedgerError(f"'{path}' is not a ledger: it is not a file.", remedy="Name the file inside it.")
    if _size(path) == 0:
        raise LedgerError(f"'{path}' is not a ledger: it is empty.", remedy="Delete it; Ledger.create makes a new one.")
    if not readonly and not (os.access(path, os.W_OK) and os.access(path.parent, os.W_OK)):
        raise _complaint(sqlite3.SQLITE_READONLY, "no permission", path)


def _beside(path: Path, suffix: str) -> Path:
    return path.with_name(path.name + suffix)


def inode(path: Path) -> int:
    """Tell a file from another one of the same name; 0 where there is none."""
    try:
        return path.stat().st_ino
    except OSError:
        return 0


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _refuse_existing(path: Path) -> None:
    if path.exists():
        raise FileExistsError(path)
    for suffix in ("-wal", "-journal"):
        left = _beside(path, suffix)
        if _size(left):
            raise LedgerError(
                f"'{left}' is left over from another ledger; SQLite would mix it into a new one at '{path}'.",
                remedy="Move the old ledger back beside it, or delete it.",
            )


def _publish(draft: Path, path: Path, *, replace: bool) -> None:
    _sync(draft, os.O_RDWR)
    if replace or not _link(draft, path):
        draft.replace(path)
    if os.name == "posix":
        _sync(path.parent, os.O_RDONLY)


def _link(draft: Path, path: Path) -> bool:
    """Give the draft its name unless it is taken; False where the file system knows no links."""
    try:
        path.hardlink_to(draft)
    except FileExistsError:
        raise
    except OSError:
        _refuse_existing(path)
        return False
    return True


def _sync(path: Path, flags: int) -> None:
    handle = os.open(path, flags)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
