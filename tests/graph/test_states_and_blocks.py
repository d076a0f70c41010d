"""Buffers that keep what is written into them, weights that are functions of others, blocks that meet channels.

Every edit that the rules alone admit is tried in evaluation and in training mode, in float64; the reference is the
network's own output before the edit.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from weightfold.graph import exactness
from weightfold.graph.apply import apply
from weightfold.graph.copies import independent_copy
from weightfold.graph.edit import permute
from weightfold.graph.group import ChannelGraph
from weightfold.graph.proof import prepared
from weightfold.graph.resize import with_sizes
from weightfold.graph.trace import trace


class Net(nn.Module):
    """A forward written on the spot."""

    def __init__(self, run: Callable[[nn.Module, Tensor], Tensor], **parts: object) -> None:
        super().__init__()
        for name, part in parts.items():
            plain = isinstance(part, Tensor) and not isinstance(part, nn.Parameter)
            self.register_buffer(name, part) if plain else setattr(self, name, part)
        self.run = run

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


def generic(net: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return net


def wrong(net: nn.Module, graph: ChannelGraph, x: Tensor) -> list[str]:
    """Admitted edits that change outputs, in either mode; buffers are the same before every forward."""
    out = []
    for training in (False, True):
        model = copy.deepcopy(net).double().train(training)
        model.register_forward_hook(Rewind(model))
        with exactness.float64():
            for group in graph:
                checks = exactness.check_group(model, graph, group.name, x.double(), torch.Generator().manual_seed(0))
                out += [f"{c.kind} of {c.group}: {c.error} {c.problem}" for c in checks if not c.error < 1e-9]
    return out


class Rewind:
    """Puts buffers back after each forward."""

    def __init__(self, model: nn.Module) -> None:
        self.before: dict[str, Tensor] = {}
        model.register_forward_pre_hook(self.keep)

    def keep(self, model: nn.Module, _: object) -> None:
        self.before = {name: b.clone() for name, b in model.named_buffers()}

    def __call__(self, model: nn.Module, _args: object, _out: object) -> None:
        for name, buffer in model.named_buffers():
            buffer.copy_(self.before[name])


def kept_mean(m: nn.Module, x: Tensor) -> Tensor:
    h = m.one(x)
    if m.training:
        m.mean.mul_(0.9).add_(h.detach().mean(0), alpha=0.1)
    return m.two(F.relu(h) * m.mean)


def copied_mean(m: nn.Module, x: Tensor) -> Tensor:
    h = m.one(x)
    if m.training:
        m.mean.copy_(h.detach().mean(0))
        return m.two(h)
    return m.two(h * m.mean)


def mean_as_output(m: nn.Module, x: Tensor) -> Tensor:
    h = m.one(x)
    if m.training:
        torch.tanh(h.detach().mean(0), out=m.mean)
        return m.two(h)
    return m.two(h - m.mean)


def row_of_a_table(m: nn.Module, x: Tensor) -> Tensor:
    h = m.one(x)
    if m.training:
        m.table[0].copy_(h.detach().mean(0))
        return m.two(h)
    return m.two(h * m.table[0])


def layers(**more: object) -> dict[str, object]:
    torch.manual_seed(0)
    return {"one": nn.Linear(5, 6), "two": nn.Linear(6, 3), **more}


BUFFERS = {
    "a running mean": lambda: Net(kept_mean, **layers(mean=torch.rand(6) + 0.5)),
    "a mean that is copied": lambda: Net(copied_mean, **layers(mean=torch.rand(6) + 0.5)),
    "a mean through out=": lambda: Net(mean_as_output, **layers(mean=torch.rand(6) + 0.5)),
    "a row of a table": lambda: Net(row_of_a_table, **layers(table=torch.rand(2, 6) + 0.5)),
}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", BUFFERS)
def test_what_is_written_into_a_buffer_are_its_channels(name: str, training: bool) -> None:
    net, x = generic(BUFFERS[name]()).train(training), torch.randn(4, 5)
    graph = prepared(net, x)
    assert "training" in graph.proved.modes or not training
    assert wrong(net, graph, x) == []
    assert wrong(net, graph, x) == [] or training


@pytest.mark.parametrize("name", ["a running mean", "a mean that is copied", "a mean through out="])
def test_a_buffer_that_only_training_writes_moves_with_its_channels(name: str) -> None:
    """Traced in training mode, the rules alone say so."""
    net, x = generic(BUFFERS[name]()).train(), torch.randn(4, 5)
    graph = trace(net, x)
    group = graph["one"]
    assert ("mean", 0) in {axis.key for axis in group.axes}
    reference = copy.deepcopy(net).eval()(x)
    apply(net, graph, permute(group, torch.tensor([3, 0, 5, 1, 2, 4])))
    torch.testing.assert_close(net.eval()(x), reference)


def spectral(into: int, out: int) -> nn.Module:
    return parametrizations.spectral_norm(nn.Linear(into, out))


@pytest.mark.parametrize("training", [False, True])
def test_spectral_norm_is_edited_only_where_that_is_exact(training: bool) -> None:
    torch.manual_seed(1)
    net = generic(nn.Sequential(nn.Linear(5, 6), nn.ReLU(), spectral(6, 8), nn.ReLU(), nn.Linear(8, 3)))
    x = torch.randn(4, 5)
    graph = prepared(net.train(training), x)
    assert graph.proved.modes == ("evaluation", "training")
    assert any("permute" in group.admits for group in graph)
    assert not any("merge" in group.admits for group in graph)
    assert wrong(net, graph, x) == []


def test_an_edit_in_training_mode_leaves_the_power_iteration_alone() -> None:
    torch.manual_seed(1)
    net, x = nn.Sequential(nn.Linear(5, 6), spectral(6, 8), nn.Linear(8, 3)), torch.randn(4, 5)
    graph = trace(net.eval(), x)
    before = {name: value.clone() for name, value in net.named_buffers()}
    _, undo = apply(net.train(), graph, permute(graph["0"], torch.tensor([5, 4, 3, 2, 1, 0])))
    undo.restore()
    assert all(torch.equal(value, before[name]) for name, value in net.named_buffers())


def test_a_copy_of_a_parametrized_layer_holds_the_copies_that_were_asked_for() -> None:
    net = nn.Sequential(spectral(4, 6), parametrizations.weight_norm(nn.Linear(6, 3)))
    twin = independent_copy(net, lambda t: nn.Parameter(t.detach().double()) if t.requires_grad else t.double())
    named = [*twin.named_parameters(), *twin.named_buffers()]
    assert [value.dtype for _, value in named] == [torch.float64] * len(named)
    assert [name for name, _ in named] == [name for name, _ in [*net.named_parameters(), *net.named_buffers()]]
    x = torch.randn(2, 4)
    torch.testing.assert_close(twin.eval()(x.double()), net.eval()(x).double(), rtol=1e-6, atol=1e-6)


def maxout_beside(m: nn.Module, x: Tensor) -> Tensor:
    h = m.one(x)
    return m.two(torch.cat([h.unflatten(1, (3, 2)).amax(-1), F.relu(h)], 1))


def heads_beside(m: nn.Module, x: Tensor) -> Tensor:
    h = m.one(x)
    strength = h.view(x.shape[0], 3, 2).norm(dim=-1)
    return m.two(torch.cat([m.side(x), strength, h], 1))


def image_with_scales(m: nn.Module, x: Tensor) -> Tensor:
    image = m.spread(x).view(x.shape[0], -1, 3, 3)
    return m.read(F.relu(image * (1 + m.scale(x)[:, :, None, None]))).mean((2, 3))


def image_with_table(m: nn.Module, x: Tensor) -> Tensor:
    image = m.spread(x).view(x.shape[0], -1, 3, 3)
    return m.read(F.relu(image * m.gain[:, None, None])).mean((2, 3))


def half_moved(move: Callable[[Tensor], Tensor]) -> Callable[[nn.Module, Tensor], Tensor]:
    """Half of the channels are moved through time, the others stay."""

    def run(m: nn.Module, x: Tensor) -> Tensor:
        a, b = m.one(x[:, None] * m.steps[:, None]).chunk(2, -1)
        return m.two(torch.cat([move(a), b], -1)).flatten(1)

    return run


MOVED = {
    "roll": lambda a: a.roll(1, 1),
    "flip": lambda a: a.flip(1),
    "shift": lambda a: F.pad(a, (0, 0, 1, 0))[:, :-1],
    "reflection": lambda a: F.pad(a.mT, (1, 0), mode="reflect").mT[:, :-1],
    "order": lambda a: a.index_select(1, torch.tensor([3, 1, 0, 2])),
    "slices": lambda a: torch.cat([a[:, 2:], a[:, :2]], 1),
}


@pytest.mark.parametrize("name", MOVED)
def test_channels_that_are_moved_through_time_are_not_of_the_kind_of_those_that_stay(name: str) -> None:
    torch.manual_seed(4)
    parts = {"one": nn.Linear(5, 8), "two": nn.Linear(8, 3), "steps": torch.arange(1.0, 5.0)}
    net, x = generic(Net(half_moved(MOVED[name]), **parts)).eval(), torch.randn(3, 5)
    graph = with_sizes(net, x, trace(net, x))
    assert sum("permute" in group.admits for group in graph) >= 1
    assert wrong(net, graph, x) == []


@pytest.mark.parametrize(
    "shuffle", [F.channel_shuffle, lambda x, g: x.unflatten(1, (g, -1)).transpose(1, 2).flatten(1, 2)]
)
def test_shuffled_channels_are_removed_only_where_the_shuffle_stays_the_same(shuffle: Callable) -> None:
    torch.manual_seed(5)
    layers = {"one": nn.Conv2d(3, 8, 1), "two": nn.Conv2d(8, 2, 1)}
    net, x = generic(Net(lambda m, x: m.two(F.relu(shuffle(m.one(x), 2))), **layers)).eval(), torch.randn(2, 3, 4, 4)
    graph = with_sizes(net, x, trace(net, x))
    assert any("permute" in group.admits for group in graph)
    assert wrong(net, graph, x) == []


BLOCKS = {
    "maxout beside its channels": lambda: Net(maxout_beside, one=nn.Linear(5, 6), two=nn.Linear(9, 3)),
    "norms of heads among channels": lambda: Net(
        heads_beside, one=nn.Linear(5, 6), side=nn.Linear(5, 4), two=nn.Linear(13, 3)
    ),
    "an image with scales": lambda: Net(
        image_with_scales, spread=nn.Linear(5, 36), scale=nn.Linear(5, 4), read=nn.Conv2d(4, 3, 3, padding=1)
    ),
    "an image with a table": lambda: Net(
        image_with_table, spread=nn.Linear(5, 36), gain=nn.Parameter(torch.rand(4)), read=nn.Conv2d(4, 3, 1)
    ),
}


@pytest.mark.parametrize("name", BLOCKS)
def test_blocks_are_followed_wherever_they_meet_channels(name: str) -> None:
    torch.manual_seed(2)
    net, x = generic(BLOCKS[name]()).eval(), torch.randn(3, 5)
    assert wrong(net, with_sizes(net, x, trace(net, x)), x) == []


@pytest.mark.parametrize("name", ["an image with scales", "an image with a table"])
def test_a_vector_laid_out_as_an_image_keeps_free_channels(name: str) -> None:
    net, x = BLOCKS[name](), torch.randn(3, 5)
    group = prepared(net, x)["spread"]
    assert group.n_channels == 4
    assert {"permute", "remove", "merge"} <= group.admits
    assert {axis.tensor.partition(".")[0] for axis in group.axes} >= {"spread", "read"}


@pytest.mark.parametrize("rnn", [nn.GRU, nn.LSTM, nn.RNN])
def test_learned_rows_that_a_recurrent_layer_reads_in_order_are_fixed(rnn: type[nn.RNNBase]) -> None:
    torch.manual_seed(6)
    parts = {"rows": nn.Parameter(torch.randn(4, 5)), "rnn": rnn(5, 6, batch_first=True), "two": nn.Linear(6, 3)}
    net = generic(Net(lambda m, x: m.two(m.rnn(m.rows * x[:, None])[0]), **parts)).eval()
    graph = trace(net, torch.randn(3, 5))
    assert not any(axis.key == ("rows", 0) for group in graph for axis in group.axes)
