"""One changed byte, anywhere in what is stored, is found by opening or verifying, and by no error of sqlite3."""

from __future__ import annotations

import os
import random
import re
import sqlite3
import subprocess
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from weightfold.errors import LedgerError
from weightfold.ledger import Ledger
from weightfold.ledger.entry import Entry

N_FLIPS = 2000


def everything(log: Ledger, digests: list[str]) -> str:
    """All that a reader can see, as one text (in which nan equals nan)."""
    metrics = {name: log.metrics(name) for name in log.metric_names()}
    return repr((list(log.entries()), metrics, [log.get_blob(digest) for digest in digests]))


def digests_of(path: Path) -> list[str]:
    with closing(sqlite3.connect(path)) as db:
        return [digest for (digest,) in db.execute("SELECT digest FROM blobs")]


def flips(size: int) -> list[tuple[int, int]]:
    """All bytes of the header, then a fixed choice of the rest; each with a mask."""
    generator = random.Random(0)
    header = [(position, 0xFF) for position in range(100)]
    return header + [(generator.randrange(size), 1 << generator.randrange(8)) for _ in range(N_FLIPS)]


@pytest.mark.parametrize("readonly", [True, False])
def test_a_flipped_byte_of_the_file_is_found_or_changes_nothing(filled: Path, tmp_path: Path, readonly: bool) -> None:
    data, digests = filled.read_bytes(), digests_of(filled)
    with Ledger.open(filled, readonly=True) as log:
        expected = everything(log, digests)
    n_found = 0
    for number, (position, mask) in enumerate(flips(len(data))[readonly::2]):
        path = tmp_path / f"{number}.ledger"
        path.write_bytes(data[:position] + bytes([data[position] ^ mask]) + data[position + 1 :])
        try:
            with Ledger.open(path, readonly=readonly) as log:
                log.verify()
                assert everything(log, digests) == expected, f"byte {position} ^ {mask:#x} was not found"
        except LedgerError:
            n_found += 1
    assert n_found > N_FLIPS / 5


def test_a_damaged_file_gives_only_ledger_errors_when_it_is_used(filled: Path, tmp_path: Path) -> None:
    data, digests = filled.read_bytes(), digests_of(filled)
    for number, (position, mask) in enumerate(flips(len(data))[::25]):
        path = tmp_path / f"{number}.ledger"
        path.write_bytes(data[:position] + bytes([data[position] ^ mask]) + data[position + 1 :])
        for use in (
            lambda log: log.append("edit", {"step": 99}),
            lambda log: log.log_metrics(99, {"loss": 0.5}),
            lambda log: log.put_blob(b"new"),
            lambda log: [log.metrics(name) for name in log.metric_names()],
            lambda log: list(log.entries(kind="edit")),
            lambda log: [log.get_blob(digest) for digest in digests],
            lambda log: (len(log), log.head),
            lambda log: log.export_jsonl(tmp_path / "out.jsonl"),
        ):
            attempt(path, use)


def attempt(path: Path, use: Callable[[Ledger], Any]) -> None:
    try:
        with Ledger.open(path) as log:
            use(log)
    except LedgerError:
        pass


@pytest.mark.skipif(os.name != "posix", reason="needs cp")
def test_a_flipped_byte_of_a_write_ahead_log_left_by_a_crash_costs_at_most_the_end(log: Ledger, tmp_path: Path) -> None:
    """SQLite ends the log at the first frame that does not fit its checksum: what remains is a whole, shorter chain."""
    for step in range(6):
        log.append("edit", {"step": step, "text": "x" * 900})
    expected = list(log.entries())
    copy, left = tmp_path / "copy.ledger", tmp_path / "copy.ledger-wal"
    for source, target in ((log.path, copy), (f"{log.path}-wal", left)):
        subprocess.run(["cp", source, target], check=True)  # reading them in this process would drop its locks
    database, data = copy.read_bytes(), left.read_bytes()
    n_left = []
    for position, mask in [(position, mask) for position, mask in flips(len(data))[:400] if position < len(data)]:
        copy.write_bytes(database)
        left.write_bytes(data[:position] + bytes([data[position] ^ mask]) + data[position + 1 :])
        try:
            with Ledger.open(copy) as damaged:
                damaged.verify()
                assert list(damaged.entries()) == expected[: len(damaged)]
                n_left.append(len(damaged))
        except LedgerError:
            n_left.append(0)
        for file in (copy, left, tmp_path / "copy.ledger-shm"):
            file.unlink(missing_ok=True)
    assert 0 < min(n_left) < max(n_left) < len(expected)


def tamper(path: Path, statement: str, *values: Any) -> None:
    """Change a row behind the ledger's back, and put its triggers back in place."""
    with closing(sqlite3.connect(path)) as db:
        triggers = db.execute("SELECT name, sql FROM sqlite_master WHERE type = 'trigger'").fetchall()
        for name, _ in triggers:
            db.execute(f"DROP TRIGGER {name}")
        assert db.execute(statement, values).rowcount == 1
        for _, sql in triggers:
            db.execute(sql)
        db.commit()


def complaint_of(path: Path) -> str:
    with Ledger.open(path, readonly=True) as log, pytest.raises(LedgerError) as caught:
        log.verify()
    return str(caught.value)


@pytest.mark.parametrize("seq", [0, 6, 13])
@pytest.mark.parametrize(
    ("column", "differs"),
    [
        ("kind", "seq, kind, body and prev hash to"),
        ("body", "seq, kind, body and prev hash to"),
        ("hash", "seq, kind, body and prev hash to"),
        ("prev", "its prev is"),
        ("time", "its time or aside does not fit"),
        ("aside", "its time or aside does not fit"),
        ("checksum", "its time or aside does not fit"),
    ],
)
def test_a_changed_column_is_located(filled: Path, seq: int, column: str, differs: str) -> None:
    with closing(sqlite3.connect(filled)) as db:
        (value,) = db.execute(f"SELECT {column} FROM entries WHERE seq = ?", (seq,)).fetchone()
    changed = value + 1 if isinstance(value, int | float) else value[:-2] + chr(ord(value[-2]) ^ 1) + value[-1]
    tamper(filled, f"UPDATE entries SET {column} = ? WHERE seq = ?", changed, seq)
    assert re.match(rf"Entry {seq} of .* was changed: .*{differs}", complaint_of(filled))


def test_a_column_of_another_type_is_located(filled: Path) -> None:
    tamper(filled, "UPDATE entries SET body = CAST(body AS BLOB) WHERE seq = 4")
    assert re.match("Entry 4 .* its columns hold int, str, float, bytes", complaint_of(filled))


def test_text_that_is_no_utf8_is_located(filled: Path) -> None:
    tamper(filled, "UPDATE entries SET body = CAST(x'7b22ff227d' AS TEXT) WHERE seq = 4")
    assert "Entry 4" in complaint_of(filled)
    complaint_of(filled).encode()  # can be printed


@pytest.mark.parametrize(
    ("statement", "complaint"),
    [
        ("DELETE FROM entries WHERE seq = 5", "Entry 5 .* is missing"),
        ("DELETE FROM entries WHERE seq = 0", "Entry 0 .* is missing"),
        ("UPDATE entries SET seq = 40 WHERE seq = 13", "Entry 13 .* is missing"),
        ("UPDATE entries SET seq = -3 WHERE seq = 13", "row of entries before the first one"),
        ("DELETE FROM metrics WHERE id = 7", "Metric 7 .* is missing"),
        ("UPDATE metrics SET value = value + 1e-15 WHERE id = 4", "Metric 4 .* does not fit the checksum"),
        ("UPDATE metrics SET value = 0 WHERE id = 3", "Metric 3 .* does not fit the checksum"),
        ("UPDATE metrics SET value = NULL WHERE id = 4", "Metric 4 .* does not fit the checksum"),
        ("UPDATE metrics SET value = 'x' WHERE id = 4", "Metric 4 .* columns hold int, str, str, int"),
        ("UPDATE metrics SET step = step + 1 WHERE id = 4", "Metric 4 .* does not fit the checksum"),
        ("UPDATE metrics SET name = 'lots' WHERE id = 4", "Metric 4 .* does not fit the checksum"),
        ("UPDATE blobs SET data = x'00' WHERE id = 1", "Blob 1 .* its data has the digest"),
        ("UPDATE blobs SET digest = 'ab' WHERE id = 2", r"Blob 2 \('ab'\) .* its data has the digest"),
    ],
)
def test_changed_rows_are_located(filled: Path, statement: str, complaint: str) -> None:
    tamper(filled, statement)
    assert re.search(complaint, complaint_of(filled))


def test_a_forged_entry_does_not_fit_the_next(filled: Path) -> None:
    """Recomputing the hash of one entry is not enough: the next one names the old hash."""
    with Ledger.open(filled, readonly=True) as log:
        before, entry = list(log.entries())[3:5]
    forged = Entry.after((before.seq, before.hash), entry.kind, entry.body | {"cost": 0.0}, entry.aside)
    row = forged.to_row()
    tamper(filled, "UPDATE entries SET body = ?, hash = ? WHERE seq = 4", row.body, row.hash)
    assert "Entry 5" in complaint_of(filled)
    assert "One of the two was replaced" in complaint_of(filled)


def test_dropped_and_foreign_triggers_are_found(filled: Path) -> None:
    with closing(sqlite3.connect(filled)) as db:
        db.execute("CREATE TRIGGER extra AFTER INSERT ON metrics BEGIN SELECT 1; END")
    assert "'extra'" in complaint_of(filled)
    with closing(sqlite3.connect(filled)) as db:
        db.execute("DROP TRIGGER extra")
        db.execute("DROP TRIGGER metrics_refuse_update")
    assert "'metrics_refuse_update'" in complaint_of(filled)


def test_a_definition_whose_name_is_no_text_is_found(filled: Path) -> None:
    with closing(sqlite3.connect(filled)) as db:
        db.execute("PRAGMA writable_schema = ON")
        db.execute("UPDATE sqlite_master SET name = CAST(name AS BLOB) WHERE name = 'metrics_once'")
        db.commit()
    assert "metrics_once" in complaint_of(filled)


def test_reading_refuses_a_changed_row_also_without_verify(filled: Path) -> None:
    tamper(filled, "UPDATE entries SET body = replace(body, 'kept', 'lept') WHERE seq = 4")
    tamper(filled, "UPDATE metrics SET value = 2 WHERE id = 1")
    tamper(filled, "UPDATE blobs SET data = x'00' WHERE id = 1")
    digests = digests_of(filled)
    with Ledger.open(filled, readonly=True) as log:
        entries = log.entries()
        assert [next(entries).seq for _ in range(4)] == [0, 1, 2, 3]
        for read in (lambda: next(entries), lambda: log.metrics("loss"), lambda: log.get_blob(digests[0])):
            with pytest.raises(LedgerError, match="was changed"):
                read()
        assert len(log.get_blob(digests[1])) == 256 * 40
