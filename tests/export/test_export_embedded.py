"""A model of the user's own comes back without the user's class: by the graph in its file. No file runs code."""

from __future__ import annotations

import pickle
import zipfile
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import weightfold as wf
from weightfold.artifact import Builder, Input, read_header
from weightfold.errors import ArtifactError, ConfigError
from weightfold.export import Blueprint, Source, export, save_model
from weightfold.export.embedded import PROGRAM, program_module, program_text

from .conftest import shrink_


class Own(nn.Module):
    """A network of the user's: tied weights, a norm, a buffer, a constant."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 16, 3)
        self.norm = nn.BatchNorm2d(16)
        self.head = nn.Linear(16, 5)
        self.again = nn.Linear(16, 5)
        self.again.weight = self.head.weight
        self.register_buffer("shift", torch.randn(5))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.norm(self.conv(x))).mean((2, 3))
        return self.head(h) + self.again(h) + self.shift + torch.tensor([2.0])


@pytest.fixture
def source() -> Source:
    net = Own().eval()
    before = Blueprint.of(net)
    assert shrink_(net, torch.zeros(1, 3, 6, 6)) == 1
    return Source(net, (Input(shape=(2, 3, 6, 6)),), before, Builder(kind="instance", name="Own"), fresh=Own)


def test_it_is_loaded_with_the_class_and_without_it(source: Source, tmp_path: Path) -> None:
    path = tmp_path / "net.safetensors"
    exported = export(source, "safetensors", path)
    x = torch.randn(7, 3, 6, 6)
    wanted = source.model(x).detach()
    assert torch.equal(wf.load(path, Own())(x), wanted)
    assert torch.allclose(wf.load(path)(x), wanted, atol=1e-6)
    assert exported.largest_difference == 0
    assert len(read_header(path).metadata[PROGRAM]) < 20_000


def test_without_an_example_the_class_is_asked_for(source: Source, tmp_path: Path) -> None:
    path = tmp_path / "net.safetensors"
    save_model(source.model, path, before=source.before, builder=source.builder)
    with pytest.raises(ConfigError, match="code that is not run"):
        wf.load(path)


def test_a_damaged_graph_or_a_missing_tensor_is_named(source: Source) -> None:
    text = program_text(source)
    assert text is not None
    tensors = dict(source.model.state_dict())
    with pytest.raises(ArtifactError, match="is damaged"):
        program_module("no graph", tensors, "net.safetensors")
    tensors.pop("shift")
    with pytest.raises(ArtifactError, match=r"needs 'shift' of shape \(5,\)"):
        program_module(text, tensors, "net.safetensors")


class Bomb:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str, str]]:
        return open, (str(self.path), "w")


def test_a_program_with_pickled_or_compiled_code_is_refused(source: Source, tmp_path: Path) -> None:
    export(source, "pt2", tmp_path / "net.pt2")
    spoilt = tmp_path / "spoilt.pt2"
    with zipfile.ZipFile(tmp_path / "net.pt2") as old, zipfile.ZipFile(spoilt, "w") as new:
        for name in old.namelist():
            inputs = "sample_inputs" in name and name.endswith(".pt")
            new.writestr(name, pickle.dumps(Bomb(tmp_path / "ran")) if inputs else old.read(name))
    with pytest.raises(ArtifactError, match="cannot be read"):
        wf.load(spoilt)
    assert not (tmp_path / "ran").exists()
    with zipfile.ZipFile(tmp_path / "net.pt2", "a") as archive:
        archive.writestr("archive/data/aotinductor/model/x.so", b"")
    with pytest.raises(ArtifactError, match="holds compiled code"):
        wf.load(tmp_path / "net.pt2")


def test_loading_puts_everything_back(source: Source, tmp_path: Path) -> None:
    before = torch.load
    export(source, "pt2", tmp_path / "net.pt2")
    assert torch.load is before


def test_the_same_model_gives_the_same_program(source: Source, tmp_path: Path) -> None:
    for name in "ab":
        export(source, "pt2", tmp_path / f"{name}.pt2")
    assert (tmp_path / "a.pt2").read_bytes() == (tmp_path / "b.pt2").read_bytes()
