"""The ledger of a run: append durably, read, verify; metrics and blobs beside the entries, in one SQLite file.

    with Ledger.create("run.ledger", run={"seed": 0}) as log:
        undo = log.put_blob(b"...")                                  # content-addressed
        log.append("edit", {"group": "fc1", "undo": undo}, aside={"seconds": 0.3})
        log.log_metrics(step=1, values={"loss": 0.5})                # fast, not chained

What is promised: an entry whose `append` returned survives a crash of the program, the machine or the disk's space.
One writer appends at a time; a second one waits its turn and continues the same chain. Readers never wait and never
make the writer wait. A metric or blob survives a crash of the program at once, of the machine from the next entry on.
The same run done twice has the same `head`. A chain cannot tell that its *last* entries were cut away (by a hand, or
with a write-ahead log that was lost or damaged after a crash): for that, compare `head` with a copy kept elsewhere, as
in the metadata of the exported model.
"""

from __future__ import annotations

import hashlib
import operator
import os
import sqlite3
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from weightfold.errors import LedgerError
from weightfold.ledger import lines, store
from weightfold.ledger.audit import audit, check_blob, read_blobs, read_metrics
from weightfold.ledger.entry import Entry
from weightfold.ledger.metric import Metric, make_rows


class Ledger:
    """An open ledger. Make one with `Ledger.create`, `Ledger.open` or `Ledger.import_jsonl`.

    May be shared by threads, not by processes: each process opens its own.

    Example:
        >>> import tempfile
        >>> folder = tempfile.TemporaryDirectory()
        >>> with Ledger.create(f"{folder.name}/run.ledger", run={"seed": 7}) as log:
        ...     entry = log.append("edit", {"group": "fc1", "kept": (0, 2)})
        ...     log.log_metrics(1, {"loss": 0.5})
        ...     log.verify()
        >>> with Ledger.open(f"{folder.name}/run.ledger", readonly=True) as log:
        ...     print([(e.seq, e.kind, e.body) for e in log.entries()], log.metrics("loss"), log.head == entry.hash)
        [(0, 'run', {'seed': 7}), (1, 'edit', {'group': 'fc1', 'kept': [0, 2]})] [(1, 0.5)] True
        >>> folder.cleanup()
    """

    def __init__(self, path: Path, *, readonly: bool) -> None:
        self.path = path
        self.readonly = readonly
        self._lock = threading.RLock()
        self._process = os.getpid()
        self._synchronous = ""
        self._db: sqlite3.Connection | None = store.connect(path, readonly=readonly)
        self._inode = store.inode(path)

    @classmethod
    def create(cls, path: str | os.PathLike[str], run: dict[str, Any]) -> Self:
        """Make a new ledger whose entry 0, of kind "run", holds the facts of the run: seed, versions, config.

        Raises:
            LedgerError: the path exists, its folder cannot be written, or `run` is not plain JSON.
        """
        target = Path(path).resolve()
        first = Entry.after(None, "run", run, {})
        with store.drafting(target) as draft, store.building(draft, target) as db:
            store.insert_entry(db, first.to_row())
        return cls(target, readonly=False)

    @classmethod
    def open(cls, path: str | os.PathLike[str], *, readonly: bool = False) -> Self:
        """Open an existing ledger to append to it, or only to read it, also while another process appends.

        Raises:
            LedgerError: the file is missing, foreign, damaged, of a newer format, or may not be written.
        """
        return cls(Path(path).resolve(), readonly=readonly)

    @classmethod
    def import_jsonl(cls, jsonl_path: str | os.PathLike[str], path: str | os.PathLike[str]) -> Self:
        """Make a new ledger from what `export_jsonl` wrote, and open it. All of it is verified before it gets its name.

        Raises:
            LedgerError: the path exists, or a line is not what it should be; names the line, entry or metric.
        """
        source, target = Path(jsonl_path).resolve(), Path(path).resolve()
        with lines.reading(source) as stream, store.drafting(target) as draft, store.building(draft, target) as db:
            lines.load(stream, db, source)
            audit(lambda sql, *values: db.execute(sql, values).fetchall(), source)
        return cls(target, readonly=False)

    def append(self, kind: str, body: dict[str, Any], *, aside: dict[str, Any] | None = None) -> Entry:
        """Add an entry to the end of the chain; it is on the disk when this returns.

        Args:
            kind: what sort of record this is: "edit", "gate", ...
            body: the facts, plain JSON with finite numbers; tuples become lists. Hashed.
            aside: facts of the wall clock, which differ from run to run. Not hashed.
        Raises:
            LedgerError: the body is not plain JSON (names the key), or the entry could not be written.
        """
        with self._writing("FULL") as db:
            last = db.execute("SELECT seq, hash FROM entries ORDER BY seq DESC LIMIT 1").fetchone()
            entry = Entry.after(last, kind, body, aside or {})
            store.insert_entry(db, entry.to_row())
        return entry

    @property
    def head(self) -> str:
        """Hash of the last entry, in hex."""
        return self._query("SELECT hash FROM entries ORDER BY seq DESC LIMIT 1")[0][0]

    def __len__(self) -> int:
        return max(0, self._query("SELECT max(seq) + 1 FROM entries")[0][0])

    def entries(self, start: int = 0, kind: str | None = None) -> Iterator[Entry]:
        """Yield the entries from `start` on, in order, of one kind or all; also those that come in meanwhile.

        Raises:
            LedgerError: an entry does not fit its hash; names its seq.
        """
        wanted = "seq >= ? AND (? IS NULL OR kind = ?) ORDER BY seq LIMIT ?"
        at = operator.index(start)
        while rows := self._query(
            f"SELECT {store.ENTRY_COLUMNS} FROM entries WHERE {wanted}", at, kind, kind, store.PAGE
        ):
            for row in rows:
                yield Entry.from_row(row, f"Entry {row[0]} of '{self.path}'")
            at = rows[-1][0] + 1

    @property
    def n_blobs(self) -> int:
        """How many blobs are stored."""
        return self._query("SELECT count(*) FROM blobs")[0][0]

    @property
    def n_metrics(self) -> int:
        """How many measured numbers are stored."""
        return self._query("SELECT count(*) FROM metrics")[0][0]

    def log_metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Record measured numbers of one step: fast, beside the chain. Also takes nan and inf.

        Raises:
            LedgerError: a value is no number (names it), or the row could not be written.
        """
        rows = make_rows(step, values)
        with self._writing("NORMAL") as db:
            store.insert_metrics(db, rows)

    def metrics(self, name: str) -> list[tuple[int, float]]:
        """List (step, value) of a metric in the order in which they were logged; empty if there are none."""
        rows = self._query(f"SELECT id, {store.METRIC_COLUMNS} FROM metrics WHERE name = ? ORDER BY id", name)
        checked = (Metric.from_row(row, f"Metric {at} of '{self.path}'") for at, *row in rows)
        return [(row.step, row.number) for row in checked]

    def metric_names(self) -> list[str]:
        """List the names of all metrics, sorted."""
        return [name for (name,) in self._query("SELECT DISTINCT name FROM metrics ORDER BY name")]

    def put_blob(self, data: bytes | bytearray | memoryview) -> str:
        """Store bytes under their SHA-256 and return it in hex; equal bytes are stored once."""
        if not isinstance(data, bytes | bytearray | memoryview):
            raise LedgerError(f"A blob must be bytes. Got {type(data).__qualname__} instead.")
        data = bytes(data)
        digest = hashlib.sha256(data).hexdigest()
        with self._writing("NORMAL") as db:
            if db.execute("SELECT 1 FROM blobs WHERE digest = ?", (digest,)).fetchone() is None:
                store.insert_blob(db, digest, data)
        return digest

    def get_blob(self, digest: str) -> bytes:
        """Give the bytes stored under a digest.

        Raises:
            LedgerError: there are none, or they do not have that digest.
        """
        rows = self._query("SELECT data FROM blobs WHERE digest = ?", digest)
        if not rows:
            raise LedgerError(f"'{self.path}' holds no blob {digest!r}.", remedy="Digests are 64 hex digits.")
        check_blob(digest, rows[0][0], f"Blob {digest} of '{self.path}'")
        return rows[0][0]

    def verify(self) -> None:
        """Check every entry, link, blob and metric, the tables, and the file's structure.

        Raises:
            LedgerError: the first thing that is wrong; names the seq and what differs.
        """
        audit(self._query, self.path)

    def export_jsonl(self, path: str | os.PathLike[str]) -> None:
        """Write entries, metrics and blobs as JSON lines; an earlier export of that name is replaced at one stroke.

        Raises:
            LedgerError: a row does not fit its hash, or the file cannot be written.
        """
        target = Path(path).resolve()
        if target.exists() and target.samefile(self.path):
            raise LedgerError(f"'{target}' is the ledger itself.", remedy="Export to another path.")
        with store.drafting(target, replace=True) as draft, draft.open("w", encoding="utf-8", newline="\n") as stream:
            stream.writelines(
                lines.dump(self.entries(), read_metrics(self._query, self.path), read_blobs(self._query, self.path))
            )

    def close(self) -> None:
        """Close the file; entries are safe without it. Closing twice does nothing."""
        with self._lock:
            if self._db is not None:
                self._db.close()
                self._db = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "closed" if self._db is None else "to read" if self.readonly else "to append"
        return f"Ledger('{self.path}', {state})"

    def _connection(self) -> sqlite3.Connection:
        if self._db is None:
            raise LedgerError(f"'{self.path}' is closed.", remedy="Open it again with Ledger.open.")
        if os.getpid() != self._process:
            raise LedgerError(f"'{self.path}' was opened by another process.", remedy="Open it in this one as well.")
        return self._db

    def _query(self, sql: str, /, *values: Any) -> list[tuple[Any, ...]]:
        with self._lock, store.door(self.path):
            return self._connection().execute(sql, values).fetchall()

    @contextmanager
    def _writing(self, synchronous: str) -> Iterator[sqlite3.Connection]:
        """Hold the one writer's lock for a block whose writes are kept together, or not at all."""
        with self._lock, store.door(self.path):
            db = self._connection()
            self._check_writable()
            if synchronous != self._synchronous:
                db.execute(f"PRAGMA synchronous = {synchronous}")
                self._synchronous = synchronous
            db.execute("BEGIN IMMEDIATE")
            try:
                yield db
                db.execute("COMMIT")
            except BaseException:
                if db.in_transaction:
                    db.execute("ROLLBACK")
                raise

    def _check_writable(self) -> None:
        if self.readonly:
            raise LedgerError(f"'{self.path}' is open for reading only.", remedy="Open it without readonly=True.")
        if store.inode(self.path) != self._inode:
            raise LedgerError(
                f"'{self.path}' was moved or deleted while it was open.", remedy="Put it back and open it again."
            )
