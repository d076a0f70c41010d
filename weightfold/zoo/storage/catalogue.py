"""The SQLite file of a zoo: which models there are, and where their contents lie.

Two tables. A *content* is a set of tensors, kept once under its digest, in full or as a difference to another content.
A *model* is a name for a content, with what is known of it. Readers and writers do not wait for each other (write-ahead
log); writers wait in turn (BEGIN IMMEDIATE). A commit is on the disk when it returns.
"""

from __future__ import annotations

import json
import sqlite3
import threading
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

from weightfold.artifact.plain import parse_json
from weightfold.errors import ArtifactError, ConfigError
from weightfold.zoo.card import Card

APPLICATION_ID = 0x57465A4F
"""'WFZO' in the file's header."""
FORMAT = 1
BUSY_S = 120.0
"""How long a writer waits for another one before it gives up."""
MAX_DEPTH = 16
"""Longest chain of differences that is read to get one model."""
_SCHEMA = (
    """CREATE TABLE contents (
    digest TEXT PRIMARY KEY, blob TEXT NOT NULL, stored_bytes INTEGER NOT NULL,
    base TEXT REFERENCES contents (digest), decoded TEXT NOT NULL, signature TEXT NOT NULL,
    n_parameters INTEGER NOT NULL, dtype TEXT NOT NULL, size_bytes INTEGER NOT NULL,
    checksum INTEGER NOT NULL) WITHOUT ROWID""",
    "CREATE INDEX contents_by_base ON contents (base) WHERE base IS NOT NULL",
    """CREATE TABLE models (
    id INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE, digest TEXT NOT NULL REFERENCES contents (digest),
    semantic_hash TEXT, embedding BLOB, extras TEXT, symmetries TEXT, body TEXT NOT NULL,
    checksum INTEGER NOT NULL)""",
    "CREATE INDEX models_by_digest ON models (digest)",
)
_MODEL = "m.name, m.digest, m.semantic_hash, m.embedding, m.extras, m.symmetries, m.body, m.checksum"
_CARDS = f"SELECT {_MODEL}, c.* FROM models m JOIN contents c ON c.digest = m.digest"
_N_MODEL = 8
"""Columns of a model in a row of both."""


Row = tuple[Any, ...]


@dataclass(frozen=True)
class Content:
    """A set of tensors.

    Args:
        digest: of the tensors as they were added.
        blob: SHA-256 of the bytes that hold them.
        stored_bytes: of the blob.
        base: content to which the blob is a difference, or None.
        decoded: digest of what decoding gives; another one than ``digest`` after lossy packing.
        signature: 16 hex digits of names, types and shapes.
        n_parameters, dtype, size_bytes: see `Card`.
    """

    digest: str
    blob: str
    stored_bytes: int
    base: str | None
    decoded: str
    signature: str
    n_parameters: int
    dtype: str
    size_bytes: int

    @property
    def lossy(self) -> bool:
        """Whether reading gives other tensors than were added."""
        return self.decoded != self.digest


@dataclass(frozen=True)
class Model:
    """A name for a content.

    Args:
        body: plain data of the card: architecture, facts, parent, source, time.
        extras: blob of the file's metadata, if it had any.
        symmetries: blob of the architecture's symmetries, if they are known.
    """

    name: str
    digest: str
    semantic_hash: str | None
    embedding: bytes | None
    extras: str | None
    symmetries: str | None
    body: dict[str, Any]


class Catalogue:
    """The open file; usable from several threads, not across a fork.

    Args:
        path: of the file, which is made if it is missing.
        readonly: change nothing, not even a log beside it; the file must be there.
    """

    def __init__(self, path: Path, *, readonly: bool = False) -> None:
        self.path = path
        self._lock = threading.RLock()
        with self._door():
            self._db = self._readable() if readonly else self._connected(str(path))
        try:
            if readonly:
                self._check()
            else:
                self._prepare()
        except BaseException:
            self._db.close()
            raise

    def _connected(self, name: str, *, uri: bool = False) -> sqlite3.Connection:
        return sqlite3.connect(name, timeout=BUSY_S, isolation_level=None, check_same_thread=False, uri=uri)

    def _readable(self) -> sqlite3.Connection:
        """Open without writing: with the log beside it where there is one, which a reader need not be able to make."""
        log = Path(f"{self.path}-wal")
        place = self.path.absolute().as_uri()
        unread = log.is_file() and log.stat().st_size > 0
        return self._connected(f"{place}?mode=ro" if unread else f"{place}?immutable=1", uri=True)

    def close(self) -> None:
        """Let go of the file."""
        self._db.close()

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Hold a transaction: all of it is on the disk when the block ends, or nothing of it.

        Raises:
            ArtifactError: the disk is full, another writer does not end, or the file is damaged.
        """
        with self._lock, self._door():
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._db.execute("COMMIT")
            except BaseException:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                raise

    def add_content(self, content: Content) -> bool:
        """Enter a content unless it is there; tells whether it was not. Call it within `writing`."""
        row = _summed(astuple(content))
        return self._db.execute(f"INSERT OR IGNORE INTO contents VALUES ({_marks(row)})", row).rowcount == 1

    def add_model(self, model: Model) -> None:
        """Enter a model. Call it within `writing`."""
        body = json.dumps(model.body, ensure_ascii=False, allow_nan=False)
        row = _summed((*astuple(model)[:-1], body))
        names = "name, digest, semantic_hash, embedding, extras, symmetries, body, checksum"
        self._db.execute(f"INSERT INTO models ({names}) VALUES ({_marks(row)})", row)

    def move_content(self, content: Content) -> None:
        """Say that a content that is there lies elsewhere from now on. Call it within `writing`."""
        changed = (content.blob, content.stored_bytes, content.base, content.decoded, _summed(astuple(content))[-1])
        self._db.execute(
            "UPDATE contents SET blob = ?, stored_bytes = ?, base = ?, decoded = ?, checksum = ? WHERE digest = ?",
            (*changed, content.digest),
        )

    def remove_model(self, name: str) -> None:
        """Take a name away. Call it within `writing`."""
        self._db.execute("DELETE FROM models WHERE name = ?", (name,))

    def remove_content(self, digest: str) -> None:
        """Take a content away that no model and no difference needs. Call it within `writing`."""
        self._db.execute("DELETE FROM contents WHERE digest = ?", (digest,))

    def content(self, digest: str) -> Content | None:
        """Look a content up."""
        row = self._one("SELECT * FROM contents WHERE digest = ?", digest)
        return None if row is None else self._content(row)

    def bases(self) -> dict[str, str | None]:
        """The content to which each content is a difference, or None."""
        return dict(self._all("SELECT digest, base FROM contents ORDER BY digest"))  # type: ignore[arg-type]

    def children(self, digest: str) -> list[str]:
        """Contents that are stored as differences to this one."""
        return [row[0] for row in self._all("SELECT digest FROM contents WHERE base = ? ORDER BY digest", digest)]

    def names_of(self, digest: str) -> list[str]:
        """Names of the models that have this content, in the order in which they were added."""
        return [row[0] for row in self._all("SELECT name FROM models WHERE digest = ? ORDER BY id", digest)]

    def find_digests(self, prefix: str) -> list[str]:
        """Digests of named contents that begin so."""
        sql = "SELECT DISTINCT digest FROM models WHERE digest >= ? AND digest < ? ORDER BY digest"
        return [row[0] for row in self._all(sql, prefix, prefix + "g")]

    def digest_of(self, name: str) -> str | None:
        """The content of a model, or None where no model has the name."""
        row = self._one("SELECT digest FROM models WHERE name = ?", name)
        return None if row is None else row[0]

    def model(self, name: str) -> Model | None:
        """Look a model up by its name."""
        row = self._one(f"SELECT {_MODEL} FROM models m WHERE name = ?", name)
        return None if row is None else self._model(row)

    def names(self) -> list[str]:
        """All names, in the order in which they were added."""
        return [row[0] for row in self._all("SELECT name FROM models ORDER BY id")]

    def n_models(self) -> int:
        """How many models there are."""
        return self._all("SELECT count(*) FROM models")[0][0]

    def card(self, name: str) -> Card | None:
        """The card of one model."""
        row = self._one(f"{_CARDS} WHERE m.name = ?", name)
        return None if row is None else self._card(row)

    def cards(self) -> list[Card]:
        """All cards, in the order in which the models were added."""
        return [self._card(row) for row in self._all(f"{_CARDS} ORDER BY m.id")]

    def blobs(self) -> set[str]:
        """Digests of all blobs that something names."""
        return {
            row[0]
            for row in self._all(
                """SELECT blob FROM contents UNION SELECT extras FROM models WHERE extras IS NOT NULL
                UNION SELECT symmetries FROM models WHERE symmetries IS NOT NULL"""
            )
        }

    def beside(self) -> dict[str, tuple[str, ...]]:
        """Blobs that hold no tensors, and the models that they belong to."""
        found: dict[str, tuple[str, ...]] = {}
        for name, *blobs in self._all("SELECT name, extras, symmetries FROM models ORDER BY id"):
            for blob in filter(None, blobs):
                found[blob] = (*found.get(blob, ()), name)
        return found

    def damages(self) -> list[str]:
        """What SQLite finds wrong with the file, and rows that name rows which are gone."""
        found = [str(row[0]) for row in self._all("PRAGMA integrity_check") if row[0] != "ok"]
        return found + [f"a row of {row[0]} names a row of {row[2]} that is gone" for row in self._all(
            "PRAGMA foreign_key_check"
        )]  # fmt: skip

    def _card(self, row: Row) -> Card:
        model, content = self._model(row[:_N_MODEL]), self._content(row[_N_MODEL:])
        try:
            return card_of(model, content)
        except (ConfigError, TypeError) as error:
            raise self._damaged(model.name, str(error).partition("\n")[0].rstrip(".")) from None

    def _model(self, row: Row) -> Model:
        name, digest, semantic_hash, embedding, extras, symmetries, body = self._checked(row)
        return Model(name, digest, semantic_hash, embedding, extras, symmetries, self._body(name, body))

    def _body(self, name: str, text: str) -> dict[str, Any]:
        try:
            body = parse_json(text)
        except (ValueError, TypeError) as error:
            raise self._damaged(name, str(error)) from None
        if not isinstance(body, dict):
            raise self._damaged(name, "its facts are no table")
        return body

    def _content(self, row: Row) -> Content:
        return Content(*self._checked(row))

    def _checked(self, row: Row) -> Row:
        """A row without its checksum.

        Raises:
            ArtifactError: it was changed behind our back.
        """
        if _summed(row[:-1]) != tuple(row):
            raise self._damaged(row[0], "its checksum differs")
        return row[:-1]

    def _damaged(self, name: Any, reason: str) -> ArtifactError:
        return ArtifactError(
            f"The zoo's catalogue '{self.path}': the row of {name!r} was changed or is damaged: {reason}.",
            remedy="Restore a copy of the zoo's folder, or add the models to a new one.",
        )

    def _one(self, sql: str, *values: Any) -> tuple[Any, ...] | None:
        with self._lock, self._door():
            return self._db.execute(sql, values).fetchone()

    def _all(self, sql: str, *values: Any) -> Sequence[tuple[Any, ...]]:
        with self._lock, self._door():
            return self._db.execute(sql, values).fetchall()

    def _check(self) -> None:
        with self._door():
            self._db.execute("PRAGMA trusted_schema = OFF")
            self._identify()
            if not self._version():
                raise ArtifactError(f"'{self.path}' is no zoo: it is empty.", remedy="Check the path.")

    def _prepare(self) -> None:
        with self._door():
            for pragma in ("foreign_keys = ON", "synchronous = FULL", "trusted_schema = OFF", "fullfsync = ON"):
                self._db.execute(f"PRAGMA {pragma}")
            self._identify()
            self._db.execute("PRAGMA journal_mode = WAL")
        with self.writing():
            if not self._version():
                for statement in _SCHEMA:
                    self._db.execute(statement)
                self._db.execute(f"PRAGMA application_id = {APPLICATION_ID}")
                self._db.execute(f"PRAGMA user_version = {FORMAT}")

    def _version(self) -> int:
        return self._db.execute("PRAGMA user_version").fetchone()[0]

    def _identify(self) -> None:
        application = self._db.execute("PRAGMA application_id").fetchone()[0]
        empty = self._db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0] == 0
        if application != APPLICATION_ID and not empty:
            raise ArtifactError(f"'{self.path}' is no zoo: it is an SQLite file of another program.")
        if self._version() > FORMAT:
            raise ArtifactError(
                f"'{self.path}' has zoo format {self._version()}; this version of weightfold reads up to {FORMAT}.",
                remedy="Upgrade weightfold.",
            )

    @contextmanager
    def _door(self) -> Iterator[None]:
        """Let errors of SQLite out as one that names the file and what to do."""
        try:
            yield
        except (sqlite3.Error, UnicodeDecodeError) as error:  # damaged text
            raise _explained(error, self.path) from None


_FULL = "Free space on that disk and try again; what was there before is as it was."
_REMEDIES = {
    sqlite3.SQLITE_FULL: ("no space is left", _FULL),
    sqlite3.SQLITE_IOERR: ("it could not be read or written", _FULL),
    sqlite3.SQLITE_BUSY: ("another writer did not end in time", "Wait until it has finished, and try again."),
    sqlite3.SQLITE_LOCKED: ("another writer did not end in time", "Wait until it has finished, and try again."),
    sqlite3.SQLITE_READONLY: (
        "it cannot be written",
        "Check the permissions of the file and of its folder, or read it as it is: Zoo.open(folder, readonly=True).",
    ),
    sqlite3.SQLITE_CANTOPEN: ("it could not be opened", "Check the permissions of the file and of its folder."),
    sqlite3.SQLITE_NOTADB: ("it is no zoo, or its header is damaged", "Restore a copy of the zoo's folder."),
}
_DAMAGED = ("it is damaged or cut short", "Restore a copy of the zoo's folder, or add the models to a new one.")


def _explained(error: Exception, path: Path) -> ArtifactError:
    reason, remedy = _REMEDIES.get(getattr(error, "sqlite_errorcode", 0) & 0xFF, _DAMAGED)
    return ArtifactError(f"The zoo's catalogue '{path}': {reason} ({error}).", remedy=remedy)


def _summed(row: Row) -> Row:
    """A row with the checksum of its values behind it."""
    return (*row, zlib.crc32(repr(tuple(row)).encode()))


def _marks(row: Row) -> str:
    return ", ".join("?" * len(row))


def card_of(model: Model, content: Content) -> Card:
    """Put a card together."""
    return Card(
        **model.body,
        name=model.name,
        digest=model.digest,
        semantic_hash=model.semantic_hash,
        vector=model.embedding,
        signature=content.signature,
        n_parameters=content.n_parameters,
        dtype=content.dtype,
        size_bytes=content.size_bytes,
        base=content.base,
        decoded=content.decoded,
        stored_bytes=content.stored_bytes,
    )
