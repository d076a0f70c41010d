"""A trained network folded at once to widths of a table, timed against what it was, refused where it is slower."""

from __future__ import annotations

import importlib
from pathlib import Path

import numpy as np
import pytest

from weightfold.artifact import Builder
from weightfold.bench.tune import check_not_slower
from weightfold.errors import ArtifactError, ExportError
from weightfold.export import Blueprint, Source
from weightfold.export.example import task_input
from weightfold.export.saved import load
from weightfold.kernels import Tuned
from weightfold.models import Classes, TableInput, TaskSpec, build
from weightfold.training.oneshot import OneShotConfig, fold_trained

pytest.importorskip("onnxruntime")
pytest.importorskip("sklearn")
TUNE = importlib.import_module("weightfold.bench.tune")


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """Widths of lenet5's hidden layers, as they might have been measured."""
    rows = {120: 1.0, 96: 0.9, 64: 0.8, 32: 0.7}
    Tuned("onnx-cpu", {"fc1": rows}, (1, 1, 8, 8)).save(tmp_path / "widths.json")
    return tmp_path / "widths.json"


def pretend(monkeypatch: pytest.MonkeyPatch, narrow_ms: float) -> None:
    """Have the race come out in a certain way."""
    times = {
        name: type("T", (), {"ms": np.array([ms]), "p50": ms})() for name, ms in (("dense", 1.0), ("narrow", narrow_ms))
    }
    monkeypatch.setattr(TUNE, "interleaved", lambda *_, **__: times)


def test_widths_are_those_of_the_table(table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, 0.8)
    run = fold_trained(OneShotConfig(model="lenet5", data="digits", keep=0.5, tuned=str(table)), tmp_path / "run")
    assert load(tmp_path / "run").fc1.out_features == 64
    arms = run["results"]["arms"]
    assert (arms["dense"]["target_ms"], arms["folded"]["target_ms"]) == (1.0, 0.8)


def test_a_slower_network_is_refused_and_nothing_is_left(
    table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(monkeypatch, 1.5)
    with pytest.raises(ExportError, match=r"takes 1\.500 ms, 1\.50 times the 1\.000 ms of the dense one"):
        fold_trained(OneShotConfig(model="lenet5", data="digits", keep=0.5, tuned=str(table)), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_table_that_is_missing_is_named(tmp_path: Path) -> None:
    config = OneShotConfig(model="lenet5", data="digits", tuned=str(tmp_path / "none.json"))
    with pytest.raises(ArtifactError, match="no table of widths"):
        fold_trained(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_much_narrower_network_is_not_slower() -> None:
    task = TaskSpec(input=TableInput(n_features=64), output=Classes(n=4))
    nets = [build("mlp", task, hidden=(width, width)).eval() for width in (1024, 64)]
    wide, narrow = (
        Source(net, (task_input(task),), Blueprint.of(net), Builder(kind="instance", name="mlp")) for net in nets
    )
    dense_ms, narrow_ms = check_not_slower(wide, narrow, batch=16)
    assert narrow_ms < dense_ms
