"""What a path may hold, and what is said of each: one LedgerError with a remedy, never an error of sqlite3."""

from __future__ import annotations

import os
import shutil
import sqlite3
import stat
import subprocess
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from weightfold.errors import LedgerError
from weightfold.ledger import Ledger

OPENERS = [Ledger.open, lambda path: Ledger.open(path, readonly=True)]


def test_create_refuses_an_existing_path_and_leaves_it_alone(path: Path) -> None:
    path.write_text("precious")
    with pytest.raises(LedgerError, match="exists already"):
        Ledger.create(path, run={})
    assert path.read_text() == "precious"
    assert list(path.parent.iterdir()) == [path]


def test_create_refuses_the_leftover_log_of_another_ledger(log: Ledger, path: Path) -> None:
    """SQLite would replay a stale write-ahead log into the new file."""
    log.append("edit", {})
    left = path.with_name("run.ledger-wal")
    shutil.copy(left, path.parent / "kept")
    log.close()
    path.unlink()
    (path.parent / "kept").rename(left)
    with pytest.raises(LedgerError, match="left over from another ledger"):
        Ledger.create(path, run={})


def test_create_leaves_nothing_when_the_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LedgerError, match=r"'body\.lr' must be a finite number"):
        Ledger.create(tmp_path / "run.ledger", run={"lr": float("nan")})
    with pytest.raises(LedgerError, match="could not be"):
        Ledger.create(tmp_path / "missing" / "run.ledger", run={})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["a b.ledger", "50% #1?.ledger", "é.ledger"])
def test_odd_names(tmp_path: Path, name: str) -> None:
    with Ledger.create(tmp_path / name, run={}) as log:
        log.append("edit", {})
    with Ledger.open(str(tmp_path / name), readonly=True) as log:
        assert len(log) == 2
    assert (tmp_path / name).is_file()


def test_the_path_may_be_relative_and_the_folder_change(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(path.parent)
    with Ledger.create("run.ledger", run={}) as log:
        monkeypatch.chdir("/")
        log.append("edit", {})
        assert log.path == path.resolve()


def foreign(path: Path) -> None:
    with closing(sqlite3.connect(path)) as db:
        db.execute("CREATE TABLE t (x)")


def newer(path: Path) -> None:
    Ledger.create(path, run={}).close()
    with closing(sqlite3.connect(path)) as db:
        db.execute("PRAGMA user_version = 2")


def without_entries(path: Path) -> None:
    Ledger.create(path, run={}).close()
    with closing(sqlite3.connect(path)) as db:
        db.execute("DROP TRIGGER entries_refuse_delete")
        db.execute("DELETE FROM entries")
        db.commit()


def without_tables(path: Path) -> None:
    Ledger.create(path, run={}).close()
    with closing(sqlite3.connect(path)) as db:
        db.execute("DROP TABLE entries")


def cut(path: Path, keep: float) -> None:
    with Ledger.create(path, run={}) as log:
        for _ in range(50):
            log.append("edit", {"text": "x" * 500})
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep)])


@pytest.mark.parametrize("opener", OPENERS)
@pytest.mark.parametrize(
    ("prepare", "complaint"),
    [
        (lambda path: None, "There is no ledger at"),
        (lambda path: path.mkdir(), "it is not a file"),
        (lambda path: path.write_bytes(b""), "it is empty"),
        (lambda path: path.write_bytes(b"short"), "is not a ledger"),
        (lambda path: path.write_text('{"record":"ledger"}\n' * 900), "is not a ledger.*import_jsonl"),
        (lambda path: path.write_bytes(b"SQLite format 3\0" + bytes(5000)), "is not a ledger"),
        (foreign, "an SQLite file of another program"),
        (newer, "has ledger format 2; this version of weightfold reads up to 1.*Upgrade"),
        (without_entries, "no first entry"),
        (without_tables, "is damaged"),
        (lambda path: cut(path, 0.5), "is damaged or cut short"),
        (lambda path: cut(path, 0.97), "is damaged or cut short"),
        (lambda path: cut(path, 0.001), "is not a ledger|damaged"),
    ],
)
def test_what_is_no_ledger_is_named(opener: Any, path: Path, prepare: Callable[[Path], Any], complaint: str) -> None:
    prepare(path)
    with pytest.raises(LedgerError, match=f"(?s){complaint}") as caught:
        opener(path)
    assert caught.value.remedy
    assert str(path) in str(caught.value)


def test_a_reader_cannot_write(filled: Path) -> None:
    with Ledger.open(filled, readonly=True) as log:
        for write in (lambda: log.append("edit", {}), lambda: log.log_metrics(1, {"a": 1}), lambda: log.put_blob(b"")):
            with pytest.raises(LedgerError, match="open for reading only"):
                write()


def test_a_reader_follows_the_writer(log: Ledger, path: Path) -> None:
    with Ledger.open(path, readonly=True) as reader:
        for step in range(5):
            entry = log.append("edit", {"step": step})
            log.log_metrics(step, {"loss": 0.5})
            assert reader.head == entry.hash
            assert len(reader.metrics("loss")) == step + 1
            reader.verify()


def test_another_writer_in_the_middle_is_waited_for_then_named(log: Ledger, path: Path) -> None:
    assert log._db is not None
    log._db.execute("PRAGMA busy_timeout = 50")
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(LedgerError, match="locked by another writer"):
            log.append("edit", {})
        with Ledger.open(path, readonly=True) as reader:
            assert len(reader) == 1
        other.execute("ROLLBACK")
    assert log.append("edit", {}).seq == 1


def test_a_ledger_that_was_taken_away_is_noticed(log: Ledger, path: Path) -> None:
    path.rename(path.with_name("elsewhere.ledger"))
    with pytest.raises(LedgerError, match="was moved or deleted"):
        log.append("edit", {})


def test_the_triggers_refuse_to_change_anything(filled: Path) -> None:
    with closing(sqlite3.connect(filled)) as db:
        for statement in (
            "UPDATE entries SET kind = 'x' WHERE seq = 1",
            "DELETE FROM entries WHERE seq = 13",
            "INSERT OR REPLACE INTO entries SELECT * FROM entries WHERE seq = 2",
            "INSERT INTO entries SELECT seq + 100, kind, time, body, aside, prev, hash, checksum FROM entries",
            "UPDATE blobs SET data = x'00'",
            "DELETE FROM blobs",
            "INSERT OR REPLACE INTO blobs (digest, data) SELECT digest, x'00' FROM blobs",
            "UPDATE metrics SET value = 0",
            "DELETE FROM metrics",
            "INSERT OR REPLACE INTO metrics SELECT * FROM metrics WHERE id = 1",
        ):
            with pytest.raises(sqlite3.IntegrityError, match=r"append-only|once|must follow"):
                db.execute(statement)


AS_NOBODY = """
import os, sys
from weightfold.errors import LedgerError
from weightfold.ledger import Ledger
if os.getuid() == 0:
    os.setgroups([]); os.setgid(65534); os.setuid(65534)
try:
    with Ledger.open(sys.argv[1], readonly=sys.argv[2] == "read") as log:
        log.verify()
        print(len(log), log.head)
except LedgerError as error:
    print(error)
"""


@pytest.fixture
def locked(filled: Path) -> Any:
    """The folder of a ledger, which the test makes unwritable; made writable again at the end."""
    for folder in [filled.parent, *filled.parent.parents][:-2]:
        if folder.owner() == filled.owner() and os.getuid() == 0:
            folder.chmod(folder.stat().st_mode | stat.S_IXOTH | stat.S_IROTH)
    yield filled.parent
    filled.parent.chmod(0o755)


def freeze(folder: Path) -> None:
    for file in folder.iterdir():
        file.chmod(0o444)
    folder.chmod(0o555)


@pytest.mark.skipif(os.name != "posix", reason="needs POSIX permissions")
def test_a_read_only_copy_can_be_read(filled: Path, locked: Path, run: Callable[..., str]) -> None:
    with Ledger.open(filled) as log:
        expected = f"{len(log)} {log.head}"
    freeze(locked)
    assert run(AS_NOBODY, filled, "read").strip() == expected
    assert "cannot be written" in run(AS_NOBODY, filled, "append")
    assert [file.name for file in locked.iterdir()] == ["run.ledger"]


@pytest.mark.skipif(os.name != "posix", reason="needs POSIX permissions")
def test_a_reader_without_permission_to_write_follows_a_live_ledger(
    filled: Path, locked: Path, run: Callable[..., str]
) -> None:
    with Ledger.open(filled) as log:
        log.append("edit", {})
        freeze(locked)
        assert run(AS_NOBODY, filled, "read").strip() == f"{len(log)} {log.head}"


@pytest.mark.skipif(os.name != "posix", reason="needs POSIX permissions")
def test_a_frozen_copy_of_a_live_ledger_is_not_read_without_its_last_entries(
    filled: Path, locked: Path, run: Callable[..., str]
) -> None:
    copy = filled.parent / "copy"
    copy.mkdir()
    with Ledger.open(filled) as log:
        log.append("edit", {})
        subprocess.run(["cp", filled, f"{filled}-wal", copy], check=True)  # a copy by this process drops its locks
        expected = f"{len(log)} {log.head}"
    freeze(copy)
    assert "Copy both files to a folder that can be written" in run(AS_NOBODY, copy / "run.ledger", "read")
    copy.chmod(0o777)
    assert run(AS_NOBODY, copy / "run.ledger", "read").strip() == expected
