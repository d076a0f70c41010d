"""The guaranteed bound: for every activation that has a rule, against dense sampling in float64."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from weightfold.bounds import CURVES, RULES, Range, output_bound
from weightfold.errors import ConfigError
from weightfold.training.lumped import LumpRunConfig, lump_network

Draw = Callable[[float, float], float]
"""A number between two ends."""

ARGUMENTS: dict[str, Callable[[Draw], dict[str, Any]]] = {
    **{name: lambda _: {} for name in CURVES},
    "gelu": lambda u: {"approximate": "tanh" if u(0, 1) < 0.5 else "none"},
    "elu": lambda u: {"alpha": u(-4, 4), "scale": u(-2, 2), "input_scale": u(-1, 2)},
    "celu": lambda u: {"alpha": math.copysign(u(0.2, 4), u(-1, 1))},
    "softplus": lambda u: {"beta": math.copysign(u(0.2, 20), u(-1, 1)), "threshold": u(-2, 30)},
    "leaky_relu": lambda u: {"negative_slope": u(-3, 3)},
    "rrelu": lambda u: {"lower": (low := u(-3, 1)), "upper": low + u(0, 2)},
    "hardtanh": lambda u: {"min_val": (low := u(-3, 2)), "max_val": low + u(0, 3)},
    "clamp": lambda u: {"min": u(-3, 3), "max": u(-3, 3)},
    "clamp_min": lambda u: {"min": u(-3, 3)},
    "clamp_max": lambda u: {"max": u(-3, 3)},
    "threshold": lambda u: {"threshold": u(-3, 3), "value": u(-3, 3)},
    "softshrink": lambda u: {"lambd": u(0, 3)},
    "hardshrink": lambda u: {"lambd": u(0, 3)},
}
"""Random arguments of each activation, signs and steepness that nobody would choose among them."""


def uniform(seed: int) -> Draw:
    generator = torch.Generator().manual_seed(seed)
    return lambda low, high: low + (high - low) * float(torch.rand((), generator=generator))


def ranges(seed: int, n: int = 60) -> Range:
    """Ranges of all widths around zero; some networks agree there, others are far apart."""
    generator = torch.Generator().manual_seed(seed)
    u = torch.rand(3, n, generator=generator, dtype=torch.float64)
    centre, radius = 8 * u[0] - 4, 10 ** (4 * u[1] - 3.5)
    return Range(centre - radius, centre + radius, torch.where(u[2] < 0.2, 0.0, 10 ** (4 * u[2] - 3.5)))


def sampled(x: Range) -> Iterator[tuple[Tensor, Tensor]]:
    """Points of each range, and of the second network beside them."""
    at = torch.linspace(0, 1, 401, dtype=torch.float64)[:, None]
    first = x.lo + (x.hi - x.lo) * at
    for share in (-1.0, -0.6, -0.1, 0.1, 0.6, 1.0):
        yield first, first + share * x.e


def operator(name: str) -> Any:
    """The overload that takes numbers."""
    return getattr(torch.ops.aten, name).default


@pytest.mark.parametrize("name", sorted(CURVES))
def test_no_activation_leaves_its_range_or_moves_further_than_its_bound(name: str) -> None:
    """Values and differences of dense samples, over random arguments; and both are nearly attained somewhere."""
    closest = []
    for seed in range(12):
        settings, x, op = ARGUMENTS[name](uniform(seed)), ranges(seed), operator(name)
        found = RULES[name](op, x, **settings)
        worst = torch.zeros_like(x.e)
        for first, second in sampled(x):
            ours, theirs = op(first, **settings), op(second, **settings)
            worst = torch.maximum(worst, (ours - theirs).abs().amax(0))
            assert bool((ours.amin(0) >= found.lo - 1e-12).all()), settings
            assert bool((ours.amax(0) <= found.hi + 1e-12).all()), settings
        assert bool((worst <= found.e * (1 + 1e-9) + 1e-12).all()), (settings, (worst - found.e).max())
        closest.append(float((worst / found.e).nan_to_num().max()))
    assert max(closest) > 0.9, "a bound that nothing comes near says nothing"


class Prelu(nn.Module):
    """A slope for each channel, of any sign, behind a convolution and a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.act = nn.Conv1d(1, 12, 1), nn.BatchNorm1d(12), nn.PReLU(12)
        self.head = nn.Linear(12, 2)
        nn.init.uniform_(self.act.weight, -2, 2)
        nn.init.uniform_(self.norm.running_var, 0.5, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.act(self.norm(self.conv(x[:, :, None]))).mean(2))


class ThroughView(nn.Module):
    """The activation writes into what a sum reads again."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(1, 12), nn.Linear(12, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        F.elu_(h.view(-1, 3, 4), 3.0)
        return self.b(h + 1)


class Scaled(nn.Module):
    """Constants of the forward, larger than the box of the inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(1, 12), nn.Linear(12, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.tanh(self.a(x)) * torch.tensor(7.0)) / torch.tensor(0.1) - 3 * x


def plain(act: nn.Module, n: int = 12) -> nn.Module:
    return nn.Sequential(nn.Linear(1, n), act, nn.Linear(n if not isinstance(act, nn.GLU) else n // 2, 2))


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "ELU(-2)": lambda: plain(nn.ELU(-2.0)),
    "ELU(7), twice": lambda: nn.Sequential(nn.Linear(1, 8), nn.ELU(7.0), nn.Linear(8, 8), nn.ELU(7.0), nn.Linear(8, 1)),
    "CELU(-1)": lambda: plain(nn.CELU(-1.0)),
    "SELU in place": lambda: plain(nn.SELU(inplace=True)),
    "LeakyReLU(-3)": lambda: plain(nn.LeakyReLU(-3.0, inplace=True)),
    "PReLU(-2)": lambda: plain(nn.PReLU(init=-2.0)),
    "PReLU by channel": Prelu,
    "RReLU(-2, -1)": lambda: plain(nn.RReLU(-2.0, -1.0)),
    "Softplus, threshold 0": lambda: plain(nn.Softplus(2.0, 0.0)),
    "Threshold(.5, -2)": lambda: plain(nn.Threshold(0.5, -2.0)),
    "Hardshrink(1)": lambda: plain(nn.Hardshrink(1.0)),
    "Softshrink(.3)": lambda: plain(nn.Softshrink(0.3)),
    "Mish": lambda: plain(nn.Mish()),
    "GELU(tanh)": lambda: plain(nn.GELU("tanh")),
    "Hardswish in place": lambda: plain(nn.Hardswish(inplace=True)),
    "GLU": lambda: plain(nn.GLU()),
    "in place through a view": ThroughView,
    "constants": Scaled,
}


def grid(box: float) -> Tensor:
    return torch.linspace(-box, box, 4001, dtype=torch.float64)[:, None]


@pytest.mark.parametrize("name", sorted(NETWORKS))
@pytest.mark.parametrize("box", [0.1, 3.0])
def test_networks_with_other_weights_stay_within_the_bound(name: str, box: float) -> None:
    """Every parameter differs a little, the slopes of activations too; every input of a dense grid, in float64."""
    torch.manual_seed(len(name))
    net = NETWORKS[name]().double().eval()
    other = copy.deepcopy(net)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
        changed = float((net(grid(box)) - other(grid(box))).abs().max())
    bound = output_bound(net, other, torch.zeros(1, 1).double(), (-box, box))
    assert 0 < changed <= bound * (1 + 1e-9) < math.inf


@pytest.mark.parametrize("name", sorted({*NETWORKS} - {"PReLU by channel", "in place through a view", "GLU"}))
@pytest.mark.parametrize("box", [0.1, 3.0])
def test_no_output_of_a_lumped_network_changes_by_more_than_the_bound(name: str, box: float) -> None:
    torch.manual_seed(len(name))
    net = NETWORKS[name]().double().eval()
    whole = copy.deepcopy(net)
    facts = lump_network(net, torch.zeros(1, 1).double(), LumpRunConfig(eps=0.8, box=box)).facts
    assert any(event["after"] < event["before"] for event in facts["events"])
    assert facts["bound"] is not None, facts["no_bound"]
    with torch.no_grad():
        changed = float((whole(grid(box)) - net(grid(box))).abs().max())
    assert changed <= facts["bound"] * (1 + 1e-9) + 1e-12


class Sloppy(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(x, 0.5, training=True)


class Computed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * 2)


def linear(value: float) -> nn.Module:
    net = nn.Sequential(nn.Linear(1, 1))
    nn.init.constant_(net[0].weight, value)
    return net


@pytest.mark.parametrize(
    ("net", "reason"),
    [
        (Sloppy(), "draws its mask"),
        (Computed(), "weights that are computed"),
        (linear(math.nan), "not bounded on this box"),
        (nn.Sequential(linear(1e30), nn.CELU(-1.0)), "not bounded on this box"),
        (nn.BatchNorm1d(1, track_running_stats=False), "measures its batch"),
        (nn.Softplus(0.0), "divides by it"),
    ],
)
def test_where_nothing_can_be_guaranteed_the_reason_is_told(net: nn.Module, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        output_bound(net.eval(), copy.deepcopy(net), torch.zeros(2, 1), (-1.0, 1.0))


def test_a_slope_that_differs_moves_only_what_lies_left_of_zero() -> None:
    """By hand: |.5 - .1| * 2 at x = -2, and nothing on the right."""
    first, second = nn.PReLU(init=0.5), nn.PReLU(init=0.1)
    example = torch.zeros(1, 1)
    assert output_bound(first, second, example, (-2.0, 5.0)) == pytest.approx(0.8)
    assert output_bound(first, second, example, (0.5, 5.0)) == 0
