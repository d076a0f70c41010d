"""Networks timed in turns in their runtimes. Only where one waits on purpose does a test look at how long it took."""

from __future__ import annotations

import importlib
import json
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from weightfold.artifact import Builder, Input
from weightfold.bench import Bench, bench, interleaved, tune
from weightfold.bench.compare import Row, refuse_slower
from weightfold.bench.compiled import time_compiled
from weightfold.bench.memory import measure_bytes
from weightfold.bench.timing import ratio
from weightfold.bench.tune import ladder, refuse_slower_plan
from weightfold.cli.main import app
from weightfold.errors import ConfigError, ExportError
from weightfold.export import Blueprint, Source, export
from weightfold.graph import trace

pytest.importorskip("onnxruntime")


class Net(nn.Module):
    """Two hidden layers of equal shapes, and one of another."""

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(
            nn.Linear(6, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 4)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)


def source(width: int = 24) -> Source:
    net = Net(width).eval()
    return Source(net, (Input(shape=(2, 6)),), Blueprint.of(net), Builder(kind="instance", name="Net"), fresh=Net)


def test_calls_are_timed_in_turns_and_ratios_are_paired() -> None:
    order: list[str] = []
    times = interleaved({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, rounds=4)
    assert order[-8:] == ["a", "b", "b", "a", "a", "b", "b", "a"]
    assert len(times["a"].ms) == len(times["b"].ms) == 4
    slow = interleaved({"slow": lambda: time.sleep(0.004), "quick": lambda: time.sleep(0.001)}, rounds=12)
    assert ratio(slow["slow"], slow["quick"]) > 1.5
    assert slow["slow"].best <= slow["slow"].p50 <= slow["slow"].p95


def test_every_runtime_gives_rows_for_both_networks() -> None:
    found = bench(
        replace(source(8), fresh=lambda: Net(8)),
        source(),
        engines=("torch", "onnx", "onnx-int8", "openvino"),
        batches=(1, 3),
        seconds=0.01,
        memory=False,
    )
    engines = {row.engine for row in found.rows}
    assert {"torch", "onnx", "onnx-int8"} <= engines
    assert engines | set(found.skipped) == {"torch", "onnx", "onnx-int8", "openvino"}
    for engine in engines:
        rows = [row for row in found.rows if row.engine == engine]
        assert [(row.batch, row.network) for row in rows] == [
            (1, "original"),
            (1, "compressed"),
            (3, "original"),
            (3, "compressed"),
        ]
        assert rows[1].file_bytes < rows[0].file_bytes
        assert rows[0].speedup is None
        assert rows[1].speedup is not None
        assert rows[2].throughput == pytest.approx(3000 / rows[2].p50_ms)
    json.dumps(found.to_record())


def test_a_runtime_that_is_missing_is_skipped_with_its_install_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "openvino", None)
    found = bench(source(), engines=("openvino",), seconds=0.01, memory=False)
    assert not found.rows
    assert 'pip install "weightfold[openvino]"' in found.skipped["openvino"]


def test_memory_is_that_of_a_fresh_process(tmp_path: Path) -> None:
    export(source(), "onnx", tmp_path / "net.onnx")
    np.save(tmp_path / "x.npy", np.zeros((1, 6), np.float32))
    if not Path("/proc/self/status").is_file():
        pytest.skip("this system does not say how much memory a process holds")
    taken = measure_bytes(tmp_path / "net.onnx", tmp_path / "x.npy", threads=1)
    assert taken is not None
    assert taken > 0
    assert measure_bytes(tmp_path / "none.onnx", tmp_path / "x.npy", threads=1) is None


@pytest.mark.slow
def test_compiled_programs_run_in_a_process_of_their_own(tmp_path: Path) -> None:
    export(source(), "pt2", tmp_path / "net.pt2")
    np.save(tmp_path / "x.npy", np.zeros((1, 6), np.float32))
    files = {"a": tmp_path / "net.pt2", "b": tmp_path / "net.pt2"}
    times = time_compiled(files, tmp_path / "x.npy", tmp_path, threads=1, seconds=0.05)
    assert len(times["a"].ms) == len(times["b"].ms) >= 10
    with pytest.raises(ExportError, match="failed in its process"):
        time_compiled({"a": tmp_path / "none.pt2"}, tmp_path / "x.npy", tmp_path, threads=1, seconds=0.05)
    with pytest.raises(ExportError, match="took longer"):
        time_compiled(files, tmp_path / "x.npy", tmp_path, threads=1, seconds=0.05, timeout=0.01)


def test_a_slower_network_is_refused_with_the_figures() -> None:
    slow = Row("onnx", "compressed", 1, 2.0, 3.0, 500.0, 0.5, None, 1, 10)
    same = Row("onnx", "compressed", 64, 2.0, 3.0, 500.0, 0.98, None, 1, 10)
    with pytest.raises(ExportError, match=r"onnx, batch 1: 2\.000 ms, 2\.00 times the original's\.") as caught:
        refuse_slower(Bench((slow, same), {}, 1))
    assert "weightfold tune" in str(caught.value)
    refuse_slower(Bench((same,), {}, 1))


def test_wrong_requests_are_refused() -> None:
    with pytest.raises(ConfigError, match="no engine 'onx'"):
        bench(source(), engines=("onx",))
    with pytest.raises(ConfigError, match="different inputs"):
        bench(source(), replace(source(), inputs=(Input(shape=(2, 7)),)))
    with pytest.raises(ConfigError, match="takes 0 example inputs"):
        bench(replace(source(), inputs=()))
    with pytest.raises(ConfigError, match="no target 'onnx-gpu'"):
        tune(source(), "onnx-gpu")
    with pytest.raises(ConfigError, match="No group 'layer'"):
        tune(source(), groups=["layer"])


@pytest.fixture
def few_points(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measure three widths of a group."""
    monkeypatch.setattr(importlib.import_module("weightfold.bench.tune"), "POINTS", 3)


@pytest.mark.usefixtures("few_points")
def test_tuning_measures_every_group_and_leaves_the_network_alone() -> None:
    made = source()
    before = {name: value.clone() for name, value in made.model.state_dict().items()}
    groups = trace(made.model, torch.zeros(2, 6))
    told: list[int] = []
    table = tune(made, seconds=0.01, progress=lambda done, total, _: told.append(total - done))
    names = [g.name for g in groups if "remove" in g.admits]
    assert list(table.groups) == names
    for name in names:
        assert sorted(table.groups[name], reverse=True) == [24, *ladder(groups[name])]
        assert all(ms > 0 for ms in table.groups[name].values())
    assert told[-1] == 0
    assert all(torch.equal(value, before[name]) for name, value in made.model.state_dict().items())
    assert table.shape == (1, 6)


def test_a_plan_is_measured_before_anything_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    made = source()
    dense_ms, narrow_ms = refuse_slower_plan(replace(made, model=Net(512).eval()), {"layers.0": 16, "layers.2": 16})
    assert narrow_ms < dense_ms
    slow = {"dense": [1.0, 1.0], "narrow": [1.3, 1.3]}
    times = {name: type("T", (), {"ms": np.array(v), "p50": v[0]})() for name, v in slow.items()}
    monkeypatch.setattr(importlib.import_module("weightfold.bench.tune"), "interleaved", lambda *a, **k: times)
    with pytest.raises(ExportError, match=r"takes 1\.300 ms, 1\.30 times the 1\.000 ms of the dense one"):
        refuse_slower_plan(made, {"layers.0": 16})
    assert made.model.layers[0].out_features == 24


@pytest.mark.usefixtures("few_points")
def test_from_the_command_line(tmp_path: Path) -> None:
    run = CliRunner().invoke
    arguments = ["bench", "mlp", "--example", "1x8", "--engine", "onnx", "--seconds", "0.01", "--no-memory", "--json"]
    result = run(app, [*arguments, "--against", "mlp"])
    assert result.exit_code == 0, result.output
    assert len(json.loads(result.output)["rows"]) == 4
    result = run(app, ["bench", "mlp", "--example", "1x8", "--engine", "onnx", "--seconds", "0.01", "--no-memory"])
    assert "p95 ms" in result.output
    out = tmp_path / "t.json"
    result = run(app, ["tune", "lenet5", "--seconds", "0.01", "--group", "fc2", "--out", str(out)])
    assert result.exit_code == 0, result.output
    assert json.loads(out.read_text())["target"] == "onnx-cpu"
