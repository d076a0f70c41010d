"""Everyday operators between two layers: which edits of the channels before them are admitted, and that each is exact.

The reference is the network itself, edited and run again in float64 (`weightfold.graph.exactness`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from weightfold.graph import exactness
from weightfold.graph.group import ChannelGraph
from weightfold.graph.trace import trace

Function = Callable[[Tensor, Tensor], Tensor]
SOURCE, TARGET = torch.tensor([0, 1, 2, 3]), torch.tensor([1, 2, 3, 0])
FOLD, SCALE, MIX = {"permute", "remove", "merge"}, {"permute", "remove", "merge", "rescale"}, {"permute"}


class Between(nn.Module):
    """A layer, a function of its output and of the input, and a layer that reads the result."""

    def __init__(self, function: Function, images: bool, reads: int) -> None:
        super().__init__()
        self.function = function
        self.a = nn.Conv2d(6, 8, 1) if images else nn.Linear(6, 8)
        self.out = nn.Conv2d(reads, 3, 1) if images else nn.Linear(reads, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.function(F.relu(self.a(x)), x))


def exact(model: nn.Module, example: Any) -> ChannelGraph:
    model = model.double().eval()
    generator = torch.Generator().manual_seed(3)
    with exactness.float64():
        graph = trace(model, example)
        for group in graph:
            for check in exactness.check_group(model, graph, group.name, example, generator):
                assert not check.problem, f"{check.group}, {check.kind}: {check.problem}"
                assert check.error <= 1e-9, f"{check.group}, {check.kind}: off by {check.error:.2e}"
    return graph


def put(h: Tensor, where: Any, what: Any) -> Tensor:
    h = h.clone()
    h[where] = what
    return h


def over(h: Tensor) -> Tensor:
    return TARGET[:, None].expand_as(h)


def edges(h: Tensor) -> Tensor:
    return torch.sparse_coo_tensor(torch.stack([SOURCE, TARGET]), torch.ones(4, dtype=h.dtype), (4, 4))


NODES: dict[str, tuple[Function, set[str]]] = {
    "index_add": (lambda h, x: torch.zeros_like(h).index_add(0, TARGET, h[SOURCE]), SCALE),
    "index_add_": (lambda h, x: torch.zeros_like(h).index_add_(0, TARGET, h[SOURCE], alpha=0.5), SCALE),
    "index_add_to_ones": (lambda h, x: torch.ones_like(h).index_add(0, TARGET, h[SOURCE]), FOLD),
    "scatter_add": (lambda h, x: torch.zeros_like(h).scatter_add(0, over(h), h[SOURCE]), SCALE),
    "scatter": (lambda h, x: h.scatter(0, over(h)[:2], h[2:]), SCALE),
    "scatter_number": (lambda h, x: h.scatter(0, over(h)[:2], 0.0), SCALE),
    "scatter_mean": (lambda h, x: torch.zeros_like(h).scatter_reduce(0, over(h), h, "mean"), SCALE),
    "scatter_amax": (lambda h, x: torch.zeros_like(h).scatter_reduce(0, over(h), h, "amax"), SCALE),
    "index_reduce": (lambda h, x: torch.zeros_like(h).index_reduce(0, TARGET, h, "mean"), SCALE),
    "index_copy": (lambda h, x: torch.zeros_like(h).index_copy(0, TARGET, h), SCALE),
    "index_put_accumulate": (lambda h, x: torch.zeros_like(h).index_put((TARGET,), h, accumulate=True), SCALE),
    "sparse_mm": (lambda h, x: torch.sparse.mm(edges(h), h), SCALE),
    "sparse_at": (lambda h, x: edges(h) @ h, SCALE),
}
SEQUENCES: dict[str, tuple[Function, set[str]]] = {
    "a position is zero": (lambda h, x: put(h, (slice(None), 0), 0.0), SCALE),
    "a position is one": (lambda h, x: put(h, (slice(None), 0), 1.0), FOLD),
    "a stretch is zero": (lambda h, x: put(h, (slice(None), slice(1, 3)), 0.0), SCALE),
    "a position is another": (lambda h, x: put(h, (slice(None), 0), h[:, 1]), SCALE),
    "masked zero": (lambda h, x: put(h, x[..., 0] > 0, 0.0), SCALE),
    "masked one": (lambda h, x: put(h, x[..., 0] > 0, 1.0), FOLD),
    "rows from elsewhere": (lambda h, x: put(h, (torch.tensor([1]),), h[0]), SCALE),
    "fill_": (lambda h, x: h + torch.empty_like(h).fill_(0.0), SCALE),
    "zero_": (lambda h, x: h + torch.empty_like(h).zero_(), SCALE),
    "index_fill": (lambda h, x: h.index_fill(1, torch.tensor([0]), 0.0), SCALE),
    "masked_scatter": (lambda h, x: h.masked_scatter((x[..., :1] > 0).expand_as(h), h.flip(0)), SCALE),
    "boolean mask": (lambda h, x: h * (x[..., :1] > 0), SCALE),
    "a channel is zero": (lambda h, x: put(h, (..., 2), 0.0), {"permute", "rescale"}),
    "ones are added": (lambda h, x: h + h.new_ones(h.shape[-1]), FOLD),
    "roll": (lambda h, x: h.roll(1, 1) + h, SCALE),
    "cumsum": (lambda h, x: h.cumsum(1), SCALE),
    "unfold": (lambda h, x: h.unfold(1, 2, 1).mean(-1), SCALE),
    "fft": (lambda h, x: torch.fft.irfft(torch.fft.rfft(h, dim=1) * 0.5, n=5, dim=1), SCALE),
    "trapezoid": (lambda h, x: torch.trapezoid(h, dim=1), SCALE),
    "quantile": (lambda h, x: h.quantile(0.5, 1), FOLD),
    "tensordot": (lambda h, x: torch.tensordot(x.mean((0, 2)), h, dims=([0], [1])), SCALE),  # pyright: ignore
    "cosine over time": (lambda h, x: h * F.cosine_similarity(h, h.flip(1), dim=1)[:, None], FOLD),
    "cosine over channels": (lambda h, x: h * F.cosine_similarity(h, h.roll(1, 1), dim=-1)[..., None], MIX),
    "pairwise_distance": (lambda h, x: h * F.pairwise_distance(h, h.roll(1, 1))[..., None], MIX),
    "cdist": (lambda h, x: torch.cdist(h, h).softmax(-1) @ h, MIX),
    "linalg.norm": (lambda h, x: h / (1 + torch.linalg.norm(h, dim=-1, keepdim=True)), MIX),
    "linalg.norm over time": (lambda h, x: h / (1 + torch.linalg.norm(h, dim=1, keepdim=True)), FOLD),
    "complex": (lambda h, x: torch.complex(h, h).abs(), SCALE),
}
IMAGES: dict[str, tuple[Function, set[str]]] = {
    "max_unpool": (lambda h, x: F.max_unpool2d(*F.max_pool2d_with_indices(h, [2, 2]), [2, 2]), SCALE),
    "group norm written down": (lambda h, x: F.group_norm(h, 2), MIX),
}


@pytest.mark.filterwarnings("ignore:index_reduce")
@pytest.mark.parametrize("name", [*NODES, *SEQUENCES, *IMAGES])
def test_what_an_operator_admits_is_exact(name: str) -> None:
    function, wanted = (NODES | SEQUENCES | IMAGES)[name]
    shape = (4, 6) if name in NODES else (2, 6, 4, 4) if name in IMAGES else (2, 5, 6)
    torch.manual_seed(0)
    x = torch.randn(*shape, dtype=torch.float64)
    graph = exact(Between(function, name in IMAGES, 8), x)
    [group] = [g for g in graph if g.kind == "channels" and any(a.key == ("a.weight", 0) for a in g.axes)]
    assert set(group.admits) == wanted


def test_a_channel_that_meets_a_constant_is_not_silent_when_nothing_writes_it() -> None:
    graph = exact(Between(lambda h, x: h + h.new_ones(h.shape[-1]), False, 8), torch.randn(2, 5, 6).double())
    assert not graph["a"].zero_at_zero


@pytest.mark.parametrize("groups", [2, 4, 8])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("out", [8, 16])
def test_grouped_transposed_convolutions(groups: int, bias: bool, out: int) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 1), nn.ReLU(), nn.ConvTranspose2d(8, out, 2, 2, groups=groups, bias=bias), nn.ReLU(),
        nn.Conv2d(out, 3, 1),
    )  # fmt: skip
    graph = exact(model, torch.randn(2, 3, 4, 4).double())
    free = {a.tensor for g in graph if "permute" in g.admits for a in g.axes if a.role != "read"}
    assert {"0.weight", "2.weight"} <= free
    assert all(a.tap is None for g in graph for a in g.axes if a.tensor == "2.weight")


def test_a_fixed_kernel_holds_on_to_its_channels() -> None:
    def blur(h: Tensor, x: Tensor) -> Tensor:
        return F.conv2d(h, torch.full((8, 1, 3, 3), 1 / 9, dtype=h.dtype), padding=1, groups=8)

    graph = exact(Between(blur, True, 8), torch.randn(2, 6, 4, 4).double())
    assert graph["a"].admits == {"permute", "rescale"}
    assert "read by a fixed kernel" in graph["a"].reasons["remove"]


def test_an_operator_without_a_rule_names_itself_its_module_the_line_and_a_remedy_that_works() -> None:
    graph = exact(
        Between(lambda h, x: torch.kron(torch.ones(1, 2, 1).to(h), h), False, 8), torch.randn(2, 5, 6).double()
    )
    reason = next(f.reason for f in graph.frozen if f.tensor == "a.weight" and f.dim == 0)
    assert all(part in reason for part in ("'aten.kron.default'", "test_operators.py", "elementwise operators"))
    followed = exact(
        Between(lambda h, x: (h[:, None] * torch.ones(2, 1, 1).to(h)).flatten(1, 2), False, 8),
        torch.randn(2, 5, 6).double(),
    )
    assert followed["a"].admits >= FOLD


class Rotary(nn.Module):
    """Heads whose pairs are turned by a table of complex numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(6, 48), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).view(*x.shape[:2], 3, 4, -1).permute(2, 0, 3, 1, 4)
        angle = torch.outer(torch.arange(x.shape[1]).double(), torch.tensor([1.0, 0.5]).double())
        table = torch.polar(torch.ones_like(angle), angle)
        q, k = (torch.view_as_real(torch.view_as_complex(t.unflatten(-1, (2, 2))) * table).flatten(-2) for t in (q, k))
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def test_heads_with_a_complex_rotary_table_are_free() -> None:
    torch.manual_seed(0)
    model, x = Rotary().double().eval(), torch.randn(2, 5, 6).double()
    graph = trace(model, x)
    [heads] = [g for g in graph if g.kind == "blocks"]
    generator = torch.Generator().manual_seed(0)
    before = exactness.outputs(model, x)
    assert heads.n_channels == 4
    for group in graph:
        for edit in exactness.symmetries(group, generator):
            undo = exactness.apply(model, graph, edit)[1]
            assert exactness.relative_error(before, exactness.outputs(model, x)) <= 1e-9, (group.name, edit.kind)
            undo.restore()


class Experts(nn.Module):
    """A mixture of experts, each token weighted by a softmax over all."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.form, self.gate, self.out = form, nn.Linear(6, 4), nn.Linear(6, 3)
        if form == "loop":
            self.experts = nn.ModuleList(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 6)) for _ in range(4))
        else:
            self.up, self.down = nn.Parameter(torch.randn(4, 6, 8)), nn.Parameter(torch.randn(4, 8, 6))

    def forward(self, x: Tensor) -> Tensor:
        share = self.gate(x).softmax(-1)
        if self.form == "loop":
            return self.out(sum(share[:, e : e + 1] * expert(x) for e, expert in enumerate(self.experts)))
        if self.form == "bmm":
            y = torch.bmm(F.relu(torch.bmm(x.expand(4, -1, -1), self.up)), self.down)
            return self.out((share.t()[..., None] * y).sum(0))
        y = torch.einsum("teh,ehd->ted", F.relu(torch.einsum("td,edh->teh", x, self.up)), self.down)
        return self.out(torch.einsum("te,ted->td", share, y))


@pytest.mark.parametrize("form", ["loop", "bmm", "einsum"])
def test_hidden_units_of_experts_are_free(form: str) -> None:
    torch.manual_seed(0)
    graph = exact(Experts(form), torch.randn(5, 6).double())
    hidden = "experts.0.0.weight" if form == "loop" else "up"
    assert any(a.tensor == hidden and a.role == "write" and g.admits >= FOLD for g in graph for a in g.axes)
