"""The reference of `surgery.py`: small networks, their duplicates written down by hand, trained through their leaves.

It knows nothing of weightfold: the wide network is a function of small leaf tensors through the lumping matrix
(`torch.func.functional_call`), and the optimisers hold the leaves.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn, optim
from torch.func import functional_call
from torch.nn import functional as F

Batch = tuple[Tensor, Tensor]
Make = Callable[[Sequence[nn.Parameter]], list[optim.Optimizer]]
"""Optimisers over some parameters."""


# networks: every module is followed by a list of what its duplicates are, written by hand --------------------------


@dataclass(frozen=True)
class Part:
    """One dimension of one tensor: where each channel stands along it (C, M), and whether it is read there."""

    tensor: str
    dim: int
    positions: Tensor
    reads: bool = False


@dataclass(frozen=True)
class Lump:
    """Channels of one group and which of them are to be one: ``labels[c]`` is the first channel equal to c."""

    group: str
    labels: Tensor
    parts: tuple[Part, ...]


@dataclass(frozen=True)
class Net:
    """A recipe, its input shape and its duplicates."""

    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    lumps: tuple[Lump, ...]


def plain(tensor: str, n: int, dim: int = 0, *, reads: bool = False) -> Part:
    return Part(tensor, dim, torch.arange(n)[:, None], reads)


def runs(tensor: str, n: int, width: int, dim: int = 0, *, reads: bool = False) -> Part:
    """Channel c stands at c * width, ..., c * width + width - 1."""
    return Part(tensor, dim, torch.arange(n * width).reshape(n, width), reads)


def gates(tensor: str, n: int, n_gates: int, dim: int = 0) -> Part:
    """Channel c stands at c, n + c, 2 n + c, ..."""
    return Part(tensor, dim, torch.arange(n * n_gates).reshape(n_gates, n).T.contiguous())


def affine(path: str, n: int) -> tuple[Part, ...]:
    return plain(f"{path}.weight", n), plain(f"{path}.bias", n)


def norm(path: str, n: int) -> tuple[Part, ...]:
    return (*affine(path, n), plain(f"{path}.running_mean", n), plain(f"{path}.running_var", n))


def lump(group: str, n: int, equal: Mapping[int, int], *parts: Part) -> Lump:
    """``equal`` names for each copy the channel it is a copy of."""
    return Lump(group, torch.tensor([equal.get(c, c) for c in range(n)]), parts)


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2, self.out = nn.Linear(6, 12), nn.Linear(12, 10), nn.Linear(10, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self.fc2(F.gelu(self.fc1(x)))))


MLP = Net(
    Mlp,
    (16, 6),
    (
        lump("fc1", 12, {5: 1, 7: 1, 11: 4}, *affine("fc1", 12), plain("fc2.weight", 12, 1, reads=True)),
        lump("fc2", 10, {3: 0, 9: 8}, *affine("fc2", 10), plain("out.weight", 10, 1, reads=True)),
    ),
)


class ResidualConv(nn.Module):
    """Two blocks with a shared trunk; the head reads the flattened map."""

    def __init__(self) -> None:
        super().__init__()
        conv = partial(nn.Conv2d, kernel_size=3, padding=1, bias=False)
        self.stem, self.n0 = conv(3, 8), nn.BatchNorm2d(8)
        self.a1, self.na1, self.a2, self.na2 = conv(8, 10), nn.BatchNorm2d(10), conv(10, 8), nn.BatchNorm2d(8)
        self.b1, self.nb1, self.b2, self.nb2 = conv(8, 6), nn.BatchNorm2d(6), conv(6, 8), nn.BatchNorm2d(8)
        self.head = nn.Linear(8 * 4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.silu(self.n0(self.stem(x)))
        x = F.silu(x + self.na2(self.a2(F.silu(self.na1(self.a1(x))))))
        x = F.silu(x + self.nb2(self.b2(F.silu(self.nb1(self.b1(x))))))
        return self.head(F.adaptive_avg_pool2d(x, 2).flatten(1))


CONV = Net(
    ResidualConv,
    (8, 3, 6, 6),
    (
        lump(
            "stem", 8, {4: 2, 6: 2, 7: 5},
            plain("stem.weight", 8), *norm("n0", 8),
            plain("a2.weight", 8), *norm("na2", 8), plain("b2.weight", 8), *norm("nb2", 8),
            plain("a1.weight", 8, 1, reads=True), plain("b1.weight", 8, 1, reads=True),
            runs("head.weight", 8, 4, 1, reads=True),
        ),
        lump("a1", 10, {9: 0}, plain("a1.weight", 10), *norm("na1", 10), plain("a2.weight", 10, 1, reads=True)),
        lump("b1", 6, {1: 0, 2: 0}, plain("b1.weight", 6), *norm("nb1", 6), plain("b2.weight", 6, 1, reads=True)),
    ),
)  # fmt: skip


class Attention(nn.Module):
    """One block: heads written out by hand with a fixed scale, then an MLP; norms over the stream."""

    def __init__(self) -> None:
        super().__init__()
        self.into = nn.Linear(5, 12)
        self.n1, self.n2 = nn.LayerNorm(12), nn.LayerNorm(12)
        self.q, self.k, self.v, self.o = (nn.Linear(12, 12, bias=False) for _ in range(4))
        self.up, self.down, self.out = nn.Linear(12, 14), nn.Linear(14, 12), nn.Linear(12, 4)
        self.n_heads = 3

    def forward(self, x: Tensor) -> Tensor:
        x = self.into(x)
        y = self.n1(x)
        q, k, v = (f(y).unflatten(-1, (self.n_heads, -1)).transpose(1, 2) for f in (self.q, self.k, self.v))
        y = torch.softmax(q @ k.transpose(-1, -2) * 0.5, -1) @ v
        x = x + self.o(y.transpose(1, 2).flatten(2))
        x = x + self.down(F.gelu(self.up(self.n2(x))))
        return self.out(x.mean(1))


ATTENTION = Net(
    Attention,
    (6, 5, 5),
    (
        lump("q", 12, {2: 0, 6: 5, 9: 8}, plain("q.weight", 12), plain("k.weight", 12, reads=True)),
        lump("v", 12, {3: 0, 5: 4, 11: 10}, plain("v.weight", 12), plain("o.weight", 12, 1, reads=True)),
        lump("up", 14, {7: 2, 8: 2}, *affine("up", 14), plain("down.weight", 14, 1, reads=True)),
    ),
)
HEADS = Net(
    Attention,
    (6, 5, 5),
    (
        lump(
            "q.blocks", 3, {2: 0},
            runs("q.weight", 3, 4), runs("k.weight", 3, 4), runs("v.weight", 3, 4),
            runs("o.weight", 3, 4, 1, reads=True),
        ),
    ),
)  # fmt: skip


class Lstm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(5, 9, batch_first=True)
        self.fc, self.out = nn.Linear(9, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self.fc(self.lstm(x)[0][:, -1])))


LSTM = Net(
    Lstm,
    (6, 7, 5),
    (
        lump(
            "lstm.weight_ih_l0", 9, {4: 1, 6: 1, 8: 7},
            *(gates(f"lstm.{leaf}_l0", 9, 4) for leaf in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")),
            plain("lstm.weight_hh_l0", 9, 1, reads=True), plain("fc.weight", 9, 1, reads=True),
        ),
        lump("fc", 8, {6: 5}, *affine("fc", 8), plain("out.weight", 8, 1, reads=True)),
    ),
)  # fmt: skip

NETS = {"mlp": MLP, "residual_conv": CONV, "attention": ATTENTION, "attention_heads": HEADS, "lstm": LSTM}

# the reference --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tie:
    """One dimension of one tensor: small position and share of every wide one, and the wide positions that stay."""

    dim: int
    small: Tensor
    share: Tensor
    stay: Tensor
    reads: bool

    @classmethod
    def of(cls, part: Part, labels: Tensor, share_C: Tensor, n: int) -> Tie:
        first = torch.arange(n)
        first[part.positions] = part.positions[labels]
        share = torch.ones(n, dtype=torch.float64)
        if part.reads:
            share[part.positions] = share_C[:, None].expand_as(part.positions)
        stay = torch.unique(first)
        return cls(part.dim, torch.searchsorted(stay, first), share, stay, part.reads)

    def _shares(self, ndim: int) -> Tensor:
        return self.share.reshape([-1 if d == self.dim else 1 for d in range(ndim)])

    def wide(self, leaf: Tensor) -> Tensor:
        """Tied rows are copies, reading columns shares."""
        out = leaf.index_select(self.dim, self.small)
        return out * self._shares(out.ndim) if self.reads else out

    def sum(self, wide: Tensor) -> Tensor:
        shape = list(wide.shape)
        shape[self.dim] = len(self.stay)
        return torch.zeros(shape, dtype=wide.dtype).index_add(self.dim, self.small, wide)

    def value(self, wide: Tensor) -> Tensor:
        """The leaf whose wide tensor computes the same: any copy of a tied row, the sum of the columns."""
        return self.sum(wide) if self.reads else wide.index_select(self.dim, self.stay)

    def first(self, wide: Tensor) -> Tensor:
        """Of quantities that all copies share: steps taken, step sizes."""
        return wide.index_select(self.dim, self.stay)

    def gradient(self, wide: Tensor) -> Tensor:
        """The adjoint of `wide`: sums of tied rows, share-weighted sums of reading columns."""
        return self.sum(wide * self._shares(wide.ndim))

    def square(self, wide: Tensor) -> Tensor:
        """Second moments of equal gradients: the square of the (weighted) sum of roots."""
        return self.sum(wide.sqrt() * self._shares(wide.ndim)).square()

    def magnitude(self, wide: Tensor) -> Tensor:
        return self.sum(wide * self._shares(wide.ndim))


RULE = {
    "SGD": {"momentum_buffer": "gradient"},
    "Muon": {"momentum_buffer": "gradient"},
    "RMSprop": {"square_avg": "square", "grad_avg": "gradient", "momentum_buffer": "first"},
    "Adagrad": {"sum": "square"},
    "Adamax": {"exp_avg": "gradient", "exp_inf": "magnitude"},
    "Adadelta": {"square_avg": "square", "acc_delta": "first"},
    "ASGD": {"ax": "value"},
    "Rprop": {"prev": "gradient", "step_size": "first"},
    "Adafactor": {"variance": "square"},
}
MOMENTS = {"exp_avg": "gradient", "exp_avg_sq": "square", "max_exp_avg_sq": "square"}
"""Of Adam and its kin."""


def pulled_back(name: str, state: Mapping[str, Any], ties: Sequence[Tie]) -> dict[str, Any]:
    """The state of a leaf's optimiser from that of the wide tensor."""
    rules = RULE.get(name, MOMENTS)
    out: dict[str, Any] = {}
    for key, value in state.items():
        if key in rules and isinstance(value, Tensor):
            for tie in ties:
                value = getattr(tie, rules[key])(value)
        out[key] = value.clone() if isinstance(value, Tensor) else copy.deepcopy(value)
    if "row_var" in state:
        row, col = state["row_var"], state["col_var"]
        full = row * col / row.mean(-2, keepdim=True)
        for tie in ties:
            full = tie.square(full)
        out["row_var"], out["col_var"] = full.mean(-1, keepdim=True), full.mean(-2, keepdim=True)
    return out


class Reference:
    """The wide network with tied duplicates, trained through its leaves."""

    def __init__(
        self, net: Net, model: nn.Module, optimizers: Sequence[optim.Optimizer], make: Make, *, uneven: bool
    ) -> None:
        self.model = copy.deepcopy(model)
        shapes = {k: v.shape for k, v in model.state_dict().items()}
        self.ties: dict[str, list[Tie]] = {name: [] for name in shapes}
        for item in net.lumps:
            shares = _shares(item.labels, uneven)
            for part in item.parts:
                n = shapes[part.tensor][part.dim]
                self.ties[part.tensor].append(Tie.of(part, item.labels, shares, n))
        self.leaves = {name: nn.Parameter(self.value(name, p.detach())) for name, p in model.named_parameters()}
        self.optimizers = make(list(self.leaves.values()))
        names = {id(p): name for name, p in model.named_parameters()}
        for old, new in zip(optimizers, self.optimizers, strict=True):
            for p, state in old.state.items():
                name = names[id(p)]
                new.state[self.leaves[name]] = pulled_back(type(old).__name__, state, self.ties[name])

    def value(self, name: str, wide: Tensor) -> Tensor:
        for tie in self.ties[name]:
            wide = tie.value(wide)
        return wide.clone()

    def wide(self, name: str) -> Tensor:
        out: Tensor = self.leaves[name]
        for tie in self.ties[name]:
            out = tie.wide(out)
        return out

    def step(self, batch: Batch) -> None:
        tied = {name: self.wide(name) for name in self.leaves}
        loss = F.cross_entropy(functional_call(self.model, tied, (batch[0],)), batch[1])
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        loss.backward()
        for optimizer in self.optimizers:
            optimizer.step()

    def state(self) -> dict[str, Tensor]:
        buffers = {k: self.value(k, v) for k, v in self.model.named_buffers() if k in self.ties}
        return {k: v.detach().clone() for k, v in (self.leaves | buffers).items()}


def _shares(labels: Tensor, uneven: bool) -> Tensor:
    """Even shares, or 1 : 2 : 3 ... over the copies."""
    out = torch.ones(len(labels), dtype=torch.float64)
    for first in torch.unique(labels):
        mine = (labels == first).nonzero().flatten()
        weight = torch.arange(1, len(mine) + 1).double() if uneven else torch.ones(len(mine)).double()
        out[mine] = weight / weight.sum()
    return out
