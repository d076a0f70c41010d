"""Lump: planted duplicates in every covered architecture, constants, heads, targets, and the readers' least squares."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from weightfold.compressor import Compressor
from weightfold.errors import ConfigError, DataError
from weightfold.graph import exactness
from weightfold.graph.apply import apply
from weightfold.graph.resize import with_sizes
from weightfold.graph.trace import trace
from weightfold.ledger import Ledger
from weightfold.methods.base import Moment, Proposal
from weightfold.methods.lump import Lump
from weightfold.models import NAMES, build
from weightfold.models.task import Classes, ImageInput, NextToken, TaskSpec, TextInput
from weightfold.repair import distance

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import architectures

HAND = (
    *("hand-vgg-bn", "hand-resnet-pad", "hand-resnext", "hand-densenet", "hand-googlenet", "hand-unet", "hand-siamese"),
    *("hand-mobilenet-v3", "hand-conv3d", "hand-wavenet", "hand-swiglu-transformer", "hand-fused-qkv-transformer"),
    *("hand-gru-cell-loop", "hand-crnn", "hand-graph-convolution", "torch-transformer-encoder", "torch-transformer"),
)


def task_of(name: str) -> TaskSpec:
    if name in ("char-gpt", "gru"):
        output = NextToken(vocab=30) if name == "char-gpt" else Classes(n=3)
        return TaskSpec(input=TextInput(vocab=30, context=12), output=output)
    return TaskSpec(input=ImageInput(channels=1, height=8, width=8), output=Classes(n=10))


def built_in(name: str) -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    task = task_of(name)
    model = build(name, task).eval()
    architectures.enliven_(model)
    return model, task.example(2)


def by_hand(name: str) -> tuple[nn.Module, Any]:
    model, args, kwargs = architectures.by_name(name).build()
    return model, (args, kwargs)


CASES: dict[str, Callable[[], tuple[nn.Module, Any]]] = {
    **{name: (lambda name=name: built_in(name)) for name in NAMES},
    **{name: (lambda name=name: by_hand(name)) for name in HAND},
}


def moment(model: nn.Module, graph: Any, example: Any) -> Moment:
    return Moment(model, graph, 0, 0, {}, example, torch.Generator().manual_seed(0))


def doubled(example: Any) -> Any:
    raise_up = lambda v: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v  # noqa: E731
    return torch.utils._pytree.tree_map(raise_up, example)


def applied(model: nn.Module, graph: Any, proposals: list[Proposal]) -> None:
    for proposal in proposals:
        for edit in proposal.edits:
            graph, _ = apply(model, graph, edit)


@pytest.mark.parametrize("name", CASES)
def test_planted_duplicates_are_found_and_merged_exactly(name: str) -> None:
    model, example = CASES[name]()
    with exactness.float64():
        model, example = model.double().eval(), doubled(example)
        graph = with_sizes(model, example, trace(model, example))
        generator = torch.Generator().manual_seed(0)
        planted = {}
        for group in graph:
            if "merge" in group.admits and group.kind == "channels" and group.role("write"):
                pair = exactness._one_per_block(group, generator, 2)
                if pair:
                    exactness.plant_duplicates(model, group, *pair)
                    planted[group.name] = len(pair[0])
        assert planted
        before = exactness.outputs(model, example)
        proposals = Lump(eps=0.0).step(moment(model, graph, example))
        applied(model, graph, proposals)
        assert exactness.relative_error(before, exactness.outputs(model, example)) <= 1e-12
    gone = {p.edit.group: p.edit.n_channels - p.edit.n_after for p in proposals}
    assert {name: gone.get(name) for name in planted} == planted


@pytest.mark.parametrize("name", ["mlp", "resnet9", "gru", "vit-tiny"])
def test_nothing_is_merged_in_a_network_without_duplicates(name: str) -> None:
    model, example = built_in(name)
    graph = with_sizes(model, example, trace(model, example))
    assert Lump(eps=0.0).step(moment(model, graph, example)) == []


@pytest.mark.parametrize(("act", "reader"), [(nn.Sigmoid, "linear"), (nn.ReLU, "linear"), (nn.Sigmoid, "conv")])
def test_constant_channels_go_exactly(act: type[nn.Module], reader: str) -> None:
    """Into the bias of a linear reader; into another constant one where zero padding makes the border differ."""
    torch.manual_seed(0)
    if reader == "linear":
        net = nn.Sequential(nn.Linear(4, 8), act(), nn.Linear(8, 3)).double()
        x = torch.randn(10, 4).double()
    else:
        net = nn.Sequential(nn.Conv2d(2, 8, 3, padding=1), act(), nn.Conv2d(8, 3, 3, padding=1)).double()
        x = torch.randn(4, 2, 5, 5).double()
    for channel, bias in ((2, 0.7), (5, -0.4)):
        net[0].weight.data[channel] = 0
        net[0].bias.data[channel] = bias
    before, graph = net(x).detach(), trace(net, x)
    [proposal] = Lump(eps=0.0).step(moment(net, graph, x))
    assert proposal.edit.n_after == (6 if reader == "linear" else 7)
    applied(net, graph, [proposal])
    assert (net(x) - before).abs().max() <= 1e-12


def test_equal_heads_become_one() -> None:
    torch.manual_seed(0)
    net = Attention(24, 4).double().eval()
    with torch.no_grad():
        for projection in (net.q, net.k, net.v):
            projection.weight[12:18], projection.bias[12:18] = (
                projection.weight[:6].clone(),
                projection.bias[:6].clone(),
            )
    x = torch.randn(2, 5, 24).double()
    before, graph = net(x).detach(), trace(net, x)
    graph = with_sizes(net, x, graph)
    proposals = Lump(eps=0.0).step(moment(net, graph, x))
    assert [p.why["kinds"] for p in proposals if p.first] == [{"equal": 1}]
    applied(net, graph, proposals)
    assert net.o.in_features == 18
    assert (net(x) - before).abs().max() <= 1e-12


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.size = width // heads
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (p(x).unflatten(-1, (-1, self.size)).transpose(1, 2) for p in (self.q, self.k, self.v))
        y = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.o(y.transpose(1, 2).flatten(2))


# targets --------------------------------------------------------------------------------------------------------------


def mlp(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 2)).double()


@pytest.mark.parametrize("target", [0.75, 0.5, 0.25])
@pytest.mark.parametrize("given", [True, False])
def test_a_target_is_met_and_nearly_used_up(target: float, given: bool) -> None:
    net = mlp()
    x = torch.randn(512, 6).double()
    graph = trace(net, x[:1])
    small = copy.deepcopy(net)
    method = Lump(target=target, inputs=[x] if given else [])
    applied(small, graph, method.step(moment(net, graph, x[:1])))
    count = lambda m: sum(p.numel() for p in m.parameters())  # noqa: E731
    assert 0.9 * target <= count(small) / count(net) <= target
    random = copy.deepcopy(net)
    for p in random.parameters():
        p.data = p.data[torch.randperm(len(p))]
    assert distance(small, net, [x])["rms"] < 0.5 * distance(random, net, [x])["rms"]


def test_readers_are_the_least_squares_solution() -> None:
    """One hidden layer: the new reader is numpy's solution on the kept units, with an intercept."""
    net = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 3)).double()
    x = torch.randn(400, 4).double()
    graph = trace(net, x[:1])
    small = copy.deepcopy(net)
    [proposal] = Lump(target=0.5, inputs=[x], ridge=0.0).step(moment(net, graph, x[:1]))
    applied(small, graph, [proposal])
    hidden = net[:2](x)[:, proposal.edit.carry].detach().numpy()
    wide = np.concatenate([hidden, np.ones((400, 1))], 1)
    best = np.linalg.lstsq(wide, net(x).detach().numpy(), rcond=None)[0]
    assert np.allclose(small[2].weight.detach().numpy(), best[:-1].T, atol=1e-5)
    assert np.allclose(small[2].bias.detach().numpy(), best[-1], atol=1e-5)


def test_data_make_a_lumping_by_tolerance_better() -> None:
    net, x = mlp(), torch.randn(512, 6).double()
    graph, lost = trace(net, x[:1]), {}
    for given in (True, False):
        small = copy.deepcopy(net)
        method = Lump(eps=1.1, inputs=[x] if given else [])
        applied(small, graph, method.step(moment(net, graph, x[:1])))
        lost[given] = distance(small, net, [x])["rms"]
    assert lost[True] < 0.7 * lost[False]


def test_everything_is_in_the_ledger(tmp_path: Path) -> None:
    net = mlp()
    net[0].weight.data[3], net[0].bias.data[3] = -net[0].weight.data[1], -net[0].bias.data[1]
    with Ledger.create(tmp_path / "l.db", run={"seed": 0}) as ledger:
        compressor = Compressor(net, torch.zeros(1, 6).double(), [Lump(eps=0.0)], ledger=ledger)
        compressor.prepare()
        [event] = compressor.once()
        compressor.convert()
        ledger.verify()
        [body] = [e.body for e in ledger.entries() if e.kind == "edit"]
    assert (event.channels_before, event.channels_after) == (32, 31)
    assert body["why"]["kinds"] == {"flipped": 1}
    [gone] = body["why"]["dropped"]
    assert {gone["channel"], gone["partner"]} == {1, 3}
    assert gone["coefficient"] == pytest.approx(-1.0)


# refusals -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("eps", [-0.1, float("nan"), float("inf")])
def test_a_tolerance_that_is_none_is_refused(eps: float) -> None:
    with pytest.raises(ConfigError, match="'eps' setting of LumpConfig"):
        Lump(eps=eps)


def test_two_ways_to_say_how_far_are_refused() -> None:
    with pytest.raises(ConfigError, match="one of 'eps' and 'target'"):
        Lump(eps=0.1, target=0.5)


def test_a_target_out_of_reach_is_refused() -> None:
    net, x = mlp(), torch.zeros(1, 6).double()
    with pytest.raises(ConfigError, match="cannot be met: the narrowest widths leave"):
        Lump(target=0.001).step(moment(net, trace(net, x), x))


def test_a_network_that_cannot_be_lumped_says_why() -> None:
    net = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 2))
    with pytest.raises(ConfigError, match="normalised across the group"):
        Lump(eps=0.0).prepare(moment(net, trace(net, torch.zeros(1, 4)), torch.zeros(1, 4)))


def test_nothing_stands_in_for_whole_numbers() -> None:
    model, example = built_in("gru")
    graph = trace(model, example)
    with pytest.raises(DataError, match="cannot stand in"):
        Lump(target=0.5).step(moment(model, graph, example))


class Kept(nn.Module):
    """Keeps what it computed, with its history, as modules with losses of their own do."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 12), nn.Linear(12, 3)
        self.last: Tensor | None = None

    def forward(self, x_BC: Tensor) -> Any:
        out_BC = self.b(torch.relu(self.a(x_BC)))
        self.last = out_BC.square().mean()
        return self.returned(out_BC)

    def returned(self, out_BC: Tensor) -> Any:
        return out_BC


class LossAlone(Kept):
    def returned(self, out_BC: Tensor) -> Any:
        return self.last


class LossFirst(Kept):
    def returned(self, out_BC: Tensor) -> Any:
        return {"loss": self.last, "out": out_BC}


@pytest.mark.parametrize("how", [{"target": 0.6}, {"eps": 5.0}], ids=["target", "tolerance"])
@pytest.mark.parametrize("kind", [Kept, LossAlone, LossFirst])
def test_networks_that_keep_or_return_a_loss_are_lumped(kind: type[nn.Module], how: dict[str, float]) -> None:
    torch.manual_seed(0)
    net, x = kind(), torch.randn(16, 6)
    net(x)  # now it holds a tensor with a history, which no `deepcopy` copies
    compressor = Compressor(net, x, [Lump(**how)])
    compressor.prepare()
    compressor.once([x])
    small = compressor.convert()
    assert small.a.out_features < 12
    small(x)
