"""Families of small networks whose parents are known: what `benchmarks/zoo.py` tells trees of.

A zoo is 10 roots, 3 children a root and 2 grandchildren a child: 100 networks on scikit-learn's digits (1,400 images).
A root is trained from its own random weights on all images; a child goes on from its parent's weights on a random
subset with another seed. Everything is drawn anew for each network:

    roots      Adam, 1e-3, 15 to 40 epochs, weight decay 0 or 1e-4
    children   Adam (rate 2e-4 to 1e-3) or SGD (momentum .9, rate 5e-3 to 3e-2), 2 to 10 epochs, 30 to 100 % of the
               images, weight decay 0, 1e-4 or 1e-3, batches of 32

``kind`` mlp: 64-64-64-10, ReLU. cnn: convolutions 1-12-24 (3x3, the second with stride 2), ReLU, linear to 10.
`disguised` permutes and rescales (log-normal, 0.5) every network at random.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from weightfold.weights.disguise import disguise
from weightfold.weights.symmetry import Symmetries

ROOTS, CHILDREN, GRANDCHILDREN = 10, 3, 2
KINDS = ("mlp", "cnn")


@dataclass(frozen=True, eq=False)
class Grown:
    """One network of a zoo: its weights, family and parent (number in the list; None for a root)."""

    model: nn.Module
    family: int
    parent: int | None
    accuracy: float


def made(kind: str, seed: int) -> nn.Module:
    """An untrained network of a kind."""
    torch.manual_seed(seed)
    if kind == "mlp":
        return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    return nn.Sequential(
        nn.Unflatten(1, (1, 8)),
        nn.Conv2d(1, 12, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(12, 24, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(24 * 16, 10),
    )


def example(kind: str) -> Tensor:
    """An input of a kind."""
    return torch.zeros(2, 64) if kind == "mlp" else torch.zeros(2, 8, 8)


@lru_cache(maxsize=1)
def digits() -> tuple[Tensor, Tensor]:
    """Images in [0, 1], shape (1797, 64), and classes, in a fixed random order."""
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    return torch.tensor(x, dtype=torch.float32)[order] / 16, torch.tensor(y)[order]


def _draw(generator: torch.Generator, low: float, high: float) -> float:
    return float(torch.rand((), generator=generator)) * (high - low) + low


def _trained(model: nn.Module, kind: str, generator: torch.Generator, root: bool) -> None:
    x, y = digits()
    x = x if kind == "mlp" else x.reshape(-1, 8, 8)
    decay = (0.0, 1e-4, 0.0 if root else 1e-3)[int(torch.randint(3, (), generator=generator))]
    share = 1.0 if root else _draw(generator, 0.3, 1.0)
    epochs = round(_draw(generator, 15, 40) if root else _draw(generator, 2, 10))
    mine = torch.randperm(1400, generator=generator)[: int(1400 * share)]
    if root or _draw(generator, 0, 1) < 0.5:
        rate = 1e-3 if root else math.exp(_draw(generator, math.log(2e-4), math.log(1e-3)))
        optimiser: torch.optim.Optimizer = torch.optim.Adam(model.parameters(), lr=rate, weight_decay=decay)
    else:
        rate = math.exp(_draw(generator, math.log(5e-3), math.log(3e-2)))
        optimiser = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9, weight_decay=decay)
    for _ in range(epochs):
        for batch in mine[torch.randperm(len(mine), generator=generator)].split(32):
            optimiser.zero_grad()
            F.cross_entropy(model(x[batch]), y[batch]).backward()
            optimiser.step()


@torch.no_grad()
def _accuracy(model: nn.Module, kind: str) -> float:
    x, y = digits()
    x = x if kind == "mlp" else x.reshape(-1, 8, 8)
    return float((model(x[1400:]).argmax(1) == y[1400:]).float().mean())


def zoo(kind: str, seed: int, roots: int = ROOTS) -> list[Grown]:
    """Train a zoo; the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    grown: list[Grown] = []

    def grow(parent: int | None, family: int) -> int:
        model = made(kind, 10_000 * seed + family) if parent is None else copy.deepcopy(grown[parent].model)
        _trained(model, kind, generator, parent is None)
        grown.append(Grown(model, family, parent, _accuracy(model, kind)))
        return len(grown) - 1

    for family in range(roots):
        top = grow(None, family)
        for _ in range(CHILDREN):
            child = grow(top, family)
            for _ in range(GRANDCHILDREN):
                grow(child, family)
    return grown


def disguised(grown: list[Grown], kind: str, found: Symmetries, seed: int, spread: float = 0.5) -> list[Grown]:
    """Every network permuted and rescaled at random, and in random order; parents are renumbered."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(grown), generator=generator).tolist()
    place = {old: new for new, old in enumerate(order)}
    out = []
    for old in order:
        one = grown[old]
        model = disguise(one.model, example(kind), generator, spread=spread, found=found)
        out.append(Grown(model, one.family, None if one.parent is None else place[one.parent], one.accuracy))
    return out
