"""Folding whole heads: planted copies go first and leave no trace; the price is the measured error."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import weightfold as wf
from weightfold.compressor import Compressor
from weightfold.graph.apply import apply
from weightfold.graph.group import ChannelGraph
from weightfold.graph.observe import Observer
from weightfold.graph.resize import with_sizes
from weightfold.heads import HeadJob, partner_of
from weightfold.methods.fold import Fold
from weightfold.redundancy import readers_of

HEADS, SIZE, WIDTH = 4, 6, 20


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.heads = HEADS
        self.q, self.k, self.v = (nn.Linear(WIDTH, HEADS * SIZE) for _ in range(3))
        self.out = nn.Linear(HEADS * SIZE, WIDTH)
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in (self.q, self.k, self.v))
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.head((x + self.out(mixed)).mean(1))


def make(*, copies: bool = False) -> Attention:
    torch.manual_seed(1)
    net = Attention().double().eval()
    if copies:
        with torch.no_grad():
            for layer in (net.q, net.k, net.v):
                layer.weight[2 * SIZE : 3 * SIZE] = layer.weight[:SIZE]
                layer.bias[2 * SIZE : 3 * SIZE] = layer.bias[:SIZE]
    return net


X = torch.randn(64, 5, WIDTH, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def job_of(net: Attention, ridge: float = 1e-9) -> tuple[ChannelGraph, HeadJob]:
    graph = with_sizes(net, X[:2], wf.trace(net, X[:2]))
    with Observer(net, graph, max_samples_per_batch=None) as observer, torch.no_grad():
        net(X)
    [(group, inner)] = [(g, p) for g in graph if (p := partner_of(graph, g)) is not None]
    [reader] = readers_of(net, inner, observer.statistics())
    return graph, HeadJob.of(group, inner, reader, ridge)


def test_a_copy_of_a_head_goes_first_and_leaves_no_trace() -> None:
    net = make(copies=True)
    before = net(X)
    graph, job = job_of(net)
    assert int(job.order[0]) in (0, 2)
    keep = job.kept(3)
    assert job.lost_energy(keep) < 1e-8
    graph, _ = apply(net, graph, job.repair(keep))
    assert torch.allclose(net(X), before, atol=1e-7), "the repair alone changes nothing"
    apply(net, graph, job.edit(keep))
    assert (net.q.out_features, net.out.in_features, net.heads) == (3 * SIZE, 3 * SIZE, 3)
    assert torch.allclose(net(X), before, atol=1e-7)


@pytest.mark.parametrize("width", [1, 2, 3])
def test_the_lost_energy_is_the_measured_error(width: int) -> None:
    net = make()
    seen: list[Tensor] = []
    net.out.register_forward_hook(lambda _, __, out: seen.append(out.detach()))
    graph, job = job_of(net)
    seen.clear()
    net(X)
    keep = job.kept(width)
    graph, _ = apply(net, graph, job.repair(keep))
    apply(net, graph, job.edit(keep))
    net(X)
    whole, cut = (part.flatten(0, 1) for part in seen)
    measured = float((whole - cut).square().sum(1).mean() / (whole - whole.mean(0)).square().sum(1).mean())
    assert job.lost_energy(keep) == pytest.approx(measured, rel=1e-6)
    assert job.cost(width) == pytest.approx(measured, rel=1e-4)


def test_elimination_is_no_worse_than_any_single_choice() -> None:
    _, job = job_of(make())
    singles = [job.lost_energy(np.delete(np.arange(HEADS), h)) for h in range(HEADS)]
    assert job.lost_energy(job.kept(3)) == pytest.approx(min(singles))


def test_folding_by_dial_takes_heads_along() -> None:
    net = make(copies=True).float().train()
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
    g = torch.Generator().manual_seed(3)
    data = [(torch.randn(32, 5, WIDTH, generator=g), torch.randint(0, 3, (32,), generator=g)) for _ in range(40)]
    fold = Fold(time_goal=0.3, latency={"0.9": 0.5, "0.1": 0.1})
    compressor = Compressor(
        net, data[0][0][:2], [fold], loss=F.cross_entropy, probe=data[:4], total_steps=40, max_increase=10.0
    )
    compressor.prepare(optimizer)
    for x, y in data:
        F.cross_entropy(net(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
        compressor.step()
    assert net.heads < HEADS
    assert net.out.in_features == net.heads * SIZE
    assert all(event.accepted for event in compressor.events)


def test_heads_that_share_keys_and_values_have_no_partner() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v = nn.Linear(WIDTH, 24), nn.Linear(WIDTH, 12), nn.Linear(WIDTH, 12)
            self.out = nn.Linear(24, WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            q = self.q(x).unflatten(-1, (4, 6)).transpose(1, 2)
            k, v = (f(x).unflatten(-1, (2, 6)).transpose(1, 2).repeat_interleave(2, 1) for f in (self.k, self.v))
            return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    torch.manual_seed(0)
    net = Shared().double()
    graph = wf.trace(net, X[:2])
    assert all(partner_of(graph, group) is None for group in graph)
