"""The SQLite file of a zoo: which models there are, and where their contents lie.

Two tables. A *content* is a set of tensors, kept once under its digest, in full or as a difference to another content.
A *model* is a name for a content, with what is known of it. Readers and writers do not wait for each other (write-ahead
log); writers wait in turn (BEGIN IMMEDIATE). A commit is on the disk when it returns.
"""

from __future__ import annotations

import json
import sqlite3
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from weightfold.errors import ArtifactError
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
    n_parameters INTEGER NOT NULL, dtype TEXT NOT NULL, size_bytes INTEGER NOT NULL) WITHOUT ROWID""",
    "CREATE INDEX contents_by_base ON contents (base) WHERE base IS NOT NULL",
    """CREATE TABLE models (
    id INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE, digest TEXT NOT NULL REFERENCES contents (digest),
    semantic_hash TEXT, embedding BLOB, extras TEXT, symmetries TEXT, body TEXT NOT NULL)""",
    "CREATE INDEX models_by_digest ON models (digest)",
)
_CARDS = """SELECT m.name, m.digest, m.semantic_hash, m.embedding, m.body, c.signature, c.n_parameters, c.dtype,
    c.size_bytes, c.base, c.decoded, c.stored_bytes FROM models m JOIN contents c ON c.digest = m.digest"""


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
    """The open file; usable from several threads, not across a fork."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.RLock()
        with self._door():
            self._db = sqlite3.connect(path, timeout=BUSY_S, isolation_level=None, check_same_thread=False)
        try:
            self._prepare()
        except BaseException:
            self._db.close()
            raise

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
        marks = ", ".join("?" * len(fields(content)))
        done = self._db.execute(f"INSERT OR IGNORE INTO contents VALUES ({marks})", tuple(asdict(content).values()))
        return done.rowcount == 1

    def add_model(self, model: Model) -> None:
        """Enter a model. Call it within `writing`."""
        self._db.execute(
            """INSERT INTO models (name, digest, semantic_hash, embedding, extras, symmetries, body)
            VALUES (?, ?, ?, ?, ?, ?, ?)""",
            (
                *(model.name, model.digest, model.semantic_hash, model.embedding, model.extras, model.symmetries),
                json.dumps(model.body, ensure_ascii=False, allow_nan=False),
            ),
        )

    def move_content(self, digest: str, blob: str, stored_bytes: int, base: str | None, decoded: str) -> None:
        """Say that a content lies elsewhere from now on. Call it within `writing`."""
        self._db.execute(
            "UPDATE contents SET blob = ?, stored_bytes = ?, base = ?, decoded = ? WHERE digest = ?",
            (blob, stored_bytes, base, decoded, digest),
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
        return None if row is None else Content(*row)

    def contents(self) -> list[Content]:
        """All contents, those in full first."""
        return [Content(*row) for row in self._all("SELECT * FROM contents ORDER BY base IS NOT NULL, digest")]

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
        row = self._one(
            "SELECT name, digest, semantic_hash, embedding, extras, symmetries, body FROM models WHERE name = ?", name
        )
        return None if row is None else Model(*row[:6], body=json.loads(row[6]))

    def names(self) -> list[str]:
        """All names, in the order in which they were added."""
        return [row[0] for row in self._all("SELECT name FROM models ORDER BY id")]

    def card(self, name: str) -> Card | None:
        """The card of one model."""
        row = self._one(f"{_CARDS} WHERE m.name = ?", name)
        return None if row is None else _card(row)

    def cards(self) -> list[Card]:
        """All cards, in the order in which the models were added."""
        return [_card(row) for row in self._all(f"{_CARDS} ORDER BY m.id")]

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

    def _one(self, sql: str, *values: Any) -> tuple[Any, ...] | None:
        with self._lock, self._door():
            return self._db.execute(sql, values).fetchone()

    def _all(self, sql: str, *values: Any) -> Sequence[tuple[Any, ...]]:
        with self._lock, self._door():
            return self._db.execute(sql, values).fetchall()

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
        except sqlite3.Error as error:
            raise _explained(error, self.path) from None


_FULL = "Free space on that disk and try again; what was there before is as it was."
_REMEDIES = {
    sqlite3.SQLITE_FULL: ("no space is left", _FULL),
    sqlite3.SQLITE_IOERR: ("it could not be read or written", _FULL),
    sqlite3.SQLITE_BUSY: ("another writer did not end in time", "Wait until it has finished, and try again."),
    sqlite3.SQLITE_LOCKED: ("another writer did not end in time", "Wait until it has finished, and try again."),
    sqlite3.SQLITE_READONLY: ("it cannot be written", "Check the permissions of the file and of its folder."),
    sqlite3.SQLITE_CANTOPEN: ("it could not be opened", "Check the permissions of the file and of its folder."),
    sqlite3.SQLITE_NOTADB: ("it is no zoo, or its header is damaged", "Restore a copy of the zoo's folder."),
}
_DAMAGED = ("it is damaged or cut short", "Restore a copy of the zoo's folder, or add the models to a new one.")


def _explained(error: sqlite3.Error, path: Path) -> ArtifactError:
    reason, remedy = _REMEDIES.get(getattr(error, "sqlite_errorcode", 0) & 0xFF, _DAMAGED)
    return ArtifactError(f"The zoo's catalogue '{path}': {reason} ({error}).", remedy=remedy)


def _card(row: tuple[Any, ...]) -> Card:
    name, digest, semantic_hash, vector, body, signature, n_parameters, dtype, size, base, decoded, stored = row
    return Card(
        **json.loads(body),
        name=name,
        digest=digest,
        signature=signature,
        n_parameters=n_parameters,
        dtype=dtype,
        size_bytes=size,
        semantic_hash=semantic_hash,
        base=base,
        decoded=decoded,
        stored_bytes=stored,
        vector=vector,
    )
