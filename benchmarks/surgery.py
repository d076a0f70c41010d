"""After a fold in mid-training, the optimiser goes on as if the wide network's duplicates had been tied all along.

    python benchmarks/surgery.py [--nets mlp ...] [--optimizers adamw ...]

A network is trained for some steps in float64, exact duplicates are planted (weights, statistics, optimiser state),
and then two roads are taken:

1. ours: `apply(merge)`, or `apply(fold)` with one-hot maps, on the live network, then steps of its own optimiser;
2. the reference, which knows nothing of weightfold: the wide network as a function of small leaf tensors through the
   lumping matrix (`torch.func.functional_call`: a tied row is a copy of the leaf's row, a reading column the leaf's
   column times its share, even or uneven), and an optimiser over the leaves. Where every channel stands is written down
   by hand for every network. The leaves' state is the pull-back of the wide one: gradients are covectors, so first
   moments of tied rows are summed and those of readers weighted by their shares; second moments of c equal copies are
   (sum of roots)^2; Adafactor's factors are multiplied out, pulled back and factored again.

``step_error`` is the largest difference after one step over the largest change that the step made, over all small
tensors; ``later_error`` the largest relative difference of the tensors after 6 more steps; ``state_error`` that of the
optimiser's state right after the edit. Also checked: the undo is exact to the bit, the optimiser holds exactly the live
parameters after every edit, averaged models follow, ties survive.
The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import json
import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn, optim
from torch.func import functional_call
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import weightfold as wf
from weightfold.graph import edit as edits
from weightfold.graph.apply import Companion, Undo, apply
from weightfold.graph.group import ChannelGraph
from weightfold.graph.resize import with_sizes

WARM_UP = 7
LATER = 6
Batch = tuple[Tensor, Tensor]

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

# optimisers -----------------------------------------------------------------------------------------------------------

Make = Callable[[Sequence[nn.Parameter]], list[optim.Optimizer]]


def _muon(parameters: Sequence[nn.Parameter]) -> list[optim.Optimizer]:
    flat, rest = [p for p in parameters if p.ndim == 2], [p for p in parameters if p.ndim != 2]
    return [optim.Muon(flat, lr=5e-3, weight_decay=0.1), optim.AdamW(rest, lr=3e-3)]


def one(cls: type[optim.Optimizer], **settings: Any) -> Make:
    return lambda parameters: [cls(parameters, **settings)]


OPTIMIZERS: dict[str, Make] = {
    "sgd": one(optim.SGD, lr=0.05, weight_decay=1e-3, foreach=False),
    "sgd_momentum": one(optim.SGD, lr=0.05, momentum=0.9, weight_decay=1e-3, foreach=False),
    "sgd_nesterov": one(optim.SGD, lr=0.05, momentum=0.9, nesterov=True, foreach=True),
    "sgd_fused": one(optim.SGD, lr=0.05, momentum=0.9, fused=True),
    "adam": one(optim.Adam, lr=3e-3, weight_decay=1e-3, foreach=False),
    "adamw": one(optim.AdamW, lr=3e-3, foreach=False),
    "adamw_amsgrad": one(optim.AdamW, lr=3e-3, amsgrad=True, foreach=False),
    "adamw_foreach": one(optim.AdamW, lr=3e-3, foreach=True),
    "adamw_fused": one(optim.AdamW, lr=3e-3, fused=True),
    "adafactor": one(optim.Adafactor, lr=0.01, weight_decay=1e-2),
    "rmsprop": one(optim.RMSprop, lr=1e-3, momentum=0.9, centered=True, foreach=False),
    "rmsprop_plain": one(optim.RMSprop, lr=1e-3, foreach=True),
    "adagrad": one(optim.Adagrad, lr=0.02, foreach=False),
    "adamax": one(optim.Adamax, lr=3e-3, foreach=False),
    "nadam": one(optim.NAdam, lr=3e-3, foreach=False),
    "radam": one(optim.RAdam, lr=3e-3, foreach=False),
    "adadelta": one(optim.Adadelta, lr=0.5, foreach=False),
    "asgd": one(optim.ASGD, lr=0.02, t0=0, foreach=False),
    "rprop": one(optim.Rprop, lr=1e-3, foreach=False),
}
if hasattr(optim, "Muon"):
    OPTIMIZERS["muon"] = _muon

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


# training and planting ------------------------------------------------------------------------------------------------


def batches(net: Net, n: int, seed: int) -> list[Batch]:
    generator = torch.Generator().manual_seed(seed)
    draw = partial(torch.randn, net.shape, generator=generator, dtype=torch.float64)
    return [(draw(), torch.randint(0, 4, net.shape[:1], generator=generator)) for _ in range(n)]


def step(model: nn.Module, optimizers: Sequence[optim.Optimizer], batch: Batch) -> None:
    loss = F.cross_entropy(model(batch[0]), batch[1])
    for optimizer in optimizers:
        optimizer.zero_grad()
    loss.backward()
    for optimizer in optimizers:
        optimizer.step()


@torch.no_grad()
def equalise(tensor: Tensor, part: Part, labels: Tensor) -> None:
    """Make the rows of all copies equal along a part, in place."""
    if part.dim >= tensor.ndim or tensor.shape[part.dim] < part.positions.numel():
        return
    source = torch.arange(tensor.shape[part.dim])
    source[part.positions] = part.positions[labels]
    tensor.copy_(tensor.index_select(part.dim, source))


def plant(net: Net, model: nn.Module, optimizers: Sequence[optim.Optimizer], averaged: AveragedModel) -> None:
    """Exact duplicates: weights and statistics of what writes them, and the state of everything."""
    tensors, means = model.state_dict(), averaged.module.state_dict()
    parameters = dict(model.named_parameters())
    for item in net.lumps:
        for part in item.parts:
            if not part.reads:
                equalise(tensors[part.tensor], part, item.labels)
                equalise(means[part.tensor], part, item.labels)
            for optimizer in optimizers:
                for key, value in optimizer.state.get(parameters.get(part.tensor, torch.zeros(())), {}).items():
                    if isinstance(value, Tensor) and not (key == "ax" and part.reads):
                        equalise(value, part, item.labels)


def edit_of(graph: ChannelGraph, item: Lump, kind: str) -> edits.Edit:
    group = graph[item.group]
    if kind == "merge":
        return edits.merge(group, item.labels)
    keep = torch.unique(item.labels)
    dropped = torch.tensor([c for c in range(group.n_channels) if c not in set(keep.tolist())])
    onehot = (item.labels[dropped][:, None] == keep[None, :]).double()
    return edits.fold(group, keep, {axis.key: onehot for axis in group.role("read")})


def fold_all(
    net: Net,
    model: nn.Module,
    graph: ChannelGraph,
    optimizers: Sequence[optim.Optimizer],
    companions: Sequence[Companion],
    kind: str,
) -> tuple[ChannelGraph, list[Undo]]:
    undos = []
    for item in net.lumps:
        graph, undo = apply(model, graph, edit_of(graph, item, kind), optimizers, companions)
        check_live(model, optimizers)
        undos.append(undo)
    return graph, undos


def check_live(model: nn.Module, optimizers: Sequence[optim.Optimizer]) -> None:
    """The optimisers hold exactly the live parameters, and keep state for no others."""
    live = sorted(id(p) for p in model.parameters())
    held = sorted(id(p) for o in optimizers for g in o.param_groups for p in g["params"])
    assert held == live, "the optimiser does not hold exactly the live parameters"
    for optimizer in optimizers:
        assert {id(p) for p in optimizer.state} <= set(live), "the optimiser keeps state of dead parameters"


# comparing ------------------------------------------------------------------------------------------------------------


def change_error(before: Mapping[str, Tensor], ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> float:
    """Largest difference over the largest change of the reference, over tensors."""
    worst = 0.0
    for name, value in theirs.items():
        if value.is_floating_point() and value.numel():
            moved = (value - before[name]).abs().max().clamp_min(1e-300)
            worst = max(worst, float((ours[name] - value).abs().max() / moved) if moved > 1e-300 else 0.0)
    return worst


def tensor_error(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> float:
    worst = 0.0
    for name, value in theirs.items():
        if value.is_floating_point() and value.numel():
            worst = max(worst, float((ours[name] - value).abs().max() / value.abs().max().clamp_min(1e-300)))
    return worst


def state_error(ours: Mapping[str, Any], reference: Reference, optimizers: Sequence[optim.Optimizer]) -> float:
    """Largest relative difference of the optimisers' state."""
    names, worst = {id(p): name for name, p in ours.items()}, 0.0
    for mine, theirs in zip(optimizers, reference.optimizers, strict=True):
        for p, state in mine.state.items():
            other = theirs.state[reference.leaves[names[id(p)]]]
            assert state.keys() == other.keys(), "the optimiser's state has other entries than the reference's"
            pairs = {k: (torch.as_tensor(v).double(), torch.as_tensor(other[k]).double()) for k, v in state.items()}
            worst = max(
                worst, tensor_error({k: a for k, (a, _) in pairs.items()}, {k: b for k, (_, b) in pairs.items()})
            )
    return worst


def snapshot(
    model: nn.Module, averaged: AveragedModel, shadow: Mapping[str, Tensor], optimizers: Sequence[optim.Optimizer]
) -> dict[str, Any]:
    """Everything that an undo must bring back, identities included."""
    out: dict[str, Any] = {}
    for who, module in (("model", model), ("averaged", averaged)):
        for name, value in (*module.named_parameters(remove_duplicate=False), *module.named_buffers()):
            out[f"{who}:{name}"] = value.detach().clone()
            out[f"{who}:{name}:id"] = id(value)
        for path, part in module.named_modules():
            out |= {f"{who}:{path}.{k}": v for k, v in vars(part).items() if isinstance(v, (int, float, tuple, str))}
    out |= {f"shadow:{name}": value.clone() for name, value in shadow.items()}
    names = {id(p): name for name, p in model.named_parameters()}
    for number, optimizer in enumerate(optimizers):
        out[f"groups:{number}"] = [[id(p) for p in g["params"]] for g in optimizer.param_groups]
        for p, state in optimizer.state.items():
            for key, value in state.items():
                kept = value.clone() if isinstance(value, Tensor) else value
                out[f"state:{number}:{names[id(p)]}:{key}"] = kept
    return out


def same(a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
    if a.keys() != b.keys():
        return False
    return all(torch.equal(v, b[k]) if isinstance(v, Tensor) else v == b[k] for k, v in a.items())


# one case -------------------------------------------------------------------------------------------------------------


@dataclass
class Start:
    """A network in mid-training with planted duplicates, its optimisers and its averages."""

    model: nn.Module
    optimizers: list[optim.Optimizer]
    averaged: AveragedModel
    shadow: dict[str, Tensor]


def start(net: Net, make: Make) -> Start:
    torch.manual_seed(3)
    model = net.build().double()
    optimizers = make(list(model.parameters()))
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
    for batch in batches(net, WARM_UP, seed=1):
        step(model, optimizers, batch)
        averaged.update_parameters(model)
    plant(net, model, optimizers, averaged)
    shadow = {name: value.detach().clone() for name, value in averaged.module.state_dict().items()}
    return Start(model, optimizers, averaged, shadow)


def run(net: Net, make: Make, kind: str, *, uneven: bool) -> dict[str, Any]:
    """Both roads, once."""
    s = start(net, make)
    example = batches(net, 1, seed=1)[0][0]
    graph = with_sizes(s.model, example, wf.trace(s.model, example))
    reference = Reference(net, s.model, s.optimizers, make, uneven=uneven)
    companions = [s.averaged, s.shadow]

    before = snapshot(s.model, s.averaged, s.shadow, s.optimizers)
    _, undos = fold_all(net, s.model, graph, s.optimizers, companions, kind)
    for undo in reversed(undos):
        undo.restore()
    undo_exact = same(before, snapshot(s.model, s.averaged, s.shadow, s.optimizers))
    check_live(s.model, s.optimizers)

    averages = {k: reference.value(k, v) for k, v in s.averaged.module.state_dict().items() if k in reference.ties}
    fold_all(net, s.model, graph, s.optimizers, companions, kind)
    average_error = max(tensor_error(s.averaged.module.state_dict(), averages), tensor_error(s.shadow, averages))
    moment_error = state_error(dict(s.model.named_parameters()), reference, s.optimizers)
    small = {k: v.detach().clone() for k, v in s.model.state_dict().items()}
    first, *rest = batches(net, 1 + LATER, seed=2)
    step(s.model, s.optimizers, first)
    s.averaged.update_parameters(s.model)
    reference.step(first)
    step_error = change_error(small, s.model.state_dict(), reference.state())
    for batch in rest:
        step(s.model, s.optimizers, batch)
        s.averaged.update_parameters(s.model)
        reference.step(batch)
    return {
        "step_error": step_error,
        "later_error": tensor_error(s.model.state_dict(), reference.state()),
        "state_error": moment_error,
        "average_error": average_error,
        "undo_exact": undo_exact,
    }


class Tied(nn.Module):
    """A language model whose head is its embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.up, self.down = nn.Embedding(11, 8), nn.Linear(8, 12), nn.Linear(12, 8)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        return self.head(x + self.down(torch.tanh(self.up(x))))


def ties_survive(make: Make) -> bool:
    """A tied embedding stays one parameter through edits of its own channels, training and the undo."""
    torch.manual_seed(5)
    model = Tied().double()
    optimizers = make(list(model.parameters()))
    ids = torch.randint(0, 11, (6, 7))
    graph = wf.trace(model, ids)
    group = graph.containing("embed.weight", 1)
    assert group is not None, "the tied channels are in no group"
    assert group.role("both"), "the tied tensor does not both write and read"
    assert "merge" not in group.admits, "merging tied channels is not exact"

    def train() -> None:
        for optimizer in optimizers:
            optimizer.zero_grad()
        F.cross_entropy(model(ids).flatten(0, 1), ids.flatten()).backward()
        for optimizer in optimizers:
            optimizer.step()

    def tied() -> bool:
        check_live(model, optimizers)
        return model.head.weight is model.embed.weight

    train()
    fine, before, undos = tied(), snapshot(model, AveragedModel(Tied()), {}, optimizers), []
    for edit in (
        edits.permute(group, torch.randperm(8)),
        edits.remove(group, torch.tensor([0, 2, 3, 5, 7])),
    ):
        graph, undo = apply(model, graph, edit, optimizers)
        undos.append(undo)
        fine &= tied()
        group = graph[group.name]
    for undo in reversed(undos):
        undo.restore()
    after = snapshot(model, AveragedModel(Tied()), {}, optimizers)
    mine = lambda s: {k: v for k, v in s.items() if not k.startswith("averaged")}  # noqa: E731
    fine &= tied() and same(mine(before), mine(after))
    train()
    return fine and tied()


CASES = (("merge", False), ("merge", True), ("fold", False), ("fold", True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--nets", nargs="+", choices=NETS, default=list(NETS))
    parser.add_argument("--optimizers", nargs="+", choices=OPTIMIZERS, default=list(OPTIMIZERS))
    chosen = parser.parse_args()
    started = time.perf_counter()
    table: dict[str, dict[str, float]] = {}
    undo_exact, ties, worst = (
        True,
        True,
        {"step_error": 0.0, "later_error": 0.0, "state_error": 0.0, "average_error": 0.0},
    )
    for name in chosen.optimizers:
        table[name] = {}
        for net in chosen.nets:
            results = [run(NETS[net], OPTIMIZERS[name], kind, uneven=uneven) for kind, uneven in CASES]
            table[name][net] = max(r["step_error"] for r in results)
            undo_exact &= all(r["undo_exact"] for r in results)
            worst = {key: max([value, *(r[key] for r in results)]) for key, value in worst.items()}
            later = max(r["later_error"] for r in results)
            average = max(r["average_error"] for r in results)
            exact = all(r["undo_exact"] for r in results)
            print(
                f"{name:14} {net:16} step {table[name][net]:.1e}  later {later:.1e}  "
                f"average {average:.1e}  undo {exact}"
            )
        ties &= ties_survive(OPTIMIZERS[name])
    print(
        json.dumps(
            {
                "max_step_error": worst["step_error"],
                "undo_exact": undo_exact,
                "optimizers": {name: max(errors.values()) for name, errors in table.items()},
                "max_later_error": worst["later_error"],
                "max_state_error": worst["state_error"],
                "max_average_error": worst["average_error"],
                "ties_survive": ties,
                "by_net": table,
                "edits": [f"{kind}, {'uneven' if uneven else 'even'} shares" for kind, uneven in CASES],
                "warm_up_steps": WARM_UP,
                "later_steps": LATER,
                "seconds": round(time.perf_counter() - started, 1),
                "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
                "n_cores": os.cpu_count(),
                "versions": {
                    "weightfold": wf.__version__,
                    "python": platform.python_version(),
                    "torch": torch.__version__,
                    "system": platform.system(),
                },
            }
        )
    )


if __name__ == "__main__":
    main()
