"""Targets that round: learned codes and grids reach the file as they are; what rounds too much gets no name."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import weightfold as wf
from weightfold.artifact import Builder, CodedTensor, Input, nearest_step
from weightfold.errors import ExportError
from weightfold.export import Blueprint, Source, export, target_onnx_int8
from weightfold.export.nbits import block_size, packed, rounded
from weightfold.export.onnx_graph import codes_behind, to_onnx, weights
from weightfold.export.packed import fill_
from weightfold.quant.activations import Grid, running

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
NUMPY = onnx.numpy_helper


@pytest.fixture(autouse=True)
def whole_in_8_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep the choice of what stays in floats from depending on the clock."""
    monkeypatch.setattr(target_onnx_int8, "HARDLY", math.inf)


class Normed(nn.Module):
    """A convolution under a norm with scales of both signs, and two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.conv = nn.Conv2d(2, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.first = nn.Linear(8 * 16, 32)
        self.head = nn.Linear(32, 4)
        with torch.no_grad():
            self.norm.weight.copy_(torch.linspace(-1, 1, 8))
            self.norm.running_mean.copy_(torch.randn(8))
            self.norm.running_var.copy_(torch.rand(8) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.conv(x)))
        return self.head(torch.relu(self.first(x.flatten(1))))


def coded_source(bits: int = 4, inputs: tuple[Input, ...] = (Input(shape=(2, 2, 4, 4)),)) -> Source:
    """The network with weights of so many bits, and their codes."""
    net = Normed().eval()
    before, coded, top = Blueprint.of(net), {}, 2 ** (bits - 1) - 1
    for name in ("conv.weight", "first.weight", "head.weight"):
        value = net.get_parameter(name).detach().numpy()
        rows = value.reshape(len(value), -1)
        steps = nearest_step(np.maximum(np.abs(rows).max(1), 1e-3) / max(top, 1))
        codes = np.clip(np.rint(rows / 2 ** (steps[:, None] / 8)), -top, top).astype(np.int16)
        codes[1] = 0
        coded[name] = CodedTensor(codes.reshape(value.shape), steps)
    fill_(net, coded)
    return Source(net, inputs, before, Builder(kind="instance", name="Normed"), coded=coded, calibration="drawn")


def stored(path: Path) -> dict[str, np.ndarray]:
    return {item.name: NUMPY.to_array(item) for item in onnx.load(path).graph.initializer}


def test_a_folded_norm_leaves_the_codes_and_scales_their_rows() -> None:
    source = coded_source()
    scale = source.model.norm.weight / torch.sqrt(source.model.norm.running_var + source.model.norm.eps)
    for weight in weights(to_onnx(source)):
        found = codes_behind(weight, source.coded)
        assert found is not None
        codes = source.coded[found.name].codes.reshape(found.codes_OI.shape)
        sign = np.sign(scale.detach().numpy())[:, None] if found.name == "conv.weight" else 1
        assert (found.codes_OI == codes * sign).all()
        assert (found.scale_O > 0).all()


def test_int8_holds_the_learned_codes(tmp_path: Path) -> None:
    source = coded_source()
    exported = export(source, "onnx-int8", tmp_path / "net.onnx")
    assert exported.relative_difference < 0.03
    tensors = stored(tmp_path / "net.onnx")
    for name, tensor in source.coded.items():
        codes = tensors[f"{name}_quantized"].astype(int)
        rows = codes.reshape(len(codes), -1) if codes.shape == tensor.shape else codes.T
        assert (np.abs(rows) == np.abs(tensor.codes.reshape(rows.shape))).all()
    plain = export(replace(source, coded={}), "onnx-int8", tmp_path / "plain.onnx")
    assert exported.relative_difference <= 1.5 * plain.relative_difference


def test_what_is_slower_in_8_bits_may_stay_in_floats(monkeypatch: pytest.MonkeyPatch) -> None:
    found = list(weights(to_onnx(coded_source())))
    conv = next(w.node.name for w in found if w.node.op_type == "Conv")
    assert target_onnx_int8._left_out(found) == [[], [conv]]
    assert target_onnx_int8._left_out([w for w in found if w.node.op_type != "Conv"]) == [[]]
    assert target_onnx_int8._quickest([0.003, 0.001]) == 0
    monkeypatch.setattr(target_onnx_int8, "HARDLY", 1.05)
    assert target_onnx_int8._quickest([0.003, 0.001]) == 1


def test_learned_grids_are_the_activations_scales(tmp_path: Path) -> None:
    source = coded_source()
    grids = {"conv": Grid(0.05, 6, True), "first": Grid(0.03, 5, False), "head": Grid(0.02, 8, False)}
    with_grids = export(replace(source, grids=grids), "onnx-int8", tmp_path / "net.onnx")
    scales = [float(value) for name, value in stored(tmp_path / "net.onnx").items() if name.endswith("_grid_scale")]
    assert sorted(scales) == pytest.approx([0.02, 0.03, 0.05])
    x = torch.randn(16, 2, 4, 4)
    with torch.no_grad():
        plain = source.model(x)
        with running(source.model, grids):
            wanted = source.model(x)
    got = wf.load(tmp_path / "net.onnx")(x)
    assert float((got - wanted).norm()) < 0.2 * float((plain - wanted).norm())
    assert with_grids.relative_difference < 0.05


@pytest.mark.parametrize(("bits", "target"), [(2, "onnx-int2"), (2, "onnx-int4"), (4, "onnx-int4"), (4, "onnx-int2")])
def test_matrices_take_as_many_bits_as_their_codes(bits: int, target: str, tmp_path: Path) -> None:
    export(coded_source(bits), target, tmp_path / "net.onnx")
    graph = onnx.load(tmp_path / "net.onnx").graph
    [node] = [node for node in graph.node if node.op_type == "MatMulNBits"]
    settings = {item.name: item.i for item in node.attribute}
    assert settings == {"K": 128, "N": 32, "bits": bits, "block_size": 128, "accuracy_level": 4}


def test_a_file_of_learned_codes_differs_by_its_activations_alone(tmp_path: Path) -> None:
    exact = export(coded_source(2), "onnx-int2", tmp_path / "a.onnx")
    lost = export(replace(coded_source(8), coded={}), "onnx-int2", tmp_path / "b.onnx", tolerance=1.0)
    assert exact.relative_difference < 0.01 < lost.relative_difference


def test_what_rounds_too_much_gets_no_name(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="computes something else") as caught:
        export(replace(coded_source(8), coded={}), "onnx-int2", tmp_path / "net.onnx", tolerance=0.05)
    assert "onnx-int4" in str(caught.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_packed_codes_are_what_the_operator_unpacks(bits: int) -> None:
    matrix = np.random.default_rng(0).normal(size=(5, 200)).astype(np.float32)
    block = block_size(200)
    codes, scale = rounded(matrix, bits, block)
    data = packed(codes, bits, block).reshape(5, -1)
    shifts = bits * np.arange(8 // bits)
    again = (data[:, :, None] >> shifts & (1 << bits) - 1).reshape(5, -1)[:, :200].astype(int) - (1 << bits - 1)
    assert (again == codes).all()
    value = codes * np.repeat(scale, block, 1)[:, :200]
    assert np.linalg.norm(value - matrix) / np.linalg.norm(matrix) < {2: 0.55, 4: 0.12, 8: 0.01}[bits]


@pytest.mark.parametrize(
    ("target", "name"), [("onnx-int4", "lenet5"), ("onnx-int8", "lenet5"), ("onnx-int8", "char-gpt")]
)
def test_a_shrunk_network_of_floats_is_rounded(
    target: str, name: str, shrunk: Callable[[str], Source], tmp_path: Path
) -> None:
    source = replace(shrunk(name), calibration="drawn")
    exported = export(source, target, tmp_path / "net.onnx", tolerance=0.5)
    assert exported.any_batch
    assert exported.relative
    assert 0 < exported.relative_difference <= 0.5


def test_half_precision_takes_half_the_bytes(shrunk: Callable[[str], Source], tmp_path: Path) -> None:
    source = coded_source()
    whole = export(source, "onnx", tmp_path / "a.onnx")
    half = export(source, "onnx-fp16", tmp_path / "b.onnx")
    assert half.relative_difference < 0.005
    assert half.size_bytes < 0.65 * whole.size_bytes


def test_weights_beyond_half_precision_are_named(tmp_path: Path) -> None:
    source = coded_source()
    with torch.no_grad():
        source.model.head.weight[0, 0] = 1e6
    with pytest.raises(ExportError, match=r"'head\.weight' holds 1e\+06") as caught:
        export(source, "onnx-fp16", tmp_path / "a.onnx")
    assert "onnx, the nearest target" in str(caught.value)


def test_what_a_target_lacks_is_named_with_the_nearest_that_can(tmp_path: Path) -> None:
    conv = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten()).eval()
    source = Source(conv, (Input(shape=(1, 1, 4, 4)),), Blueprint.of(conv), Builder(kind="instance", name="S"))
    with pytest.raises(ExportError, match="stored matrix of 1,024") as caught:
        export(source, "onnx-int4", tmp_path / "a.onnx")
    assert "onnx-int8" in str(caught.value)
    nothing = nn.ReLU()
    bare = replace(source, model=nothing, before=Blueprint.of(nothing), calibration="drawn")
    with pytest.raises(ExportError, match=r"nothing to quantise.*this model has Relu"):
        export(bare, "onnx-int8", tmp_path / "a.onnx")
    double = nn.Linear(4, 2).double()
    wide = Source(double, (Input(shape=(1, 4), dtype="float64"),), Blueprint.of(double), source.builder)
    with pytest.raises(ExportError, match=r"'weight' is of type torch\.float64"):
        export(wide, "onnx", tmp_path / "a.onnx")
    assert not list(tmp_path.iterdir())


class Special(nn.Module):
    """Takes an operator that ONNX lacks."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.special.bessel_j0(x)


@pytest.mark.parametrize("target", ["onnx", "onnx-int8"])
def test_an_operator_that_onnx_lacks_is_named(target: str, tmp_path: Path) -> None:
    net = Special()
    builder = Builder(kind="instance", name="Special")
    source = Source(net, (Input(shape=(2, 3)),), Blueprint.of(net), builder, calibration="drawn")
    with pytest.raises(ExportError, match="bessel_j0") as caught:
        export(source, target, tmp_path / "a.onnx")
    assert "pt2, the nearest target that can" in str(caught.value)
    assert export(source, "pt2", tmp_path / "a.pt2").largest_difference == 0
