"""Tracing leaves everything alone, does not depend on how a model is held, and says what it cannot do, and where."""

from __future__ import annotations

import copy
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from weightfold.errors import TraceError
from weightfold.graph.group import ChannelGraph
from weightfold.graph.resize import with_sizes
from weightfold.graph.trace import trace

ROOT = Path(__file__).parents[2]


class Net(nn.Module):
    """Convolution, batch norm, dropout, a head: everything that has a state in a forward."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.drop, self.head = nn.Dropout(0.5), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.drop(F.relu(self.norm(self.conv(x)))).mean((2, 3)))


class TiedLm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.up, self.down = nn.Embedding(11, 8), nn.Linear(8, 9), nn.Linear(9, 8)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        return self.head(x + self.down(torch.tanh(self.up(x))))


def example() -> Tensor:
    return torch.zeros(2, 3, 8, 8)


def picture(graph: ChannelGraph) -> Any:
    """All of a graph as plain data: names, edits, index tables, gauges."""
    tables = [[(a.tensor, a.dim, a.slabs, a.size, a.index.tolist()) for a in g.axes] for g in graph]
    gauges = [
        [(u.kind, u.channel.tolist(), [(*x[:4], x[4].tolist()) for x in u.axes]) for u in g.gauges] for g in graph
    ]
    blocks = [None if g.block is None else g.block.tolist() for g in graph]
    return graph.summary(), tables, gauges, blocks, dict(graph.shapes)


def state_of(model: nn.Module) -> dict[str, Any]:
    """What a trace could disturb: tensors bit for bit and by identity, modes, hooks, attributes, gradients."""
    out: dict[str, Any] = {}
    for name, value in (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)):
        grad = None if value.grad is None else value.grad.clone()
        out[name] = (id(value), value.detach().clone(), value._version, grad, value.requires_grad)
    for path, module in model.named_modules():
        out[f"{path}:mode"] = module.training
        for kind in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"):
            out[f"{path}:{kind}"] = list(getattr(module, kind).values())
        out[f"{path}:attributes"] = sorted(vars(module))
    return out


def assert_same(a: Any, b: Any) -> None:
    if isinstance(a, Tensor):
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, tuple):
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    else:
        assert a == b


@pytest.mark.parametrize("training", [True, False])
def test_nothing_is_touched(training: bool) -> None:
    model, calls = Net().train(training), []
    model.norm.eval()
    model.conv.register_forward_hook(lambda *_: calls.append("forward"))
    model.head.register_forward_pre_hook(lambda *_: calls.append("before"))
    model.head.register_full_backward_hook(lambda *_: calls.append("backward"))
    model(torch.randn(2, 3, 8, 8)).sum().backward()
    calls.clear()
    before = state_of(model)
    rng = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()  # noqa: NPY002
    flags = torch.is_grad_enabled(), torch.get_default_dtype(), torch.backends.mha.get_fastpath_enabled()
    x = example()
    graph = trace(model, x)
    with_sizes(model, x, graph)
    assert_same(before, state_of(model))
    assert not calls, "a user's hook was run"
    assert torch.equal(rng[0], torch.get_rng_state())
    assert rng[1] == np.random.get_state()[1].tolist()  # noqa: NPY002
    assert rng[2] == random.getstate()
    assert flags == (torch.is_grad_enabled(), torch.get_default_dtype(), torch.backends.mha.get_fastpath_enabled())
    assert bool((x == 0).all())
    model(example())
    assert calls == ["before", "forward"] or calls == ["forward", "before"]


def test_train_and_eval_mode_give_the_same_groups() -> None:
    assert picture(trace(Net().train(), example())) == picture(trace(Net().eval(), example()))


def test_meta_tensors_give_the_same_groups() -> None:
    torch.manual_seed(0)
    real = Net()
    with torch.device("meta"):
        hollow, x = Net(), example()
    assert picture(trace(hollow, x)) == picture(trace(real, example()))


def test_half_precision_and_frozen_parameters_give_the_same_groups() -> None:
    half = Net().to(torch.bfloat16)
    frozen = Net().requires_grad_(False)
    expected = picture(trace(Net(), example()))
    assert picture(trace(frozen, example())) == expected
    assert picture(trace(half, example().bfloat16())) == expected


def test_arguments_by_position_and_by_name() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 5), nn.Linear(5, 2)

        def forward(self, x: Tensor, scale: Tensor) -> Tensor:
            return self.b(F.relu(self.a(x))) * scale

    x, scale = torch.zeros(2, 3), torch.ones(2, 1)
    expected = picture(trace(Two(), (x, scale)))
    assert picture(trace(Two(), {"x": x, "scale": scale})) == expected
    assert picture(trace(Two(), ((x,), {"scale": scale}))) == expected
    assert [g["name"] for g in expected[0]] == ["a"]


def test_a_shared_module_is_one_set_of_axes() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.into, self.block, self.out = nn.Linear(3, 6), nn.Linear(6, 6), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = F.relu(self.into(x))
            return self.out(F.relu(self.block(F.relu(self.block(x)))))

    graph = trace(Shared(), torch.zeros(2, 3))
    [group] = [g for g in graph if g.free]
    assert {a.key for a in group.axes} >= {
        ("into.weight", 0),
        ("block.weight", 0),
        ("block.weight", 1),
        ("out.weight", 1),
    }


def test_a_tied_embedding_writes_and_reads_and_is_not_merged() -> None:
    graph = trace(TiedLm(), torch.zeros(2, 5, dtype=torch.long))
    group = graph.containing("embed.weight", 1)
    assert group is not None
    assert group.axis("embed.weight", 1).role == "both"
    assert "merge" not in group.admits
    assert "tied" in group.reasons["merge"]
    assert graph.aliases == {"head.weight": "embed.weight"}
    assert "merge" in graph["up"].admits


def test_parametrized_weights() -> None:
    class Normed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = parametrizations.weight_norm(nn.Linear(3, 5)), nn.Linear(5, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(F.relu(self.a(x)))

    graph = trace(Normed(), torch.zeros(2, 3))
    group = graph.containing("b.weight", 1)
    assert group is not None
    assert {"permute", "remove"} <= group.admits
    names = {a.tensor for a in group.axes}
    assert {"a.parametrizations.weight.original0", "a.parametrizations.weight.original1", "a.bias"} <= names


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_compiled_wrapper_gives_the_same_groups() -> None:
    model = Net()
    graph = trace(torch.compile(model), example())  # pyright: ignore
    stripped = [{a["tensor"].removeprefix("_orig_mod.") for a in g["axes"]} for g in graph.summary()]
    assert stripped == [{a["tensor"] for a in g["axes"]} for g in trace(model, example()).summary()]


def test_a_wrong_shape_names_the_line() -> None:
    with pytest.raises(TraceError) as caught:
        trace(Net(), torch.zeros(2, 5, 8, 8))
    assert "test_trace.py:" in caught.value.message
    assert "self.conv(x)" in caught.value.message
    assert caught.value.remedy


def test_a_branch_on_data_names_the_line() -> None:
    class Branch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 5), nn.Linear(5, 2)

        def forward(self, x: Tensor) -> Tensor:
            y = self.a(x)
            if y.sum() > 0:
                y = y * 2
            return self.b(y)

    with pytest.raises(TraceError) as caught:
        trace(Branch(), torch.zeros(2, 3))
    assert "branches on the values of a tensor" in caught.value.message
    assert "test_trace.py:" in caught.value.message
    assert "if y.sum() > 0" in caught.value.message
    assert "torch.where" in str(caught.value.remedy)


@torch.library.custom_op("weightfold_test::twist", mutates_args=())
def twist(x: Tensor) -> Tensor:
    return x.flip(-1) * 2


@twist.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


def test_an_unknown_operator_freezes_with_its_reason() -> None:
    class Strange(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(3, 5), nn.Linear(5, 6), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.c(F.relu(self.b(twist(self.a(x)))))

    graph = trace(Strange(), torch.zeros(2, 3))
    assert [g.name for g in graph if g.free] == ["b"]
    [reason] = {f.reason for f in graph.frozen if f.tensor == "a.weight" and f.dim == 0}
    assert "twist" in reason
    assert "no rule" in reason
    assert "test_trace.py:" in reason
    assert "twist(self.a(x))" in reason


def test_a_model_that_cannot_be_copied_is_refused() -> None:
    model = Net()
    model.lock = open(__file__)  # noqa: SIM115, PTH123
    try:
        with pytest.raises(TraceError, match="cannot be copied"):
            trace(model, example())
    finally:
        model.lock.close()


def test_a_copy_of_the_model_gives_the_same_groups() -> None:
    model = Net()
    assert picture(trace(copy.deepcopy(model), example())) == picture(trace(model, example()))


SNIPPET = """
import json, torch
from tests.graph.test_trace import Net, TiedLm, example, picture
from weightfold.graph.resize import with_sizes
from weightfold.graph.trace import trace
torch.manual_seed(0)
out = []
for model, x in ((Net(), example()), (TiedLm(), torch.zeros(2, 5, dtype=torch.long)),
                 (torch.nn.TransformerEncoderLayer(12, 3, 20, batch_first=True), torch.zeros(2, 5, 12))):
    graph = with_sizes(model, x, trace(model, x))
    out.append([graph.summary(), picture(graph), [vars(f) for f in graph.frozen]])
print(json.dumps(out))
"""


def test_the_hash_seed_does_not_matter() -> None:
    printed = []
    for seed in ("0", "4711"):
        env = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONHASHSEED": seed, "OMP_NUM_THREADS": "1"}
        done = subprocess.run([sys.executable, "-W", "ignore", "-c", SNIPPET], capture_output=True, text=True, env=env)
        assert done.returncode == 0, done.stderr
        printed.append(done.stdout)
    assert printed[0] == printed[1]
    assert len(printed[0]) > 1000


def test_a_network_without_parameters_has_no_groups() -> None:
    for net in (nn.Identity(), nn.Sequential(nn.Flatten(), nn.ReLU(), nn.Softmax(1))):
        graph = trace(net, torch.zeros(2, 3, 4))
        assert (graph.groups, graph.frozen) == ((), ())
