"""Natural collapse: planted silent and equal channels are counted, and told from coincidences."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import weightfold as wf
from weightfold.collapse import collapse, distances
from weightfold.graph.group import ChannelGroup


def planted(noise: float = 0.0, *, outgoing: bool = True) -> tuple[nn.Module, ChannelGroup]:
    """Twelve channels: 1-3 equal channel 0, 4 and 5 are silent, the others differ."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 12), nn.ReLU(), nn.Linear(12, 3))
    with torch.no_grad():
        for i in (1, 2, 3):
            net[0].weight[i] = net[0].weight[0] + noise * torch.randn(5)
            net[0].bias[i] = net[0].bias[0]
            if outgoing:
                net[2].weight[:, i] = net[2].weight[:, 0]
        net[0].weight[4:6], net[0].bias[4:6] = 0, 0
    return net, wf.trace(net, torch.zeros(1, 5))["0"]


@pytest.mark.parametrize("noise", [0.0, 0.005])
def test_equal_and_silent_channels_are_counted(noise: float) -> None:
    net, group = planted(noise)
    found = collapse(net, group)
    assert found.silent == (4, 5)
    assert len(set(found.labels_C[:4].tolist())) == 1
    assert found.n_independent == 1 + 6
    assert found.outgoing_agreement is not None
    assert found.outgoing_agreement < 0.01


def test_equal_writers_with_unrelated_readers_are_no_collapse() -> None:
    found = collapse(*planted(outgoing=False))
    assert found.outgoing_agreement is not None
    assert found.outgoing_agreement > 0.3


def test_a_fresh_network_has_not_collapsed() -> None:
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(5, 12), nn.ReLU(), nn.Linear(12, 3))
    found = collapse(net, wf.trace(net, torch.zeros(1, 5))["0"])
    assert (found.n_independent, found.silent, found.outgoing_agreement) == (12, (), None)


def test_distances_are_relative_to_the_longer_row() -> None:
    found = distances(torch.tensor([[2.0, 0.0], [1.0, 0.0], [0.0, 0.0], [0.0, 0.0]]))
    assert found[0, 1] == 0.5
    assert found[0, 2] == 1.0
    assert found[2, 3] == 0.0
