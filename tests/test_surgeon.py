"""Edits on layers that tell their own sizes are taken back: at once, after training, from a checkpoint, from a record.

Reference: the network before the edit. What it computes, and every number that a module tells of itself, is as it was.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from weightfold.graph import edit
from weightfold.graph.group import ChannelGroup
from weightfold.graph.resize import with_sizes
from weightfold.graph.trace import trace
from weightfold.graph.unfold import unfold
from weightfold.surgeon import Surgeon


class Net(nn.Module):
    """A convolution, something of 12 channels in between, and a linear layer."""

    def __init__(self, middle: nn.Module, out: int = 12) -> None:
        super().__init__()
        self.a, self.middle, self.out = nn.Conv2d(3, 12, 3, padding=1), middle, nn.Linear(out, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.relu(self.middle(torch.relu(self.a(x)))).mean((2, 3)))


class Recurrent(nn.Module):
    """Two recurrent layers behind a linear one."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.rnn, self.out = nn.Linear(3, 6), nn.LSTM(6, 8, 2, batch_first=True), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.rnn(torch.relu(self.a(x.flatten(2).mT)))[0][:, -1])


class Attention(nn.Module):
    """Heads, and the hidden units behind them."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(8, 4, 12, dropout=0.0, batch_first=True)
        self.a, self.out = nn.Linear(3, 8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.layer(self.a(x.flatten(2).mT)).mean(1))


NETS: dict[str, Callable[[], nn.Module]] = {
    "plain": lambda: Net(nn.Conv2d(12, 12, 3, padding=1)),
    "depthwise": lambda: Net(nn.Conv2d(12, 12, 3, padding=1, groups=12)),
    "depthwise, two kernels each": lambda: Net(nn.Conv2d(12, 24, 3, padding=1, groups=12), 24),
    "grouped": lambda: Net(nn.Conv2d(12, 12, 3, padding=1, groups=4)),
    "transposed depthwise": lambda: Net(nn.ConvTranspose2d(12, 12, 3, padding=1, groups=12)),
    "group norm": lambda: Net(nn.GroupNorm(4, 12)),
    "batch norm": lambda: Net(nn.BatchNorm2d(12)),
    "depthwise and norms": lambda: Net(
        nn.Sequential(nn.Conv2d(12, 12, 3, groups=12), nn.BatchNorm2d(12), nn.ReLU(), nn.Conv2d(12, 12, 1, groups=3))
    ),
    "recurrent": Recurrent,
    "attention": Attention,
}


def build(kind: str) -> nn.Module:
    torch.manual_seed(0)
    return NETS[kind]().double()


def images(n: int = 2, seed: int = 1) -> Tensor:
    return torch.randn(n, 3, 6, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def sizes(model: nn.Module) -> dict[str, Any]:
    """Every number that a module tells of itself, and the shapes of its tensors."""
    told = {
        f"{path}.{name}": value
        for path, module in model.named_modules()
        for name, value in vars(module).items()
        if isinstance(value, int | tuple) and name != "training" and not name.startswith("_")
    }
    return told | {name: tuple(t.shape) for name, t in model.state_dict().items()}


def narrow(group: ChannelGroup, least: bool) -> edit.Edit:
    """All but the last of each block, or the first of each alone."""
    block = torch.zeros(group.n_channels) if group.block is None else group.block
    parts = [(block == b).nonzero().flatten() for b in block.unique()]
    return edit.remove(group, torch.cat([part[:1] if least else part[:-1] for part in parts]))


def edited(model: nn.Module, optimizer: torch.optim.Optimizer, least: bool) -> Surgeon:
    """All groups that may lose channels have lost some."""
    hands = Surgeon(model, with_sizes(model, images(), trace(model, images())))
    hands.attach([optimizer], [])
    for name in [g.name for g in hands.graph if "remove" in g.admits]:
        cut = narrow(hands.graph[name], least)
        if cut.n_after and cut.resizes:
            hands.keep(cut, *hands.attempt(cut))
    assert hands.applied
    return hands


def learn(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    F.cross_entropy(model(images(8, 2)), torch.arange(8) % 5).backward()
    optimizer.step()
    optimizer.zero_grad()


def adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam(model.parameters(), lr=1e-2)


every_kind = pytest.mark.parametrize("kind", NETS)
each_width = pytest.mark.parametrize("least", [False, True])


@every_kind
@each_width
def test_undo_bit_for_bit(kind: str, least: bool) -> None:
    model = build(kind).eval()
    before, told = model(images()), sizes(model)
    hands = edited(model, adam(model), least)
    assert sizes(model) != told
    model(images())
    while hands.applied:
        hands.undo()
        model(images())
    assert torch.equal(model(images()), before)
    assert sizes(model) == told
    assert {name: g.n_channels for name, g in ((g.name, g) for g in hands.graph)} == {
        g.name: g.n_channels for g in trace(model, images())
    }


@every_kind
@each_width
def test_unfold_bit_for_bit_and_after_training(kind: str, least: bool) -> None:
    model = build(kind).eval()
    optimizer = adam(model)
    learn(model, optimizer)
    before, told = model(images()), sizes(model)
    hands = edited(model, optimizer, least)
    n_edits = len(hands.applied)
    hands.unfold(n_edits)
    torch.testing.assert_close(model(images()), before, rtol=0, atol=1e-12)
    assert sizes(model) == told
    hands = edited(model, optimizer, least)
    learn(model, optimizer)
    hands.unfold(n_edits)
    assert sizes(model) == told
    learn(model, optimizer)
    assert {p.shape for p in optimizer.state} == {p.shape for p in model.parameters()}


@every_kind
def test_undo_after_a_restart(kind: str) -> None:
    """The latest edit's undo comes out of a checkpoint; the network is built anew from its first structure."""
    model = build(kind).eval()
    before, told = model(images()), sizes(model)
    hands = edited(model, optimizer := adam(model), least=False)
    n_edits = len(hands.applied)
    state, weights = copy.deepcopy(hands.state(n_edits)), copy.deepcopy(model.state_dict())
    fresh = build(kind).eval()
    again = Surgeon(fresh, with_sizes(fresh, images(), trace(fresh, images())))
    again.attach([other := adam(fresh)], [])
    again.load(state)
    again.load_undo(state)
    fresh.load_state_dict(weights)
    other.load_state_dict(optimizer.state_dict())
    assert sizes(fresh) == sizes(model)
    for _ in range(n_edits):
        again.undo()
    assert torch.equal(fresh(images()), before)
    assert sizes(fresh) == told


@every_kind
@each_width
def test_taking_back_by_stored_tensors(kind: str, least: bool) -> None:
    """As from a ledger: the graphs and the replaced tensors are all there is."""
    model = build(kind).eval()
    before, told = model(images()), sizes(model)
    hands = edited(model, adam(model), least)
    for applied in reversed(hands.applied):
        assert applied.undo is not None
        old = {name: value.clone() for _, name, value in applied.undo.tensors}
        unfold(model, applied.graph, applied.edit, old)
    torch.testing.assert_close(model(images()), before, rtol=0, atol=1e-12)
    assert sizes(model) == told


def test_what_is_dropped_has_never_been() -> None:
    model = build("depthwise and norms").eval()
    before, told = model(images()), sizes(model)
    hands = edited(model, adam(model), least=False)
    hands.drop(len(hands.applied))
    assert torch.equal(model(images()), before)
    assert sizes(model) == told
    assert hands.journal == []
    assert hands.spent == 0
