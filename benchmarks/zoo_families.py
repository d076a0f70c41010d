"""Families of small networks whose parents are known: what `benchmarks/zoo.py` tells trees of.

A zoo is 10 roots, 3 children a root and 2 grandchildren a child: 100 networks on scikit-learn's digits (1,400 images).
A root is trained from its own random weights on all images (AdamW, rate 1e-3, 15 to 40 epochs, weight decay 0, .01 or
.1); a child goes on from its parent's weights with another seed, on a random subset of its own. ``recipe`` says how:

    alike      AdamW, rate 5e-4, 5 epochs, half of the images, no weight decay
    mixed      drawn anew for each child: AdamW (rate 2e-4 to 1e-3, decay 0, .01 or .1) or SGD (momentum .9, rate 5e-3
               to 3e-2, decay 0 or 5e-4), 2 to 10 epochs, 30 to 100 % of the images

Batches hold 32. ``kind`` mlp: 64-64-64-10, ReLU. cnn: convolutions 1-12-24 (3x3, the second with stride 2), ReLU,
linear to 10. slim: 64-32-10, ReLU. tanh: 64-48-48-32-10. `disguised` permutes and rescales (log-normal, 0.5) every
network at random.
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
N_TRAIN = 1400
KINDS, OTHERS, RECIPES = ("mlp", "cnn"), ("slim", "tanh"), ("alike", "mixed")


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
    if kind == "slim":
        return nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    if kind == "tanh":
        first, second = (nn.Linear(64, 48), nn.Tanh()), (nn.Linear(48, 48), nn.Tanh())
        return nn.Sequential(*first, *second, nn.Linear(48, 32), nn.Tanh(), nn.Linear(32, 10))
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
    return torch.zeros(2, 8, 8) if kind == "cnn" else torch.zeros(2, 64)


@lru_cache(maxsize=1)
def digits() -> tuple[Tensor, Tensor]:
    """Images in [0, 1], shape (1797, 64), and classes, in a fixed random order."""
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    return torch.tensor(x, dtype=torch.float32)[order] / 16, torch.tensor(y)[order]


def _draw(generator: torch.Generator, low: float, high: float) -> float:
    return float(torch.rand((), generator=generator)) * (high - low) + low


@dataclass(frozen=True)
class _Recipe:
    optimiser: str
    rate: float
    decay: float
    epochs: int
    share: float


def _recipe(name: str, generator: torch.Generator, root: bool) -> _Recipe:
    decay = (0.0, 0.01, 0.1)[int(torch.randint(3, (), generator=generator))]
    if root:
        return _Recipe("adamw", 1e-3, decay, round(_draw(generator, 15, 40)), 1.0)
    if name == "alike":
        return _Recipe("adamw", 5e-4, 0.0, 5, 0.5)
    epochs, share = round(_draw(generator, 2, 10)), _draw(generator, 0.3, 1.0)
    if _draw(generator, 0, 1) < 0.5:
        return _Recipe("adamw", math.exp(_draw(generator, math.log(2e-4), math.log(1e-3))), decay, epochs, share)
    rate = math.exp(_draw(generator, math.log(5e-3), math.log(3e-2)))
    return _Recipe("sgd", rate, 5e-4 if decay else 0.0, epochs, share)


def _train(model: nn.Module, kind: str, recipe: _Recipe, generator: torch.Generator) -> None:
    x, y = digits()
    x = x.reshape(-1, 8, 8) if kind == "cnn" else x
    mine = torch.randperm(N_TRAIN, generator=generator)[: int(N_TRAIN * recipe.share)]
    if recipe.optimiser == "adamw":
        optimiser: torch.optim.Optimizer
        optimiser = torch.optim.AdamW(model.parameters(), lr=recipe.rate, weight_decay=recipe.decay)
    else:
        optimiser = torch.optim.SGD(model.parameters(), lr=recipe.rate, momentum=0.9, weight_decay=recipe.decay)
    for _ in range(recipe.epochs):
        for batch in mine[torch.randperm(len(mine), generator=generator)].split(32):
            optimiser.zero_grad()
            F.cross_entropy(model(x[batch]), y[batch]).backward()
            optimiser.step()


@torch.no_grad()
def _accuracy(model: nn.Module, kind: str) -> float:
    x, y = digits()
    x = x.reshape(-1, 8, 8) if kind == "cnn" else x
    return float((model(x[N_TRAIN:]).argmax(1) == y[N_TRAIN:]).float().mean())


def zoo(kind: str, recipe: str, seed: int, roots: int = ROOTS) -> list[Grown]:
    """Train a zoo; the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    grown: list[Grown] = []

    def grow(parent: int | None, family: int) -> int:
        model = made(kind, 10_000 * seed + family) if parent is None else copy.deepcopy(grown[parent].model)
        _train(model, kind, _recipe(recipe, generator, parent is None), generator)
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
