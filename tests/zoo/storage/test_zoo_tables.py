"""Symmetries as bytes, of every kind of network; and those of a graph in a file, without the class."""

from __future__ import annotations

import zlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import save
from torch import Tensor, nn

from weightfold.artifact import Builder, Input
from weightfold.blueprint import Blueprint
from weightfold.errors import ArtifactError
from weightfold.export import target_safetensors
from weightfold.export.source import Source
from weightfold.fingerprint import fingerprint
from weightfold.models import Classes, ImageInput, NextToken, TaskSpec, TextInput, build
from weightfold.weights.canon import hash_of, same_hash, structure_digest
from weightfold.weights.symmetry import symmetries
from weightfold.zoo.storage.tables import from_bytes, to_bytes
from weightfold.zoo.store import Zoo

IMAGES = TaskSpec(input=ImageInput(channels=3, height=16, width=16), output=Classes(n=10))
TEXT = TaskSpec(input=TextInput(vocab=20, context=8), output=NextToken(vocab=20))


class Normed(nn.Module):
    """A class that no file names: a batch norm behind a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.Linear(6 * 16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.norm(self.conv(x))).flatten(1))


@pytest.mark.parametrize(("name", "task"), [("mlp", IMAGES), ("resnet20", IMAGES), ("char-gpt", TEXT)])
def test_symmetries_come_back_from_their_bytes(name: str, task: TaskSpec) -> None:
    model = build(name, task)
    found = symmetries(model, task.example())
    data = to_bytes(found)
    twin = from_bytes(data)
    assert to_bytes(twin) == data
    assert structure_digest(twin) == structure_digest(found)
    assert hash_of(twin, model.state_dict()) == hash_of(found, model.state_dict())
    assert twin.graph.summary() == found.graph.summary()
    assert twin.graph.aliases == found.graph.aliases
    twin.graph.validate()


def test_damaged_symmetries_are_refused() -> None:
    data = to_bytes(symmetries(nn.Linear(3, 2), torch.zeros(1, 3)))
    for wrong in (b"", data[:20], data[:-4], b"\xff" * 8 + data[8:]):
        with pytest.raises(ArtifactError, match="stored symmetries are damaged"):
            from_bytes(wrong)


@pytest.mark.parametrize(
    "text",
    ['{"c":"Path","v":{}}', '{"c":"Members","v":[1]}', '{"c":"Members","v":{"x":1}}', '{"f":[1,0]}', '{"t":7}', "[]",
     '{"l":[' * 9000 + "]}" * 9000],
    ids=["class", "fields", "field", "fraction", "tensor", "list", "deep"],
)  # fmt: skip
def test_plain_data_of_something_else_is_refused(text: str) -> None:
    data = len(text).to_bytes(8, "little") + zlib.compress(text.encode() + save({"0": torch.ones(2)}))
    with pytest.raises(ArtifactError, match="stored symmetries are damaged"):
        from_bytes(data)


def test_an_exported_graph_is_hashed_without_its_class(zoo: Zoo, tmp_path: Path) -> None:
    model = Normed().eval()
    with torch.no_grad():
        model.norm.running_mean.uniform_(-1, 1)
    source = Source(model, (Input(shape=(1, 1, 6, 6)),), Blueprint.of(model), Builder(kind="instance", name="Normed"))
    target_safetensors.write(source, tmp_path / "a.safetensors")
    card = zoo.add(tmp_path / "a.safetensors")
    by_class = zoo.add(model, example=torch.zeros(1, 1, 6, 6))
    assert card.architecture == "Normed"
    assert card.hash_reason is None
    assert same_hash(str(card.semantic_hash), str(by_class.semantic_hash))
    import weightfold

    out = weightfold.load(zoo.get("a", tmp_path / "out.safetensors"))
    x = torch.randn(1, 1, 6, 6)
    assert torch.equal(out(x), model(x))
    assert fingerprint(out) == card.digest


def changed(data: bytes, old: str, new: str) -> bytes:
    """Stored symmetries with another text, the first time that it stands there."""
    n_text, whole = int.from_bytes(data[:8], "little"), zlib.decompress(data[8:])
    text = whole[:n_text].decode()
    assert old in text
    text = text.replace(old, new, 1)
    return len(text).to_bytes(8, "little") + zlib.compress(text.encode() + whole[n_text:])


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"dim":0', '"dim":"0"'),
        ('"dim":0', '"dim":true'),
        ('"dim":0', '"dim":null'),
        ('{"s":["', '{"s":[3,"'),
        ('"c":"Slot"', '"c":"Symmetries"'),
        ('"c":"Slot"', '"c":"exec"'),
        ('{"t":0}', '{"t":"0.0"}'),
        ('{"t":0}', "0"),
        ('"free":', '"free":1,"free":'),
        ('"c":"Symmetries"', '"c":"Slot"'),
    ],
)
def test_fields_of_another_type_are_damage(old: str, new: str) -> None:
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    data = to_bytes(symmetries(net, torch.zeros(1, 4)))
    assert to_bytes(from_bytes(data)) == data
    with pytest.raises(ArtifactError, match="stored symmetries are damaged"):
        from_bytes(changed(data, old, new))


def test_symmetries_that_unpack_to_much_are_refused() -> None:
    data = (1 << 28).to_bytes(8, "little") + zlib.compress(bytes(1 << 24))
    with pytest.raises(ArtifactError, match="damaged"):
        from_bytes(data)
