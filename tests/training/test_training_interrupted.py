"""One process a folder; what was interrupted or killed at any moment goes on by the command that began it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from weightfold.artifact.lock import locked
from weightfold.audit.folder import verify_folder
from weightfold.errors import ArtifactError, ConfigError
from weightfold.ledger import Ledger
from weightfold.report import write_report
from weightfold.training import TrainConfig, resume, train
from weightfold.training import folder as files
from weightfold.training.again import undo_run
from weightfold.training.lumped import LumpRunConfig, lump_to_folder
from weightfold.training.oneshot import OneShotConfig, fold_trained
from weightfold.training.rewind import rewind

from .conftest import TINY

ROOT = Path(__file__).parent.parent.parent
SMALL = {**TINY, "epochs": 2, "overrides": {"hidden": [8]}, "method": "fold", "dense": False}
KILLED_IN = """
import importlib, json, os, signal, sys
import torch
from weightfold.report import write_report
from weightfold.training import TrainConfig, train

def run(out, moment):
    module, name, times = moment.split(":")
    owner = importlib.import_module(module)
    whole, calls = getattr(owner, name), [0]

    def die(*args, **named):
        calls[0] += 1
        if calls[0] == int(times):
            os.kill(os.getpid(), signal.SIGKILL)
        return whole(*args, **named)

    setattr(owner, name, die)
    train(TrainConfig(**json.loads(sys.argv[1])), out, after=write_report)

torch.set_num_threads(1)
for out, moment in json.loads(sys.argv[2]).items():
    child = os.fork()
    if child == 0:
        try:
            run(out, moment)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL, moment
"""
MOMENTS = {
    "before its ledger": "weightfold.training.run:fingerprint:1",
    "with a ledger, before run.json": "weightfold.training.arm:widths_of:1",
    "while run.json is written": "weightfold.training.folder:write_bytes:1",
    "before the first checkpoint": "weightfold.training.run:write_checkpoint:1",
    "before the last checkpoint": "weightfold.training.run:write_checkpoint:3",
    "after its result": "weightfold.training.finish:save_model:1",
    "before run.json says done": "weightfold.training.folder:write_bytes:2",
    "before its report": "weightfold.report.page:write_bytes:1",
}


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs that were killed, each at its moment; every one in a process of its own."""
    folder = tmp_path_factory.mktemp("killed")
    wanted = {str(folder / name): moment for name, moment in MOMENTS.items()}
    command = [sys.executable, "-c", KILLED_IN, json.dumps(SMALL), json.dumps(wanted)]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=env, check=False, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    return folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nobody disturbed."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    train(TrainConfig(**SMALL), out, after=write_report)
    return out


def left_in(out: Path) -> set[str]:
    return {path.name for path in out.iterdir() if not path.name.endswith(("-wal", "-shm"))}


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_run_killed_at_any_moment_goes_on_by_the_same_command(moment: str, killed: Path, whole: Path) -> None:
    out = killed / moment
    assert out.exists() == (moment != "before its ledger")
    assert not out.exists() or (out / files.LOCK).exists(), "nobody could tell that it is unfinished"
    if moment == "with a ledger, before run.json":
        assert not (out / "run.json").exists()
        assert verify_folder(out)["unfinished"]
        run = resume(out, after=write_report)
    else:
        run = train(TrainConfig(**SMALL), out, after=write_report)
    assert run["status"] == "done"
    assert left_in(out) == left_in(whole)
    facts, wanted = verify_folder(out), verify_folder(whole)
    assert (facts["head"], facts["unchecked"]) == (wanted["head"], [])
    for name in ("model.safetensors", "structure.json"):
        assert (out / name).read_bytes() == (whole / name).read_bytes()


def test_a_folder_in_work_is_refused_by_all_and_left_alone(whole: Path, tmp_path: Path) -> None:
    config = OneShotConfig(model=str(whole), data="digits", samples=64)
    wants: list[Callable[[], Any]] = [
        lambda: train(TrainConfig(**SMALL), tmp_path, force=True),
        lambda: fold_trained(config, tmp_path, force=True),
        lambda: resume(tmp_path),
        lambda: undo_run(tmp_path, force=True),
    ]
    for path in whole.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with locked(tmp_path / files.LOCK) as lock:
        lock.state("train")
        for want in wants:
            with pytest.raises(ConfigError, match=rf"Another process is at work in .*pid {os.getpid()}"):
                want()
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.name in before} == before


def test_an_interrupted_run_of_other_settings_is_not_gone_on_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("weightfold.training.finish.save_model", lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            train(TrainConfig(**SMALL), tmp_path / "run")
    with pytest.raises(ConfigError, match="other settings: 'seed' is 3 there and 4 here") as error:
        train(TrainConfig(**{**SMALL, "seed": 4}), tmp_path / "run")
    assert "--force" in str(error.value)
    with pytest.raises(ConfigError, match="'kind' is 'train' there and 'fold' here"):
        fold_trained(OneShotConfig(model="lenet5", data="digits", samples=64), tmp_path / "run")
    assert train(TrainConfig(**{**SMALL, "seed": 4}), tmp_path / "run", force=True)["status"] == "done"
    with pytest.raises(ConfigError, match="holds a finished run"):
        train(TrainConfig(**{**SMALL, "seed": 4}), tmp_path / "run")


@pytest.mark.parametrize("cut", ["save_model", "write_structure"])
def test_what_is_made_at_once_begins_again_where_it_was_killed(
    cut: str, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from weightfold.export.opened import open_model

    fold = OneShotConfig(model=str(whole), data="digits", samples=64, keep=0.5)
    commands: dict[str, Callable[[Path], Any]] = {
        "oneshot": lambda out: fold_trained(fold, out),
        "lumped": lambda out: lump_to_folder(open_model(str(whole)), LumpRunConfig(eps=0.3), out),
    }
    for module, command in commands.items():
        wanted = command(tmp_path / f"whole-{module}")
        with monkeypatch.context() as patch:
            # As after a kill: nothing is tidied up, and the lock's file stays.
            patch.setattr(f"weightfold.training.{module}.{cut}", lambda *a, **k: (_ for _ in ()).throw(SystemExit))
            patch.setattr(files, "clear", lambda folder: None)
            patch.setattr(Path, "unlink", lambda self, missing_ok=False: None)
            with pytest.raises(SystemExit):
                command(tmp_path / module)
        assert {files.LEDGER, files.LOCK} <= left_in(tmp_path / module)
        assert command(tmp_path / module)["results"].get("head") == wanted["results"].get("head")
        assert left_in(tmp_path / module) == left_in(tmp_path / f"whole-{module}")
        verify_folder(tmp_path / module)


def test_an_undo_killed_halfway_is_finished_by_the_same_command(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copies = [tmp_path / name for name in ("whole", "cut", "early")]
    for out in copies:
        out.mkdir()
        for path in whole.iterdir():
            (out / path.name).write_bytes(path.read_bytes())
    wanted = undo_run(copies[0], force=True)

    def stop(*args: object) -> None:
        raise SystemExit

    for out, place in ((copies[1], "weightfold.training.again._moved"), (copies[2], "weightfold.ledger.Ledger.append")):
        with monkeypatch.context() as patch:
            patch.setattr(place, stop)
            patch.setattr(Path, "unlink", lambda self, missing_ok=False: None)
            with pytest.raises(SystemExit):
                undo_run(out, force=True)
        found = undo_run(out, force=True)
        assert {**found, "file": ""} == {**wanted, "file": ""}
        assert verify_folder(out)["head"] == verify_folder(copies[0])["head"]
        assert left_in(out) == left_in(copies[0])


def test_a_rewind_killed_halfway_is_done_again(tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"
    with Ledger.create(path, run={}) as ledger:
        for n in range(3):
            ledger.append("edit", {"n": n})
    (tmp_path / "ledger.db.rewind").write_bytes(b"half")
    (tmp_path / "ledger.db.rewind-wal").write_bytes(b"half")
    (tmp_path / "ledger.db.rewind.jsonl").write_text("half")
    rewind(path, 2, 0)
    with Ledger.open(path) as ledger:
        ledger.verify()
        assert len(ledger) == 2
    assert [p.name for p in tmp_path.iterdir()] == ["ledger.db"]


def test_what_a_run_wrote_and_someone_removed_is_missed(whole: Path, tmp_path: Path) -> None:
    for name in ("run.json", "report.html", "model.safetensors", "structure.json"):
        out = tmp_path / name
        out.mkdir()
        for path in whole.iterdir():
            (out / path.name).write_bytes(path.read_bytes())
        verify_folder(out)
        (out / name).unlink()
        with pytest.raises(ArtifactError, match=rf"{name}' is missing"):
            verify_folder(out)


def test_a_finished_run_that_calls_itself_running_is_noticed(whole: Path, tmp_path: Path) -> None:
    for path in whole.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    run = json.loads((tmp_path / "run.json").read_text())
    (tmp_path / "run.json").write_text(json.dumps({"format": 1, "status": "running", "config": run["config"]}))
    with pytest.raises(ArtifactError, match=r"run\.json' was changed"):
        verify_folder(tmp_path)
