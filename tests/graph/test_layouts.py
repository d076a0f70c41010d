"""Layouts of real architectures, small: what they leave free is found, and no admitted edit is wrong."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from weightfold.errors import TraceError
from weightfold.graph import exactness
from weightfold.graph.group import ChannelGraph
from weightfold.graph.resize import with_sizes
from weightfold.graph.trace import trace
from weightfold.models.resnet20 import ResNet20, ResNet20Config
from weightfold.models.task import Classes, ImageInput, TaskSpec

TOLERANCE = 1e-9


class SharedKey(nn.Module):
    """Four heads of queries over one head of keys and values, expanded or broadcast; a rotation of the first half."""

    def __init__(self, *, fused: bool) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = nn.Linear(5, 16), nn.Linear(5, 4), nn.Linear(5, 4), nn.Linear(16, 3)
        self.fused, self.n_heads = fused, 4

    def turned(self, x: Tensor) -> Tensor:
        a, b = x[..., :2], x[..., 2:]
        angle = torch.arange(x.shape[-2], dtype=x.dtype)[:, None] * torch.tensor([1.0, 0.1], dtype=x.dtype)
        return torch.cat([a * angle.cos() + a.roll(1, -1) * angle.sin(), b], -1)

    def forward(self, x: Tensor) -> Tensor:
        q = self.turned(self.q(x).unflatten(-1, (self.n_heads, 4)).transpose(1, 2))
        k, v = self.turned(self.k(x)[:, None]), self.v(x)[:, None]
        if self.fused:
            k, v = (t.expand(-1, self.n_heads, -1, -1) for t in (k, v))
            y = F.scaled_dot_product_attention(q, k, v, scale=0.5)
        else:
            y = torch.softmax(q @ k.transpose(-1, -2) * 0.5, -1) @ v
        return self.out(y.transpose(1, 2).flatten(2))


class SharedAngles(nn.Module):
    """Two layers of heads that one trained vector of factors acts on: the same channels in the heads of both."""

    def __init__(self) -> None:
        super().__init__()
        self.q1, self.q2, self.v1, self.v2 = (nn.Linear(5, 12) for _ in range(4))
        self.out1, self.out2, self.factors = nn.Linear(12, 5), nn.Linear(12, 3), nn.Parameter(torch.rand(4) + 0.5)

    def layer(self, x: Tensor, q: nn.Module, v: nn.Module, out: nn.Module) -> Tensor:
        a, b = (f(x).unflatten(-1, (3, 4)).transpose(1, 2) for f in (q, v))
        a = torch.tanh(a * self.factors)
        return out((torch.softmax(a @ a.transpose(-1, -2), -1) @ b).transpose(1, 2).flatten(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.layer(x, self.q1, self.v1, self.out1), self.q2, self.v2, self.out2)


class RelativeBias(nn.Module):
    """Scores of relative positions, picked from a table of positions by data that all heads share."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.v, self.out = nn.Linear(5, 12), nn.Linear(5, 12), nn.Linear(12, 3)
        self.table, self.rel = nn.Parameter(torch.randn(7, 5)), nn.Linear(5, 12)

    def forward(self, x: Tensor) -> Tensor:
        q, v = (f(x).unflatten(-1, (3, 4)).transpose(1, 2) for f in (self.q, self.v))
        rel = self.rel(self.table).unflatten(-1, (3, 4)).transpose(0, 1)
        n = torch.arange(x.shape[1])
        far = (n[:, None] - n[None, :] + 3).clamp(0, 6)
        scores = torch.gather(q @ rel.transpose(-1, -2), -1, far.expand(x.shape[0], 3, -1, -1))
        return self.out((torch.softmax(scores, -1) @ v).transpose(1, 2).flatten(2))


class PickedByList(nn.Module):
    """Heads fused as (queries..., key, value) and picked by a list of positions from the end."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(5, 2 * 4 * 3), nn.Linear(2 * 2 * 3, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.qkv(x).view(*x.shape[:2], 2, 4, 3)
        q, k, v = y[..., :-2, :], y[..., [-2], :], y[..., [-1], :]
        k, v = (t.expand_as(q) for t in (k, v))
        q, k, v = (t.flatten(2, 3).transpose(1, 2) for t in (q, k, v))
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Recurrence(nn.Module):
    """Steps written one by one into a tensor made beforehand."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.gate, self.out = nn.Linear(5, 8), nn.Linear(5, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        y, gate = self.into(x), torch.sigmoid(self.gate(x))
        kept, state = torch.zeros_like(y), torch.zeros_like(y[:, 0])
        for t in range(x.shape[1]):
            state = state * gate[:, t] + y[:, t]
            kept[:, t] = state
        return self.out(kept)


class HeadKernels(nn.Module):
    """Every head and position has its own kernel over time: its taps are no channels, the heads are free."""

    def __init__(self) -> None:
        super().__init__()
        self.taps, self.values, self.out = nn.Linear(5, 2 * 3), nn.Linear(5, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        taps = torch.softmax(self.taps(x).reshape(-1, 3, 1), 1)
        windows = F.unfold(self.values(x).transpose(1, 2).unsqueeze(-1), [3, 1], padding=[1, 0])
        windows = windows.transpose(1, 2).reshape(b, n, 8, 3).reshape(-1, 4, 3)
        return self.out((windows @ taps).reshape(b, n, 8))


class BlockGates(nn.Module):
    """A weight per block gates channels that another layer writes without any view into blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.out = nn.Linear(5, 12), nn.Linear(5, 12), nn.Linear(12, 3)
        self.gate = nn.Parameter(torch.randn(3, 4, 4))

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        gate = torch.bmm(y.flatten(0, 1).view(-1, 3, 4).transpose(0, 1), self.gate)
        return self.out(y * torch.sigmoid(gate.transpose(0, 1).reshape_as(y)) * self.b(x))


class Masked(nn.Module):
    """Some channels are multiplied by one and some by zero: by a mask that is put together of constants."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.one, self.two, self.how = nn.Linear(5, 8), nn.Linear(8, 3), how

    def mask(self) -> Tensor:
        ones = torch.ones(4)
        if self.how == "cat":
            return torch.cat([ones, torch.zeros(4)])
        if self.how == "pad":
            return F.pad(ones, (0, 4))
        if self.how == "stack":
            return torch.stack([ones, torch.zeros(4)], 1).flatten()
        mask = torch.zeros(8)
        mask[:4] = ones
        return mask

    def forward(self, x: Tensor) -> Tensor:
        return self.two(torch.tanh(self.one(x)) * self.mask())


class Rearranged(nn.Module):
    """Channels in an order that is written down as a list, and perhaps overwritten."""

    def __init__(self, *, overwritten: bool = False) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(5, 6), nn.Linear(6, 3)
        self.overwritten = overwritten

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.one(x))
        order = torch.tensor([1, 0, 2, 3, 4, 5] if self.overwritten else [3, 1, 0, 5, 4, 2])
        if self.overwritten:
            seen = order.view(-1)
            order.neg_().add_(5)
            order = seen
        return self.two(y[..., order] + y.exp())


class Windowed(nn.Module):
    """Overlapping windows laid over memory that is not in order."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(5, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.one(x)).transpose(1, 2)
        b, n, t = y.shape
        s = y.stride()
        windows = y.as_strided((b, t - 2, 3, n), (s[0], s[2], s[2], s[1]))
        return self.two(windows.mean(2))


class Branching(nn.Module):
    """A branch on the value of a tensor, made of this or that."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.one, self.mid, self.two = nn.Linear(5, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.source = source
        self.register_buffer("table", torch.ones(3))

    def condition(self, x: Tensor) -> Tensor:
        mask = torch.zeros(3)
        if self.source == "ones":
            mask[0] = 1
        elif self.source == "written":
            mask[0] = x[0, 0, 0]
        else:
            mask = {"input": x, "buffer": self.table, "parameter": self.one.weight, "random": torch.rand(3)}[
                self.source
            ]
        return (mask > 0).any()

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.one(x))
        return self.two(torch.tanh(self.mid(y)) if self.condition(x) else y)


SEQUENCE = (2, 6, 5)
NETS: dict[str, Any] = {
    # build, and (tensor, positions) of groups that must be free
    "shared key, expanded": (lambda: SharedKey(fused=True), [("q.weight", "blocks")]),
    "shared key, broadcast": (lambda: SharedKey(fused=False), []),
    "shared angles": (SharedAngles, [("q1.weight", "blocks")]),
    "relative bias": (RelativeBias, [("q.weight", "blocks"), ("v.weight", "channels")]),
    "picked by list": (PickedByList, [("qkv.weight", "blocks"), ("qkv.weight", "channels")]),
    "recurrence": (Recurrence, [("into.weight", "channels")]),
    "head kernels": (HeadKernels, [("taps.weight", "blocks"), ("values.weight", "channels")]),
    "block gates": (BlockGates, [("a.weight", "blocks"), ("b.weight", "blocks")]),
    "mask of parts": (lambda: Masked("cat"), []),
    "padded mask": (lambda: Masked("pad"), []),
    "stacked mask": (lambda: Masked("stack"), []),
    "written mask": (lambda: Masked("write"), []),
    "rearranged": (Rearranged, []),
    "rearranged, overwritten": (lambda: Rearranged(overwritten=True), []),
    "windows": (Windowed, [("one.weight", "channels")]),
    "branch on constants": (lambda: Branching("ones"), [("one.weight", "channels"), ("mid.weight", "channels")]),
}


def built(name: str) -> tuple[nn.Module, Tensor, ChannelGraph]:
    torch.manual_seed(6)
    model, example = NETS[name][0]().double().eval(), torch.randn(SEQUENCE, dtype=torch.float64)
    return model, example, with_sizes(model, example, trace(model, example))


@pytest.mark.parametrize("name", list(NETS))
def test_what_is_free_is_found_and_no_edit_is_wrong(name: str) -> None:
    model, example, graph = built(name)
    for tensor, kind in NETS[name][1]:
        assert graph.containing(tensor, 0, kind) is not None, f"{tensor} is in no group of {kind}"
    generator = torch.Generator().manual_seed(7)
    with exactness.float64():
        for group in graph:
            for check in exactness.check_group(model, graph, group.name, example, generator):
                assert not check.problem, f"{check.group}, {check.kind}: {check.problem}"
                assert check.error <= TOLERANCE, f"{check.group}, {check.kind}: relative error {check.error:.2e}"


@pytest.mark.parametrize("how", ["cat", "pad", "stack", "write"])
def test_a_mask_put_together_of_constants_freezes(how: str) -> None:
    graph = trace(Masked(how), torch.zeros(SEQUENCE))
    assert graph.containing("one.weight", 0) is None or not graph["one"].free
    [reason] = {f.reason for f in graph.frozen if f.tensor == "one.weight" and f.dim == 0}
    assert "meets data that differs per channel" in reason


@pytest.mark.parametrize("source", ["input", "buffer", "parameter", "random", "written"])
def test_a_branch_on_more_than_constants_is_refused(source: str) -> None:
    with pytest.raises(TraceError, match=r"branches on the values of a tensor.*test_layouts.py:\d+: .*condition\(x\)"):
        trace(Branching(source), torch.randn(SEQUENCE))


def test_a_head_over_shared_values_is_not_silent_without_its_queries() -> None:
    *_, graph = built("shared key, expanded")
    group = graph.containing("q.weight", 0, "blocks")
    assert group is not None
    assert not group.zero_at_zero
    *_, graph = built("relative bias")
    group = graph.containing("q.weight", 0, "blocks")
    assert group is not None
    assert group.zero_at_zero


@pytest.mark.parametrize("width", [2, 4])
def test_channels_padded_on_both_sides_keep_their_number(width: int) -> None:
    """Half of the new channels stand before the old ones and half behind: one less would move the old ones."""
    torch.manual_seed(8)
    task = TaskSpec(input=ImageInput(channels=3, height=8, width=8), output=Classes(n=4))
    model = ResNet20(task, ResNet20Config(width=width, depth=8)).double().eval()
    example = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    graph = with_sizes(model, example, trace(model, example))
    for name in ("layer2.0.conv2", "layer3.0.conv2"):
        assert "remove" not in graph[name].admits
        assert "permute" in graph[name].admits
        assert "is cut at written-down positions" in graph[name].reasons["remove"]
    assert "remove" in graph["conv1"].admits
    for group in (g for g in graph if "remove" in g.admits):
        for check in exactness.check_cuts(model, graph, group.name, example):
            assert check.error <= TOLERANCE, f"{check.group}, {check.kind}: relative error {check.error:.2e}"
