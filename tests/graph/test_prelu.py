"""PReLU with one slope a channel: channels are dimension 1 in every rank, and the slopes go with them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

CONVS = {1: nn.Linear, 2: nn.Linear, 3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}


def layer(rank: int, into: int, out: int) -> nn.Module:
    return nn.Linear(into, out) if rank == 2 else CONVS[rank](into, out, 1)


def admits(graph: Any, name: str) -> set[str]:
    return next((set(g.admits) for g in graph if g.name == name), set())


@pytest.mark.parametrize("rank", [2, 3, 4, 5])
@pytest.mark.parametrize("width", [5, 6])
@pytest.mark.parametrize("n_slopes", [1, 6])
def test_slopes_follow_in_every_rank(graph_of: Callable, rank: int, width: int, n_slopes: int) -> None:
    """Also where the image is as wide as there are channels."""
    net = nn.Sequential(layer(rank, 3, 6), nn.PReLU(n_slopes), layer(rank, 6, 4))
    graph = graph_of(net, torch.randn(2, 3, *[width] * (rank - 2), dtype=torch.float64))
    assert admits(graph, "0") == {"permute", "rescale", "remove", "merge"}
    assert [a.role for a in graph["0"].axes if a.tensor == "1.weight"] == (["pointwise"] if n_slopes > 1 else [])


NORMS = {
    "batch": lambda: nn.BatchNorm2d(6),
    "instance": lambda: nn.InstanceNorm2d(6, affine=True),
    "groups of one": lambda: nn.GroupNorm(6, 6),
}


@pytest.mark.parametrize("norm", NORMS)
def test_slopes_follow_behind_a_norm(graph_of: Callable, norm: str) -> None:
    net = nn.Sequential(nn.Conv2d(3, 6, 1), NORMS[norm](), nn.PReLU(6), nn.Conv2d(6, 4, 3))
    assert "permute" in admits(graph_of(net, torch.randn(2, 3, 6, 6, dtype=torch.float64)), "0")


class Form(nn.Module):
    """A network with a slope a channel, written in one of several forms."""

    def __init__(self, form: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b, self.slope = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 4, 1), nn.Parameter(torch.rand(6))
        self.form = form

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.form(self.a(x), self.slope))


FORMS = {
    "functional": F.prelu,
    "torch.prelu": torch.prelu,
    "Tensor.prelu": lambda h, s: h.prelu(s),
    "before a residual": lambda h, s: h + F.prelu(h, s),
    "of a gated value": lambda h, s: F.prelu(h * h.sigmoid(), s),
    "by hand": lambda h, s: F.relu(h) - s[:, None, None] * F.relu(-h),
    "by where": lambda h, s: torch.where(h > 0, h, s.view(1, -1, 1, 1) * h),
    "tokens of channels": lambda h, s: F.prelu(h.flatten(2), s).unflatten(2, (6, 6)),
    "twice": lambda h, s: F.prelu(F.prelu(h, s), s),
    "squared slopes": lambda h, s: F.prelu(h, s.square()),
}


@pytest.mark.parametrize("form", FORMS)
def test_slopes_follow_in_every_form(graph_of: Callable, form: str) -> None:
    graph = graph_of(Form(FORMS[form]), torch.randn(2, 3, 6, 6, dtype=torch.float64))
    assert "permute" in admits(graph, "a")


def test_slopes_of_a_length_belong_to_the_length(graph_of: Callable) -> None:
    """Transposed tokens: dimension 1 is the sequence, whose positions are no channels."""

    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.act, self.b = nn.Linear(3, 6), nn.PReLU(6), nn.Linear(6, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.act(self.a(x)))

    graph = graph_of(Tokens(), torch.randn(2, 6, 3, dtype=torch.float64))
    assert admits(graph, "a") >= {"permute", "remove", "merge"}
    assert all(axis.tensor != "act.weight" for group in graph for axis in group.axes if group.free)


def test_slopes_of_a_depthwise_layer(graph_of: Callable) -> None:
    net = nn.Sequential(nn.Conv2d(3, 6, 1), nn.PReLU(6), nn.Conv2d(6, 6, 3, groups=6), nn.PReLU(6), nn.Conv2d(6, 2, 1))
    assert admits(graph_of(net, torch.randn(2, 3, 8, 8, dtype=torch.float64)), "0") >= {"permute", "remove"}
