"""Times of training steps: what is timed, and that timing leaves no trace. No test looks at how long anything took."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import weightfold as wf
from weightfold.fingerprint import fingerprint
from weightfold.latency import Latency, StepTime, cut, measure


def make() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Dropout(0.5), nn.Linear(16, 3))


def test_measuring_leaves_no_trace_and_times_every_plan() -> None:
    model = make()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    graph = wf.trace(model, torch.zeros(1, 4))
    before, state = fingerprint(model), torch.get_rng_state()
    batch = torch.randn(8, 4, generator=torch.Generator().manual_seed(0)), torch.arange(8) % 3
    table = measure(model, graph, [({}, 112.0), ({"0": 4}, 28.0)], batch, F.cross_entropy, [optimizer])
    assert [row.widths for row in table.rows] == [{}, {"0": 4}]
    assert all(row.seconds > 0 for row in table.rows)
    assert fingerprint(model) == before
    assert torch.equal(torch.get_rng_state(), state)
    assert not optimizer.state


def test_a_cut_keeps_the_first_channels_of_every_block() -> None:
    attention = nn.MultiheadAttention(8, 2, batch_first=True)
    net = nn.Sequential(nn.Linear(4, 12), nn.ReLU(), nn.Linear(12, 2))
    twin = cut(net, wf.trace(net, torch.zeros(1, 4)), {"0": 5})
    assert (twin[0].out_features, twin[2].in_features) == (5, 5)
    assert torch.equal(twin[0].weight, net[0].weight[:5])
    assert net[0].out_features == 12
    assert attention.num_heads == 2


def test_between_rows_times_are_interpolated_over_macs() -> None:
    table = Latency((StepTime({}, 100.0, 2.0), StepTime({}, 50.0, 1.2), StepTime({}, 20.0, 0.8)))
    assert table.ratio(75.0) == pytest.approx(0.8)
    assert table.ratio(35.0) == pytest.approx(0.5)
    assert table.ratio(10.0) == pytest.approx(0.2)
    assert table.ratio(120.0) == 1.0


def test_a_slower_narrow_network_saves_nothing() -> None:
    assert Latency((StepTime({}, 100.0, 1.0), StepTime({}, 50.0, 1.5))).ratio(50.0) == 1.0


def test_a_recorded_table_is_read_back() -> None:
    table = Latency.recorded({"0.25": 0.4, "0.5": 0.6}, 1000.0)
    assert table.ratio(1000.0) == 1.0
    assert table.ratio(500.0) == pytest.approx(0.6)
    assert table.ratio(250.0) == pytest.approx(0.4)
