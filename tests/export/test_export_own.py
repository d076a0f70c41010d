"""A network of one's own, folded: saved, loaded and exported in one line each, and read from a plain state dict."""

from __future__ import annotations

import copy
import functools
import gc
import weakref
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import weightfold
from weightfold.errors import ArtifactError, ConfigError, ExportError
from weightfold.export import Blueprint

from .own_nets import NETS, Counted, Plain, Recurrent, ResidualCNN, Transformer


@functools.cache
def folded(kind: type[nn.Module], keep: float = 0.5) -> tuple[nn.Module, Tensor, Tensor]:
    """A folded network, inputs, and its outputs."""
    g = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    x = NETS[kind](g, 64)
    compressor = weightfold.Compressor(kind(), x[:2], [weightfold.Fold(keep=keep)])
    compressor.prepare()
    assert any(event.accepted for event in compressor.once([x]))
    small = compressor.convert().eval()
    x = NETS[kind](g, 3)
    return small, x, small(x).detach()


@pytest.mark.parametrize("kind", NETS)
def test_every_kind_of_network_makes_the_round_trip(kind: type[nn.Module], tmp_path: Path) -> None:
    small, x, wanted = folded(kind)
    small.train()
    file = weightfold.save(small, tmp_path / "small.safetensors")
    assert small.training, "the network was not left as it was"
    assert torch.equal(weightfold.load(file, kind())(x), wanted)
    assert Blueprint.of(weightfold.load(file, kind())) == Blueprint.of(small)
    graph = weightfold.load(file)
    assert not graph.eval().training
    assert torch.allclose(graph(x), wanted, atol=1e-5)
    unknown = weightfold.save(copy.deepcopy(small), tmp_path / "unknown.safetensors")
    assert torch.equal(weightfold.load(unknown, kind())(x), wanted), "without knowing what it was before its edits"
    with pytest.raises(ConfigError, match=f"made by '{kind.__name__}': code that is not run"):
        weightfold.load(unknown)
    told = weightfold.save(copy.deepcopy(small), tmp_path / "told.safetensors", x)
    assert torch.allclose(weightfold.load(told)(x), wanted, atol=1e-5)


@pytest.mark.parametrize("kind", [Recurrent, Plain, Transformer])
def test_a_network_is_exported_in_one_line(kind: type[nn.Module], tmp_path: Path) -> None:
    small, x, wanted = folded(kind)
    assert weightfold.export(small, tmp_path / "small.pt2").any_batch
    assert torch.allclose(weightfold.load(tmp_path / "small.pt2").eval()(x), wanted, atol=1e-5)
    with pytest.raises(ConfigError, match="no training mode"):
        weightfold.load(tmp_path / "small.pt2").train()
    with pytest.raises(ExportError, match="not known"):
        weightfold.export(copy.deepcopy(small), tmp_path / "copy.pt2")
    assert not (tmp_path / "copy.pt2").exists()
    weightfold.export(copy.deepcopy(small), tmp_path / "copy.pt2", x)
    with pytest.raises(ConfigError, match=r"'.*small\.txt' is that of no target"):
        weightfold.export(small, tmp_path / "small.txt")
    with pytest.raises(ConfigError, match=r"must end in '\.safetensors'.*weightfold\.export"):
        weightfold.save(small, tmp_path / "small.onnx")


@pytest.mark.parametrize("kind", [Recurrent, Transformer, Counted, Plain])
def test_a_state_dict_of_folded_widths_goes_into_a_fresh_instance(kind: type[nn.Module], tmp_path: Path) -> None:
    small, x, wanted = folded(kind)
    torch.save(small.state_dict(), tmp_path / "state.pt")
    twin = weightfold.load(tmp_path / "state.pt", kind(), x)
    assert torch.equal(twin(x), wanted)
    assert Blueprint.of(twin) == Blueprint.of(small)


@pytest.mark.parametrize(("kind", "sure"), [(Recurrent, True), (Plain, True), (Transformer, False), (Counted, False)])
def test_without_an_example_only_what_the_layers_tell_is_taken(
    kind: type[nn.Module], sure: bool, tmp_path: Path
) -> None:
    small, x, wanted = folded(kind)
    torch.save(small.state_dict(), tmp_path / "state.pt")
    if sure:
        twin = weightfold.load(tmp_path / "state.pt", kind())
        assert torch.equal(twin(x), wanted)
        assert Blueprint.of(twin) == Blueprint.of(small)
    else:
        with pytest.raises(ArtifactError, match="must be then, the file does not say") as error:
            weightfold.load(tmp_path / "state.pt", kind())
        assert "example=" in str(error.value.remedy)


class Heads(nn.Module):
    """Attention whose heads can go, and whose heads can become narrower: the shapes are the same."""

    def __init__(self, num_heads: int = 4, head_dim: int = 4) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.ModuleList(nn.Linear(8, num_heads * head_dim) for _ in range(3))
        self.out = nn.Linear(num_heads * head_dim, 8)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for layer in self.qkv)
        return self.out((torch.softmax(q @ k.mT, -1) @ v).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("made", [(2, 4), (4, 2)])
def test_widths_that_can_be_read_in_two_ways_are_refused(made: tuple[int, int], tmp_path: Path) -> None:
    torch.save(Heads(*made).state_dict(), tmp_path / "state.pt")
    with pytest.raises(ArtifactError, match="in more than one way") as error:
        weightfold.load(tmp_path / "state.pt", Heads(), torch.zeros(2, 5, 8))
    assert "weightfold.save" in str(error.value.remedy)
    net, x = Heads(*made).eval(), torch.randn(2, 5, 8)
    file = weightfold.save(net, tmp_path / "net.safetensors")
    assert torch.equal(weightfold.load(file, Heads())(x), net(x)), "the remedy works"


def test_grouped_convolutions_are_refused_by_shapes_alone(tmp_path: Path) -> None:
    small, x, _ = folded(ResidualCNN)
    torch.save(small.state_dict(), tmp_path / "state.pt")
    for example in (None, x):
        with pytest.raises(ArtifactError, match=r"does not say|do not say"):
            weightfold.load(tmp_path / "state.pt", ResidualCNN(), example)


def test_other_networks_are_refused(tmp_path: Path) -> None:
    small, x, _ = folded(Plain)
    file = weightfold.save(small, tmp_path / "small.safetensors")
    with pytest.raises(ArtifactError, match=r"no tensor 'conv\.weight'"):
        weightfold.load(file, Recurrent())
    wide = Plain()
    wide.conv = nn.Conv1d(3, 16, 3)
    with pytest.raises(ArtifactError, match=r"'conv\.weight' has the shape \(16, 3, 3\)"):
        weightfold.load(file, wide)
    torch.save(small.state_dict(), tmp_path / "state.pt")
    with pytest.raises(ArtifactError, match="lacks"):
        weightfold.load(tmp_path / "state.pt", Recurrent(), x)
    untied, tied = Transformer(), Transformer()
    untied.head.weight = nn.Parameter(untied.embed.weight.detach() + 1)
    with pytest.raises(ArtifactError, match=r"ties 'head\.weight' to 'embed\.weight'"):
        weightfold.load(weightfold.save(untied, tmp_path / "untied.safetensors"), tied)


def test_another_original_is_kept_in_mind_where_it_is_told(tmp_path: Path) -> None:
    small, x, wanted = folded(Plain)
    file = weightfold.save(copy.deepcopy(small), tmp_path / "small.safetensors", original=Plain())
    assert torch.equal(weightfold.load(file, Plain())(x), wanted)
    other = Plain()
    other.conv.stride = (2,)
    other.head = nn.Linear(12, 3)
    with pytest.raises(ArtifactError, match=r"'head\.weight' has the shape \(3, 12\).*\(3, 16\)"):
        weightfold.load(file, other)


def test_clustered_networks_are_loaded(tmp_path: Path) -> None:
    small, x, _ = folded.__wrapped__(Recurrent)
    palette = weightfold.palettize(small, k=4)
    palette.save(tmp_path / "clustered.safetensors", small)
    assert torch.equal(weightfold.load(tmp_path / "clustered.safetensors", Recurrent())(x), small(x))
    net = Plain().eval()
    weightfold.palettize(net, k=4).save(tmp_path / "plain.safetensors", net)
    x = torch.randn(2, 2, 9)
    assert torch.equal(weightfold.load(tmp_path / "plain.safetensors", Plain())(x), net(x))
    with pytest.raises(ArtifactError, match="Pass the model together"):
        weightfold.load(tmp_path / "plain.safetensors")


def test_what_a_compressor_took_down_is_forgotten_with_the_network() -> None:
    small, _, _ = folded.__wrapped__(Plain)
    gone = weakref.ref(small)
    del small
    gc.collect()
    assert gone() is None
