"""Files of 8 bits: what they are calibrated on, what stays in floats, and what is said of both."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import weightfold as wf
from weightfold.artifact import Builder, Input
from weightfold.errors import ConfigError, ExportError
from weightfold.export import Blueprint, Source, export, target_onnx_int8
from weightfold.export.check import in_batches

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")


def source_of(net: nn.Module, *inputs: Input, calibration: Any = ()) -> Source:
    builder = Builder(kind="instance", name=type(net).__name__)
    return Source(net.eval(), inputs, Blueprint.of(net), builder, calibration=calibration)


class Two(nn.Module):
    """Reads two inputs of very different sizes, the second by name."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(6, 32), nn.Linear(6, 32), nn.Linear(32, 3)

    def forward(self, x: Tensor, *, other: Tensor) -> Tensor:
        return self.head(torch.relu(self.a(x)) + torch.relu(self.b(other)))


class Fixed(nn.Module):
    """Its batch size is written down."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 32), nn.Linear(32, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.relu(self.a(x)).view(4, 32))


def two(scale: float, n: int = 64) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
    return (torch.randn(n, 6),), {"other": scale * torch.randn(n, 6)}


def test_without_inputs_nothing_is_quantised_and_each_remedy_works(tmp_path: Path) -> None:
    torch.manual_seed(0)
    bare = source_of(Two(), Input(shape=(2, 6)), Input(name="other", shape=(2, 6)))
    with pytest.raises(ExportError, match="no real inputs to calibrate on") as caught:
        export(bare, "onnx-int8", tmp_path / "net.onnx")
    assert not list(tmp_path.iterdir())
    assert 'calibration="drawn"' in str(caught.value)
    assert "calibration=[" in str(caught.value)
    drawn = export(replace(bare, calibration="drawn"), "onnx-int8", tmp_path / "drawn.onnx")
    assert drawn.compared_on == "drawn inputs"
    real = export(replace(bare, calibration=[two(50.0, 512)]), "onnx-int8", tmp_path / "real.onnx")
    assert real.compared_on == "real inputs"
    (x,), named = two(50.0)
    with torch.no_grad():
        wanted = bare.model(x, **named)
    off = {
        name: float((wf.load(tmp_path / f"{name}.onnx")(x, **named) - wanted).norm() / wanted.norm())
        for name in ("drawn", "real")
    }
    assert off["real"] <= max(0.05, 2 * real.relative_difference)
    assert off["drawn"] > 0.3, "which is why drawn numbers are not taken unasked"


def test_other_targets_need_no_inputs(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4))
    for target in ("onnx", "onnx-fp16", "onnx-int4"):
        assert export(source_of(net, Input(shape=(2, 64))), target, tmp_path / f"{target}.onnx").size_bytes


def test_real_inputs_are_cut_to_the_batch_that_the_file_takes(tmp_path: Path) -> None:
    """Not passed over for drawn ones: the file is right on inputs as large as those it was calibrated on."""
    torch.manual_seed(0)
    x = 100 * torch.randn(10, 6)
    source = source_of(Fixed(), Input(shape=(4, 6)), calibration=[((x,), {})])
    exported = export(source, "onnx-int8", tmp_path / "net.onnx")
    assert (exported.any_batch, exported.compared_on) == (False, "real inputs")
    with torch.no_grad():
        wanted = source.model(x[:4])
    got = wf.load(tmp_path / "net.onnx")(x[:4])
    assert float((got - wanted).norm()) < 0.05 * float(wanted.norm())
    short = replace(source, calibration=[((x[:3],), {})])
    with pytest.raises(ExportError, match="batches of 4 alone"):
        export(short, "onnx-int8", tmp_path / "short.onnx")
    assert [len(args[0]) for args, _ in in_batches([((x,), {}), ((x[:3],), {})], 4)] == [4, 4]


class Excited(nn.Module):
    """Depthwise and pointwise convolutions, most of its bytes."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, n, 3, 2, 1), nn.Conv2d(n, n, 3, 1, 1, groups=n)
        self.c, self.head = nn.Conv2d(n, n, 1), nn.Linear(n, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.hardswish(self.b(nn.functional.hardswish(self.a(x))))
        return self.head(nn.functional.hardswish(self.c(x)).mean((2, 3)))


def test_what_stays_float_is_said_and_size_may_be_preferred(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    real = [((torch.randn(8, 3, 16, 16),), {})]
    source = source_of(Excited(96), Input(shape=(1, 3, 16, 16)), calibration=real)
    whole = export(source, "onnx", tmp_path / "float.onnx").size_bytes
    monkeypatch.setattr(target_onnx_int8, "_seconds", lambda made, inputs: [2.0, 1.5, 1.0][: len(made)])
    quick = export(source, "onnx-int8", tmp_path / "quick.onnx")
    small = export(source, "onnx-int8", tmp_path / "small.onnx", prefer="size")
    assert small.size_bytes < 0.6 * whole < 0.6 * quick.size_bytes / 0.6
    assert small.notes == ()
    convolutions = 4 * (96 * 27 + 96 * 9 + 96 * 96)
    [note] = quick.notes
    assert f"{quick.size_bytes:,} of " in note
    assert f"{convolutions:,} bytes of weights stay float ({convolutions:,} in Conv)" in note
    assert f'prefer="size" (--prefer size) takes {small.size_bytes:,} bytes and 2 times as long' in note
    tensors = onnx.load(tmp_path / "small.onnx").graph.initializer
    assert sum(onnx.numpy_helper.to_array(t).dtype == np.int8 for t in tensors if len(t.dims) > 1) == 4


def test_weights_that_have_no_kernel_of_8_bits_are_named(tmp_path: Path) -> None:
    """A table of embeddings and a recurrent layer beside one matrix: nothing that could be preferred."""

    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.gru, self.head = nn.Embedding(500, 16), nn.GRU(16, 32, batch_first=True), nn.Linear(32, 4)

        def forward(self, ids: Tensor) -> Tensor:
            return self.head(self.gru(self.table(ids))[0][:, -1])

    torch.manual_seed(0)
    real = [((torch.randint(500, (8, 6)),), {})]
    source = source_of(Recurrent(), Input(shape=(1, 6), dtype="int64", high=500), calibration=real)
    [note] = export(source, "onnx-int8", tmp_path / "net.onnx").notes
    assert f"{4 * 500 * 16:,} in Gather" in note
    assert "in GRU" in note
    assert "prefer" not in note


def test_a_preference_is_one_of_those_there_are(tmp_path: Path) -> None:
    source = source_of(nn.Linear(4, 4), Input(shape=(1, 4)), calibration="drawn")
    with pytest.raises(ConfigError, match="'onnx' trades nothing"):
        export(source, "onnx", tmp_path / "net.onnx", prefer="size")
    with pytest.raises(ConfigError, match="one of speed, size"):
        export(source, "onnx-int8", tmp_path / "net.onnx", prefer="sise")


@pytest.mark.parametrize("kind", [nn.GRU, nn.LSTM])
def test_the_reason_of_a_refusal_names_what_the_model_has(kind: type[nn.Module], tmp_path: Path) -> None:
    class Alone(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = kind(8, 64, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x)[0]

    source = source_of(Alone(), Input(shape=(1, 5, 8)), calibration="drawn")
    with pytest.raises(ExportError, match=f"nothing to quantise: .* {kind.__name__}") as caught:
        export(source, "onnx-int8", tmp_path / "net.onnx")
    assert "Export it as onnx" in str(caught.value)
    with pytest.raises(ExportError, match="No matrix of this model") as caught:
        export(source, "onnx-int4", tmp_path / "net.onnx")
    assert str(caught.value).endswith("Export it as onnx.")
    assert export(source, "onnx", tmp_path / "net.onnx").size_bytes


def test_the_inputs_of_a_compressors_probe_are_calibrated_on(tmp_path: Path) -> None:
    """A network of one's own that has been folded, at inputs fifty times as large as drawn ones."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 64), nn.Tanh(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 3))
    x = 50 * torch.randn(256, 6)
    probe = [(x[:128], net(x[:128]).detach()), (x[128:], net(x[128:]).detach())]
    compressor = wf.Compressor(net, x[:2], [wf.Fold(keep=0.5)], loss=nn.functional.mse_loss, probe=probe)
    compressor.prepare()
    compressor.once([x])
    small = compressor.convert().eval()
    exported = wf.export(small, tmp_path / "net.onnx", target="onnx-int8", prefer="size")
    assert exported.compared_on == "real inputs"
    held = 50 * torch.randn(64, 6)
    with torch.no_grad():
        wanted = small(held)
    assert float((wf.load(tmp_path / "net.onnx")(held) - wanted).norm()) < 0.1 * float(wanted.norm())
    plain = nn.Sequential(nn.Linear(6, 64), nn.Tanh(), nn.Linear(64, 3))
    with pytest.raises(ExportError, match="no real inputs"):
        wf.export(plain, tmp_path / "plain.onnx", x[:2], target="onnx-int8")
    assert wf.export(plain, tmp_path / "plain.onnx", x[:2], target="onnx-int8", calibration="drawn").size_bytes
    assert wf.export(plain, tmp_path / "plain.onnx", x[:2], target="onnx-int8", calibration=[x]).size_bytes
