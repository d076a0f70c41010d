"""The paired run: what it writes, that it is the same again, and that an interruption changes nothing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from weightfold.artifact import read_structure
from weightfold.data import load as load_data
from weightfold.errors import ArtifactError, ConfigError, DataError, LedgerError, WeightfoldError
from weightfold.export import load
from weightfold.ledger import Ledger
from weightfold.training import TrainConfig, resume, train
from weightfold.training import run as run_module
from weightfold.training.measure import evaluate

from .conftest import TINY

ROOT = Path(__file__).parent.parent.parent
KILLED_AT = """
import json, os, signal, sys
from weightfold.training import TrainConfig, train
from weightfold.training import run as module

write, calls = module.write_checkpoint, 0

def write_or_die(folder, state):
    global calls
    calls += 1
    if calls == int(sys.argv[3]):
        os.kill(os.getpid(), signal.SIGKILL)
    write(folder, state)

module.write_checkpoint = write_or_die
train(TrainConfig(**json.loads(sys.argv[1])), sys.argv[2])
"""

Finished = tuple[Path, dict[str, Any]]


def deterministic(run: dict[str, Any]) -> dict[str, Any]:
    """What must be the same whenever a run is done again."""
    keys = ("score", "loss", "parameters", "macs", "fingerprint", "widths", "size_bytes")
    arms = run["results"]["arms"]
    return {name: {key: arm[key] for key in keys} for name, arm in arms.items()} | {"head": run["results"]["head"]}


def names_in(folder: Path) -> set[str]:
    """Names of the files, without what SQLite leaves beside a file that was read."""
    return {path.name for path in folder.iterdir() if not path.name.endswith(("-wal", "-shm"))}


def test_the_folder_holds_what_is_promised(finished: Finished) -> None:
    out, run = finished
    assert names_in(out) == {"run.json", "ledger.db", "model.safetensors", "dense.safetensors", "structure.json"}
    assert json.loads((out / "run.json").read_text()) == json.loads(json.dumps(run))
    assert run["status"] == "done"
    structure, _ = read_structure(out / "model.safetensors")
    assert structure.ledger_head == run["results"]["head"]
    assert json.loads((out / "structure.json").read_text()) == structure.model_dump(mode="json")


def test_both_networks_are_measured_and_the_second_is_smaller(finished: Finished) -> None:
    _, run = finished
    dense, folded = (run["results"]["arms"][name] for name in ("dense", "folded"))
    assert folded["widths"] == [["body.0", 24, 12], ["body.2", 24, 12]]
    assert dense["parameters"] == 64 * 24 + 24 + 24 * 24 + 24 + 24 * 10 + 10
    assert folded["parameters"] == 64 * 12 + 12 + 12 * 12 + 12 + 12 * 10 + 10
    assert dense["macs"] == 64 * 24 + 24 * 24 + 24 * 10
    for arm in (dense, folded):
        assert arm["score"] > 0.3, "chance is 0.1"
        assert arm["seconds"] > 0
        assert arm["latency_ms_1"] > 0
        assert arm["latency_ms_64"] > 0


def test_the_saved_models_are_the_measured_ones(finished: Finished) -> None:
    out, run = finished
    data = load_data("digits", limit=160)
    for name, file in (("dense", "dense.safetensors"), ("folded", "model.safetensors")):
        arm = run["results"]["arms"][name]
        score = evaluate(load(out / file), data, "test", torch.device("cpu"))
        assert (score.value, pytest.approx(score.loss)) == (arm["score"], arm["loss"])
        assert arm["size_bytes"] == (out / file).stat().st_size


def test_the_ledger_tells_the_run(finished: Finished) -> None:
    out, run = finished
    with Ledger.open(out / "ledger.db", readonly=True) as ledger:
        ledger.verify()
        assert [entry.kind for entry in ledger.entries()] == ["run", "prepare", "edit", "edit", "convert", "result"]
        first = next(iter(ledger.entries()))
        assert first.body["config"]["seed"] == 3
        assert "out" not in first.body["config"]
        steps = [step for step, _ in ledger.metrics("folded/loss")]
        assert steps == list(range(1, run["total_steps"] + 1))
        assert len(ledger.metrics("dense/val_score")) == TINY["epochs"]
        seconds = [value for _, value in ledger.metrics("dense/seconds")]
        assert seconds == sorted(seconds)


def test_both_networks_are_equal_until_the_first_edit(finished: Finished) -> None:
    out, run = finished
    step = run["results"]["arms"]["folded"]["events"][0]["step"]
    with Ledger.open(out / "ledger.db", readonly=True) as ledger:
        dense, folded = (dict(ledger.metrics(f"{name}/loss")) for name in ("dense", "folded"))
    assert all(dense[at] == folded[at] for at in range(1, step + 1))
    assert any(dense[at] != folded[at] for at in range(step + 1, run["total_steps"] + 1))


def test_the_same_run_again_has_the_same_head(finished: Finished, tiny: Callable, tmp_path: Path) -> None:
    assert deterministic(train(tiny(), tmp_path / "again")) == deterministic(finished[1])


def test_the_dense_network_does_not_depend_on_its_companion(finished: Finished, tiny: Callable, tmp_path: Path) -> None:
    alone = train(tiny(method="none"), tmp_path / "alone")
    assert list(alone["results"]["arms"]) == ["dense"]
    assert alone["results"]["arms"]["dense"]["fingerprint"] == finished[1]["results"]["arms"]["dense"]["fingerprint"]
    folded = train(tiny(dense=False), tmp_path / "folded")
    assert list(folded["results"]["arms"]) == ["folded"]
    assert folded["results"]["arms"]["folded"]["fingerprint"] == finished[1]["results"]["arms"]["folded"]["fingerprint"]
    assert (tmp_path / "alone" / "model.safetensors").exists()


@pytest.mark.parametrize("checkpoint", [1, 3, 5])
def test_a_killed_run_goes_on_to_the_same_result(finished: Finished, tmp_path: Path, checkpoint: int) -> None:
    """Killed just before a checkpoint is written, so that the ledger is ahead of the last one."""
    out = tmp_path / "killed"
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", KILLED_AT, json.dumps(TINY), str(out), str(checkpoint)]
    done = subprocess.run(command, env=env, check=False, capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    assert not (out / "model.safetensors").exists()
    assert deterministic(resume(out)) == deterministic(finished[1])
    assert names_in(out) == names_in(finished[0])


def test_a_run_stopped_at_its_very_end_finishes(
    finished: Finished, tiny: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*args: object, **settings: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("weightfold.training.finish.save_model", stop)
        with pytest.raises(KeyboardInterrupt):
            train(tiny(), tmp_path / "run")
    assert deterministic(resume(tmp_path / "run")) == deterministic(finished[1])
    assert resume(tmp_path / "run")["status"] == "done"


def test_an_optimiser_with_state_is_taken_up(tiny: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny(optimizer="adamw", method="prune")
    whole = train(config, tmp_path / "whole")
    write, calls = run_module.write_checkpoint, []

    def interrupt(folder: Path, state: dict[str, Any]) -> None:
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        write(folder, state)

    with monkeypatch.context() as patch:
        patch.setattr(run_module, "write_checkpoint", interrupt)
        with pytest.raises(KeyboardInterrupt):
            train(config, tmp_path / "cut")
    assert deterministic(resume(tmp_path / "cut")) == deterministic(whole)


def test_progress_is_told_after_each_epoch(tiny: Callable, tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    train(tiny(epochs=2, method="none"), tmp_path / "run", progress=lambda done, total, _: told.append((done, total)))
    assert told == [(1, 2), (2, 2)]


def test_the_process_is_left_as_it_was(tiny: Callable, tmp_path: Path) -> None:
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    train(tiny(epochs=1, method="none"), tmp_path / "run")
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("changes", "error", "complaint"),
    [
        ({"model": "mpl", "overrides": {}}, ConfigError, "no model 'mpl'"),
        ({"overrides": {"widht": 3}}, ConfigError, "widht"),
        ({"data": "missing.csv"}, DataError, "missing.csv"),
        ({"model": "char-gpt", "overrides": {}}, ConfigError, "text input"),
        ({"model": "torch.nn:Identity", "overrides": {}}, DataError, r"\(B, 1, 8, 8\)"),
        ({"max_increase": 1.0, "limit": 10}, DataError, "splits need"),
    ],
)
def test_what_is_wrong_is_found_before_the_first_batch_and_leaves_no_folder(
    changes: dict[str, Any], error: type[WeightfoldError], complaint: str, tiny: Callable, tmp_path: Path
) -> None:
    with pytest.raises(error, match=complaint):
        train(tiny(**changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "changes", [{"keep": 0}, {"keep": 1.1}, {"epochs": 0}, {"lr": 0}, {"lr": float("inf")}, {"x": 1}]
)
def test_settings_out_of_range_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(changes))):
        TrainConfig(**changes)


def test_a_folder_in_use_is_refused_unless_forced(finished: Finished, tiny: Callable, tmp_path: Path) -> None:
    out = tmp_path / "run"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="not empty"):
        train(tiny(), out)
    train(tiny(epochs=1, method="none"), out, force=True)
    train(tiny(epochs=1, method="none"), out, force=True)
    assert (out / "notes.txt").read_text() == "mine"
    with pytest.raises(ConfigError, match="is a file"):
        train(tiny(), out / "notes.txt")


def test_what_cannot_be_resumed_is_refused(tiny: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ArtifactError, match="holds no run"):
        resume(tmp_path)
    monkeypatch.setattr(run_module, "finish", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        train(tiny(epochs=1), tmp_path / "run")
    checkpoint = tmp_path / "run" / "checkpoint.safetensors"
    whole = checkpoint.read_bytes()
    checkpoint.write_bytes(whole[:-10])
    with pytest.raises(ArtifactError, match="checkpoint"):
        resume(tmp_path / "run")
    checkpoint.write_bytes(whole)
    (tmp_path / "run" / "ledger.db").unlink()
    with pytest.raises(LedgerError, match="no ledger"):
        resume(tmp_path / "run")
    (tmp_path / "run" / "run.json").write_text("{")
    with pytest.raises(ArtifactError, match=r"run\.json"):
        resume(tmp_path / "run")
