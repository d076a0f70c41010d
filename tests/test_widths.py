"""Widths for a share or a budget. Expected numbers: closed forms and brute force."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import weightfold as wf
from weightfold.errors import ConfigError
from weightfold.size import MacModel
from weightfold.widths import Grid, by_cost, uniform, uniform_for_macs


def mlp_macs() -> tuple[MacModel, list[Any]]:
    net = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 3))
    x = torch.zeros(1, 6)
    graph = wf.trace(net, x)
    macs = MacModel.of(net, graph, x)
    return macs, [graph["0"], graph["2"]]


def closed_form(a: int, b: int) -> int:
    return 6 * a + a * b + 3 * b


@given(st.integers(1, 12), st.integers(1, 8))
def test_macs_of_two_layers(a: int, b: int) -> None:
    assert MLP[0].at({"0": a, "2": b}) == pytest.approx(closed_form(a, b))


MLP = mlp_macs()


@pytest.mark.parametrize(
    ("grid", "expected"),
    [
        (Grid(), [12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1]),
        (Grid(align=8), [12, 8]),
        (Grid(align=16), [12]),
        (Grid(align=4, min_channels=5), [12, 8]),
        (Grid(floor=0.75), [12, 11, 10, 9]),
    ],
)
def test_allowed_widths(grid: Grid, expected: list[int]) -> None:
    assert grid.widths(MLP[1][0]) == expected


def test_widths_never_grow_and_snap_to_the_nearest() -> None:
    groups = MLP[1]
    assert uniform(groups, 1.0, Grid(align=8)) == {"0": 12, "2": 8}
    assert uniform(groups, 0.5, Grid(align=4)) == {"0": 8, "2": 4}
    assert uniform(groups, 0.01, Grid()) == {"0": 1, "2": 1}


@pytest.mark.parametrize("share", [0.9, 0.6, 0.3])
def test_uniform_widths_fill_the_budget(share: float) -> None:
    macs, groups = MLP
    widths = uniform_for_macs(macs, groups, share, Grid())
    used = closed_form(widths["0"], widths["2"]) / closed_form(12, 8)
    assert used <= share
    assert closed_form(widths["0"] + 1, widths["2"] + 1) / closed_form(12, 8) > share


def test_the_cheapest_widths_are_near_the_best_of_all() -> None:
    macs, groups = MLP
    cost = {"0": lambda w: (12 - w) ** 2 / 40, "2": lambda w: (8 - w) ** 2 / 5}
    widths = by_cost(macs, groups, cost, 0.5, Grid())
    budget = 0.5 * closed_form(12, 8)
    best = min(
        cost["0"](a) + cost["2"](b)
        for a, b in itertools.product(range(1, 13), range(1, 9))
        if closed_form(a, b) <= budget
    )
    assert closed_form(widths["0"], widths["2"]) <= budget
    assert sum(cost[name](w) for name, w in widths.items()) <= 1.25 * best


def test_a_budget_out_of_reach_is_refused() -> None:
    macs, groups = MLP
    least = closed_form(8, 6) / closed_form(12, 8)
    with pytest.raises(ConfigError, match=f"cannot be met: the narrowest allowed widths leave {least:.3g}"):
        by_cost(macs, groups, {"0": float, "2": float}, 0.3, Grid(floor=2 / 3))
    with pytest.raises(ConfigError, match="cannot be met"):
        uniform_for_macs(macs, groups, 0.01, Grid())
