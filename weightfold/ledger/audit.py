"""Check a whole ledger: every row against its own hash, every entry against the one before, then the file itself."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from weightfold.errors import LedgerError
from weightfold.ledger.entry import GENESIS, RESTORE, ROW_TYPES, Entry, Row, chain_hash, check_types
from weightfold.ledger.metric import Metric
from weightfold.ledger.store import ENTRY_COLUMNS, METRIC_COLUMNS, PAGE, STRUCTURE, expected_structure


class Query(Protocol):
    """Run one SELECT and give all its rows; errors are LedgerErrors."""

    def __call__(self, sql: str, /, *values: Any) -> list[tuple[Any, ...]]: ...


def audit(query: Query, file: Path) -> None:
    """Check everything that `query` reaches.

    Raises:
        LedgerError: the first thing that is wrong; names the entry, blob or metric and what differs.
    """
    _audit_entries(query, file)
    for _ in read_blobs(query, file):
        pass
    for _ in read_metrics(query, file):
        pass
    _audit_file(query, file)


def read_blobs(query: Query, file: Path) -> Iterator[tuple[str, bytes]]:
    """Yield (digest, data) of every blob, checked, in the order in which they were stored."""
    for at, (digest, data) in _walk(query, file, "blobs", "id", 1, "digest, data", page=1):
        where = f"Blob {at} ({digest!r}) of '{file}'"
        check_blob(digest, data, where)
        yield digest, data


def read_metrics(query: Query, file: Path) -> Iterator[Metric]:
    """Yield every row of metrics, checked, in the order in which they were logged."""
    for at, values in _walk(query, file, "metrics", "id", 1, METRIC_COLUMNS):
        yield Metric.from_row(values, f"Metric {at} of '{file}'")


def check_blob(digest: str, data: bytes, where: str) -> None:
    """Refuse bytes that do not have the digest under which they were stored."""
    check_types((digest, data), (str, bytes), where)
    computed = hashlib.sha256(data).hexdigest()
    if computed != digest:
        raise LedgerError(f"{where} was changed: its data has the digest {computed}.", remedy=RESTORE)


def _audit_entries(query: Query, file: Path) -> None:
    last = GENESIS
    for seq, values in _walk(query, file, "entries", "seq", 0, ENTRY_COLUMNS):
        row, where = Row(*values), f"Entry {seq} of '{file}'"
        check_types(row, ROW_TYPES, where)
        if row.prev != last:
            raise LedgerError(f"{where} {_broken_link(row, last)}", remedy=RESTORE)
        entry = Entry.from_row(row, where)
        if entry.compute_hash() != entry.hash:
            raise LedgerError(f"{where} was changed: its body is not canonical JSON.", remedy=RESTORE)
        last = entry.hash


def _broken_link(row: Row, last: str) -> str:
    if chain_hash(row.seq, row.kind, row.body, last) == row.hash:
        return f"was changed: its prev is {row.prev!r}, but the entry before has the hash {last}."
    return f"does not follow the entry before: its prev is {row.prev!r}, not {last}. One of the two was replaced."


def _audit_file(query: Query, file: Path) -> None:
    found = dict(query(STRUCTURE))
    expected = expected_structure()
    for name in sorted(found.keys() | expected.keys(), key=repr):
        if found.get(name) != expected.get(name):
            state = "is missing" if name not in found else "is foreign" if name not in expected else "was changed"
            raise LedgerError(f"The definition of '{name}' in '{file}' {state}; the rows are intact.", remedy=RESTORE)
    ((result,),) = query("PRAGMA integrity_check(1)")
    if result != "ok":
        raise LedgerError(f"The rows of '{file}' are intact, but the file is damaged: {result}.", remedy=RESTORE)


def _walk(
    query: Query, file: Path, table: str, key: str, first: int, columns: str, page: int = PAGE
) -> Iterator[tuple[int, tuple[Any, ...]]]:
    """Yield (key, row) of a table that counts its rows; refuse at the first one that is missing or cannot be read."""
    noun = {"entries": "Entry", "blobs": "Blob", "metrics": "Metric"}[table]
    sql = f"SELECT {key}, {columns} FROM {table} WHERE {key} >= ? ORDER BY {key} LIMIT ?"
    ((end,),) = query(f"SELECT coalesce(max({key}) + 1, ?) FROM {table}", first)
    at = first
    while at < end:
        rows = _page(query, sql, at, page, f"{noun} {at} of '{file}'")
        if not rows or rows[0][0] != at:
            raise LedgerError(f"{noun} {at} of '{file}' is missing.", remedy=RESTORE)
        for key_found, *values in rows:
            if key_found != at:
                break
            yield at, tuple(values)
            at += 1
    if query(f"SELECT count(*) FROM {table} WHERE {key} < ?", end) != [(end - first,)]:
        raise LedgerError(f"'{file}' holds a row of {table} before the first one.", remedy=RESTORE)


def _page(query: Query, sql: str, at: int, page: int, where: str) -> list[tuple[Any, ...]]:
    """Read some rows; where they cannot be read together, the first one alone."""
    try:
        return query(sql, at, page)
    except LedgerError:
        try:
            return query(sql, at, 1)
        except LedgerError as error:
            raise LedgerError(f"{where} cannot be read: {error.message}", remedy=error.remedy) from None
