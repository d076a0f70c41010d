"""Tables of widths: what is worth having, kept as JSON; planning keeps to them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import weightfold as wf
from weightfold.errors import ArtifactError, ConfigError
from weightfold.kernels import Tuned
from weightfold.widths import Grid

STAIRS = {64: 2.00, 60: 2.02, 56: 1.99, 48: 1.50, 40: 1.51, 32: 1.00, 24: 1.01, 16: 0.60}


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 3))


def test_a_staircase_is_liked_at_its_edges() -> None:
    assert Tuned("onnx-cpu", {"a": STAIRS}).liked("a") == [64, 48, 32, 16]


@given(st.dictionaries(st.integers(1, 200), st.floats(0.1, 10), min_size=1))
def test_what_is_liked_is_quicker_than_all_that_is_wider(rows: dict[int, float]) -> None:
    liked = Tuned("onnx-cpu", {"a": rows}).liked("a")
    assert liked[0] == max(rows)
    for width in liked[1:]:
        assert all(rows[width] < ms for wider, ms in rows.items() if wider > width)


def test_a_table_comes_back_from_its_file(tmp_path: Path) -> None:
    table = Tuned("onnx-cpu", {"a": STAIRS}, (1, 8), 2, {"cpu": "x"})
    table.save(tmp_path / "t.json")
    assert Tuned.read(tmp_path / "t.json") == table
    assert json.loads((tmp_path / "t.json").read_text())["liked"] == {"a": [64, 48, 32, 16]}


@pytest.mark.parametrize("text", ["", "[]", '{"format": 9}', '{"format": 1, "target": "x"}'])
def test_what_is_no_table_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "t.json").write_text(text)
    with pytest.raises(ArtifactError, match="no table of widths"):
        Tuned.read(tmp_path / "t.json")
    with pytest.raises(ArtifactError, match="There is no table"):
        Tuned.read(tmp_path / "none.json")


@pytest.mark.parametrize("method", [wf.Prune, wf.Fold])
@pytest.mark.parametrize(("keep", "width"), [(0.7, 48), (0.55, 32), (0.2, 16), (0.95, 64)])
def test_plans_keep_to_liked_widths(method: type, keep: float, width: int) -> None:
    model = net()
    compressor = wf.Compressor(model, torch.zeros(1, 8), [method(keep=keep, liked={"0": [64, 48, 32, 16]})])
    compressor.prepare()
    compressor.once([torch.randn(256, 8)])
    assert model[0].out_features == width


def test_a_table_of_another_network_is_refused() -> None:
    for method in (wf.Prune(liked={"conv1": [8]}), wf.Fold(liked={"conv1": [8]})):
        with pytest.raises(ConfigError, match="no group 'conv1'"):
            wf.Compressor(net(), torch.zeros(1, 8), [method]).prepare()


def test_blocks_and_least_widths_still_hold() -> None:
    graph = wf.trace(net(), torch.zeros(1, 8))
    assert Grid(min_channels=20, liked={"0": [64, 48, 32, 16]}).widths(graph["0"]) == [64, 48, 32]
    assert Grid(align=8, liked={"other": [1]}).widths(graph["0"])[:2] == [64, 56]
