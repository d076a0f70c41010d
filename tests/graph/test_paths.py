"""Layers that only the training forward runs follow; those that neither forward runs are told of."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import weightfold as wf
from weightfold.errors import TraceError
from weightfold.graph import edit
from weightfold.graph.apply import apply
from weightfold.graph.group import ChannelGraph
from weightfold.graph.paths import _calls, other_mode
from weightfold.graph.proof import prepared
from weightfold.graph.trace import trace


class Trunk(nn.Module):
    """Two layers and a third one, `extra`, that only some path runs."""

    def __init__(self, extra: nn.Module | None = None) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 12), nn.Linear(12, 3)
        self.extra = extra if extra is not None else nn.Linear(12, 5)

    def hidden(self, x: Tensor) -> Tensor:
        return F.relu(self.a(x))


class Auxiliary(Trunk):
    def forward(self, x: Tensor) -> Any:
        h = self.hidden(x)
        return (self.b(h), self.extra(h)) if self.training else self.b(h)


class NotTraining(Trunk):
    """The other way around: evaluation computes more."""

    def forward(self, x: Tensor) -> Any:
        h = self.hidden(x)
        if self.training:
            return self.b(h)
        return self.b(h), self.extra(h)


class InAHelper(Trunk):
    def forward(self, x: Tensor) -> Any:
        return self.finish(self.hidden(x))

    def finish(self, h: Tensor) -> Any:
        return {"main": self.b(h)} | ({"extra": [self.extra(h)]} if self.training else {})


class Adapter(Trunk):
    """A parallel way from the input to the hidden units, in training alone."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(6, 12))

    def forward(self, x: Tensor) -> Tensor:
        h = self.hidden(x)
        return self.b(h + self.extra(x) if self.training else h)


class LossInside(Trunk):
    """Training returns a penalty on the hidden units: a sum reads them."""

    def forward(self, x: Tensor) -> Any:
        h = self.hidden(x)
        return (self.b(h), h.abs().sum()) if self.training else self.b(h)


class Scaled(Trunk):
    """A width enters the training forward."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.hidden(x)
        return self.b(h / h.shape[-1] if self.training else h)


class Normalised(Trunk):
    def forward(self, x: Tensor) -> Tensor:
        h = self.hidden(x)
        return self.b(F.layer_norm(h, (h.shape[-1],)) if self.training else h)


def axes(graph: ChannelGraph, name: str) -> set[tuple[str, str]]:
    return {(axis.tensor, axis.role) for axis in graph[name].axes}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("kind", [Auxiliary, NotTraining, InAHelper])
def test_layers_of_either_mode_follow(kind: type[Trunk], training: bool) -> None:
    net, x = kind().double().train(training), torch.randn(4, 6, dtype=torch.float64)
    graph = trace(net, x)
    assert net.training == training
    assert axes(graph, "a") >= {("extra.weight", "read"), ("b.weight", "read")}
    assert graph["a"].admits == {"permute", "remove", "merge", "rescale"}
    assert {axis.tap for axis in graph["a"].role("read")} == {("b", -1)}
    before = {mode: net.train(mode)(x) for mode in (False, True)}
    apply(net, graph, edit.permute(graph["a"], torch.arange(12).roll(1)))
    for mode, out in before.items():
        torch.testing.assert_close(net.train(mode)(x), out)


@pytest.mark.parametrize("training", [False, True])
def test_what_only_training_writes_follows(training: bool) -> None:
    graph = trace(Adapter().train(training), torch.randn(4, 6))
    assert axes(graph, "a") >= {("extra.weight", "write"), ("extra.bias", "write")}


@pytest.mark.parametrize("training", [False, True])
def test_what_either_mode_forbids_is_forbidden(training: bool) -> None:
    graph = trace(LossInside().train(training), torch.randn(4, 6))
    assert graph["a"].read_elsewhere
    assert "merge" not in graph["a"].admits
    graph = trace(Normalised().train(training), torch.randn(4, 6))
    assert graph["a"].admits == {"permute"}
    assert 12.0 in trace(Scaled().train(training), torch.randn(4, 6)).constants


class Flagged(Trunk):
    def forward(self, x: Tensor, more: bool = False) -> Any:
        h = self.hidden(x)
        return (self.b(h), self.extra(h)) if more else self.b(h)


class Tasks(nn.Module):
    """A head for each task, of which a call runs one."""

    def __init__(self, heads: nn.Module) -> None:
        super().__init__()
        self.a, self.heads = nn.Linear(6, 12), heads

    def forward(self, x: Tensor, task: Any = 0) -> Tensor:
        return self.heads[task](F.relu(self.a(x)))


class Encoders(nn.Module):
    """Two encoders, of which a call runs one, before the same head."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.head = nn.Linear(6, 12), nn.Linear(6, 12), nn.Linear(12, 3)

    def forward(self, x: Tensor, right: bool = False) -> Tensor:
        return self.head(F.relu(self.right(x) if right else self.left(x)))


class Nested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.body = nn.Linear(6, 6), Flagged()

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self.stem(x))


class ByName(Trunk):
    def forward(self, x: Tensor, which: str = "b") -> Tensor:
        return getattr(self, which)(self.hidden(x))


UNRUN: dict[str, tuple[Callable[[], nn.Module], str, str]] = {
    "flag": (Flagged, "a", "extra"),
    "list of heads": (lambda: Tasks(nn.ModuleList([nn.Linear(12, 3), nn.Linear(12, 4)])), "a", "heads.1"),
    "deep heads": (
        lambda: Tasks(nn.ModuleList([nn.Linear(12, 3), nn.Sequential(nn.ReLU(), nn.Linear(12, 4))])), "a", "heads.1"
    ),
    "encoders": (Encoders, "left", "right"),
    "nested": (Nested, "body.a", "body.extra"),
    "by name": (ByName, "a", "extra"),
}  # fmt: skip


@pytest.mark.parametrize("name", UNRUN)
def test_a_layer_that_does_not_run_is_named(name: str) -> None:
    make, group, layer = UNRUN[name]
    graph = trace(make(), torch.randn(4, 6))
    assert not graph[group].admits
    assert not graph[group].gauges
    assert all(f"the layer '{layer}'" in reason for reason in graph[group].reasons.values())
    frozen = [f.reason for f in graph.frozen if f.tensor == f"{group}.weight" and f.dim == 0]
    assert f"the layer '{layer}'" in frozen[-1]


def test_an_example_that_runs_it_frees_the_channels() -> None:
    assert trace(Flagged(), {"x": torch.randn(4, 6), "more": True})["a"].free


def test_taking_the_layer_out_frees_the_channels() -> None:
    net = Flagged()
    del net.extra
    assert trace(net, torch.randn(4, 6))["a"].free


def test_a_layer_that_no_forward_names_is_left_over() -> None:
    net = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 3))
    net.add_module("3", nn.Identity())
    net.get_submodule("3").register_parameter("left_over", nn.Parameter(torch.zeros(12)))
    assert trace(net, torch.randn(4, 6))["0"].free


class Unequal(Trunk):
    def forward(self, x: Tensor, more: bool = False) -> Any:
        return self.extra(x) if more else self.b(self.hidden(x))


class Pair(nn.Module):
    """Two blocks of one kind, of which the network runs the extra layer of the second alone."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = Flagged(), Flagged()

    def forward(self, x: Tensor) -> Any:
        return self.one(x), self.two(x, more=True)


def test_which_of_like_blocks_runs_a_layer_is_the_network_s_own_choice() -> None:
    graph = trace(Pair(), torch.randn(4, 6))
    assert graph["one.a"].free
    assert graph["two.a"].free


def test_a_layer_of_other_widths_stands_in_no_way() -> None:
    assert trace(Unequal(nn.Linear(7, 5)), torch.randn(4, 6))["a"].free


class Dropping(Trunk):
    """Mentions the mode, but only to drop."""

    def forward(self, x: Tensor) -> Tensor:
        h = F.dropout(self.hidden(x), 0.5, self.training)
        return self.b(F.dropout(h, p=0.1 if self.training else 0.0)) + 0 * self.extra(h)[..., :3]


ALIKE = {
    "plain": lambda: nn.Sequential(nn.Linear(6, 8), nn.Dropout(), nn.Linear(8, 3)),
    "batch norm": lambda: nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)),
    "dropout by hand": Dropping,
    "attention": lambda: nn.TransformerEncoderLayer(6, 2, 8),
}


@pytest.mark.parametrize("name", ALIKE)
def test_forwards_that_only_drop_are_traced_once(name: str) -> None:
    net = ALIKE[name]()
    state = {k: v.clone() for k, v in net.state_dict().items()}
    assert other_mode(net, torch.randn(4, 6)) is None
    assert all(torch.equal(v, state[k]) for k, v in net.state_dict().items())


class Merging(Trunk):
    """Merges a weight into another one when it goes into evaluation; to be set back in training."""

    def train(self, mode: bool = True) -> Merging:
        with torch.no_grad():
            self.a.weight += (0.0 if mode else 1.0) if mode != self.training else 0.0
        return super().train(mode)  # pyright: ignore

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.hidden(x)) * (1 if self.training else 2) + 0 * self.extra(self.hidden(x)).sum()


def test_looking_at_the_other_mode_changes_no_weight() -> None:
    net = Merging()
    before = net.a.weight.detach().clone()
    assert other_mode(net, torch.randn(4, 6)) is not None
    assert torch.equal(net.a.weight, before)


class Bare(Auxiliary):
    """A training forward that cannot be followed."""

    def forward(self, x: Tensor) -> Any:
        h = self.hidden(x)
        if self.training and float(h.sum()) > -1e9:
            return self.b(h), self.extra(h)
        return self.b(h)


def test_a_training_forward_that_cannot_be_followed_leaves_its_layers_named() -> None:
    graph = trace(Bare().eval(), torch.randn(4, 6))
    assert not graph["a"].admits
    assert all("the layer 'extra'" in reason for reason in graph["a"].reasons.values())


# branches on numbers, in training alone -------------------------------------------------------------------------------


class SkipsAtRandom(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 2)

    def forward(self, x_BC: Tensor) -> Tensor:
        h_BH = torch.relu(self.a(x_BC))
        if self.training and torch.rand(1).item() < 0.2:
            return self.c(h_BH)
        return self.c(h_BH + torch.relu(self.b(h_BH)))


class CountsInABuffer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.c = nn.Linear(4, 8), nn.Linear(8, 2)
        self.register_buffer("bank_K", torch.zeros(12))
        self.register_buffer("at", torch.zeros(1, dtype=torch.long))

    def forward(self, x_BC: Tensor) -> Tensor:
        h_BH = torch.relu(self.a(x_BC))
        if self.training:
            at = int(self.at)
            self.bank_K[at : at + 1] = float(h_BH.detach().mean())
            self.at[0] = (at + 1) % 12
        return self.c(h_BH)


BRANCHING = {
    "a batch norm that averages all batches": lambda: nn.Sequential(
        nn.Linear(4, 8), nn.BatchNorm1d(8, momentum=None), nn.ReLU(), nn.Linear(8, 2)
    ),
    "layers skipped at random": SkipsAtRandom,
    "a place counted in a buffer": CountsInABuffer,
}


@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
@pytest.mark.parametrize("name", BRANCHING)
def test_a_branch_of_training_alone_is_no_hindrance_in_either_mode(name: str, training: bool) -> None:
    torch.manual_seed(0)
    net = BRANCHING[name]().train(training)
    graph = prepared(net, torch.randn(3, 4))
    assert {kind for group in graph for kind in group.admits} >= {"permute", "remove", "merge"}
    assert all(module.training == training for module in net.modules())


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 4)

    def forward(self, x_BC: Tensor) -> Tensor:
        return self.a(x_BC) if x_BC.sum() > 0 else x_BC


def test_a_branch_of_both_modes_is_refused_with_its_line() -> None:
    with pytest.raises(TraceError, match=r"branches on the values of a tensor.*x_BC.sum"):
        trace(Branches().train(), torch.ones(3, 4))


def _chosen(net: nn.Module, x: Tensor) -> Tensor:
    return net.one(x) if net.training else net.two(x)


class Delegating(nn.Module):
    """What runs is written outside of the module: by a global name, in a closure, behind a partial."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.stem, self.one, self.two, self.head = nn.Linear(5, 6), nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(8, 3)
        choose = lambda net, x: net.one(x) if net.training else net.two(x)  # noqa: E731
        self.run = {
            "global": lambda net, x: _chosen(net, x),
            "closure": lambda net, x: choose(net, x),
            "partial": partial(choose),
        }[how]

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.run(self, torch.relu(self.stem(x)))))


@pytest.mark.parametrize("how", ["global", "closure", "partial"])
def test_like_layers_of_which_each_mode_runs_one_follow_together(how: str) -> None:
    """Both modes call the same functions on the same shapes: only the weights tell them apart."""
    torch.manual_seed(0)
    net, x = Delegating(how).eval(), torch.randn(4, 5)
    graph = wf.trace(net, x)
    tensors = {axis.tensor for axis in graph["stem"].axes}
    assert {"one.weight", "two.weight"} <= tensors
    assert not prepared(net, x).proved.withdrawn


def test_without_storage_a_value_that_is_asked_for_does_not_double_the_trace() -> None:
    class Asking(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            scale = 2.0 if self.training and x.sum().item() > 1e9 else 1.0
            return self.b(self.a(x).relu() * (1.0 if bool(x.sum() > 1e9) else scale))

    with torch.device("meta"):
        net, x = Asking(), torch.empty(2, 4)
    assert _calls(net, x, False) is not None
