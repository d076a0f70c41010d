"""Appending, reading, metrics and blobs, as a user sees them."""

from __future__ import annotations

import hashlib
import json
import math
import os
import tempfile
import threading
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from weightfold.errors import LedgerError
from weightfold.ledger import Ledger
from weightfold.ledger.entry import GENESIS

LEAF = st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False, allow_infinity=False)
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=6)
BODIES = st.dictionaries(TEXT, LEAF | TEXT | st.lists(LEAF | TEXT, max_size=3), max_size=4)
STEPS = st.integers(-(2**63) + 1, 2**63 - 1)
NAMES = TEXT.filter(bool)


@settings(deadline=None, max_examples=40)
@given(st.lists(st.tuples(BODIES, BODIES), max_size=4))
def test_every_body_comes_back(pairs: list[tuple[dict[str, Any], dict[str, Any]]]) -> None:
    with tempfile.TemporaryDirectory() as folder, Ledger.create(f"{folder}/run.ledger", run={}) as log:
        written = [log.append("edit", body, aside=aside) for body, aside in pairs]
        log.verify()
        log.close()
        with Ledger.open(f"{folder}/run.ledger", readonly=True) as copy:
            assert list(copy.entries(start=1)) == written
            for entry, (body, _) in zip(copy.entries(1), pairs, strict=True):
                assert json.dumps(entry.body, sort_keys=True) == json.dumps(body, sort_keys=True)
            copy.verify()


@settings(deadline=None, max_examples=40)
@given(st.lists(st.tuples(STEPS, st.dictionaries(NAMES, st.floats(), max_size=3)), max_size=4))
def test_every_metric_comes_back(rows: list[tuple[int, dict[str, float]]]) -> None:
    with tempfile.TemporaryDirectory() as folder, Ledger.create(f"{folder}/run.ledger", run={}) as log:
        for step, values in rows:
            log.log_metrics(step, values)
        names = sorted({name for _, values in rows for name in values})
        assert log.metric_names() == names
        for name in names:
            expected = [(step, values[name] + 0.0) for step, values in rows if name in values]
            assert repr(log.metrics(name)) == repr(expected)
        log.verify()


def test_the_entries_form_a_chain(log: Ledger, path: Path) -> None:
    for step in range(600):
        log.append("edit" if step % 2 else "gate", {"step": step})
    entries = list(log.entries())
    assert [entry.seq for entry in entries] == list(range(601)) == list(range(len(log)))
    assert [entry.prev for entry in entries] == [GENESIS, *(entry.hash for entry in entries[:-1])]
    assert all(entry.hash == entry.compute_hash() for entry in entries)
    assert log.head == entries[-1].hash
    assert entries[0].kind == "run"
    assert entries[0].body == {"seed": 7}
    assert [entry.body["step"] for entry in log.entries(kind="edit")] == list(range(1, 600, 2))
    assert [entry.seq for entry in log.entries(start=599)] == [599, 600]
    assert [entry.seq for entry in log.entries(start=np.int64(600))] == [600]  # pyright: ignore[reportArgumentType]
    assert list(log.entries(start=601)) == list(log.entries(kind="none")) == []


def test_appending_goes_on_after_reopening(log: Ledger, path: Path) -> None:
    first = log.append("edit", {"step": 1})
    log.close()
    with Ledger.open(path) as again:
        assert again.append("edit", {"step": 2}).prev == first.hash
        assert len(again) == 3
        again.verify()


def test_entries_that_come_in_meanwhile_are_read_and_stop_nobody(log: Ledger, path: Path) -> None:
    with Ledger.open(path) as other:
        reader = log.entries()
        next(reader)
        other.append("edit", {"by": "other"})
        log.append("edit", {"by": "log"})
        assert [entry.body["by"] for entry in reader] == ["other", "log"]


def test_an_entry_is_synced_to_the_disk_and_a_metric_is_not(log: Ledger) -> None:
    """In WAL mode SQLite syncs at every commit under FULL (2), only at checkpoints under NORMAL (1)."""
    assert log._db is not None
    assert log._db.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    for write, level in ((lambda: log.append("edit", {}), 2), (lambda: log.log_metrics(1, {"a": 1}), 1)) * 2:
        write()
        assert log._db.execute("PRAGMA synchronous").fetchone() == (level,)


def test_two_writers_in_turn_continue_one_chain(log: Ledger, path: Path) -> None:
    with Ledger.open(path) as other:
        for step in range(10):
            (log, other)[step % 2].append("edit", {"step": step})
        assert log.head == other.head
        assert len(log) == len(other) == 11
        log.verify()


def test_threads_share_one_ledger(log: Ledger) -> None:
    def work() -> None:
        for step in range(20):
            log.append("edit", {"step": step})
            log.log_metrics(step, {"loss": 0.5})
            list(log.entries())

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(log) == 81
    assert len(log.metrics("loss")) == 80
    log.verify()


def test_metrics_take_numbers_of_any_kind(log: Ledger) -> None:
    step: Any = np.int64(3)
    values: Any = {"a": np.float32(0.5), "b": 2, "c": True, "d": Fraction(1, 4), "e": math.inf}
    log.log_metrics(step, values)
    log.log_metrics(4, {"a": math.nan, "z": -0.0})
    assert [log.metrics(name) for name in "bcde"] == [[(3, 2.0)], [(3, 1.0)], [(3, 0.25)], [(3, math.inf)]]
    assert str(log.metrics("a")) == "[(3, 0.5), (4, nan)]"
    assert log.metrics("missing") == []
    assert len(log) == 1
    log.verify()


@pytest.mark.parametrize(
    ("step", "values", "complaint"),
    [
        (1.5, {"a": 1.0}, "step of a metric must be an int"),
        (2**63, {"a": 1.0}, "must fit in 64 bits"),
        (1, {"a": "0.5"}, "Metric 'a' must be a number. Got str"),
        (1, {"a": np.zeros(1)}, "Metric 'a' must be a number. Got ndarray"),
        (1, {"a": 10**400}, "Metric 'a' must fit in a 64-bit float"),
        (1, {"ok": 1.0, "": 1.0}, "name of a metric must be a non-empty str"),
        (1, {3: 1.0}, "name of a metric must be a non-empty str"),
    ],
)
def test_metrics_that_are_no_numbers_are_refused(log: Ledger, step: Any, values: Any, complaint: str) -> None:
    with pytest.raises(LedgerError, match=complaint):
        log.log_metrics(step, values)
    assert log.metric_names() == []


def test_blobs_are_stored_once_by_digest(log: Ledger, path: Path) -> None:
    data = os.urandom(3_000_000)
    digest = log.put_blob(data)
    assert digest == hashlib.sha256(data).hexdigest()
    size = path.with_name("run.ledger-wal").stat().st_size
    assert log.put_blob(bytearray(data)) == log.put_blob(memoryview(data)) == digest
    assert path.with_name("run.ledger-wal").stat().st_size == size
    assert log.get_blob(digest) == data
    assert log.get_blob(log.put_blob(b"")) == b""
    with pytest.raises(LedgerError, match="holds no blob 'abc'"):
        log.get_blob("abc")
    with pytest.raises(LedgerError, match="was refused"):
        log.get_blob(object())  # pyright: ignore[reportArgumentType]
    with pytest.raises(LedgerError, match="must be bytes"):
        log.put_blob("text")  # pyright: ignore[reportArgumentType]
    log.verify()


def test_a_refused_body_leaves_no_trace(log: Ledger) -> None:
    head = log.head
    for body, aside in [({"loss": math.nan}, {}), ({}, {"seconds": math.inf}), ({"x": object()}, {})]:
        with pytest.raises(LedgerError):
            log.append("edit", body, aside=aside)
    assert log.head == head
    assert log.append("edit", {}).seq == 1


def test_an_exception_in_the_block_closes_and_keeps_what_was_appended(path: Path) -> None:
    def fail() -> None:
        with Ledger.create(path, run={}) as log:
            log.append("edit", {})
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert list(path.parent.iterdir()) == [path]
    with Ledger.open(path, readonly=True) as log:
        assert len(log) == 2


def test_a_closed_ledger_says_so(log: Ledger) -> None:
    log.close()
    log.close()
    assert "closed" in repr(log)
    for use in (
        log.verify,
        lambda: log.head,
        lambda: len(log),
        lambda: log.append("edit", {}),
        lambda: log.metrics("a"),
    ):
        with pytest.raises(LedgerError, match="is closed"):
            use()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_child_process_must_open_its_own(log: Ledger) -> None:
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            log.append("edit", {})
        except LedgerError as error:
            os.write(write, str(error).encode())
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    assert b"opened by another process" in os.read(read, 1000)
    os.close(read)
    os.close(write)
    assert len(log) == 1
