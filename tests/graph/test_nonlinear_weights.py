"""Weights that are a nonlinear or normalised function of a parameter: what reads by them does not add up."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import weight_norm

Weight = Callable[[Tensor], Tensor]


class Reading(nn.Module):
    """Ten hidden units that a weight f(W) reads: of a linear layer, a convolution or a product."""

    def __init__(self, f: Weight, form: str = "linear") -> None:
        super().__init__()
        self.a: nn.Module = nn.Linear(6, 10)
        shape = {"conv": (12, 10, 3), "transposed": (10, 12, 3), "matmul": (10, 12)}.get(form, (12, 10))
        self.w = nn.Parameter(torch.randn(shape))
        self.f, self.form = f, form

    def forward(self, x: Tensor) -> Tensor:
        h, w = F.relu(self.a(x)), self.f(self.w)
        if self.form == "matmul":
            return h @ w
        if self.form == "einsum":
            return torch.einsum("bni,oi->bno", h, w)
        if self.form == "conv":
            return F.conv1d(h.transpose(1, 2), w)
        if self.form == "transposed":
            return F.conv_transpose1d(h.transpose(1, 2), w)
        return F.linear(h, w)


class Writing(nn.Module):
    """Ten hidden units that a weight f(W) writes."""

    def __init__(self, f: Weight) -> None:
        super().__init__()
        self.w, self.b, self.f = nn.Parameter(torch.randn(10, 6)), nn.Linear(10, 3), f

    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.relu(F.linear(x, self.f(self.w))))


def tokens() -> Tensor:
    return torch.randn(2, 4, 6, dtype=torch.float64)


CURVED: dict[str, Weight] = {
    "softplus": F.softplus,
    "exp": torch.exp,
    "sigmoid": torch.sigmoid,
    "absolute": torch.abs,
    "square": torch.square,
    "sign": torch.sign,
    "heaviside": lambda w: (w > 0).to(w.dtype),
    "relu": F.relu,
    "leaky": lambda w: F.leaky_relu(w, 0.2),
    "clamp": lambda w: w.clamp(-0.5, 0.5),
    "tanh of a scaled one": lambda w: torch.tanh(3 * w),
    "rounded": lambda w: torch.round(8 * w) / 8,
    "rounded straight through": lambda w: w + (torch.round(8 * w) / 8 - w).detach(),
    "signs of one size": lambda w: w.sign() * w.abs().mean(-1, keepdim=True),
    "ternary": lambda w: torch.where(w.abs() > 0.7, w.sign(), torch.zeros_like(w)),
    "soft threshold": lambda w: F.softshrink(w, 0.3),
    "pruned by size": lambda w: w * (w.abs() > 0.5),
    "shifted": lambda w: w + 1,
    "times itself": lambda w: w * w,
    "columns of one length": lambda w: F.normalize(w, dim=0),
    "columns divided by their largest": lambda w: w / w.abs().amax(0, keepdim=True),
    "columns of mean zero and variance one": lambda w: (w - w.mean(0)) / w.std(0),
    "softmax over rows": lambda w: w.softmax(0),
    "softmax over columns": lambda w: w.softmax(-1),
    "rows of one length": lambda w: F.normalize(w, dim=-1),
    "maximum with a number": lambda w: torch.maximum(w, torch.zeros((), dtype=w.dtype)),
    "squared and cut in half": lambda w: torch.cat([w[:6].square(), w[6:].square()]),
    "stacked": lambda w: torch.stack([w.square(), w.exp()]).sum(0),
}
FORMS = ["linear", "matmul", "einsum", "conv", "transposed"]
ELEMENTWISE = ["softplus", "square", "sign", "rounded straight through", "relu"]


@pytest.mark.parametrize("name", CURVED)
def test_columns_of_a_nonlinear_weight_are_not_added_up(graph_of: Callable, name: str) -> None:
    graph = graph_of(Reading(CURVED[name]), tokens(), sizes=False)
    assert "permute" in graph["a"].admits
    assert "merge" not in graph["a"].admits


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ELEMENTWISE)
def test_nor_in_any_form_of_the_product(graph_of: Callable, form: str, name: str) -> None:
    graph = graph_of(Reading(CURVED[name], form), tokens(), sizes=False)
    assert graph["a"].admits >= {"permute", "remove"}
    assert "merge" not in graph["a"].admits


LINEAR: dict[str, Weight] = {
    "itself": lambda w: w,
    "negative": lambda w: -w,
    "scaled": lambda w: 0.3 * w / 2,
    "scaled by a tensor": lambda w: w * torch.full((), 0.3, dtype=w.dtype),
    "detached": lambda w: w.detach(),
    "transposed twice": lambda w: w.t().contiguous().t(),
    "a part of it": lambda w: w[2:8],
    "tripled": lambda w: torch.stack([w, w, w]).sum(0),
}


@pytest.mark.parametrize("name", LINEAR)
def test_columns_of_a_linear_function_are_free(graph_of: Callable, name: str) -> None:
    graph = graph_of(Reading(LINEAR[name]), tokens(), sizes=False)
    assert graph["a"].admits >= {"permute", "remove", "merge", "rescale"}


@pytest.mark.parametrize("name", CURVED)
def test_rows_of_a_nonlinear_weight_are_permuted_and_equal_ones_merged(graph_of: Callable, name: str) -> None:
    graph = graph_of(Writing(CURVED[name]), tokens(), sizes=False)
    assert "permute" in graph["w"].admits
    if name in ("softplus", "square", "sign", "relu"):
        assert graph["w"].admits >= {"remove", "merge"}


class Positive(nn.Module):
    def forward(self, w: Tensor) -> Tensor:
        return F.softplus(w)


NORMED: dict[str, Callable[[], nn.Module]] = {
    "linear, columns": lambda: nn.Sequential(nn.Linear(6, 10), nn.ReLU(), weight_norm(nn.Linear(10, 12), dim=1)),
    "linear, rows": lambda: nn.Sequential(nn.Linear(6, 10), nn.ReLU(), weight_norm(nn.Linear(10, 12), dim=0)),
    "both": lambda: nn.Sequential(weight_norm(nn.Linear(6, 10)), nn.ReLU(), weight_norm(nn.Linear(10, 12), dim=1)),
    "positive weights": lambda: _parametrized(),
}  # fmt: skip


def _parametrized() -> nn.Module:
    net = nn.Sequential(nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 12))
    parametrize.register_parametrization(net[2], "weight", Positive())
    return net


@pytest.mark.parametrize("name", NORMED)
def test_normalised_and_parametrized_layers(graph_of: Callable, name: str) -> None:
    graph = graph_of(NORMED[name](), tokens(), sizes=False)
    group = next(g for g in graph if g.free)
    assert "merge" not in group.admits


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("transposed", [False, True])
def test_weight_norm_of_convolutions_over_either_dimension(
    graph_of: Callable, rank: int, dim: int, transposed: bool
) -> None:
    plain = [nn.Conv1d, nn.Conv2d, nn.Conv3d][rank - 1]
    second = [nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d][rank - 1] if transposed else plain
    net = nn.Sequential(plain(4, 5, 1), nn.ReLU(), weight_norm(second(5, 3, 2), dim=dim))
    graph = graph_of(net, torch.randn(2, 4, *[3] * rank, dtype=torch.float64), sizes=False)
    assert "permute" in graph["0"].admits
    assert "merge" not in graph["0"].admits


class LinearAttention(nn.Module):
    """Queries and keys behind a feature map: keys read queries, by weights in front of a nonlinearity."""

    def __init__(self, feature: Weight) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(6, 8) for _ in range(4))
        self.out = nn.Linear(8, 3)
        self.scale, self.feature = nn.Parameter(torch.ones(8)), feature

    def forward(self, x: Tensor) -> Tensor:
        q, k = self.feature(self.q(x)), self.feature(self.k(x))
        return self.out((q @ k.transpose(1, 2)) @ self.v(x))


MAPS: dict[str, Weight] = {
    "relu": F.relu,
    "elu": lambda h: F.elu(h) + 1,
    "square": torch.square,
    "sign": torch.sign,
    "leaky": F.leaky_relu,
    "of one length": lambda h: F.normalize(h, dim=-1),
    "over positions": lambda h: h.softmax(1),
}


@pytest.mark.parametrize("name", MAPS)
def test_keys_behind_a_feature_map_do_not_add_up(graph_of: Callable, name: str) -> None:
    graph = graph_of(LinearAttention(MAPS[name]), tokens(), sizes=False)
    assert "merge" not in graph["q"].admits


def test_plain_keys_do(graph_of: Callable) -> None:
    graph = graph_of(LinearAttention(lambda h: h), tokens(), sizes=False)
    assert graph["q"].admits >= {"permute", "remove", "merge"}
