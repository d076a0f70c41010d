"""Every target is loaded back in its runtime; what computes something else gets no name."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from weightfold.artifact import Builder, Input
from weightfold.errors import ConfigError, ExportError
from weightfold.export import TARGETS, Blueprint, Source, export

SUFFIX = {"pt2": ".pt2", "safetensors": ".safetensors", "packed": ".wfp", "openvino": ".xml"} | {
    name: ".onnx" for name in TARGETS if name.startswith("onnx")
}
EXACT = ("safetensors", "pt2", "onnx")


class FixedBatch(nn.Module):
    """Takes batches of two only."""

    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(2, 6) @ torch.ones(6, 3)


class TwoInputs(nn.Module):
    """Takes one tensor by position and one by name, and gives two."""

    def forward(self, x: Tensor, *, ids: Tensor) -> tuple[Tensor, Tensor]:
        return x + 1, x.sum(1) * ids.sum(1)


class Branches(nn.Module):
    """Branches on its data."""

    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


def source_of(net: nn.Module, *inputs: Input) -> Source:
    return Source(net.eval(), inputs, Blueprint.of(net), Builder(kind="instance", name=type(net).__name__))


@pytest.mark.parametrize("name", ["mlp", "lenet5", "char-gpt"])
@pytest.mark.parametrize("target", EXACT)
def test_a_shrunk_network_runs_in_every_target(
    target: str, name: str, shrunk: Callable[[str], Source], tmp_path: Path
) -> None:
    path = tmp_path / f"model{SUFFIX[target]}"
    exported = export(shrunk(name), target, path)
    assert exported.path == path
    assert exported.size_bytes == path.stat().st_size
    assert exported.any_batch
    assert exported.largest_difference <= exported.tolerance
    assert [found.name for found in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("target", ["pt2", "onnx"])
def test_a_fixed_batch_size_is_exported_and_said(target: str, tmp_path: Path) -> None:
    exported = export(source_of(FixedBatch(), Input(shape=(2, 6))), target, tmp_path / f"a{SUFFIX[target]}")
    assert not exported.any_batch


@pytest.mark.parametrize("target", ["pt2", "onnx"])
def test_several_inputs_and_outputs(target: str, tmp_path: Path) -> None:
    inputs = (Input(shape=(2, 6)), Input(name="ids", shape=(2, 4), dtype="int64", high=9))
    exported = export(source_of(TwoInputs(), *inputs), target, tmp_path / f"a{SUFFIX[target]}")
    assert exported.any_batch


@pytest.mark.parametrize("target", EXACT)
def test_a_file_that_computes_something_else_gets_no_name(
    target: str, shrunk: Callable[[str], Source], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = shrunk("mlp")
    module = importlib.import_module(f"weightfold.export.target_{target}")
    wrong = shrunk("mlp")
    with torch.no_grad():
        wrong.model.get_parameter("head.bias").add_(1)
    write = module.write
    monkeypatch.setattr(module, "write", lambda _, path: write(wrong, path))
    path = tmp_path / f"model{SUFFIX[target]}"
    path.write_bytes(b"older")
    with pytest.raises(ExportError, match="computes something else"):
        export(source, target, path)
    assert path.read_bytes() == b"older"
    assert [found.name for found in tmp_path.iterdir()] == [path.name]


def test_what_cannot_be_a_graph_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="cannot be expressed as a graph"):
        export(source_of(Branches(), Input(shape=(2, 3))), "pt2", tmp_path / "a.pt2")
    assert not list(tmp_path.iterdir())


def test_bad_requests_are_refused_in_words(shrunk: Callable[[str], Source], tmp_path: Path) -> None:
    source = shrunk("mlp")
    with pytest.raises(ConfigError, match="no export target 'onx'") as caught:
        export(source, "onx", tmp_path / "a.onnx")
    assert "'onnx'" in str(caught.value)
    with pytest.raises(ConfigError, match=r"must end in '\.pt2'"):
        export(source, "pt2", tmp_path / "a.onnx")
    with pytest.raises(ExportError, match="no example input"):
        export(replace(source, inputs=()), "pt2", tmp_path / "a.pt2")


def test_a_missing_package_is_named_with_the_line_that_installs_it(
    shrunk: Callable[[str], Source], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ExportError, match="'onnxruntime'") as caught:
        export(shrunk("mlp"), "onnx", tmp_path / "a.onnx")
    assert 'pip install "weightfold[export]"' in str(caught.value)
