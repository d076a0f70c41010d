"""kill -9 in mid-write, two writers, a full disk: every acknowledged entry is there, and the chain verifies."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from weightfold.errors import LedgerError
from weightfold.ledger import Ledger

Spawn = Callable[..., subprocess.Popen[str]]
Run = Callable[..., str]

N_KILLS = 20

WRITER = """
import os, sys
from weightfold.ledger import Ledger
with Ledger.open(sys.argv[1]) as log:
    step = 0
    while True:
        step += 1
        log.log_metrics(step, {"loss": 1 / step})
        blob = log.put_blob(os.urandom(3000))
        entry = log.append("edit", {"step": step, "blob": blob, "text": "x" * (step * 37 % 9000)})
        os.write(1, f"{entry.seq} {entry.hash}\\n".encode())
"""


def acknowledged(output: str) -> dict[int, str]:
    lines = [line.split() for line in output.splitlines(keepends=True) if line.endswith("\n")]
    return {int(seq): digest for seq, digest in lines}


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
def test_no_acknowledged_entry_is_lost_to_kill(path: Path, spawn: Spawn) -> None:
    Ledger.create(path, run={"seed": 0}).close()
    reader = Follower(path)
    reader.start()
    known: dict[int, str] = {}
    pause = random.Random(0)
    for _ in range(N_KILLS):
        known |= acknowledged(write_and_kill(path, spawn, pause.uniform(0, 0.06)))
        with Ledger.open(path, readonly=True) as log:
            log.verify()
            found = {entry.seq: entry.hash for entry in log.entries()}
            blobs = [entry.body["blob"] for entry in log.entries(start=max(0, len(log) - 5), kind="edit")]
            assert all(len(log.get_blob(blob)) == 3000 for blob in blobs)
        assert known.items() <= found.items()
    assert len(known) > N_KILLS
    reader.finish()


def write_and_kill(path: Path, spawn: Spawn, seconds: float) -> str:
    """Let a writer acknowledge its first entry, then kill it some time later; give all that it acknowledged."""
    with spawn(WRITER, path) as process:
        assert process.stdout is not None
        first = process.stdout.readline()
        time.sleep(seconds)
        process.kill()
        output, errors = process.communicate()
    assert process.returncode == -signal.SIGKILL, errors
    return first + output


class Follower(threading.Thread):
    """Reads the ledger all the while, and keeps what went wrong."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path, self.stop, self.n_reads = path, threading.Event(), 0
        self.failures: list[str] = []

    def run(self) -> None:
        while not self.stop.is_set():
            try:
                with Ledger.open(self.path, readonly=True) as log:
                    previous = "0" * 64
                    for entry in log.entries():
                        assert entry.prev == previous
                        previous = entry.hash
                    log.metrics("loss")
                    self.n_reads += 1
            except (LedgerError, AssertionError) as error:
                self.failures.append(repr(error))

    def finish(self) -> None:
        self.stop.set()
        self.join()
        assert not self.failures
        assert self.n_reads


ALTERNATE = """
import sys
from weightfold.ledger import Ledger
with Ledger.open(sys.argv[1]) as log:
    for step in range(60):
        log.append("edit", {"by": sys.argv[2], "step": step})
        log.log_metrics(step, {sys.argv[2]: 1.0})
"""


def test_two_processes_write_one_chain(path: Path, spawn: Spawn) -> None:
    Ledger.create(path, run={}).close()
    with spawn(ALTERNATE, path, "a") as first, spawn(ALTERNATE, path, "b") as second:
        errors = [process.communicate()[1] for process in (first, second)]
    assert errors == ["", ""]
    with Ledger.open(path) as log:
        assert len(log) == 121
        for name in "ab":
            assert [entry.body["step"] for entry in log.entries(1) if entry.body["by"] == name] == list(range(60))
            assert len(log.metrics(name)) == 60
        log.verify()


FILE_LIMIT = """
import os, resource, signal, sys
from weightfold.errors import LedgerError
from weightfold.ledger import Ledger
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
most = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
with Ledger.open(sys.argv[1]) as log:
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, most))
    def append():
        entry = log.append("edit", {"text": "x" * 2000})
        print(entry.seq, entry.hash, flush=True)
    for write in (append, lambda: log.put_blob(os.urandom(2000)), lambda: log.log_metrics(1, {"a": 1})):
        try:
            while True:
                write()
        except LedgerError as error:
            assert sys.argv[1] in str(error), error
            assert "no acknowledged entry was lost" in str(error), error
    log.verify()
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
    entry = log.append("edit", {"after": True})
    print(entry.seq, entry.hash, flush=True)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs resource limits")
def test_a_file_that_may_not_grow_costs_no_acknowledged_entry(path: Path, run: Run) -> None:
    Ledger.create(path, run={}).close()
    known = acknowledged(run(FILE_LIMIT, path))
    with Ledger.open(path, readonly=True) as log:
        log.verify()
        assert len(known) > 10
        assert known == {entry.seq: entry.hash for entry in log.entries(start=1)}


def test_a_full_disk_is_one_error_and_appending_goes_on_after_it(log: Ledger, path: Path) -> None:
    """SQLite's own limit of pages takes the way that a full disk takes: SQLITE_FULL."""
    assert log._db is not None
    ((pages,),) = log._db.execute("PRAGMA page_count")
    log._db.execute(f"PRAGMA max_page_count = {pages + 8}")
    with pytest.raises(LedgerError, match=r"(?s)No space is left for .*no acknowledged entry was lost.*Free space"):
        append_many(log)
    n_entries, head = len(log), log.head
    assert n_entries > 4
    with pytest.raises(LedgerError, match="No space is left"):
        log.put_blob(os.urandom(100_000))
    log.verify()
    log._db.execute("PRAGMA max_page_count = 100000")
    assert log.append("edit", {}).prev == head
    log.verify()


def append_many(log: Ledger) -> None:
    for _ in range(100):
        log.append("edit", {"text": "x" * 3000})


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_an_export_to_a_full_disk_leaves_the_old_one(log: Ledger, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    export = path.with_name("out.jsonl")
    log.export_jsonl(export)
    before = export.read_bytes()
    log.append("edit", {})
    opened = Path.open
    monkeypatch.setattr(Path, "open", lambda self, *args, **kw: opened(Path("/dev/full"), *args, **kw))
    with pytest.raises(LedgerError, match="could not be written: No space left on device"):
        log.export_jsonl(export)
    monkeypatch.undo()
    assert export.read_bytes() == before
    assert sorted(file.suffix for file in path.parent.iterdir() if file.suffix.startswith(".j")) == [".jsonl"]
