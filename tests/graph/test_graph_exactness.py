"""Every admitted edit is exact, on small networks of many designs, in float64; what should be free is free.

The reference is the network itself: a random symmetry, the removal of a planted dead channel, the merging of planted
duplicates and a split must leave the output alone up to rounding (`weightfold.graph.exactness`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from weightfold.graph import exactness
from weightfold.graph.group import ChannelGraph
from weightfold.graph.resize import with_sizes
from weightfold.graph.trace import trace

TOLERANCE = 1e-9


@dataclass(frozen=True)
class Case:
    """A network, its input, the groups that admit removal and merging, and those that only admit symmetries."""

    build: Callable[[], nn.Module]
    example: Callable[[], Tensor | tuple]
    foldable: str
    symmetric: str = ""
    removable: str = ""


def images(channels: int = 3, size: int = 8) -> Callable[[], Tensor]:
    return lambda: torch.randn(2, channels, size, size)


def tokens(width: int = 6, length: int = 5) -> Callable[[], Tensor]:
    return lambda: torch.randn(2, length, width)


def ids() -> Tensor:
    return torch.randint(0, 11, (2, 5))


def conv(into: int, out: int, kernel: int = 3, **settings: int) -> nn.Conv2d:
    return nn.Conv2d(into, out, kernel, padding=kernel // 2, **settings)


# convolutions ---------------------------------------------------------------------------------------------------------


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.n0 = conv(3, 6), nn.BatchNorm2d(6)
        self.c1, self.n1, self.c2, self.n2 = conv(6, 8), nn.BatchNorm2d(8), conv(8, 6), nn.BatchNorm2d(6)
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.n0(self.stem(x)))
        x = F.relu(x + self.n2(self.c2(F.relu(self.n1(self.c1(x))))))
        return self.head(x.mean((2, 3)))


class Inverted(nn.Module):
    """A depthwise convolution between an expansion and a projection."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.n1 = conv(3, 10, 1), nn.BatchNorm2d(10)
        self.deep, self.n2 = conv(10, 10, groups=10), nn.BatchNorm2d(10)
        self.down, self.head = conv(10, 6, 1), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu6(self.n1(self.up(x)))
        x = F.relu6(self.n2(self.deep(x)))
        return self.head(self.down(x).mean((2, 3)))


class Grouped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.c1, self.c2, self.c3 = conv(3, 12), conv(12, 8, groups=4), conv(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.c3(F.relu(self.c2(F.relu(self.c1(x))))).mean((2, 3))


class Transposed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Conv2d(3, 6, 2, stride=2)
        self.up = nn.ConvTranspose2d(6, 7, 2, stride=2)
        self.out = conv(7, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.relu(self.up(F.relu(self.down(x)))))


class Dense(nn.Module):
    """Each layer reads the concatenation of all before it."""

    def __init__(self) -> None:
        super().__init__()
        self.c0, self.n1, self.c1 = conv(3, 5), nn.BatchNorm2d(5), conv(5, 4)
        self.n2, self.c2, self.head = nn.BatchNorm2d(9), conv(9, 6), nn.Linear(15, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.c0(x)
        x = torch.cat([x, self.c1(F.relu(self.n1(x)))], 1)
        x = torch.cat([x, self.c2(F.relu(self.n2(x)))], 1)
        return self.head(x.mean((2, 3)))


class SqueezeExcite(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.c1, self.n1 = conv(3, 8), nn.BatchNorm2d(8)
        self.squeeze, self.excite = conv(8, 5, 1), conv(5, 8, 1)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.silu(self.n1(self.c1(x)))
        x = x * torch.sigmoid(self.excite(F.relu(self.squeeze(x.mean((2, 3), keepdim=True)))))
        return self.head(x.mean((2, 3)))


class SubPixel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.c1, self.c2, self.c3 = conv(3, 6), conv(6, 20), conv(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.c3(F.relu(F.pixel_shuffle(self.c2(F.relu(self.c1(x))), 2)))


class Flat(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.c1, self.c2 = conv(3, 6), conv(6, 8)
        self.fc1, self.fc2 = nn.Linear(8 * 16, 9), nn.Linear(9, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.c2(F.relu(self.c1(x)))), 2)
        return self.fc2(F.relu(self.fc1(x.flatten(1))))


class GroupNormed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.c1, self.n1, self.c2, self.c3 = conv(3, 8), nn.GroupNorm(4, 8), conv(8, 6), conv(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.c3(F.relu(self.c2(F.silu(self.n1(self.c1(x)))))).mean((2, 3))


class Shortcut(nn.Module):
    """Shortcuts of type A: every other pixel, new channels filled with zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.c0, self.n0 = conv(3, 4), nn.BatchNorm2d(4)
        self.c1, self.n1 = conv(4, 8, stride=2), nn.BatchNorm2d(8)
        self.c2, self.n2 = conv(8, 8), nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.n0(self.c0(x)))
        y = self.n2(self.c2(F.relu(self.n1(self.c1(x)))))
        return self.head(F.relu(y + F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 2, 2))).mean((2, 3)))


class UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.d1, self.d2, self.mid = conv(3, 5), conv(5, 7), conv(7, 9)
        self.up1, self.u1 = nn.ConvTranspose2d(9, 6, 2, stride=2), conv(13, 8)
        self.up2, self.u2, self.out = nn.ConvTranspose2d(8, 4, 2, stride=2), conv(9, 5), conv(5, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        a = F.relu(self.d1(x))
        b = F.relu(self.d2(F.max_pool2d(a, 2)))
        x = F.relu(self.mid(F.max_pool2d(b, 2)))
        x = F.relu(self.u1(torch.cat([self.up1(x), b], 1)))
        return self.out(F.relu(self.u2(torch.cat([self.up2(x), a], 1))))


# layers without space -------------------------------------------------------------------------------------------------


class ChunkGlu(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 16), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.up(x).chunk(2, -1)
        return self.down(F.gelu(a) * b)


class SwiGlu(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(6, 9, False), nn.Linear(6, 9, False), nn.Linear(9, 4, False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Normed(nn.Module):
    """Pre-norm residual MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.norm = nn.Linear(6, 8), nn.LayerNorm(8)
        self.up, self.down, self.out = nn.Linear(8, 11), nn.Linear(11, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.into(x)
        return self.out(x + self.down(F.gelu(self.up(self.norm(x)))))


class WeightNormed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.utils.parametrizations.weight_norm(nn.Linear(6, 9))
        self.fc2 = nn.Linear(9, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.relu(self.fc1(x)))


class Scan(nn.Module):
    """A recurrent module and a head on its last state in time."""

    def __init__(self, kind: type[nn.RNNBase], **settings: object) -> None:
        super().__init__()
        self.rnn = kind(6, 7, batch_first=True, **settings)  # pyright: ignore
        with torch.no_grad():
            width = self.rnn(torch.zeros(1, 1, 6))[0].shape[-1]
        self.out = nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.rnn(x)[0].mean(1))


# attention ------------------------------------------------------------------------------------------------------------


class Attention(nn.Module):
    def __init__(self, *, heads: int = 3, kv_heads: int = 3, fused: bool = True) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.fused, self.head_dim = heads, kv_heads, fused, 4
        self.q = nn.Linear(6, heads * 4)
        self.k, self.v = nn.Linear(6, kv_heads * 4), nn.Linear(6, kv_heads * 4)
        self.o, self.out = nn.Linear(heads * 4, 6), nn.Linear(6, 4)

    def split(self, x: Tensor, heads: int) -> Tensor:
        return x.view(x.shape[0], x.shape[1], heads, -1).transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.split(self.q(x), self.heads), *(self.split(f(x), self.kv_heads) for f in (self.k, self.v))
        k, v = (t.repeat_interleave(self.heads // self.kv_heads, 1) for t in (k, v))
        if self.fused:
            y = F.scaled_dot_product_attention(q, k, v)
        else:
            y = torch.softmax(q @ k.transpose(-2, -1) / self.head_dim**0.5, -1) @ v
        return self.out(self.o(y.transpose(1, 2).flatten(2)))


class Rotary(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.n_heads = 3
        self.q, self.k, self.v, self.o = (nn.Linear(6, 12), nn.Linear(6, 12), nn.Linear(6, 12), nn.Linear(12, 4))
        angle = torch.outer(torch.arange(5.0), torch.tensor([1.0, 0.1]))
        self.register_buffer("cos", torch.cat([angle, angle], -1).cos(), persistent=False)
        self.register_buffer("sin", torch.cat([angle, angle], -1).sin(), persistent=False)

    def turned(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, -1)
        return x * self.cos + torch.cat([-b, a], -1) * self.sin

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (self.n_heads, -1)).transpose(1, 2) for f in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(self.turned(q), self.turned(k), v, is_causal=True)
        return self.o(y.transpose(1, 2).flatten(2))


class Cross(nn.Module):
    """Two inputs: one asks, the other is read."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = 2
        self.q, self.k, self.v, self.o = (nn.Linear(6, 8), nn.Linear(5, 8), nn.Linear(5, 10), nn.Linear(10, 4))

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        q, k, v = (
            t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (self.q(x), self.k(memory), self.v(memory))
        )
        y = torch.softmax(q @ k.transpose(-2, -1) * 0.4, -1) @ v
        return self.o(y.transpose(1, 2).flatten(2))


class TiedLm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm, self.head = nn.Embedding(11, 8), nn.LayerNorm(8), nn.Linear(8, 11, bias=False)
        self.up, self.down = nn.Linear(8, 9), nn.Linear(9, 8)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        return self.head(self.norm(x + self.down(torch.tanh(self.up(x)))))


def cross_example() -> tuple:
    return torch.randn(2, 5, 6), torch.randn(2, 3, 5)


CASES: dict[str, Case] = {
    "residual": Case(Residual, images(), "stem c1"),
    "depthwise": Case(Inverted, images(), "up down"),
    "grouped": Case(Grouped, images(), "c1 c1.blocks c2"),
    "transposed": Case(Transposed, images(), "down up"),
    "dense": Case(Dense, images(), "c0 c1 c2"),
    "squeeze_excite": Case(SqueezeExcite, images(), "c1 squeeze"),
    "pixel_shuffle": Case(SubPixel, images(), "c1 c2"),
    "flatten": Case(Flat, images(), "c1 c2 fc1"),
    "group_norm": Case(GroupNormed, images(), "c1.blocks c2", "c1"),
    "shortcut_a": Case(Shortcut, images(), "c0 c1", "c2"),
    "unet": Case(UNet, images(), "d1 d2 mid up1 u1 up2 u2"),
    "chunk_glu": Case(ChunkGlu, tokens(), "up"),
    "swiglu": Case(SwiGlu, tokens(), "gate"),
    "layer_norm": Case(Normed, tokens(), "up", "into"),
    "weight_norm": Case(WeightNormed, tokens(), "fc1"),
    "lstm": Case(lambda: Scan(nn.LSTM), tokens(), "rnn.weight_ih_l0"),
    "gru": Case(lambda: Scan(nn.GRU), tokens(), "rnn.weight_ih_l0"),
    "rnn": Case(lambda: Scan(nn.RNN), tokens(), "rnn.weight_ih_l0"),
    "rnn_relu": Case(lambda: Scan(nn.RNN, nonlinearity="relu"), tokens(), "rnn.weight_ih_l0"),
    "lstm_two_layers": Case(lambda: Scan(nn.LSTM, num_layers=2), tokens(), "rnn.weight_ih_l0"),
    "gru_bidirectional": Case(lambda: Scan(nn.GRU, bidirectional=True), tokens(), "rnn.weight_ih_l0"),
    "lstm_projected": Case(lambda: Scan(nn.LSTM, proj_size=5), tokens(), "rnn.weight_ih_l0 rnn.weight_hr_l0"),
    "attention_fused": Case(Attention, tokens(), "v o q.blocks", "q"),
    "attention_by_hand": Case(lambda: Attention(fused=False), tokens(), "q v o q.blocks"),
    "grouped_queries": Case(lambda: Attention(heads=4, kv_heads=2), tokens(), "v o q.blocks", "q"),
    "rotary": Case(Rotary, tokens(), "v q.blocks"),
    "cross_attention": Case(Cross, cross_example, "q v q.blocks"),
    "tied_embedding": Case(TiedLm, ids, "up", "down"),
}


def built(case: Case) -> tuple[nn.Module, Tensor | tuple, ChannelGraph]:
    """The network in eval mode with every parameter and statistic away from zero and one, in float64."""
    torch.manual_seed(11)
    model = case.build().eval()
    with torch.no_grad():
        for tensor in (*model.parameters(), *(b for b in model.buffers() if b.is_floating_point())):
            tensor.add_(0.2 * torch.rand_like(tensor))
    example = case.example()
    graph = with_sizes(model, example, trace(model, example))
    model.double()
    double = lambda t: t.double() if t.is_floating_point() else t  # noqa: E731
    example = tuple(map(double, example)) if isinstance(example, tuple) else double(example)
    return model, example, graph


@pytest.mark.filterwarnings("ignore:LSTM with projections")
@pytest.mark.parametrize(
    "name",
    list(CASES),
)
def test_admitted_edits_are_exact_and_what_should_be_free_is_free(name: str) -> None:
    case = CASES[name]
    model, example, graph = built(case)
    generator = torch.Generator().manual_seed(5)
    kinds = set()
    with exactness.float64():
        for group in graph:
            for check in exactness.check_group(model, graph, group.name, example, generator):
                kinds.add((group.name, check.kind))
                assert not check.problem, f"{check.group}, {check.kind}: {check.problem}"
                assert check.error <= TOLERANCE, f"{check.group}, {check.kind}: relative error {check.error:.2e}"
    foldable = {g.name for g in graph if {"permute", "remove", "merge"} <= g.admits}
    removable = {g.name for g in graph if {"permute", "remove"} <= g.admits} - foldable
    symmetric = {g.name for g in graph if g.free} - foldable - removable
    assert foldable == set(case.foldable.split())
    assert removable == set(case.removable.split())
    assert symmetric == set(case.symmetric.split())
    assert {(n, "merge") for n in foldable} <= kinds
