"""Forwards that write sizes or positions down, or that treat channels unequally: no admitted edit may be wrong, and a
refusal says where in the user's code it comes from."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from weightfold.graph import exactness
from weightfold.graph.group import ChannelGraph
from weightfold.graph.resize import with_sizes
from weightfold.graph.trace import trace

TOLERANCE = 1e-9
SIZED = {"remove", "merge"}
ALL = {"permute", "remove", "merge"}


class Net(nn.Module):
    """Two layers with something awkward in between."""

    def __init__(self, *, width: int = 8, into: int = 8, images: bool = True) -> None:
        super().__init__()
        make = (lambda a, b: nn.Conv2d(a, b, 3, padding=1)) if images else nn.Linear
        self.one, self.two = make(3, width), make(into, 4)


class WrittenView(Net):
    def __init__(self) -> None:
        super().__init__(width=8, into=128, images=False)
        self.one = nn.Conv2d(3, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.two(F.relu(self.one(x)).view(-1, 128))


class WrittenSlice(Net):
    def forward(self, x: Tensor) -> Tensor:
        x = self.one(x)
        return self.two(torch.cat([F.relu(x[:, :3]), torch.tanh(x[:, 3:])], 1))


class WrittenPrefix(Net):
    """Only a written-down part of the channels is used."""

    def __init__(self) -> None:
        super().__init__(into=5)

    def forward(self, x: Tensor) -> Tensor:
        return self.two(F.relu(self.one(x))[:, :5])


class WrittenSplit(Net):
    def __init__(self) -> None:
        super().__init__(into=4)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.one(x).split([4, 4], 1)
        return self.two(a * torch.sigmoid(b))


class PickedGates(nn.Module):
    """Gates taken one by one from the channels of a small layer."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.gate, self.two = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(3, 2, 1), nn.Conv2d(6, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        g = torch.sigmoid(self.gate(x))
        y = self.one(x)
        return self.two(F.relu(y) * g[:, 0:1] + torch.tanh(y) * g[:, 1:2])


class ChannelAttention(Net):
    """A map of where, from mean and maximum over the channels."""

    def __init__(self) -> None:
        super().__init__()
        self.where = nn.Conv2d(2, 1, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.one(x))
        seen = torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], 1)
        return self.two(x * torch.sigmoid(self.where(seen)))


class SoftmaxOverChannels(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.two(torch.softmax(self.one(x), 1))


class FlipAdd(Net):
    def forward(self, x: Tensor) -> Tensor:
        x = self.one(x)
        return self.two(F.relu(x + x.flip(1)))


class Rolled(Net):
    def forward(self, x: Tensor) -> Tensor:
        x = self.one(x)
        return self.two(F.relu(x + torch.roll(x, 1, 1)))


class TwoHalves(Net):
    def forward(self, x: Tensor) -> Tensor:
        a, b = self.one(x).chunk(2, 1)
        return self.two(torch.cat([F.relu(a), torch.tanh(b)], 1))


class ConvOverChannels(Net):
    """Efficient channel attention: a kernel slides over the channels."""

    def __init__(self) -> None:
        super().__init__()
        self.slide = nn.Conv1d(1, 1, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.one(x))
        y = self.slide(x.mean((2, 3)).unsqueeze(1)).squeeze(1)
        return self.two(x * torch.sigmoid(y)[:, :, None, None])


class WeightStandardised(Net):
    def __init__(self) -> None:
        super().__init__()
        self.mid = nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        w = self.mid.weight
        w = (w - w.mean((1, 2, 3), keepdim=True)) / (w.var((1, 2, 3), keepdim=True) + 1e-5).sqrt()
        x = F.relu(self.one(x))
        return self.two(F.relu(F.conv2d(x, w, self.mid.bias, padding=1)))


class ChannelConstants(Net):
    def forward(self, x: Tensor) -> Tensor:
        x = self.one(x)
        return self.two(F.relu(x + 0.1 * torch.arange(x.shape[1]).to(x)[:, None, None]))


class SizeInScale(Net):
    """The width sets a constant: 1 / sqrt(C)."""

    def __init__(self) -> None:
        super().__init__(images=False)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.one(x))
        return self.two(x / x.shape[-1] ** 0.5)


class MeanOverChannels(Net):
    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.one(x))
        return self.two(x - x.mean(1, keepdim=True))


class Interleaved(Net):
    """Even and odd channels go different ways."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.one(x)
        y = torch.stack([F.relu(x[:, 0::2]), torch.tanh(x[:, 1::2])], 2)
        return self.two(y.flatten(1, 2))


class Shuffled(Net):
    """A channel shuffle by a view with a written-down number of groups, then a grouped convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.mid = nn.Conv2d(8, 8, 3, padding=1, groups=2)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.one(x))
        x = x.unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2)
        return self.two(F.relu(self.mid(x)))


class Sorted(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.one(x).sort(1).values)


class OneHotChannel(Net):
    """A single channel is picked out and scales all."""

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.one(x))
        return self.two(x * x[:, 2:3])


class SelfGram(Net):
    """The channels are multiplied with each other over space."""

    def __init__(self) -> None:
        super().__init__(into=8, images=False)
        self.one = nn.Conv2d(3, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.one(x).flatten(2)
        return self.two(x @ x.transpose(1, 2))


class Buffered(Net):
    """A table of the channels' length, kept as a buffer that is not saved."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.linspace(0.5, 1.5, 8)[:, None, None], persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.two(F.relu(self.one(x)) * self.table)


class Parity(Net):
    """Even channels first, then odd ones: taking any but the last channel away moves the others."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.one(x)
        return self.two(F.relu(torch.cat([x[:, ::2], x[:, 1::2]], 1)))


class Joined(Net):
    """One weight made of two parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.w1, self.w2 = nn.Parameter(torch.randn(4, 8, 1, 1)), nn.Parameter(torch.randn(4, 8, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.two(F.relu(F.conv2d(F.relu(self.one(x)), torch.cat([self.w1, self.w2]))))


class Symmetric(Net):
    """A weight and its transpose, added up: each of its dimensions reads and writes."""

    def __init__(self) -> None:
        super().__init__(images=False)
        self.w = nn.Parameter(torch.randn(8, 8))

    def forward(self, x: Tensor) -> Tensor:
        return self.two(F.relu(F.relu(self.one(x)) @ (self.w + self.w.t())))


class Largest(Net):
    """The larger of two layers, one homogeneous, the other odd: neither symmetry is left."""

    def __init__(self) -> None:
        super().__init__(images=False)
        self.other = nn.Linear(3, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.two(torch.stack([F.relu(self.one(x)), torch.tanh(self.other(x))]).amax(0))


class WithItself(nn.Module):
    """Queries are keys: the square of a sum is no sum of squares."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(3, 8), nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        q = self.one(x)
        return self.two(torch.softmax(q @ q.transpose(1, 2), -1))


class Maxout(Net):
    """Pairs of neighbours compete."""

    def __init__(self) -> None:
        super().__init__(into=4)

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.one(x).unflatten(1, (-1, 2)).amax(2))


class LastButOne(Net):
    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.one(x))
        return self.two(x * torch.sigmoid(x[:, -2:-1]))


class Concatenated(Net):
    """Both signs of every channel."""

    def __init__(self) -> None:
        super().__init__(into=16)

    def forward(self, x: Tensor) -> Tensor:
        x = self.one(x)
        return self.two(F.relu(torch.cat([x, -x], 1)))


IMAGES, ROWS = (2, 3, 4, 4), (5, 3)

REFUSALS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], str, set[str], str]] = {
    # build, input, group (or tensor that is frozen), what must be refused, words of the line that is named
    "view": (WrittenView, IMAGES, "one", SIZED, "view(-1, 128)"),
    "slices": (WrittenSlice, IMAGES, "one", SIZED, "x[:, :3]"),
    "prefix": (WrittenPrefix, IMAGES, "one", SIZED, "[:, :5]"),
    "split": (WrittenSplit, IMAGES, "one", SIZED, "split([4, 4], 1)"),
    "gates": (PickedGates, IMAGES, "gate", ALL, "g[:, 0:1]"),
    "channel attention": (ChannelAttention, IMAGES, "one", SIZED, "x.mean(1, keepdim=True)"),
    "softmax": (SoftmaxOverChannels, IMAGES, "one", SIZED, "torch.softmax"),
    "convolution over channels": (ConvOverChannels, IMAGES, "one", ALL, "self.slide("),
    "weight standardisation": (WeightStandardised, IMAGES, "one", SIZED, "w.mean((1, 2, 3)"),
    "constants": (ChannelConstants, IMAGES, "one", ALL, "torch.arange"),
    "scale": (SizeInScale, ROWS, "one", SIZED, ""),
    "mean": (MeanOverChannels, IMAGES, "one", SIZED, "x.mean(1, keepdim=True)"),
    "sorted": (Sorted, IMAGES, "one", ALL, "sort(1)"),
    "one channel": (OneHotChannel, IMAGES, "one", SIZED, ""),
    "table": (Buffered, IMAGES, "one", ALL, "self.table"),
    "flip": (FlipAdd, IMAGES, "", set(), ""),
    "roll": (Rolled, IMAGES, "one", SIZED, ""),
    "halves": (TwoHalves, IMAGES, "", set(), ""),
    "interleaved": (Interleaved, IMAGES, "", set(), ""),
    "shuffle": (Shuffled, IMAGES, "", set(), ""),
    "gram": (SelfGram, IMAGES, "one", SIZED, ""),
    "parity": (Parity, IMAGES, "one", SIZED, ""),
    "joined weights": (Joined, IMAGES, "", set(), ""),
    "symmetric weight": (Symmetric, ROWS, "one", {"merge"}, ""),
    "largest": (Largest, ROWS, "one", {"rescale", "sign"}, ""),
    "with itself": (WithItself, (4, 5, 3), "one", {"merge"}, ""),
    "maxout": (Maxout, IMAGES, "", set(), ""),
    "last but one": (LastButOne, IMAGES, "one", SIZED, ""),
    "both signs": (Concatenated, IMAGES, "", set(), ""),
}


def built(name: str) -> tuple[nn.Module, Tensor, ChannelGraph]:
    torch.manual_seed(4)
    build, shape, *_ = REFUSALS[name]
    model, example = build().double().eval(), torch.randn(shape, dtype=torch.float64)
    return model, example, with_sizes(model, example, trace(model, example))


@pytest.mark.parametrize("name", list(REFUSALS))
def test_no_admitted_edit_is_wrong(name: str) -> None:
    model, example, graph = built(name)
    generator = torch.Generator().manual_seed(5)
    with exactness.float64():
        for group in graph:
            checks = [*exactness.check_group(model, graph, group.name, example, generator)]
            for check in (*checks, *exactness.check_cuts(model, graph, group.name, example)):
                assert not check.problem, f"{check.group}, {check.kind}: {check.problem}"
                assert check.error <= TOLERANCE, f"{check.group}, {check.kind}: relative error {check.error:.2e}"


@pytest.mark.parametrize("name", [n for n, row in REFUSALS.items() if row[2]])
def test_what_cannot_be_edited_is_refused_with_its_line(name: str) -> None:
    _, _, where, refused, words = REFUSALS[name]
    _, _, graph = built(name)
    group = next((g for g in graph if g.name == where), None)
    if group is None:
        reasons = {f.reason for f in graph.frozen if f.tensor == f"{where}.weight" and f.dim == 0}
    else:
        assert not refused & group.admits
        reasons = {group.reasons[kind] for kind in refused if kind in group.reasons}
    assert reasons or refused <= {"rescale", "sign"}
    for reason in reasons if words else ():
        assert __file__.rpartition("/")[2] in reason
        assert words in reason
        assert any(f".py:{n}:" in reason for n in range(1, 400))
