"""Many writers, a sweep beside them, a full disk, kill -9: what was acknowledged is there, nothing half-written."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from weightfold.errors import ArtifactError, ConfigError
from weightfold.zoo.storage.objects import Objects
from weightfold.zoo.store import Zoo

from ..conftest import equal, near, net, pair, switched

ROOT = Path(__file__).parents[3]
N_KILLS = 16
pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")


def together(*jobs: Callable[[], None]) -> list[int]:
    """Run each job in a process of its own, all begun at once; give their exit codes."""
    read, write = os.pipe()
    children = []
    for job in jobs:
        child = os.fork()
        if child == 0:
            code = 1
            try:
                os.close(write)
                os.read(read, 1)
                job()
                code = 0
            except ConfigError:
                code = 3
            except BaseException:
                sys.excepthook(*sys.exc_info())
            finally:
                os._exit(code)
        children.append(child)
    os.close(read)
    os.close(write)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def test_many_processes_add_the_same_models_at_once(tmp_path: Path) -> None:
    folder = tmp_path / "zoo"

    def job() -> None:
        with Zoo.open(folder) as zoo:
            for seed in range(12):
                zoo.add(net(seed).state_dict(), name=f"n{seed}")

    assert together(job, job, job, job) == [0, 0, 0, 0]
    with Zoo.open(folder) as zoo:
        assert sorted(card.name for card in zoo.cards()) == sorted(f"n{seed}" for seed in range(12))
        assert not zoo.verify()
        assert all(equal(zoo.state(f"n{seed}"), net(seed).state_dict()) for seed in range(12))
        swept = zoo.sweep()
        assert swept is not None
        assert swept.n_files == 0, "no blob twice"


def test_of_two_that_want_one_name_one_gets_it(tmp_path: Path) -> None:
    folder = tmp_path / "zoo"
    Zoo.open(folder).close()

    def job(seed: int) -> Callable[[], None]:
        def run() -> None:
            with Zoo.open(folder) as zoo:
                zoo.add(net(seed).state_dict(), name="mine")

        return run

    assert sorted(together(*(job(seed) for seed in range(4)))) == [0, 3, 3, 3]
    with Zoo.open(folder) as zoo:
        assert len(zoo) == 1
        assert not zoo.verify()


def test_sweeps_beside_writers_take_nothing_that_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "zoo"
    Zoo.open(folder).close()

    def write(start: int) -> Callable[[], None]:
        def run() -> None:
            with Zoo.open(folder) as zoo:
                for seed in range(start, start + 15):
                    zoo.add(net(seed).state_dict(), name=f"n{seed}")
                    if seed % 3 == 0:
                        zoo.remove(f"n{seed}")

        return run

    def sweep() -> None:
        with Zoo.open(folder) as zoo:
            for _ in range(40):
                zoo.sweep()
                for card in zoo.cards():
                    try:
                        zoo.state(card.name)
                    except ConfigError:
                        continue  # removed meanwhile

    assert together(write(0), write(100), sweep) == [0, 0, 0]
    with Zoo.open(folder) as zoo:
        assert len(zoo) == 20
        assert not zoo.verify()


def test_packing_and_reading_at_once(tmp_path: Path) -> None:
    """A reader meets contents that become differences, and full again, and blobs that are swept, all the time."""
    folder = tmp_path / "zoo"
    parent = net().state_dict()
    children = {f"c{seed}": near(parent, seed) for seed in range(3)}
    with Zoo.open(folder) as zoo:
        zoo.add(parent, name="parent")
        zoo.add_many(list(children.values()), names=list(children))

    def change() -> None:
        with Zoo.open(folder) as zoo:
            for _ in range(6):
                for name in children:
                    switched(zoo, name, "parent")
                zoo.sweep()
                for name in children:
                    zoo.unpack(name)
                zoo.sweep()

    def read() -> None:
        for _ in range(25):
            with Zoo.open(folder) as zoo:
                assert all(equal(zoo.state(name), state) for name, state in children.items())

    assert together(change, read, read) == [0, 0, 0]
    with Zoo.open(folder) as zoo:
        assert not zoo.verify()


def test_a_lease_keeps_the_sweep_away(zoo: Zoo) -> None:
    objects = Objects(zoo.folder)
    with objects.lease():
        digest = objects.put(b"not named yet")
        assert zoo.sweep(wait_s=0.05) is None
        assert objects.path(digest).is_file()
    swept = zoo.sweep()
    assert swept is not None
    assert (swept.n_files, swept.n_bytes) == (1, 13)
    assert not objects.path(digest).exists()


def test_drafts_of_killed_writers_are_swept(zoo: Zoo) -> None:
    zoo.add(net(), name="a")
    (zoo.folder / "blobs" / "00" / ".00ab.123-abc").write_bytes(b"half")
    swept = zoo.sweep()
    assert swept is not None
    assert swept.n_files == 1
    assert not zoo.verify()


# a full disk ----------------------------------------------------------------------------------------------------------


@contextmanager
def no_file_above(n_bytes: int) -> Iterator[None]:
    """Let every write beyond a size fail, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)


def files_of(folder: Path) -> set[Path]:
    return {path for path in folder.rglob("*") if path.is_file() and "zoo.db" not in path.name}


def test_on_a_full_disk_nothing_is_half_written(zoo: Zoo, tmp_path: Path) -> None:
    zoo.add(net(), name="a")
    before, cards = files_of(zoo.folder), zoo.cards()
    with no_file_above(200_000), pytest.raises(ArtifactError, match="could not be written") as caught:
        zoo.add_many([net(3), {"w": torch.zeros(100_000)}])
    assert "Free space" in str(caught.value.remedy)
    assert files_of(zoo.folder) == before
    assert zoo.cards() == cards
    with no_file_above(100), pytest.raises(ArtifactError, match="could not be written"):
        zoo.get("a", tmp_path / "out.safetensors")
    assert not list(tmp_path.glob("*out*"))
    assert not zoo.verify()


@pytest.mark.parametrize("room", [0, 500, 4000, 12_000, 40_000])
def test_a_catalogue_that_cannot_grow_takes_back_the_whole_transaction(zoo: Zoo, room: int) -> None:
    zoo.add(net(), name="a")
    names, states = [f"n{seed}" for seed in range(60)], [{"w": torch.tensor(float(s))} for s in range(60)]
    wal = (zoo.folder / "zoo.db-wal").stat().st_size
    with no_file_above(wal + room), pytest.raises(ArtifactError, match=r"zoo\.db.*(read or written|no space)"):
        zoo.add_many(states, names=names, facts={"text": "x" * 2000})
    assert [card.name for card in zoo.cards()] == ["a"]
    with Zoo.open(zoo.folder) as fresh:
        assert not fresh.verify()
        swept = fresh.sweep()
        assert swept is not None
        assert swept.n_files == 0, "blobs that nobody names were given back"
        assert len(fresh.add_many(states, names=names)) == 60


def test_a_difference_that_finds_no_room_changes_nothing(zoo: Zoo) -> None:
    _, child = pair(zoo)
    zoo.sweep()
    cards = zoo.cards()
    with no_file_above(100), pytest.raises(ArtifactError, match="could not be written"):
        zoo.unpack("child")
    assert zoo.cards() == cards
    assert equal(zoo.state("child"), child)


# kill -9 --------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
def test_kill_loses_no_acknowledged_model(tmp_path: Path) -> None:
    script = ROOT / "benchmarks" / "zoo_faults.py"
    out = tmp_path / "report.json"
    command = [sys.executable, str(script), "--kills", str(N_KILLS), "--seed", "3", "--out", str(out)]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(out.read_text())
    assert report["kills"] == N_KILLS
    assert report["lost"] == report["wrong"] == report["problems"] == 0
    assert report["acknowledged"] > 0


@pytest.mark.parametrize("name", ["child", "grandchild"])
def test_a_reader_is_not_disturbed_by_who_unpacks_and_removes(
    zoo: Zoo, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Between the child's row and its parent's, another process stores the child in full and removes the parent."""
    _, child = pair(zoo)
    zoo.add(near(child, 2), name="grandchild")
    switched(zoo, "grandchild", "child")
    wanted = zoo.state(name)
    real, meanwhile = Objects.read, [lambda other: other.remove("parent", unpack=True)]

    def read(self: Objects, digest: str) -> bytes:
        data = real(self, digest)
        if self.path(digest).stat().st_size == zoo.card("child").stored_bytes and meanwhile:
            with Zoo.open(zoo.folder) as other:
                meanwhile.pop()(other)
        return data

    with Zoo.open(zoo.folder) as fresh, monkeypatch.context() as patch:
        patch.setattr(Objects, "read", read)
        assert equal(fresh.state(name), wanted)
    assert not meanwhile
    assert "parent" not in {card.name for card in zoo.cards()}
