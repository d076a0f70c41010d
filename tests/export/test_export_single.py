"""Models that compute in halves, in files whose runtime computes in singles."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import weightfold as wf
from weightfold.artifact import Builder, Input
from weightfold.errors import ExportError
from weightfold.export import Blueprint, Source, export
from weightfold.export.single import in_single
from weightfold.quant.activations import Grid

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
ALLOWED = {"onnx": 0.02, "onnx-fp16": 0.02, "onnx-int8": 0.15, "onnx-int4": 0.3}
HALVES = [torch.bfloat16, torch.float16]


class Normed(nn.Module):
    """A convolution under a norm, and a large enough matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.first, self.head = nn.Linear(8 * 16, 32), nn.Linear(32, 4)
        nn.init.uniform_(self.norm.running_var, 0.5, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.conv(x.view(-1, 1, 4, 4))))
        return self.head(torch.relu(self.first(x.flatten(1))))


class Casting(nn.Module):
    """Takes and gives singles, and computes in halves that its own code names; a constant besides."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype
        self.net = nn.Sequential(nn.Linear(16, 128), nn.LayerNorm(128), nn.GELU(), nn.Linear(128, 4)).to(dtype)
        self.shift = torch.full((4,), 0.5, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        y = self.net(x.to(self.dtype)) + self.shift + torch.ones(4, dtype=self.dtype)
        return y.float()


class Autocast(nn.Module):
    """Holds singles alone, and computes in halves under autocast."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.a, self.b, self.dtype = nn.Linear(16, 128), nn.Linear(128, 4), dtype

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", self.dtype):
            return self.b(torch.relu(self.a(x))).float()


NETWORKS: dict[str, Callable[[torch.dtype], tuple[nn.Module, torch.dtype]]] = {
    "convolution and norm": lambda dtype: (Normed().to(dtype), dtype),
    "casting by itself": lambda dtype: (Casting(dtype), torch.float32),
    "under autocast": lambda dtype: (Autocast(dtype), torch.float32),
}


def source_of(name: str, dtype: torch.dtype) -> Source:
    torch.manual_seed(0)
    net, given = NETWORKS[name](dtype)
    inputs = (Input(shape=(2, 16), dtype=str(given).removeprefix("torch.")),)
    real = [((torch.randn(32, 16).to(given),), {})]
    builder = Builder(kind="instance", name=name)
    return Source(net.eval(), inputs, Blueprint.of(net), builder, calibration=real)


CASES = [
    *(("convolution and norm", torch.bfloat16, target) for target in ALLOWED),
    ("convolution and norm", torch.float16, "onnx"),
    ("casting by itself", torch.bfloat16, "onnx"),
    ("casting by itself", torch.float16, "onnx-int4"),
    ("under autocast", torch.bfloat16, "onnx"),
]


@pytest.mark.parametrize(("name", "dtype", "target"), CASES)
def test_the_file_computes_what_the_module_does(name: str, dtype: torch.dtype, target: str, tmp_path: Path) -> None:
    """In ONNX Runtime, on inputs as the module takes them and as singles; the module is not changed."""
    source = source_of(name, dtype)
    before = copy.deepcopy(source.model.state_dict())
    exported = export(source, target, tmp_path / "net.onnx")
    kind = str(dtype).removeprefix("torch.")
    assert any(f"cast from {kind} to float32" in note for note in exported.notes)
    assert f"cast from {kind}" in exported.agreement
    x = torch.randn(20, 16).to(getattr(torch, source.inputs[0].dtype))
    with torch.no_grad():
        wanted = source.model(x).double()
    loaded = wf.load(tmp_path / "net.onnx")
    for given in (x, x.float()):
        assert float((loaded(given).double() - wanted).norm()) <= ALLOWED[target] * float(wanted.norm())
    assert all(torch.equal(value, before[key]) for key, value in source.model.state_dict().items())


def test_singles_are_left_alone(tmp_path: Path) -> None:
    source = source_of("convolution and norm", torch.float32)
    assert in_single(source) == (source, ())
    assert export(source, "onnx", tmp_path / "net.onnx").notes == ()


@pytest.mark.parametrize("dtype", HALVES)
def test_the_single_of_a_half_is_the_module_in_singles(dtype: torch.dtype) -> None:
    """No weight changes: to the rounding of singles it is what `model.float()` computes."""
    source = source_of("convolution and norm", dtype)
    twin, _ = in_single(source)
    reference, x = copy.deepcopy(source.model).float(), torch.randn(7, 16)
    with torch.no_grad():
        torch.testing.assert_close(twin.model(x), reference(x), rtol=1e-5, atol=1e-6)
    assert {tensor.dtype for tensor in twin.model.state_dict().values()} <= {torch.float32, torch.int64}
    assert twin.inputs[0].dtype == "float32"


def test_a_language_model_in_halves_with_named_inputs(tmp_path: Path) -> None:
    transformers: Any = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64
    )
    net = transformers.BertModel(config).eval().to(torch.bfloat16)
    inputs = (
        Input(name="input_ids", shape=(2, 12), dtype="int64", high=50),
        Input(name="attention_mask", shape=(2, 12), dtype="int64"),
    )
    source = Source(net, inputs, Blueprint.of(net), Builder(kind="instance", name="BertModel"))
    exported = export(source, "onnx", tmp_path / "net.onnx")
    assert "cast from bfloat16 to float32" in exported.notes[0]
    ids, mask = torch.randint(50, (3, 12)), torch.ones(3, 12, dtype=torch.int64)
    with torch.no_grad():
        wanted = net(input_ids=ids, attention_mask=mask).last_hidden_state.float()
    got = wf.load(tmp_path / "net.onnx")(input_ids=ids, attention_mask=mask)[0]
    assert float((got - wanted).norm()) <= 0.02 * float(wanted.norm())


def test_grids_that_were_learned_in_singles_are_not_taken_along(tmp_path: Path) -> None:
    """And the remedy works."""
    source = source_of("convolution and norm", torch.bfloat16)
    gridded = Source(**{**vars(source), "grids": {"first": Grid(0.05, 8, False)}})
    with pytest.raises(ExportError, match="grids of activations") as caught:
        export(gridded, "onnx-int8", tmp_path / "net.onnx")
    assert "model.float()" in str(caught.value)
    single = source_of("convolution and norm", torch.float32)
    again = Source(**{**vars(single), "grids": {"first": Grid(0.05, 8, False)}})
    assert export(again, "onnx-int8", tmp_path / "net.onnx", tolerance=0.5).size_bytes > 0
