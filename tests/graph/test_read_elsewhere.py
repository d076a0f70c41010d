"""A channel whose reading weights are zero is unread only if nothing but weights reads it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import weightfold
from weightfold.lumping import rows_of
from weightfold.quant.dead import dead_channels


class Net(nn.Module):
    """Two layers, and something else that the forward returns."""

    def __init__(self, second: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 10), nn.Linear(10, 3)
        self.second = second

    def forward(self, x: Tensor) -> Any:
        h = F.relu(self.a(x))
        return self.b(h), self.second(h)


def vectors() -> Tensor:
    return torch.randn(4, 6, dtype=torch.float64)


READING: dict[str, Callable[[Tensor], Any]] = {
    "sum": lambda h: h.sum(-1),
    "sum of all": lambda h: h.sum(),
    "sum of squares": lambda h: (h * h).sum(),
    "sum of sizes": lambda h: h.abs().sum(),
    "l1 penalty in a dict": lambda h: {"penalty": [1e-3 * h.abs().sum()]},
    "product with itself, detached": lambda h: (h * h.detach()).sum(-1),
    "similarities": lambda h: h @ h.t(),
    "similarities by einsum": lambda h: torch.einsum("bi,ci->bc", h, h),
    "product with ones": lambda h: h @ torch.ones(h.shape[1], dtype=h.dtype),
    "number of active ones": lambda h: (h > 0).sum(-1),
    "mean": lambda h: h.mean(),
    "norm": lambda h: h.norm(dim=-1),
    "largest": lambda h: h.amax(-1),
    "largest and where": lambda h: h.max(-1),
    "place of the largest": lambda h: h.argmax(-1),
    "place of the smallest": lambda h: h.min(-1).indices,
    "median and where": lambda h: h.median(-1),
    "any": lambda h: (h > 1).any(-1),
    "logsumexp": lambda h: h.logsumexp(-1),
    "variance": lambda h: h.var(-1),
    "product": lambda h: (1 + h).prod(-1),
    "cosine of samples": lambda h: F.cosine_similarity(h, h.flip(0), dim=-1),
    "distance of samples": lambda h: (h - h.flip(0)).square().sum(-1),
    "loss": lambda h: F.mse_loss(h, torch.zeros_like(h), reduction="sum"),
    "smooth loss": lambda h: F.smooth_l1_loss(h, torch.zeros_like(h)),
    "entropy": lambda h: -(h.softmax(-1) * h.log_softmax(-1)).sum(-1),
    "sum over two views": lambda h: h.view(-1, 2, 5).sum((1, 2)),
    "sum of a part": lambda h: h[:, :4].sum(-1),
    "itself": lambda h: h,
}


@pytest.mark.parametrize("name", READING)
def test_no_admitted_edit_changes_what_else_is_returned(graph_of: Callable, name: str) -> None:
    graph_of(Net(READING[name]), vectors(), sizes="view" in name or "part" in name)


SUMS = ["sum", "sum of squares", "number of active ones", "similarities", "product with ones", "distance of samples"]


@pytest.mark.parametrize("name", SUMS)
def test_what_a_sum_reads_is_removable_but_never_unread(graph_of: Callable, name: str) -> None:
    graph = graph_of(Net(READING[name]), vectors(), sizes=False)
    assert {"permute", "remove"} <= graph["a"].admits
    assert graph["a"].read_elsewhere
    net = Net(READING[name]).double()
    with torch.no_grad():
        net.b.weight[:, 4] = 0
        net.a.weight[6], net.a.bias[6] = 0, 0.5
    group = weightfold.trace(net, vectors())["a"]
    dead = dead_channels(net, weightfold.trace(net, vectors()), group, {}, {})
    assert not dead.gone_C.any()
    assert dead.silent_C.tolist() == [c == 6 for c in range(10)]
    assert not rows_of(net, group).unread_C.any()


def test_without_a_second_reader_it_is_unread() -> None:
    net = Net(lambda h: None).double()
    with torch.no_grad():
        net.b.weight[:, 4] = 0
    graph = weightfold.trace(net, vectors())
    assert not graph["a"].read_elsewhere
    assert dead_channels(net, graph, graph["a"], {}, {}).unread_C.tolist() == [c == 4 for c in range(10)]
    assert rows_of(net, graph["a"]).unread_C.tolist() == [c == 4 for c in range(10)]


class Gated(nn.Module):
    """Channels of an image that a squeeze reads as well: by weights."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.gate, self.b = nn.Conv2d(3, 6, 1), nn.Linear(6, 6), nn.Conv2d(6, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.a(x))
        return self.b(h * self.gate(h.mean((2, 3))).sigmoid()[:, :, None, None])


class Statistics(nn.Module):
    """Keeps a running mean of its hidden units."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 10), nn.Linear(10, 3)
        self.register_buffer("total", torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.a(x))
        return self.b(h) * (self.total + h.sum(-1)).sigmoid()[:, None]


class Heads(nn.Module):
    """Attention that also returns the sum of its probabilities over heads, or of its values."""

    def __init__(self, of_values: bool) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(8, 8) for _ in range(4))
        self.of_values = of_values

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        q, k, v = (m(x).view(2, 5, 4, 2).transpose(1, 2) for m in (self.q, self.k, self.v))
        p = (q @ k.transpose(-1, -2)).softmax(-1)
        h = p @ v
        return self.out(h.transpose(1, 2).flatten(2)), h.sum(1) if self.of_values else p.sum(1)


@pytest.mark.parametrize("of_values", [False, True])
def test_heads_that_a_sum_reads(graph_of: Callable, of_values: bool) -> None:
    graph_of(Heads(of_values), torch.randn(2, 5, 8, dtype=torch.float64))


def test_squeezes_and_statistics(graph_of: Callable) -> None:
    graph = graph_of(Gated(), torch.randn(2, 3, 5, 5, dtype=torch.float64), sizes=False)
    assert graph["a"].admits >= {"permute"}
    graph = graph_of(Statistics(), vectors(), sizes=False)
    assert graph["a"].read_elsewhere


class Products(nn.Module):
    """Queries that meet keys; values in the same layer or not; a weight that reads the queries besides or not."""

    def __init__(self, fused: bool, besides: bool) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(8, 3)
        self.qkv, self.head = nn.Linear(6, 24), nn.Linear(8, 3)
        if fused:
            del self.q, self.k, self.v
        else:
            del self.qkv
        if not besides:
            del self.head

    def forward(self, x: Tensor) -> Any:
        q, k, v = self.qkv(x).chunk(3, -1) if "qkv" in self._modules else (self.q(x), self.k(x), self.v(x))
        mixed = self.out((q @ k.t()).softmax(-1) @ v)
        return (mixed, self.head(q)) if "head" in self._modules else mixed


@pytest.mark.parametrize("besides", [False, True])
@pytest.mark.parametrize("fused", [False, True])
def test_what_meets_others_of_its_kind_is_read_by_them(graph_of: Callable, fused: bool, besides: bool) -> None:
    """A query that no weight reads is still read by its key: the probabilities change without it."""
    x = torch.randn(4, 6, dtype=torch.float64)
    graph_of(Products(fused, besides), x, sizes=False)
    net: Any = Products(fused, besides).double()
    if besides:
        with torch.no_grad():
            net.head.weight[:, 4] = 0
    graph = weightfold.trace(net, x)
    [group] = [g for g in graph if g.kind == "channels" and any(a.tensor.startswith("q") for a in g.axes)]
    assert "remove" in group.admits
    assert not dead_channels(net, graph, group, {}, {}).gone_C.any()
    assert not rows_of(net, group).unread_C.any()
