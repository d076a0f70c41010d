"""The lock of a folder: one holder, told to all others, free when its process is gone, and its drafts with it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save

from weightfold.artifact import read_header
from weightfold.artifact.files import drafted, drafting
from weightfold.artifact.header import settled
from weightfold.artifact.lock import locked, look
from weightfold.errors import ConfigError

ROOT = Path(__file__).parent.parent.parent
HOLDER = """
import sys, time
from pathlib import Path
from weightfold.artifact.files import drafting
from weightfold.artifact.lock import locked

with locked(Path(sys.argv[1], "lock")) as lock, drafting(Path(sys.argv[1], "a.bin")) as draft:
    draft.write_bytes(b"half")
    lock.state("train", config={"seed": 1})
    print("held", flush=True)
    time.sleep(600)
"""


def test_a_killed_holder_lets_go_and_leaves_its_mark(tmp_path: Path) -> None:
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, env=env)
    assert holder.stdout is not None
    assert holder.stdout.readline() == b"held\n"
    for wants in (lambda: locked(tmp_path / "lock").__enter__(), lambda: look(tmp_path / "lock")):
        with pytest.raises(ConfigError, match=rf"at work in .*pid {holder.pid}, weightfold train, since 20"):
            wants()
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    holder.stdout.close()
    left = look(tmp_path / "lock")
    assert left is not None
    assert (left["pid"], left["config"]) == (holder.pid, {"seed": 1})
    with locked(tmp_path / "lock") as lock:
        assert lock.left == left
    assert [drafted(path.name) for path in tmp_path.iterdir()] == ["a.bin"]
    with drafting(tmp_path / "a.bin") as draft:
        draft.write_bytes(b"whole")
    assert [path.name for path in tmp_path.iterdir()] == ["a.bin"], "neither lock nor draft is left"


def test_of_many_threads_one_holds_at_a_time(tmp_path: Path) -> None:
    inside, most, taken = [0], [0], [0]

    def work() -> None:
        for _ in range(20):
            try:
                with locked(tmp_path / "lock"):
                    inside[0] += 1
                    most[0] = max(most[0], inside[0])
                    taken[0] += 1
                    inside[0] -= 1
            except ConfigError:
                continue

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most[0] == 1
    assert taken[0] >= 20
    assert not (tmp_path / "lock").exists()


def test_drafts_of_living_processes_and_other_files_stay(tmp_path: Path) -> None:
    for name in (f".a.{os.getpid()}-00000000.bin", ".a.notes.bin", "a.1-00000000.bin"):
        (tmp_path / name).touch()
    with drafting(tmp_path / "a.bin") as first, drafting(tmp_path / "a.bin") as second:
        first.write_bytes(b"1")
        second.write_bytes(b"2")
        assert first.exists()
    assert len(list(tmp_path.iterdir())) == 4


@pytest.mark.parametrize(
    ("name", "whole"),
    [
        (".model.12-0a1b2c3d.safetensors", "model.safetensors"),
        ("..model.1-00000000.2-11111111.safetensors", "model.safetensors"),
        (".ledger.db.12-0a1b2c3d.tmp", "ledger.db"),
        (".ledger.db.12-0a1b2c3d.tmp-journal", "ledger.db"),
        (".run.12-0a1b2c3d.json", "run.json"),
        (".run.json", ""),
        ("model.12-0a1b2c3d.safetensors", ""),
    ],
)
def test_the_name_that_a_draft_is_to_take(name: str, whole: str) -> None:
    assert drafted(name) == whole


def test_equal_files_have_equal_bytes(tmp_path: Path) -> None:
    tensors = {"b": np.ones(3, np.float32), "a": np.zeros((2, 2))}
    metadata = {f"key{n}": "ü" * n for n in range(9)}
    made = {settled(save(tensors, metadata=dict(sorted(metadata.items(), reverse=bool(n))))) for n in range(2)}
    assert len(made) == 1
    (tmp_path / "a.safetensors").write_bytes(made.pop())
    header = read_header(tmp_path / "a.safetensors")
    assert dict(header.metadata) == metadata
    assert {name: stored.shape for name, stored in header.tensors.items()} == {"b": (3,), "a": (2, 2)}
    assert settled(save(tensors)) == save(tensors)
