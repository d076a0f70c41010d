"""Dead channels: cutting them changes nothing. Reference: the network's own float64 output before the cut."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import weightfold as wf
from weightfold.gate import probing
from weightfold.graph.apply import apply
from weightfold.graph.edit import remove
from weightfold.graph.resize import with_sizes
from weightfold.models.attention import Block
from weightfold.quant.dead import Dead, dead_channels, observe_spans


def seeded(model: nn.Module) -> nn.Module:
    """Random weights; biases that are far from zero."""
    generator = torch.Generator().manual_seed(0)
    model = model.double()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator, dtype=p.dtype) * (0.5 if p.ndim > 1 else 1.0))
    return model


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def silence(weight: Tensor, rows: Sequence[int], columns: Sequence[int] = ()) -> None:
    with torch.no_grad():
        weight[list(rows)] = 0
        weight[:, list(columns)] = 0


def cut(model: nn.Module, x: Tensor, name: str) -> tuple[Dead, float]:
    """What is dead in a group, and by how much the output changes when it goes, relative to its largest value."""
    graph = with_sizes(model, x[:2], wf.trace(model, x[:2]))
    group = graph[name]
    assert "remove" in group.admits
    live = {n: p.detach() != 0 for n, p in model.named_parameters() if p.ndim > 1}
    dead = dead_channels(model, graph, group, live, observe_spans(model, graph, [x[: len(x) // 2], x[len(x) // 2 :]]))
    gone_C = dead.gone_C
    if not bool(gone_C.any()):
        return dead, 0.0
    shift = {key: torch.where(gone_C, value, 0.0) for key, value in dead.shift.items()}
    edit = replace(remove(group, (~gone_C).nonzero().flatten()), shift=shift)
    narrow = copy.deepcopy(model)
    apply(narrow, graph, edit)
    with probing(model), probing(narrow):
        before, after = model(x), narrow(x)
    return dead, float((after - before).abs().max() / before.abs().max())


def which(mask_C: Tensor) -> list[int]:
    return mask_C.nonzero().flatten().tolist()


def test_unread_and_silent_units_of_a_perceptron() -> None:
    """GELU makes of a silent unit another constant than its bias."""
    net = seeded(nn.Sequential(nn.Linear(5, 8), nn.GELU(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3)))
    silence(net[0].weight, [1, 3])  # pyright: ignore
    silence(net[2].weight, [2], [5])  # pyright: ignore
    x = draw(16, 5)
    dead, error = cut(net, x, "0")
    assert (which(dead.unread_C), which(dead.silent_C), which(dead.constant_C)) == ([5], [1, 3], [1, 3])
    expected = F.gelu(net[0].bias.detach())  # pyright: ignore
    torch.testing.assert_close(dead.shift["2.weight", 1][[1, 3]], expected[[1, 3]], rtol=0, atol=1e-15)
    assert error <= 1e-12


class ByKeyword(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(5, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(input=F.relu(self.a(input=x)))


def test_modules_that_are_called_by_keyword() -> None:
    net = ByKeyword()
    seeded(net)
    silence(net.a.weight, [1, 3])
    dead, error = cut(net, draw(16, 5), "a")
    assert which(dead.constant_C) == [1, 3]
    assert error <= 1e-12


class Convolutions(nn.Module):
    def __init__(self, padding: int, mode: str = "zeros", *, bias: bool = True) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 8, 3, padding=1)
        self.b = nn.Conv2d(8, 6, 3, padding=padding, padding_mode=mode, bias=bias)
        self.norm, self.c = nn.BatchNorm2d(6), nn.Conv2d(6, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(F.relu(self.norm(self.b(F.relu(self.a(x))))))


def convolutions(padding: int, mode: str = "zeros", *, bias: bool = True) -> Convolutions:
    """Channels 1 and 2 of the first are silent: a constant above zero, and one that the ReLU makes zero."""
    net = Convolutions(padding, mode, bias=bias)
    seeded(net)
    silence(net.a.weight, [1, 2])
    with torch.no_grad():
        net.a.bias[1], net.a.bias[2] = 1.0, -1.0
    return net


def test_an_unpadded_convolution_takes_a_constant_over() -> None:
    dead, error = cut(convolutions(0), draw(4, 3, 7, 7), "a")
    assert which(dead.constant_C) == [1, 2]
    assert float(dead.shift["b.weight", 1][1]) == 1.0
    assert error <= 1e-12


@pytest.mark.parametrize("net", [convolutions(1), convolutions(1, "reflect"), convolutions(0, bias=False)])
def test_a_constant_that_a_border_or_a_missing_bias_keeps_in_place(net: Convolutions) -> None:
    """Only the channel that is zero goes; the other is stuck until it is zero too."""
    x = draw(4, 3, 7, 7)
    dead, error = cut(net, x, "a")
    assert (which(dead.constant_C), which(dead.stuck_C)) == ([2], [1])
    assert error <= 1e-12
    with torch.no_grad():
        net.a.bias[1] = 0.0
    dead, error = cut(net, x, "a")
    assert (which(dead.constant_C), which(dead.stuck_C)) == ([1, 2], [])
    assert error <= 1e-12


def test_a_silent_channel_is_what_batch_norm_makes_of_it() -> None:
    net = convolutions(1)
    silence(net.b.weight, [3, 4])
    with torch.no_grad():
        net.norm.bias[3] = 0.7
    dead, error = cut(net, draw(4, 3, 7, 7), "b")
    assert which(dead.constant_C) == [3, 4]
    torch.testing.assert_close(dead.shift["c.weight", 1][3], net.norm.bias[3].detach(), rtol=0, atol=1e-7)
    assert error <= 1e-9


class Stream(nn.Module):
    """A residual stream with three writers and three readers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(4, 8), nn.Linear(8, 2)
        self.a, self.b, self.c, self.d = nn.Linear(8, 6), nn.Linear(6, 8), nn.Linear(8, 6), nn.Linear(6, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.b(F.relu(self.a(x)))
        return self.head(x + self.d(F.relu(self.c(x))))


def test_a_channel_of_a_residual_stream_is_silent_only_when_every_writer_is() -> None:
    """Its constant is another one at each depth."""
    net = Stream()
    seeded(net)
    silence(net.stem.weight, [0, 1, 2])
    silence(net.b.weight, [0, 1])
    silence(net.d.weight, [0])
    dead, error = cut(net, draw(16, 4), "stem")
    assert which(dead.silent_C) == which(dead.constant_C) == [0]
    biases = [float(layer.bias.detach()[0]) for layer in (net.stem, net.b, net.d)]
    at = [float(dead.shift[f"{name}.weight", 1][0]) for name in ("a", "c", "head")]
    assert at == pytest.approx([biases[0], biases[0] + biases[1], sum(biases)])
    assert error <= 1e-12


class Tied(nn.Module):
    """One matrix reads two sources, whose silent units are different constants."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.i, self.j, self.a = nn.Linear(4, 8), nn.Linear(4, 8), nn.Linear(8, 5)
        if how == "two modules":
            self.b = nn.Linear(8, 5)
            self.b.weight = self.a.weight
        self.head = nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        left, right = F.relu(self.i(x)), F.relu(self.j(x))
        if self.how == "a function":
            return self.head(F.relu(self.a(left)) + F.relu(F.linear(right, self.a.weight)))
        return self.head(F.relu(self.a(left)) + F.relu((self.b if self.how == "two modules" else self.a)(right)))


@pytest.mark.parametrize("how", ["two modules", "a function", "two calls"])
def test_readers_of_one_weight_at_several_places(how: str) -> None:
    """One bias cannot take over what two places read; equal constants of one module that is called twice it can."""
    net = Tied(how)
    seeded(net)
    silence(net.i.weight, [0, 1])
    silence(net.j.weight, [0, 1])
    with torch.no_grad():
        net.i.bias[:2] = 1.0
        net.j.bias[:2] = torch.tensor([2.0, 1.0])
    dead, error = cut(net, draw(16, 4), "i")
    assert which(dead.silent_C) == [0, 1]
    assert which(dead.constant_C) == ([1] if how == "two calls" else [])
    assert error <= 1e-12


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.gate, self.down = nn.Linear(4, 8), nn.Linear(4, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x) * torch.sigmoid(self.gate(x)))


def test_a_gated_unit_is_silent_when_both_of_its_halves_are() -> None:
    net = Gated()
    seeded(net)
    silence(net.up.weight, [0, 1])
    silence(net.gate.weight, [1, 2])
    dead, error = cut(net, draw(16, 4), "up")
    assert which(dead.constant_C) == [1]
    assert error <= 1e-12


class Transposed(nn.Module):
    def __init__(self, depthwise: bool) -> None:
        super().__init__()
        self.a, self.c = nn.Conv2d(3, 8, 1), nn.Conv2d(8 if depthwise else 6, 4, 1)
        self.b = nn.Conv2d(8, 8, 3, padding=1, groups=8) if depthwise else nn.ConvTranspose2d(8, 6, 2, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(F.relu(self.b(F.relu(self.a(x)))))


def test_a_transposed_convolution_reads_along_its_rows() -> None:
    net = Transposed(False)
    seeded(net)
    silence(net.a.weight, [0, 1])
    silence(net.b.weight, [2], [1])
    with torch.no_grad():
        net.a.bias[:2] = torch.tensor([1.0, -1.0])
    dead, error = cut(net, draw(4, 3, 6, 6), "a")
    assert (which(dead.unread_C), which(dead.constant_C), which(dead.stuck_C)) == ([2], [1], [0])
    assert error <= 1e-12
    dead, error = cut(net, draw(4, 3, 6, 6), "b")
    assert which(dead.constant_C) == [1]
    assert error <= 1e-12


def test_a_channel_that_a_depthwise_kernel_makes_constant_is_silent() -> None:
    net = Transposed(True)
    seeded(net)
    silence(net.a.weight, [0, 1])
    silence(net.b.weight, [1, 2])
    with torch.no_grad():
        net.a.bias[0], net.b.weight[0], net.b.bias[0] = 1.0, 1.0, 1.0
    dead, error = cut(net, draw(4, 3, 6, 6), "a")
    assert (which(dead.constant_C), which(dead.stuck_C)) == ([1, 2], [0])
    assert error <= 1e-12


class Concatenated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 3, padding=1)
        self.c, self.head = nn.Conv2d(8, 4, 1), nn.Linear(4 * 9, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.c(torch.cat([F.relu(self.a(x)), F.relu(self.b(x))], 1))).flatten(1))


@pytest.mark.parametrize(("name", "rows"), [("a", [0, 1]), ("b", [2]), ("c", [3])])
def test_branches_that_are_put_together_and_maps_that_are_laid_out(name: str, rows: list[int]) -> None:
    net = Concatenated()
    seeded(net)
    silence(getattr(net, name).weight, rows)
    dead, error = cut(net, draw(4, 3, 3, 3), name)
    assert which(dead.constant_C) == rows
    assert error <= 1e-12


def test_channels_of_attention_heads_go_when_all_that_makes_them_is_zero() -> None:
    """Channels 0 to 3 of each of two heads are queries with keys, then values; a bias that is left holds them."""
    net: Any = seeded(nn.Sequential(nn.Linear(8, 8), Block(8, 2, 16, causal=False), nn.Linear(8, 2)))
    rows, x = [0, 4, 8, 12, 16, 20], draw(4, 5, 8)
    silence(net[1].attn.qkv.weight, rows)
    silence(net[1].attn.proj.weight, [], [0, 4])
    assert which(cut(net, x, "1.attn.qkv")[0].gone_C) == []
    with torch.no_grad():
        net[1].attn.qkv.bias[rows] = 0
    dead, error = cut(net, x, "1.attn.qkv")
    assert which(dead.gone_C) == [0, 4, 8, 12]
    assert error <= 1e-12
