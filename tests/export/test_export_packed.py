"""A quantised network comes back from its packed file with exactly the weights that its codes mean."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from weightfold.artifact import Builder, CodedTensor, nearest_step, read_packed
from weightfold.errors import ArtifactError, ConfigError, ExportError
from weightfold.export import Blueprint, Source, load, load_packed, promised_packed_bytes, save_packed
from weightfold.export.example import draw
from weightfold.export.opened import is_saved, open_model
from weightfold.export.packed import fill_
from weightfold.fingerprint import fingerprint

from .conftest import SMALL


def quantise_(model: nn.Module) -> dict[str, CodedTensor]:
    """Round the weights of a module to few levels, and give their codes."""
    coded = {}
    for name, parameter in model.named_parameters():
        if parameter.ndim < 2:
            continue
        rows = parameter.detach().reshape(len(parameter), -1).numpy()
        steps = nearest_step(np.abs(rows).max(axis=1) / 3 + 1e-9)
        codes = np.clip(np.rint(rows / 2 ** (steps[:, None] / 8)), -3, 3).astype(np.int16)
        coded[name] = CodedTensor(codes.reshape(parameter.shape), steps)
    fill_(model, coded)
    return coded


@pytest.mark.parametrize("name", SMALL)
def test_a_built_in_network_comes_back_from_its_file_alone(
    name: str, shrunk: Callable[[str], Source], tmp_path: Path
) -> None:
    source = shrunk(name)
    coded = quantise_(source.model)
    path = tmp_path / "model.wfp"
    sizes = save_packed(source, coded, path)
    assert abs(promised_packed_bytes(source, coded) - sizes.total_bytes) <= 0.01 * sizes.total_bytes
    for twin in (load(path), load(tmp_path), load_packed(path)):
        args, _ = draw(source.inputs)
        assert torch.equal(twin(*args), source.model(*args))
        assert Blueprint.of(twin) == Blueprint.of(source.model)
        assert fingerprint(twin) == fingerprint(source.model)
        assert not twin.training
    assert read_packed(path).structure.fingerprint == fingerprint(source.model)
    assert is_saved(path)
    assert is_saved(tmp_path)
    opened = open_model(str(path))
    assert opened.inputs == source.inputs
    assert opened.ledger_head == source.ledger_head
    assert fingerprint(opened.model) == fingerprint(source.model)


class Twins(nn.Module):
    """A network of the user's own, with tied weights."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 8)
        self.head = nn.Linear(8, 6)
        self.again = nn.Linear(8, 6)
        self.again.weight = self.head.weight

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.first(x))
        return self.head(h) + self.again(h)


def twins() -> Source:
    net = Twins()
    return Source(net, (), Blueprint.of(net), Builder(kind="instance", name="Twins"))


def test_tied_weights_are_kept_once(tmp_path: Path) -> None:
    source, path = twins(), tmp_path / "twins.wfp"
    coded = quantise_(source.model)
    assert "again.weight" not in coded
    save_packed(source, coded, path)
    twin = load(path, Twins())
    x = torch.randn(3, 6)
    assert torch.equal(twin(x), source.model(x))
    assert isinstance(twin, Twins)
    assert twin.again.weight is twin.head.weight
    with pytest.raises(ExportError, match=r"tied to 'head\.weight'"):
        save_packed(source, {"again.weight": coded["head.weight"]}, path)
    with pytest.raises(ConfigError, match="code that is not run"):
        load(path)


def test_plain_tensors_are_halved_where_that_is_exact(tmp_path: Path) -> None:
    net = nn.BatchNorm1d(64)
    source = Source(net, (), Blueprint.of(net), Builder(kind="instance", name="BatchNorm1d"))
    with torch.no_grad():
        net.weight.copy_(torch.rand(64))
    save_packed(source, {}, tmp_path / "norm.wfp")
    kinds = {name: str(array.dtype) for name, array in read_packed(tmp_path / "norm.wfp").plain.items()}
    assert kinds["running_var"] == "float16"
    assert kinds["weight"] == "float32"
    twin = load(tmp_path / "norm.wfp", nn.BatchNorm1d(64))
    assert fingerprint(twin) == fingerprint(net)


def test_a_file_is_never_another_network(tmp_path: Path) -> None:
    source, path = twins(), tmp_path / "twins.wfp"
    coded = quantise_(source.model)
    save_packed(source, coded, path)
    with pytest.raises(ArtifactError, match=r"ties 'again\.weight' to 'head\.weight'"):
        load(path, nn.Sequential(Twins()))
    more = Twins()
    more.extra = nn.Linear(1, 1)
    with pytest.raises(ArtifactError, match=r"lacks 'extra\.weight', which the model has"):
        load(path, more)
    wide = Twins()
    wide.first = nn.Linear(7, 8)
    before = wide.head.weight.clone()
    with pytest.raises(ArtifactError, match=r"'first\.weight' of shape \(8, 6\)"):
        load(path, wide)
    assert torch.equal(wide.head.weight, before)
    with torch.no_grad():
        source.model.get_parameter("first.weight")[0, 0] += 1
    with pytest.raises(ExportError, match="does not hold the values of its codes"):
        save_packed(source, coded, path)
    with pytest.raises(ExportError, match="has no such tensor"):
        save_packed(source, {"none": coded["first.weight"]}, path)
    data = path.read_bytes()
    path.write_bytes(data[:-1])
    with pytest.raises(ArtifactError, match=r"twins\.wfp"):
        load(path, Twins())
