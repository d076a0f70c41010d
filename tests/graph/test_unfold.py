"""Taking an edit back after training has gone on: exact at once, function-preserving later."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

import weightfold as wf
from weightfold.graph.apply import apply
from weightfold.graph.edit import Edit, fold, merge, remove
from weightfold.graph.group import ChannelGroup
from weightfold.graph.unfold import unfold_undo


def make_net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.ReLU(),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(24, 5),
    ).double()  # fmt: skip


def make_edit(kind: str, group: ChannelGroup) -> Edit:
    if kind == "remove":
        return remove(group, torch.tensor([0, 2, 5]))
    if kind == "merge":
        return merge(group, torch.tensor([0, 1, 1, 2, 0, 0][: group.n_channels] + [2] * (group.n_channels - 6)))
    keep = torch.tensor([1, 3, 4])
    g = torch.Generator().manual_seed(1)
    shape = (group.n_channels - 3, 3)
    maps = {a.key: torch.randn(shape, generator=g, dtype=torch.float64) for a in group.role("read")}
    shift = {key: torch.randn(group.n_channels, generator=g, dtype=torch.float64) for key in maps}
    for vector in shift.values():
        vector[keep] = 0
    found = fold(group, keep, maps, shift)
    if kind == "fold":
        return found
    [gauge] = [number for number, gauge in enumerate(group.gauges) if gauge.kind == "positive"]
    return replace(found, scale=torch.tensor([0.5, 2.0, 3.0], dtype=torch.float64), gauge=gauge)


def train(net: nn.Module, optimizer: torch.optim.Optimizer, n_steps: int) -> None:
    g = torch.Generator().manual_seed(2)
    for _ in range(n_steps):
        net(torch.randn(4, 3, 6, 6, generator=g, dtype=torch.float64)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("kind", ["remove", "fold", "balanced fold", "merge"])
@pytest.mark.parametrize("name", ["0", "3"])
def test_unfolding_keeps_what_was_trained_and_folds_back_to_it(kind: str, name: str) -> None:
    net = make_net()
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
    train(net, optimizer, 2)
    graph = wf.trace(net, torch.zeros(2, 3, 6, 6, dtype=torch.float64))
    average = {n: t.detach().clone() for n, t in net.state_dict().items()}
    edit = make_edit(kind, graph[name])
    narrow_graph, undo = apply(net, graph, edit, [optimizer], [average])
    assert narrow_graph[name].n_channels == 3
    train(net, optimizer, 5)
    narrow = copy.deepcopy(net)
    unfold_undo(graph, edit, undo, [optimizer])
    assert net[int(name)].weight.shape == make_net()[int(name)].weight.shape
    assert average[f"{name}.weight"].shape == net[int(name)].weight.shape
    train(net, optimizer, 0)
    again = copy.deepcopy(net)
    apply(again, graph, edit)
    for (key, a), b in zip(again.state_dict().items(), narrow.state_dict().values(), strict=True):
        assert torch.allclose(a.double(), b.double(), atol=1e-12), key
    train(net, optimizer, 1)


@pytest.mark.parametrize("kind", ["fold", "balanced fold"])
def test_unfolding_at_once_is_exact(kind: str) -> None:
    net = make_net()
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-2, momentum=0.9)
    train(net, optimizer, 2)
    before = copy.deepcopy(net.state_dict())
    momentum = {n: optimizer.state[p]["momentum_buffer"].clone() for n, p in net.named_parameters()}
    graph = wf.trace(net, torch.zeros(2, 3, 6, 6, dtype=torch.float64))
    edit = make_edit(kind, graph["0"])
    _, undo = apply(net, graph, edit, [optimizer])
    unfold_undo(graph, edit, undo, [optimizer])
    for key, value in net.state_dict().items():
        assert torch.equal(value, before[key]), key
    removed = [0, 2, 5, 6, 7]
    held = optimizer.state[net[0].weight]["momentum_buffer"]
    assert torch.equal(held[removed], momentum["0.weight"][removed])
