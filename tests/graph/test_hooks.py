"""Forward hooks are part of what is traced; hooks that only watch are not, and nothing that is theirs is touched."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune, spectral_norm, weight_norm

import weightfold as wf
from weightfold.errors import TraceError
from weightfold.graph.copies import independent_copy, structural_copy
from weightfold.graph.exactness import check_group
from weightfold.graph.observe import Observer
from weightfold.graph.trace import trace

SEEN: list[Tensor] = []
BY_NAME: dict[str, list[Tensor]] = {"first": []}
COUNT = 0


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    layers = (nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, 3))
    return nn.Sequential(*layers).double().eval()


def inputs() -> Tensor:
    return torch.randn(4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def assert_exact(net: nn.Module, x: Any, *, free: bool = True) -> None:
    """Every edit that is admitted leaves all outputs as they are."""
    graph = trace(net, x)
    names = [group.name for group in graph if group.free]
    assert names or not free
    checks = [c for name in names for c in check_group(net, graph, name, x, torch.Generator().manual_seed(0))]
    assert not [c for c in checks if not c.error < 1e-9]


# hooks that change values ---------------------------------------------------------------------------------------------


class Scaled:
    """A hook that is an object."""

    def __init__(self, factor: Tensor) -> None:
        self.factor = factor

    def __call__(self, module: nn.Module, args: Any, out: Tensor) -> Tensor:
        return out * self.factor


def doubled(module: nn.Module, args: Any, out: Tensor) -> Tensor:
    return 2 * out


def in_place(module: nn.Module, args: Any, out: Tensor) -> None:
    out.mul_(torch.linspace(1, 2, 12, dtype=out.dtype))


def by_keyword(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return (args[0] + args[0].flip(-1),), kwargs


def replaced(factor: Tensor, module: nn.Module, args: Any, out: Tensor) -> Tensor:
    return out * factor


def steering(net: nn.Sequential) -> None:
    direction = torch.randn(12, dtype=torch.float64)
    net[2].register_forward_hook(lambda module, args, out: out + direction)


def adapter(net: nn.Sequential) -> None:
    net.add_module("down", nn.Linear(12, 4).double())
    net.add_module("up", nn.Linear(4, 12).double())
    net[2].register_forward_hook(lambda module, args, out: out + net.up(net.down(args[0])))
    body = nn.Sequential.forward
    net.forward = lambda x: body(nn.Sequential(*list(net)[:5]), x)


CHANGES: dict[str, Callable[[nn.Sequential], Any]] = {
    "pre-hook": lambda net: net[2].register_forward_pre_hook(lambda m, a: (a[0] + a[0].flip(-1),)),
    "pre-hook with keywords": lambda net: net[2].register_forward_pre_hook(by_keyword, with_kwargs=True),
    "function": lambda net: net[0].register_forward_hook(doubled),
    "table": lambda net: net[0].register_forward_hook(Scaled(torch.linspace(1, 2, 12, dtype=torch.float64))),
    "partial": lambda net: net[1].register_forward_hook(functools.partial(replaced, torch.rand(12).double())),
    "in place": lambda net: net[0].register_forward_hook(in_place),
    "residual": lambda net: net[2].register_forward_hook(lambda m, a, out: out + a[0]),
    "on the root": lambda net: net.register_forward_hook(lambda m, a, out: out.softmax(-1)),
    "before the root": lambda net: net.register_forward_pre_hook(lambda m, a: (a[0] / a[0].norm(),)),
    "first of two": lambda net: (steering(net), net[2].register_forward_hook(doubled, prepend=True)),
    "always called": lambda net: net[1].register_forward_hook(doubled, always_call=True),
    "steering vector": steering,
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_hook_that_changes_values_is_traced(name: str) -> None:
    net = mlp()
    CHANGES[name](net)
    assert_exact(net, inputs())


def test_a_hook_with_layers_of_its_own_is_traced_though_it_changes_nothing_yet() -> None:
    net = mlp()
    down, up = nn.Linear(12, 4).double(), nn.Linear(4, 12, bias=False).double()
    net[2].down, net[2].up = down, up
    nn.init.zeros_(up.weight)
    net[2].register_forward_hook(lambda module, args, out: out + module.up(module.down(args[0])))
    assert ("2.up.weight", 1) in {axis.key for axis in trace(net, inputs())["2.down"].axes}
    nn.init.normal_(up.weight)
    assert_exact(net, inputs())


REPARAMETRIZED: dict[str, Callable[[nn.Linear], Any]] = {
    "weight norm": weight_norm,
    "spectral norm": spectral_norm,
    "pruned": lambda layer: prune.l1_unstructured(layer, "weight", 0.3),
    "pruned twice": lambda layer: [prune.random_unstructured(layer, "weight", 0.3) for _ in range(2)],
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("name", REPARAMETRIZED)
@pytest.mark.parametrize("ran", [False, True])
def test_hooks_that_compute_the_weight_are_traced(name: str, *, ran: bool) -> None:
    net = mlp()
    REPARAMETRIZED[name](net[0])
    if ran:
        net(inputs()).sum().backward()
    graph = trace(net, inputs())
    generator = torch.Generator().manual_seed(0)
    checks = list(check_group(net, graph, "0", inputs(), generator)) if "0" in [g.name for g in graph] else []
    assert [c for c in checks if c.kind == "permute"]
    assert not [c for c in checks if c.kind in ("permute", "rescale", "sign") and not c.error < 1e-9]


# hooks that feed the forward ------------------------------------------------------------------------------------------


class Fed(nn.Module):
    """Its head reads what hooks have collected of the body."""

    def __init__(self, how: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 8))
        self.head = nn.Linear(12, 3)
        self.got: Any = {} if how in ("dict", "by module") else []
        got, weak = self.got, weakref.ref(self)
        hooks: dict[str, Any] = {
            "bound method": self.collect,
            "closure over self": lambda m, a, out: self.got.append(out),
            "closure over a list": lambda m, a, out: got.append(out),
            "default argument": lambda m, a, out, got=got: got.append(out),
            "partial": functools.partial(Fed.collect, self),
            "weak reference": lambda m, a, out: weak().got.append(out),
            "dict": lambda m, a, out: got.__setitem__("last", out),
            "by module": lambda m, a, out: got.__setitem__(m, out),
            "bound append": lambda m, a, out: append(out),
            "on the module": lambda m, a, out: setattr(m, "kept", out),
        }
        append = functools.partial(list.append, got) if isinstance(got, list) else None
        self.body[1].register_forward_hook(hooks[how])
        self.how = how
        self.double()

    def collect(self, module: nn.Module, args: Any, out: Tensor) -> None:
        self.got.append(out)

    def forward(self, x: Tensor) -> Tensor:
        self.got.clear()
        self.body(x)
        if self.how == "on the module":
            return self.head(self.body[1].kept)
        if isinstance(self.got, dict):
            return self.head(self.got[self.body[1] if self.how == "by module" else "last"])
        return self.head(self.got[-1])


WAYS = (
    *("bound method", "closure over self", "closure over a list", "default argument", "partial", "weak reference"),
    *("dict", "by module", "bound append", "on the module"),
)


@pytest.mark.parametrize("how", WAYS)
@pytest.mark.parametrize("ran", [False, True])
def test_a_forward_that_reads_what_a_hook_collected_is_traced(how: str, *, ran: bool) -> None:
    net = Fed(how).eval()
    if ran:
        net(inputs())
    held = list(net.got.values() if isinstance(net.got, dict) else net.got)
    graph = trace(net, inputs())
    now = list(net.got.values() if isinstance(net.got, dict) else net.got)
    assert len(held) == len(now)
    assert all(a is b for a, b in zip(held, now, strict=True))
    assert {axis.tensor for axis in graph["body.0"].axes} >= {"body.0.weight", "body.2.weight", "head.weight"}
    assert_exact(net, inputs())


@pytest.mark.parametrize("how", WAYS)
def test_a_copy_computes_the_same_and_leaves_the_original_alone(how: str) -> None:
    net = Fed(how).eval()
    for copied in (independent_copy(net), structural_copy(net)):
        expected = net(inputs())
        net.got.clear()
        assert torch.equal(copied(inputs()), expected)
        assert not net.got


@pytest.mark.parametrize("how", ["bound method", "closure over a list", "dict"])
def test_a_hook_fed_model_is_folded_at_once(how: str) -> None:
    net = Fed(how).float().eval()
    compressor = wf.Compressor(net, torch.randn(2, 6), [wf.Fold(keep=0.5)])
    compressor.prepare()
    compressor.once([torch.randn(256, 6)])
    small = compressor.convert()
    assert small(torch.randn(2, 6)).shape == (2, 3)
    assert any(event.accepted for event in compressor.events)


# hooks that only watch ------------------------------------------------------------------------------------------------


def counts(module: nn.Module, args: Any, out: Tensor) -> None:
    global COUNT
    COUNT += 1
    SEEN.append(out)
    BY_NAME["first"].append(out)
    BY_NAME.setdefault("second", []).append(out)


def prints(module: nn.Module, args: Any, out: Tensor) -> None:
    assert f"{out.abs().max().item():.3f}"


def alarms(module: nn.Module, args: Any, out: Tensor) -> None:
    if not torch.isfinite(out).all() or out.detach().numpy().max() > 1e6:
        raise FloatingPointError


def averages(module: nn.Module, args: Any, out: Tensor) -> None:
    module.average = out.detach().mean()


WATCHES = {"counts": counts, "prints": prints, "alarms": alarms, "averages": averages}


def facts(net: nn.Module) -> Any:
    return [(g.name, g.admits, g.n_channels, len(g.axes)) for g in trace(net, inputs())]


@pytest.mark.parametrize("names", [("counts",), ("prints",), ("alarms",), ("averages",), tuple(WATCHES)])
def test_what_only_watches_leaves_no_trace(names: tuple[str, ...]) -> None:
    net = mlp()
    expected = facts(net)
    for name in names:
        for layer in (net[0], net[1]):
            layer.register_forward_hook(WATCHES[name])
    before = COUNT, len(SEEN), {name: list(seen) for name, seen in BY_NAME.items()}
    assert facts(net) == expected
    assert before == (COUNT, len(SEEN), BY_NAME)
    assert len(net[0]._forward_hooks) == len(names)


def test_a_watching_hook_that_joins_sizes_holds_them_together() -> None:
    """It would fail after an edit of one of the two alone."""
    net = mlp()
    far = []
    net[2].register_forward_hook(lambda module, args, out: far.append((out - args[0]).abs().mean()))
    graph = trace(net, inputs())
    assert {axis.tensor for axis in graph["0"].axes} >= {"0.weight", "2.weight", "4.weight"}


def test_our_own_hooks_are_no_part_of_the_trace() -> None:
    net = mlp()
    graph = trace(net, inputs())
    with Observer(net, graph) as observer:
        assert facts(net) == [(g.name, g.admits, g.n_channels, len(g.axes)) for g in graph]
        assert not observer.statistics()


# what is refused ------------------------------------------------------------------------------------------------------


def clips(module: nn.Module, args: Any, out: Tensor) -> Tensor:
    return out / 2 if out.abs().max().item() > 0.001 else out


def test_a_hook_that_branches_on_values_and_changes_them_is_named(capfd: pytest.CaptureFixture[str]) -> None:
    net = nn.Sequential(mlp(), nn.ReLU())
    handle = net[0][2].register_forward_hook(clips)
    with pytest.raises(TraceError) as caught:
        trace(net, inputs())
    message = str(caught.value)
    assert "forward hook 'clips'" in message
    assert "on '0.2'" in message
    assert "test_hooks.py" in message
    assert "take it off" in message
    assert "/torch/" not in message
    assert capfd.readouterr() == ("", "")
    handle.remove()
    net[0][2].register_forward_hook(lambda m, a, out: torch.where(out.abs().max() > 0.001, out / 2, out))
    assert len(trace(net, inputs()))
