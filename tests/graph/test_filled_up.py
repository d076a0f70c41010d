"""Values that are filled up with numbers: states that start from zeros beside an input, ones and zeros side by side."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

Fill = Callable[[Tensor], Tensor]


class Cell(nn.Module):
    """A recurrent cell by hand: input and state lie side by side under one layer."""

    def __init__(self, start: Fill, state_first: bool) -> None:
        super().__init__()
        self.width, self.start, self.state_first = 8, start, state_first
        self.gates, self.out = nn.Linear(4 + 8, 24), nn.Linear(8, 3)

    def forward(self, x_BTC: Tensor) -> Tensor:
        h_BH = self.start(x_BTC.new_zeros(len(x_BTC), self.width))
        for x_BC in x_BTC.unbind(1):
            z, r, n = self.gates(torch.cat([h_BH, x_BC] if self.state_first else [x_BC, h_BH], 1)).chunk(3, 1)
            h_BH = z.sigmoid() * h_BH + r.sigmoid() * n.tanh()
        return self.out(h_BH)


STARTS: dict[str, Fill] = {"zeros": lambda h: h, "ones": torch.ones_like, "halves": lambda h: torch.full_like(h, 0.5)}


@pytest.mark.parametrize("state_first", [False, True])
@pytest.mark.parametrize("start", STARTS)
def test_a_state_that_starts_from_one_number_is_free(graph_of: Any, start: str, state_first: bool) -> None:
    graph = graph_of(Cell(STARTS[start], state_first), torch.randn(3, 4, 4, dtype=torch.float64))
    group = graph.containing("out.weight", 1)
    assert group.n_channels == 8
    assert group.admits >= {"permute", "remove", "merge"}


class Beside(nn.Module):
    """A layer that reads a value, be it channels or an input, beside constants on which something is done."""

    def __init__(self, fill: Fill, channels: bool) -> None:
        super().__init__()
        self.a, self.fill, self.channels = nn.Linear(4, 8), fill, channels
        self.b, self.c = nn.Linear(8 + 6 if channels else 4 + 6, 8), nn.Linear(8, 3)

    def forward(self, x_BC: Tensor) -> Tensor:
        h = torch.relu(self.a(x_BC))
        out = self.c(torch.tanh(self.b(self.fill(h if self.channels else x_BC))))
        return out + h.mean(1, keepdim=True)


def beside(x: Tensor, *numbers: float) -> Tensor:
    return torch.cat([x, *(x.new_full((len(x), 6 // len(numbers)), n) for n in numbers)], 1)


FILLS: dict[str, Fill] = {
    "zeros": lambda x: beside(x, 0.0),
    "ones": lambda x: beside(x, 1.0),
    "zeros and ones": lambda x: beside(x, 0.0, 1.0),
    "ones and twos": lambda x: beside(x, 1.0, 2.0),
    "three numbers": lambda x: beside(x, 0.0, 1.0, 2.0),
    "ones times a table": lambda x: beside(x, 1.0) * torch.arange(x.shape[1] + 6).to(x),
    "zeros and a table": lambda x: beside(x, 0.0) + torch.arange(x.shape[1] + 6).to(x),
    "exponentials": lambda x: beside(x, 0.0).exp(),
    "cosines less one": lambda x: beside(x, 0.0).cos() - 1,
    "filled up twice": lambda x: torch.cat([torch.cat([x, x.new_zeros(len(x), 3)], 1), x.new_ones(len(x), 3)], 1),
}


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("channels", [False, True])
@pytest.mark.parametrize("name", FILLS)
def test_no_edit_takes_one_number_for_another(graph_of: Any, name: str, channels: bool, seed: int) -> None:
    torch.manual_seed(seed)
    graph = graph_of(Beside(FILLS[name], channels), torch.randn(5, 4, dtype=torch.float64))
    assert graph.containing("c.weight", 1).admits >= {"permute", "remove", "merge"}
