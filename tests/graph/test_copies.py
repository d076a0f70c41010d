"""Edits upon edits: groups that overlap copied channels, or copied blocks, are followed: the next edit is exact.

The reference is the network's own output before the edits, in float64.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from weightfold.graph import edit as edits
from weightfold.graph.apply import apply
from weightfold.graph.edit import Edit
from weightfold.graph.group import ChannelGroup
from weightfold.graph.trace import trace


class Heads(nn.Module):
    """Attention of three heads with a scale that does not follow their width."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = nn.Linear(5, 6), nn.Linear(5, 6), nn.Linear(5, 6), nn.Linear(6, 4)
        self.heads = 3

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        q, k, v = (m(x).view(b, t, self.heads, -1).transpose(1, 2) for m in (self.q, self.k, self.v))
        return self.o((0.5 * q @ k.mT).softmax(-1).matmul(v).transpose(1, 2).reshape(b, t, -1))


class FusedHeads(nn.Module):
    """The same with one projection for queries, keys and values."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.o, self.heads = nn.Linear(5, 18), nn.Linear(6, 4), 3

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        q, k, v = self.qkv(x).view(b, t, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        return self.o((0.5 * q @ k.mT).softmax(-1).matmul(v).transpose(1, 2).reshape(b, t, -1))


class Groups(nn.Module):
    """A grouped convolution behind a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.mid, self.two = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 9, 3, groups=3), nn.Conv2d(9, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.two(F.relu(self.mid(F.relu(self.one(x)))))


def images() -> Tensor:
    return torch.randn(2, 3, 5, 5, dtype=torch.float64)


def tokens() -> Tensor:
    return torch.randn(2, 4, 5, dtype=torch.float64)


def copied(group: ChannelGroup, generator: torch.Generator) -> Edit:
    """One random channel of every block becomes two."""
    block = torch.zeros(group.n_channels, dtype=torch.long) if group.block is None else group.block
    copies = torch.ones(group.n_channels, dtype=torch.long)
    for b in torch.unique(block):
        mine = (block == b).nonzero().flatten()
        copies[mine[torch.randint(len(mine), (), generator=generator)]] = 2
    shares = torch.rand(int(copies.sum()), generator=generator, dtype=torch.float64) + 0.1
    number = torch.repeat_interleave(torch.arange(group.n_channels), copies)
    total = torch.zeros(group.n_channels, dtype=torch.float64).index_add(0, number, shares)
    return edits.split(group, copies, shares / total[number])


def moved(group: ChannelGroup, generator: torch.Generator) -> Edit | None:
    """A random permutation within blocks, or a random rescale."""
    if group.gauges and torch.rand((), generator=generator) < 0.5 and group.gauges[0].kind == "positive":
        return edits.rescale(group, torch.rand(len(group.gauges[0]), generator=generator) + 0.5, 0)
    if "permute" not in group.admits:
        return None
    block = torch.zeros(group.n_channels, dtype=torch.long) if group.block is None else group.block
    order = torch.arange(group.n_channels)
    for b in torch.unique(block):
        mine = (block == b).nonzero().flatten()
        order[mine] = mine[torch.randperm(len(mine), generator=generator)]
    return edits.permute(group, order)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(("build", "example"), [(Heads, tokens), (FusedHeads, tokens), (Groups, images)])
def test_edits_after_copies_are_exact(build: Callable[[], nn.Module], example: Callable[[], Tensor], seed: int) -> None:
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    net, x = build().double(), example()
    reference = net(x)
    graph = trace(net, x)
    names = [group.name for group in graph]
    kinds = {group.kind for group in graph}
    assert kinds == {"channels", "blocks"}
    for step in range(12):
        group = graph[names[int(torch.randint(len(names), (), generator=generator))]]
        grows = "merge" in group.admits and group.kind == "channels" and step % 3 == 0
        change = copied(group, generator) if grows else moved(group, generator)
        if change is not None:
            graph, _ = apply(net, graph, change)
            torch.testing.assert_close(net(x), reference, rtol=1e-9, atol=1e-9, msg=f"{change.kind} of {group.name}")


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("build", "example"), [(Heads, tokens), (FusedHeads, tokens), (Groups, images)])
def test_channels_inside_copied_blocks_are_copied_with_them(
    build: Callable[[], nn.Module], example: Callable[[], Tensor], seed: int
) -> None:
    """What is traced from the grown network has the same groups as the graph that was followed."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    net, x = build().double(), example()
    reference, graph = net(x), trace(net, x)
    blocks = next(group for group in graph if group.kind == "blocks")
    if "merge" not in blocks.admits:
        change = Edit(blocks.name, "copy", 3, torch.tensor([0, 1, 1, 2]), read=torch.eye(3)[:, [0, 1, 1, 2]].double())
        change.read[1, 1:3] = 0.5
    else:
        change = copied(blocks, generator)
    graph, _ = apply(net, graph, change)
    if hasattr(net, "heads"):
        net.heads = 4
    torch.testing.assert_close(net(x), reference, rtol=1e-9, atol=1e-9)
    again = trace(net, x)
    for group in again:
        assert graph[group.name].n_channels == group.n_channels
    for group in [g for g in graph if g.kind == "channels"]:
        change = moved(group, generator)
        if change is not None:
            graph, _ = apply(net, graph, change)
            torch.testing.assert_close(net(x), reference, rtol=1e-9, atol=1e-9, msg=f"{change.kind} of {group.name}")
