"""Files in their runtimes: called like the module, refusing in words."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import weightfold as wf
from weightfold.artifact import Builder, Input
from weightfold.errors import ArtifactError, ConfigError, ExportError
from weightfold.export import Blueprint, Source, export
from weightfold.runtime import load_file


def source() -> Source:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 64), nn.ReLU(), nn.Linear(64, 32)).eval()
    builder = Builder(kind="instance", name="Sequential")
    return Source(net, (Input(shape=(2, 6)),), Blueprint.of(net), builder, calibration="drawn")


@pytest.mark.parametrize(
    ("target", "ending", "close"),
    [
        ("pt2", ".pt2", 1e-6),
        ("onnx", ".onnx", 1e-5),
        ("onnx-fp16", ".onnx", 1e-2),
        ("onnx-int8", ".onnx", 0.1),
        ("onnx-int4", ".onnx", 0.3),
        ("openvino", ".xml", 1e-5),
    ],
)
def test_every_file_is_called_like_the_module(target: str, ending: str, close: float, tmp_path: Path) -> None:
    pytest.importorskip("openvino" if target == "openvino" else "onnxruntime")
    made, x = source(), torch.randn(5, 6)
    export(made, target, tmp_path / f"net{ending}", tolerance=0.5)
    loaded = wf.load(tmp_path / f"net{ending}")
    wanted = made.model(x).detach()
    got = loaded(x)
    assert isinstance(got, torch.Tensor)
    assert float((got.detach() - wanted).abs().max()) < close
    if target != "pt2":
        arrays = loaded(x.numpy())
        assert isinstance(arrays, np.ndarray)
        assert loaded.any_batch


def test_an_input_of_another_shape_is_refused_with_both(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    export(source(), "onnx", tmp_path / "net.onnx")
    loaded = wf.load(tmp_path / "net.onnx")
    with pytest.raises(ExportError, match=r"has the shape \(N, 6\)\. Got \(2, 7\)") as caught:
        loaded(torch.zeros(2, 7))
    assert "--example" in str(caught.value)
    with pytest.raises(ExportError, match="which is missing"):
        loaded()
    with pytest.raises(ExportError, match="takes 1 inputs"):
        loaded(torch.zeros(2, 6), torch.zeros(2, 6))


@pytest.mark.parametrize(("ending", "package"), [(".onnx", "onnxruntime"), (".xml", "openvino")])
def test_a_runtime_that_is_missing_is_named_with_its_install_line(
    ending: str, package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / f"net{ending}"
    path.write_bytes(b"x")
    path.with_suffix(".bin").write_bytes(b"x")
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ExportError, match=f"'{package}', which is not installed") as caught:
        load_file(path)
    assert "pip install" in str(caught.value)


def test_foreign_and_missing_files_are_refused(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    (tmp_path / "a.onnx").write_bytes(b"no protobuf at all")
    (tmp_path / "a.pt2").write_bytes(b"no archive")
    for name in ("a.onnx", "a.pt2"):
        with pytest.raises(ArtifactError, match=name):
            wf.load(tmp_path / name)
    for name in ("b.onnx", "b.pt2", "b.xml"):
        with pytest.raises(ArtifactError, match="There is no model file"):
            wf.load(tmp_path / name)
    with pytest.raises(ConfigError, match="No runtime loads"):
        load_file(tmp_path / "a.gguf")
