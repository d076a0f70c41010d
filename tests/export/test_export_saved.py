"""A saved model comes back with its edited shapes and computes the same to the bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from weightfold.artifact import Builder, read_header, read_structure
from weightfold.errors import ArtifactError, ConfigError
from weightfold.export import Blueprint, Source, load, save_model
from weightfold.export.example import draw
from weightfold.models import NAMES
from weightfold.size import parameters

from .conftest import SMALL, shrink_


class Twins(nn.Module):
    """A network of the user's own, with tied weights."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.first = nn.Linear(6, width)
        self.head = nn.Linear(width, 6)
        self.again = nn.Linear(width, 6)
        self.again.weight = self.head.weight

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.first(x))
        return self.head(h) + self.again(h)


def test_every_family_is_tried() -> None:
    assert set(SMALL) == set(NAMES)


@pytest.mark.parametrize("name", SMALL)
def test_a_built_in_network_comes_back_from_its_file_alone(
    name: str, shrunk: Callable[[str], Source], tmp_path: Path
) -> None:
    source = shrunk(name)
    path = tmp_path / "model.safetensors"
    structure = save_model(source.model, path, before=source.before, builder=source.builder, inputs=source.inputs)
    assert structure.sizes, "nothing was removed: the test shows nothing"
    twin = load(tmp_path)
    args, _ = draw(source.inputs)
    assert torch.equal(twin(*args), source.model(*args))
    assert parameters(twin) == parameters(source.model)
    assert Blueprint.of(twin) == Blueprint.of(source.model)
    assert not twin.training


def test_a_user_s_network_comes_back_into_a_fresh_instance(tmp_path: Path) -> None:
    net, x = Twins(), torch.randn(3, 6)
    before = Blueprint.of(net)
    assert shrink_(net, x) == 1
    path = tmp_path / "model.safetensors"
    structure = save_model(net, path, before=before, builder=Builder(kind="instance", name="Twins"))
    assert structure.aliases == {"again.weight": "head.weight"}
    assert set(load_file(path)) == {"first.weight", "first.bias", "head.weight", "head.bias", "again.bias"}
    twin = load(path, Twins())
    assert torch.equal(twin(x), net(x))
    assert twin.again.weight is twin.head.weight
    assert twin.first.out_features == 4
    with pytest.raises(ConfigError, match="code that is not run"):
        load(path)


def test_another_network_is_refused_with_both_shapes(tmp_path: Path) -> None:
    net = Twins()
    before = Blueprint.of(net)
    shrink_(net, torch.zeros(1, 6))
    path = tmp_path / "model.safetensors"
    save_model(net, path, before=before, builder=Builder(kind="instance", name="Twins"))
    with pytest.raises(ArtifactError, match=r"'first\.weight' has the shape \(10, 6\).*\(8, 6\) and holds \(4, 6\)"):
        load(path, Twins(10))
    with pytest.raises(ArtifactError, match=r"no tensor 'first\.weight'"):
        load(path, nn.Linear(2, 2))
    untied = Twins()
    untied.again.weight = nn.Parameter(untied.head.weight.detach().clone())
    with pytest.raises(ArtifactError, match=r"ties 'again\.weight' to 'head\.weight'"):
        load(path, untied)


def test_an_attribute_that_does_not_fit_is_named(tmp_path: Path) -> None:
    net = Twins()
    before = Blueprint.of(net)
    shrink_(net, torch.zeros(1, 6))
    path = tmp_path / "model.safetensors"
    save_model(net, path, before=before, builder=Builder(kind="instance", name="Twins"))
    strange = Twins()
    strange.first.out_features = 5
    with pytest.raises(ArtifactError, match=r"'first\.out_features' is 5 in the model.*with 8"):
        load(path, strange)


def test_changed_tensors_are_noticed(tmp_path: Path, shrunk: Callable[[str], Source]) -> None:
    source = shrunk("mlp")
    path = tmp_path / "model.safetensors"
    save_model(source.model, path, before=source.before, builder=source.builder)
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    with pytest.raises(ArtifactError, match="fingerprint"):
        load(path)


def test_foreign_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"w": torch.zeros(2)}, path)
    with pytest.raises(ArtifactError, match="not written by weightfold"):
        load(path)
    path.write_bytes(b"\x80\x04 a pickle, perhaps")
    with pytest.raises(ArtifactError, match="corrupt"):
        load(path)
    with pytest.raises(ArtifactError, match="There is no model file"):
        load(tmp_path / "none.safetensors")


def test_the_metadata_names_the_ledger_s_head(tmp_path: Path, shrunk: Callable[[str], Source]) -> None:
    source = shrunk("mlp")
    path = tmp_path / "model.safetensors"
    save_model(source.model, path, before=source.before, builder=source.builder, ledger_head=source.ledger_head)
    assert read_header(path).metadata["ledger"] == source.ledger_head
    assert read_structure(path)[0].ledger_head == source.ledger_head
