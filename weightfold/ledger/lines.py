"""A ledger as JSON lines: entries, metrics, blobs in base64, and a last line that counts them.

{"format":1,"record":"ledger"}
{"aside":{},"body":{"seed":0},"checksum":...,"hash":"...","kind":"run","prev":"000...","record":"entry","seq":0,...}
{"checksum":...,"name":"loss","record":"metric","step":1,"value":0.5}
{"data":"...","digest":"...","record":"blob"}
{"blobs":1,"entries":1,"head":"...","metrics":1,"record":"end"}
"""

from __future__ import annotations

import base64
import math
import sqlite3
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from weightfold.errors import LedgerError
from weightfold.ledger import store
from weightfold.ledger.audit import check_blob
from weightfold.ledger.entry import Entry, Row, canonical, parse, to_json
from weightfold.ledger.metric import Metric

Record = dict[str, Any]

_TABLES = {"entry": "entries", "metric": "metrics", "blob": "blobs"}


def dump(entries: Iterable[Entry], metrics: Iterable[Metric], blobs: Iterable[tuple[str, bytes]]) -> Iterator[str]:
    """Yield the lines of a ledger.

    Example:
        >>> print(*dump([], [Metric.make(1, "loss", 0.5)], []), sep="")
        {"format":1,"record":"ledger"}
        {"checksum":780775325,"name":"loss","record":"metric","step":1,"value":0.5}
        {"blobs":0,"entries":0,"head":"","metrics":1,"record":"end"}
        <BLANKLINE>
    """
    counts, head = Counter(dict.fromkeys(_TABLES.values(), 0)), ""
    yield _line("ledger", format=store.FORMAT)
    for entry in entries:
        head = entry.hash
        counts["entries"] += 1
        yield _line("entry", **entry.to_row()._asdict() | {"body": entry.body, "aside": entry.aside})
    for metric in metrics:
        counts["metrics"] += 1
        yield _line("metric", **metric._asdict() | {"value": _number_or_word(metric.number)})
    for digest, data in blobs:
        counts["blobs"] += 1
        yield _line("blob", digest=digest, data=base64.b64encode(data).decode())
    yield _line("end", head=head, **counts)


@contextmanager
def reading(file: Path) -> Iterator[TextIO]:
    """Open a JSON-lines file; bytes that are no UTF-8 are let through, for the check of their record to find."""
    try:
        with file.open(encoding="utf-8", errors="surrogateescape", newline="\n") as stream:
            yield stream
    except OSError as error:
        raise LedgerError(f"'{file}' could not be read: {error.strerror or error}.") from None


def load(lines: Iterable[str], db: sqlite3.Connection, file: Path) -> None:
    """Insert the records of a JSON-lines file into empty tables; each one is checked by itself.

    Raises:
        LedgerError: a line is not what it should be, or the end is missing; names the line.
    """
    counts, head, kind, where = Counter(dict.fromkeys(_TABLES, 0)), "", "", f"'{file}', an empty file,"
    for number, line in enumerate(lines, 1):
        where, before = f"Line {number} of '{file}'", kind
        record = _record(line, where)
        kind = record["record"]
        if before == "end" or (kind == "ledger") != (number == 1):
            raise LedgerError(f"{where} is out of place: a '{kind}' after '{before or 'nothing'}'.")
        if kind in _INSERT:
            _INSERT[kind](record, db, where)
            counts[kind] += 1
            head = record.get("hash", head)
        elif kind == "end":
            _check_end(record, counts, head, where)
    if kind != "end":
        raise LedgerError(f"{where} is the last one and no end: the file was cut short.", remedy="Export it again.")


def _insert_entry(record: Record, db: sqlite3.Connection, where: str) -> None:
    texts = {"body": canonical(record["body"]), "aside": canonical(record["aside"], "aside")}
    row = Row._make((record | texts)[name] for name in Row._fields)
    Entry.from_row(row, f"{where}, entry {row.seq},")
    store.insert_entry(db, row)


def _insert_metric(record: Record, db: sqlite3.Connection, where: str) -> None:
    value = record["value"]
    values = record | {"value": _WORDS.get(value, value) if type(value) is str else value}
    store.insert_metrics(db, [Metric.from_row([values[name] for name in Metric._fields], where)])


def _insert_blob(record: Record, db: sqlite3.Connection, where: str) -> None:
    try:
        data = base64.b64decode(record["data"], validate=True)
    except (TypeError, ValueError):
        raise LedgerError(f"{where} holds no base64 in 'data'.") from None
    check_blob(record["digest"], data, where)
    store.insert_blob(db, record["digest"], data)


_INSERT: dict[str, Callable[[Record, sqlite3.Connection, str], None]] = {
    "entry": _insert_entry,
    "metric": _insert_metric,
    "blob": _insert_blob,
}
_FIELDS = {
    "ledger": {"format"},
    "entry": set(Row._fields),
    "metric": set(Metric._fields),
    "blob": {"digest", "data"},
    "end": {"entries", "metrics", "blobs", "head"},
}


def _record(line: str, where: str) -> Record:
    record = parse(line, where)
    kind = record.get("record") if isinstance(record, dict) else None
    if kind not in list(_FIELDS):
        raise LedgerError(f"{where} is no record of a ledger: {line[:60]!r}.", remedy="Is the file an export?")
    if kind == "ledger" and record.get("format") != store.FORMAT:
        raise LedgerError(
            f"{where} has format {record.get('format')!r}, not {store.FORMAT}.", remedy="Upgrade weightfold."
        )
    if set(record) != _FIELDS[kind] | {"record"}:
        raise LedgerError(f"{where}: a '{kind}' must have {sorted(_FIELDS[kind])}. Got {sorted(record)} instead.")
    return record


def _check_end(record: Record, counts: Counter[str], head: str, where: str) -> None:
    read = {table: counts[kind] for kind, table in _TABLES.items()} | {"head": head, "record": "end"}
    if record != read:
        raise LedgerError(f"{where} promises {to_json(record)}; the lines before it hold {to_json(read)}.")


def _line(record: str, /, **fields: Any) -> str:
    return to_json(fields | {"record": record}) + "\n"


def _number_or_word(number: float) -> float | str:
    return number if math.isfinite(number) else str(number)


_WORDS = {"nan": None, "inf": math.inf, "-inf": -math.inf}
