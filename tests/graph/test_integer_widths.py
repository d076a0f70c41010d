"""A width that enters the arithmetic of a forward: no edit may change it, whatever type it comes in."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from weightfold.graph.proof import prepared
from weightfold.graph.retrace import Bench, retraced
from weightfold.graph.rules.numbers import digest
from weightfold.graph.trace import trace

Formula = Callable[[Tensor, "Net"], Tensor]


class Net(nn.Module):
    """Two layers with a formula of the hidden units, (4, 10) or (4, 10, 5), and of the network between them."""

    def __init__(self, formula: Formula, conv: bool = False) -> None:
        super().__init__()
        self.a: nn.Module = nn.Conv1d(6, 10, 1) if conv else nn.Linear(6, 10)
        self.b: nn.Module = nn.Conv1d(10, 3, 1) if conv else nn.Linear(10, 3)
        self.width = 10
        self.formula = formula

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.formula(F.relu(self.a(x)), self))


COMPUTING: dict[str, Formula] = {
    "quotient": lambda h, _: h / h.shape[-1],
    "product": lambda h, _: h * h.size(1),
    "product from the left": lambda h, _: h.shape[1] * h,
    "sum": lambda h, _: h + h.shape[1],
    "difference from the left": lambda h, _: h.shape[1] - h,
    "alpha": lambda h, _: torch.add(h, h.tanh(), alpha=h.shape[1]),
    "alpha of a difference": lambda h, _: torch.sub(h, h.tanh(), alpha=h.shape[1]),
    "beta of a product": lambda h, _: torch.addmm(h, h, torch.eye(h.shape[1], dtype=h.dtype), beta=h.shape[1]),
    "in place": lambda h, _: h.clone().mul_(h.shape[1]),
    "attribute of the reader": lambda h, net: h * net.b.in_features,
    "attribute of the writer": lambda h, net: h + net.a.out_features,
    "shape of the weight": lambda h, net: h * net.b.weight.shape[1],
    "shape of the bias": lambda h, net: h * len(net.a.bias),
    "shape of the transposed": lambda h, _: h * h.t().shape[0],
    "full": lambda h, _: h * torch.full((1,), h.shape[-1], dtype=h.dtype),
    "new_full": lambda h, _: h + h.new_full((1,), h.shape[1]),
    "full_like": lambda h, _: h + torch.full_like(h[:, :1], h.shape[1]),
    "tensor": lambda h, _: h * torch.tensor(h.shape[1]),
    "tensor in a list": lambda h, _: h * torch.tensor([float(h.shape[1])], dtype=h.dtype),
    "numbers counted out": lambda h, _: h * (torch.arange(h.shape[0], dtype=h.dtype)[:, None] + h.shape[1]),
    "sum of ones": lambda h, _: h / torch.ones(h.shape[1], dtype=h.dtype).sum(),
    "sum of ones like it": lambda h, _: h / torch.ones_like(h).sum(-1, keepdim=True),
    "sum of what is counted out": lambda h, _: h / torch.arange(h.shape[1]).sum(),
    "last of what is counted out": lambda h, _: h + torch.arange(h.shape[1])[-1],
    "largest of what is counted out": lambda h, _: h + torch.arange(h.shape[1]).max(),
    "mean of a fixed table": lambda h, _: h * torch.linspace(0, 1, h.shape[1], dtype=h.dtype).square().mean(),
    "trace of an identity": lambda h, _: h * torch.eye(h.shape[1], dtype=h.dtype).trace(),
    "power": lambda h, _: torch.sigmoid(h) ** h.shape[1],
    "base of a power": lambda h, _: h.shape[1] ** -h,
    "clamp": lambda h, _: h.clamp(max=h.shape[1] - 9),
    "hardtanh": lambda h, _: F.hardtanh(h, 0, h.shape[1] - 9),
    "leaky slope": lambda h, _: F.leaky_relu(h - 1, h.shape[1]),
    "threshold": lambda h, _: F.threshold(h, h.shape[1] - 9.5, 0),
    "numel": lambda h, _: h / h.numel(),
    "scale of a mask": lambda h, _: h.masked_fill(h > h.shape[1] - 9, 0),
    "comparison": lambda h, _: h * (h > h.shape[1] - 9.5),
    "remainder": lambda h, _: torch.remainder(h, h.shape[1]),
    "parity": lambda h, _: h * (1 + h.shape[1] % 3),
}
"""Formulas that change the function when a channel is cut."""


def refused(formula: Formula, conv: bool = False) -> str:
    """Why the hidden units cannot be cut: by the rules, or by what a second trace of a cut network shows."""
    net = Net(formula, conv).double().eval()
    x = torch.randn(4, 6, 5, dtype=torch.float64) if conv else torch.randn(4, 6, dtype=torch.float64)
    graph = trace(net, x)
    group = next((g for g in graph if g.name == "a"), None)
    if group is None:
        return next(f.reason for f in graph.frozen if f.tensor == "a.weight" and f.dim == 0)
    return group.reasons.get("remove", "") or retraced(Bench.of(net, x), graph, {"a": -1})


@pytest.mark.parametrize("name", COMPUTING)
def test_a_width_that_is_computed_with_is_seen(name: str) -> None:
    assert refused(COMPUTING[name])


ROUNDED: dict[str, Formula] = {
    "a half, rounded down": lambda h, _: h * (h.shape[1] // 4),
    "logarithm, rounded down": lambda h, _: h * h.shape[1].bit_length(),
    "a bound": lambda h, _: h / min(h.shape[1], 7),
    "a flag": lambda h, _: h * (h.shape[1] > 6),
}


@pytest.mark.parametrize("name", [*ROUNDED, "quotient", "full", "sum of ones like it", "alpha", "numel"])
def test_a_width_that_is_computed_with_is_not_changed(name: str) -> None:
    """Rounded numbers change once enough channels are cut."""
    torch.manual_seed(0)
    graph = prepared(Net((ROUNDED | COMPUTING)[name]), torch.randn(4, 6))
    group = next(g for g in graph if g.name == "a")
    assert not {"remove", "merge"} & group.admits
    assert group.reasons["remove"]


CONV: dict[str, Formula] = {
    "shift along the length": lambda h, _: h.roll(h.shape[1] // 2, -1),
    "one place of the length": lambda h, _: h * h[:, :, h.shape[1] - 7].unsqueeze(-1).sigmoid(),
    "a start along the length": lambda h, _: h[:, :, h.shape[1] - 9 :].mean(-1, keepdim=True),
    "a window": lambda h, _: F.avg_pool1d(h, h.shape[1] - 7),
    "padding of the length": lambda h, _: F.pad(h, (0, h.shape[1] - 8)),
    "diagonal of a mask": lambda h, _: h @ torch.ones(5, 5, dtype=h.dtype).tril(h.shape[1] - 10),
    "size of an image": lambda h, _: F.interpolate(h, size=h.shape[1] - 6),
}


@pytest.mark.parametrize("name", CONV)
def test_a_width_that_picks_places_of_data_is_seen(name: str) -> None:
    assert refused(CONV[name], conv=True)


HARMLESS: dict[str, Formula] = {
    "a view": lambda h, _: h.view(h.shape[0], h.shape[1]),
    "blocks": lambda h, _: h.view(-1, 2, h.shape[1] // 2).flatten(1),
    "zeros": lambda h, _: h + torch.zeros(h.shape[0], h.shape[1], dtype=h.dtype),
    "ones": lambda h, _: h * torch.ones(h.shape[1], dtype=h.dtype),
    "a scale of its own": lambda h, _: h / 7 + 2 * h,
    "a length": lambda h, _: h / h.shape[0],
    "all of them, by number": lambda h, _: h[:, torch.arange(h.shape[1])],
    "padded channels": lambda h, _: F.pad(h, (0, h.shape[1]))[:, : h.shape[1]],
}


@pytest.mark.parametrize("name", HARMLESS)
def test_a_width_that_only_lays_out_channels_stays_free(graph_of: Callable, name: str) -> None:
    graph = graph_of(Net(HARMLESS[name]), torch.randn(4, 6, dtype=torch.float64))
    assert {"remove", "merge"} <= graph["a"].admits
    assert not refused(HARMLESS[name])


def test_a_digest_tells_numbers_apart_and_not_sizes_of_constants() -> None:
    assert digest(torch.full((3,), 7)) == digest(torch.full((2, 5), 7.0)) == [7.0, 0.0]
    assert digest(torch.zeros(0)) == [0.0, 0.0]
    assert digest(torch.tensor([1.0, 2.0])) != digest(torch.tensor([2.0, 1.0]))
    assert digest(torch.tensor([0.0, -torch.inf])) != digest(torch.tensor([0.0, torch.inf]))
    assert digest(torch.tensor([1 + 2j])) != digest(torch.tensor([2 + 1j]))
