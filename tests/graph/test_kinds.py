"""How models are held, called and answer: wrappers, programs, objects in and out, transforms; traced or refused."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state

from weightfold.errors import TraceError
from weightfold.graph.exactness import check_group
from weightfold.graph.trace import trace


class Net(nn.Module):
    """One hidden layer, and anything done to what comes out."""

    def __init__(self, out: Callable[[Tensor], Any] = lambda y: y) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(6, 12), nn.Linear(12, 3)
        self.out = out
        self.double()

    def forward(self, x: Tensor) -> Any:
        return self.out(self.b(torch.tanh(self.a(x))))


def inputs() -> Tensor:
    return torch.randn(4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def assert_exact(net: nn.Module, x: Any, group: str = "a") -> None:
    """The hidden layer is free, and every edit that is admitted leaves all outputs as they are."""
    graph = trace(net, x)
    assert "permute" in graph[group].admits
    generator = torch.Generator().manual_seed(0)
    checks = [c for g in graph if g.free for c in check_group(net, graph, g.name, x, generator)]
    assert checks
    assert not [c for c in checks if not c.error < 1e-9]


# what comes out -------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Answer:
    y: Tensor
    n: int = 3
    rest: Any = None


@dataclasses.dataclass(slots=True)
class Slim:
    y: Tensor


class Pair(NamedTuple):
    y: Tensor
    rest: Tensor | None


class Held:
    def __init__(self, y: Tensor) -> None:
        self.keys, self.more = [y], {"sum": y.sum()}


OUTPUTS: dict[str, Callable[[Tensor], Any]] = {
    "dataclass": Answer,
    "dataclass with slots": Slim,
    "dataclass in a list": lambda y: [Answer(y), Answer(y + 1)],
    "named tuple": lambda y: Pair(y, None),
    "object": Held,
    "numbers and None": lambda y: (y, None, 3, "text", 2.5),
    "keys that are numbers": lambda y: {0: y, 1: y.sum()},
    "distribution": lambda y: torch.distributions.Normal(y, 1.0),
    "categories": lambda y: torch.distributions.Categorical(logits=y),
}


@pytest.mark.parametrize("name", OUTPUTS)
def test_outputs_of_every_kind(name: str) -> None:
    net = Net(OUTPUTS[name])
    assert_exact(net, inputs())
    assert trace(net, inputs()).frozen


@pytest.mark.parametrize("nothing", [None, 3, "text"])
def test_a_forward_without_a_tensor_in_its_output(nothing: Any) -> None:
    trace(Net(lambda y: nothing), inputs())


def test_a_width_that_comes_out_as_a_number_is_a_constant_of_the_graph() -> None:
    class Wide(Net):
        def forward(self, x: Tensor) -> Any:
            h = self.a(x)
            return self.b(h), h.shape[-1]

    assert 12.0 in trace(Wide(), inputs()).constants


@pytest.mark.parametrize("checks", [True, False])
def test_distributions_check_their_parameters_as_before(checks: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """What PyTorch's compiler, once used, has turned off for the process stays off too."""
    monkeypatch.setattr(torch.distributions.Distribution, "_validate_args", checks)
    trace(Net(OUTPUTS["distribution"]), inputs())
    with pytest.raises(ValueError, match="constraint") if checks else nullcontext():
        torch.distributions.Normal(torch.zeros(2), -torch.ones(2))


# what goes in ---------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Batch:
    x: Tensor
    more: dict[str, Any]


class ByKeyword(Net):
    def forward(self, *, x: Tensor, mask: Tensor | None = None, scale: float = 2.0) -> Tensor:
        return super().forward(x) * scale


class OfBatch(Net):
    def forward(self, batch: Batch, shift: Tensor | None = None) -> Tensor:
        y = super().forward(batch.x) + batch.more["t"]
        return y if shift is None else y + shift


def test_keywords_alone() -> None:
    assert_exact(ByKeyword(), {"x": inputs()})
    assert_exact(ByKeyword(), {"x": inputs(), "mask": None, "scale": 3.0})


def test_objects_as_inputs() -> None:
    batch = Batch(inputs(), {"t": torch.ones(3, dtype=torch.float64), "name": "first"})
    assert_exact(OfBatch(), (batch,))
    assert_exact(OfBatch(), {"batch": batch, "shift": torch.ones(3, dtype=torch.float64)})
    assert type(batch.x) is Tensor


# how it is held -------------------------------------------------------------------------------------------------------


class Called(Net):
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return super().__call__(*args, **kwargs) * 2


class Bare(nn.Module):
    """No forward at all."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 12), nn.Linear(12, 3)
        self.double()

    def __call__(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).relu())


def compiled_inside() -> nn.Module:
    net = Net()
    net.compile(backend="eager")
    return net


def patched() -> nn.Module:
    net = Net()
    inner = net.forward
    net.forward = lambda x: inner(x) * 2
    return net


HOLDERS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "call": (Called, "a"),
    "no forward": (Bare, "a"),
    "child without forward": (lambda: nn.Sequential(Bare(), nn.Linear(3, 3).double()), "0.a"),
    "compiled": (lambda: torch.compile(Net(), backend="eager"), "_orig_mod.a"),  # type: ignore[dict-item,return-value]
    "compiled child": (
        lambda: nn.Sequential(nn.Linear(6, 6).double(), torch.compile(Net(), backend="eager")),
        "1._orig_mod.a",
    ),
    "compiled in place": (compiled_inside, "a"),
    "data parallel": (lambda: nn.DataParallel(Net()), "module.a"),
    "patched forward": (patched, "a"),
}


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("name", HOLDERS)
def test_models_however_they_are_held(name: str) -> None:
    make, group = HOLDERS[name]
    assert_exact(make(), inputs(), group)


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("process_group")
def test_distributed_data_parallel() -> None:
    assert_exact(nn.parallel.DistributedDataParallel(Net()), inputs(), "module.a")


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_children_that_are_programs() -> None:
    inner = nn.Sequential(nn.Linear(6, 12), nn.BatchNorm1d(12), nn.ReLU()).double().eval()
    script = torch.jit.script(inner)
    net = nn.Sequential(script, nn.Linear(12, 3).double()).eval()
    assert_exact(net, inputs(), "0.0")
    traced = torch.jit.trace(nn.Sequential(nn.Tanh(), nn.Linear(12, 3)).double(), torch.zeros(4, 12).double())
    assert_exact(nn.Sequential(nn.Linear(6, 12).double(), traced), inputs(), "0")
    with pytest.raises(TraceError, match="TorchScript"):
        trace(torch.jit.script(nn.Sequential(inner, nn.Linear(12, 3).double())), inputs())
    assert len(trace(nn.Sequential(inner, nn.Linear(12, 3).double()), inputs()))


def test_lazy_modules() -> None:
    net = nn.Sequential(nn.LazyLinear(12), nn.ReLU(), nn.LazyLinear(3)).double()
    with pytest.raises(TraceError, match=r"'0\.weight' of 'Sequential' has no size yet"):
        trace(net, inputs())
    net(inputs())
    assert_exact(net, inputs(), "0")


# transforms -----------------------------------------------------------------------------------------------------------


class Ensemble(nn.Module):
    """Members side by side, their weights stacked."""

    def __init__(self, nested: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Parameter(torch.randn(3, 6, 12)), nn.Parameter(torch.randn(3, 12, 2))
        self.nested = nested
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        def member(a: Tensor, b: Tensor) -> Tensor:
            rows = torch.vmap(lambda row: torch.tanh(row @ a)) if self.nested else lambda x: torch.tanh(x @ a)
            return rows(x) @ b

        return torch.vmap(member)(self.first, self.second).mean(0)


class PerSample(Net):
    def forward(self, x: Tensor) -> Tensor:
        return torch.vmap(super().forward)(x)


class Chunked(Net):
    def forward(self, x: Tensor) -> Tensor:
        return torch.vmap(super().forward, chunk_size=2)(x)


class Turned(Net):
    def forward(self, x: Tensor) -> Tensor:
        return torch.vmap(super().forward, in_dims=1)(x.T)


class Functional(nn.Module):
    """`functional_call` on weights of its own, scaled by an input."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Net()

    def forward(self, x: Tensor) -> Tensor:
        weights = {name: value * 2 for name, value in self.net.named_parameters()}
        return functional_call(self.net, weights, (x,))


class Stacked(nn.Module):
    """The documented way: `stack_module_state` once, `functional_call` under `vmap`."""

    def __init__(self) -> None:
        super().__init__()
        weights, _ = stack_module_state([Net().float() for _ in range(3)])
        self.weights = nn.ParameterDict({name.replace(".", "-"): value.detach() for name, value in weights.items()})
        self.__dict__["base"] = Net().to("meta")
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        weights = {name.replace("-", "."): value for name, value in self.weights.items()}
        return torch.vmap(lambda w: functional_call(self.base, w, (x,)))(weights)


TRANSFORMED = {
    "ensemble": Ensemble,
    "nested": lambda: Ensemble(nested=True),
    "samples": PerSample,
    "chunks": Chunked,
    "other dimensions": Turned,
    "functional call": Functional,
    "stacked": Stacked,
}


@pytest.mark.parametrize("name", TRANSFORMED)
def test_transforms_are_traced_as_what_they_compute(name: str) -> None:
    net = TRANSFORMED[name]()
    graph = trace(net, inputs())
    assert any(group.free for group in graph)
    generator = torch.Generator().manual_seed(0)
    checks = [c for g in graph if g.free for c in check_group(net, graph, g.name, inputs(), generator)]
    assert checks
    assert not [c for c in checks if not c.error < 1e-9]


class Gradient(Net):
    def forward(self, x: Tensor) -> Tensor:
        return torch.vmap(torch.func.grad(lambda row: super(Gradient, self).forward(row).sum()))(x)


class Across(Net):
    def forward(self, x: Tensor) -> Tensor:
        return torch.vmap(super().forward, out_dims=1)(x)


@pytest.mark.parametrize("kind", [Gradient, Across])
def test_what_cannot_be_followed_is_refused_and_the_remedy_helps(kind: type[Net]) -> None:
    with pytest.raises(TraceError) as caught:
        trace(kind(), inputs())
    message = str(caught.value)
    assert "runs on the example, but cannot be traced" in message
    assert "keep it out of the forward" in message
    assert "test_kinds.py" in message or kind is Across
    assert "0x" not in message
    assert "/torch/" not in message
    assert_exact(Net(), inputs())


class Wrong(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Net()])

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks[0](x.T)


def test_an_example_that_does_not_fit_is_told_with_module_and_line() -> None:
    with pytest.raises(TraceError) as caught:
        trace(Wrong(), inputs())
    message = str(caught.value)
    assert "fails on the example (in 'blocks.0" in message
    assert "test_kinds.py" in message
    assert "return self.out(self.b(torch.tanh(self.a(x))))" in message
