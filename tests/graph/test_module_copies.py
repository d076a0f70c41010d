"""Copies of modules: tensors that a forward has left behind, functions, locks, wrappers; and what cannot be copied."""

from __future__ import annotations

import sys
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import weightfold as wf
from weightfold.errors import TraceError
from weightfold.graph.copies import independent_copy, meta_tensor, structural_copy
from weightfold.graph.exactness import check_group
from weightfold.graph.trace import trace


class Cache:
    """Keys and values of earlier calls, as generating models keep them."""

    def __init__(self, h: Tensor) -> None:
        self.layers = [(h, h.detach())]


class Slots:
    __slots__ = ("h",)

    def __init__(self, h: Tensor) -> None:
        self.h = h


KEPT: dict[str, Callable[[Tensor], Any]] = {
    "loss": lambda h: h.pow(2).mean(),
    "features": lambda h: h,
    "view": lambda h: h[:, :2],
    "list": lambda h: [h, h * 2],
    "tuple": lambda h: (h, None),
    "dict": lambda h: {"h": h, "inner": {0: [h]}},
    "object": Cache,
    "slots": Slots,
    "set": lambda h: {h},
    "function": lambda h: lambda: h,
    "complex": lambda h: torch.complex(h, h),
}


class Block(nn.Module):
    """Keeps what it computed last."""

    def __init__(self, keep: str) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 12), nn.Linear(12, 6)
        self.keep = keep
        self.kept: Any = None

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x).relu()
        self.kept = KEPT[self.keep](h)
        return x + self.b(h)


def network(keep: str) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 6), Block(keep), Block(keep), nn.Linear(6, 3)).double()


def inputs() -> Tensor:
    return torch.randn(4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def summary(net: nn.Module) -> Any:
    return [(g.name, g.admits, g.n_channels, len(g.axes)) for g in trace(net, inputs())]


@pytest.mark.parametrize("keep", KEPT)
def test_kept_tensors_do_not_matter(keep: str) -> None:
    net = network(keep)
    before = summary(net)
    net(inputs()).sum().backward()
    kept = net[1].kept
    assert summary(net) == before
    assert net[1].kept is kept
    net(inputs())
    assert summary(net) == before


def test_a_kept_tensor_that_the_forward_reads_is_a_constant_with_its_value() -> None:
    class Lazy(Block):
        def forward(self, x: Tensor) -> Tensor:
            if self.kept is None:
                self.kept = self.b.weight.sum(0)
            return self.b(self.a(x).relu() * self.kept)

    net = Lazy("loss").double()
    x = torch.randn(4, 6, dtype=torch.float64)
    net(x)
    graph = trace(net, x)
    checks = [c for g in graph if g.free for c in check_group(net, graph, g.name, x, torch.Generator().manual_seed(0))]
    assert not [c for c in checks if not c.error < 1e-9]


@pytest.mark.parametrize("keep", ["loss", "dict", "object"])
def test_a_compressor_is_prepared_in_the_middle_of_training(keep: str) -> None:
    net = network(keep).float()
    x, y = torch.randn(64, 5), torch.randint(3, (64,))
    optimizer = torch.optim.AdamW(net.parameters())
    F.cross_entropy(net(x), y).backward()
    optimizer.step()
    optimizer.zero_grad()
    compressor = wf.Compressor(
        net, x[:8], [wf.Fold(keep=0.5, at=0.3)], loss=F.cross_entropy, probe=[(x, y)], total_steps=10, max_increase=5.0
    )
    compressor.prepare(optimizer)
    for _ in range(10):
        F.cross_entropy(compressor.network(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
        compressor.step()
    assert any(event.accepted for event in compressor.events)


# what else modules hold -----------------------------------------------------------------------------------------------


class Holding(nn.Module):
    """A network with anything as an attribute."""

    def __init__(self, thing: Any = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(5, 12), nn.Linear(12, 3)
        self.thing = thing
        self.act = F.relu
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.act(self.a(x)))


HELD: dict[str, Callable[[], Any]] = {
    "lock": threading.Lock,
    "reentrant lock": threading.RLock,
    "condition": threading.Condition,
    "module of Python": lambda: sys,
    "random numbers": torch.Generator,
    "function": lambda: F.relu,
    "class": lambda: nn.Linear,
    "weak reference": lambda: weakref.ref(nn.ReLU()),
}


@pytest.mark.parametrize("name", HELD)
def test_what_modules_hold_is_copied_or_shared(name: str) -> None:
    net = Holding(HELD[name]())
    assert [g.name for g in trace(net, inputs()) if g.free] == ["a"]
    assert structural_copy(net).act is F.relu


def test_random_numbers_of_the_models_own_are_left_alone() -> None:
    class Noisy(Holding):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + torch.rand(3, generator=self.thing, dtype=x.dtype)

    net = Noisy(torch.Generator().manual_seed(3))
    before = net.thing.get_state()
    trace(net, inputs())
    independent_copy(net)(inputs())
    assert torch.equal(before, net.thing.get_state())


@pytest.mark.parametrize(
    ("thing", "kind"), [((k for k in range(3)), "generator"), ({"log": [sys.__stdout__]}, "TextIOWrapper")]
)
def test_what_cannot_be_copied_is_named_and_the_remedies_help(thing: Any, kind: str) -> None:
    net = nn.Sequential(nn.Sequential(nn.Linear(5, 5).double(), Holding(thing)))
    with pytest.raises(TraceError) as caught:
        trace(net, inputs())
    for part in ("'thing'", "module '0.1' of 'Sequential'", kind):
        assert part in str(caught.value)

    class Shared:
        def __deepcopy__(self, memo: Any) -> Shared:
            return self

    net[0][1].thing = Shared()
    assert len(trace(net, inputs()))
    net[0][1].thing = None
    assert len(trace(net, inputs()))


def test_weights_are_shared_cloned_or_without_storage() -> None:
    net = Holding()
    assert structural_copy(net).a.weight is net.a.weight
    own = independent_copy(net)
    assert own.a.weight is not net.a.weight
    assert torch.equal(own.a.weight, net.a.weight)
    assert structural_copy(net, meta_tensor).a.weight.is_meta


def test_references_inside_of_a_copy_lead_to_the_copy() -> None:
    net = Holding()
    net.thing = {"weak": weakref.ref(net.a), "proxy": weakref.proxy(net.b), "bound": net.a.forward, net.a: 1}
    twin = structural_copy(net)
    assert twin.thing["weak"]() is twin.a
    assert twin.thing["proxy"].weight is twin.b.weight
    assert twin.thing["bound"].__self__ is twin.a
    assert twin.thing[twin.a] == 1


def test_a_recursive_function_is_copied_once() -> None:
    net = Holding()

    def depth(n: int) -> int:
        return 0 if n == 0 or net.training is None else 1 + depth(n - 1)

    net.thing = depth
    twin = structural_copy(net)
    assert twin.thing is not depth
    assert twin.thing(3) == 3
    assert twin.thing.__closure__[1].cell_contents is twin or twin.thing.__closure__[0].cell_contents is twin


def test_weights_that_a_mode_changes_are_left_alone() -> None:
    class Merged(nn.Linear):
        """An adapter that is part of the weight in eval mode and apart from it in training."""

        def __init__(self) -> None:
            super().__init__(5, 4, dtype=torch.float64)
            self.down, self.up = nn.Parameter(torch.randn(2, 5).double()), nn.Parameter(torch.randn(4, 2).double())
            self.merged = False

        def train(self, mode: bool = True) -> Merged:
            super().train(mode)
            if self.merged == mode:
                self.weight.data += (-1 if mode else 1) * self.up.data @ self.down.data
                self.merged = not mode
            return self

        def forward(self, x: Tensor) -> Tensor:
            out = super().forward(x)
            return out if self.merged else out + x @ self.down.T @ self.up.T

    net = nn.Sequential(Merged(), nn.ReLU(), nn.Linear(4, 3).double()).eval()
    before, expected = net[0].weight.detach().clone(), net(inputs())
    trace(net, inputs())
    assert torch.equal(net[0].weight, before)
    assert torch.equal(net(inputs()), expected)
