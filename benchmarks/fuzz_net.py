"""Random networks from a seed: a recipe is drawn, printed, read back, shrunk, and built into a plain module."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import fuzz_layers  # noqa: F401  (fills the table)
import fuzz_pieces  # noqa: F401  (fills the table)
import torch
from fuzz_core import IMAGE, PIECES, SEQUENCE, VECTOR, Forward, Pick, Piece, Shape
from torch import Tensor, nn
from torch.nn import functional as F

BATCH = 3
LONGEST = 64
"""Tokens of the longest mask."""
MOST_CHANNELS, MOST_NUMBERS = 40, 1500
"""Feature maps above this size get no further pieces."""
STARTS = (IMAGE, SEQUENCE, VECTOR, "tokens")
ENDS = ("plain",) * 12 + ("tuple", "list", "dict", "nested") * 2 + ("object",)


@dataclass(frozen=True)
class Step:
    """One piece of a network: its name in the table, the seed of its own picks, the chains that it holds."""

    name: str
    seed: int
    bodies: tuple[tuple[Step, ...], ...] = ()

    def plain(self) -> list[Any]:
        return [self.name, self.seed, *([s.plain() for s in body] for body in self.bodies)]

    @classmethod
    def of(cls, plain: list[Any]) -> Step:
        name, seed, *bodies = plain
        return cls(name, seed, tuple(tuple(cls.of(s) for s in body) for body in bodies))


@dataclass(frozen=True)
class Recipe:
    """Everything that a network is made from.

    Args:
        training: the mode in which it is traced.
        used: it has run once, with gradients, before it is traced.
    """

    start: str
    seed: int
    steps: tuple[Step, ...]
    end: str = "plain"
    head: str = "linear"
    training: bool = False
    used: bool = False

    def text(self) -> str:
        """One line of JSON, which `Recipe.read` reads back."""
        return json.dumps({**vars(self), "steps": [s.plain() for s in self.steps]})

    @classmethod
    def read(cls, text: str) -> Recipe:
        plain = json.loads(text)
        return cls(**{**plain, "steps": tuple(Step.of(s) for s in plain["steps"])})

    def names(self) -> set[str]:
        """Pieces used."""
        waiting, out = list(self.steps), set()
        while waiting:
            step = waiting.pop()
            out.add(step.name)
            waiting += [s for body in step.bodies for s in body]
        return out


class Chain(nn.Module):
    """Blocks one after another."""

    def __init__(self, blocks: list[nn.Module]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor, io: Forward) -> Tensor:
        for layer in self.blocks:
            x = layer(x, io)
        return x


@dataclass
class Result:
    """What a network may return in place of a tuple."""

    logits: Tensor
    more: tuple[Any, ...]


class Net(nn.Module):
    """A stem, a chain of pieces, a head."""

    def __init__(self, recipe: Recipe, stem: nn.Module, chain: nn.Module, head: nn.Module | None) -> None:
        super().__init__()
        self.stem, self.chain, self.head = stem, chain, head
        self.start, self.end, self.how = recipe.start, recipe.end, recipe.head

    def forward(self, x: Tensor, **inputs: Tensor) -> Any:
        io = Forward(inputs)
        h = self.chain(self.stem(x), io)
        if self.how == "tied":
            h = F.linear(h, self.stem.weight)
        elif self.head is not None:
            h = self.head(h)
        more = io.outputs
        if self.end == "plain" and not more:
            return h
        if self.end == "dict":
            return {"logits": h, **{f"more{k}": v for k, v in enumerate(more)}}
        if self.end == "nested":
            return {"out": (h, {"more": list(more)})}
        if self.end == "object":
            return Result(h, tuple(more))
        return [h, *more] if self.end == "list" else (h, *more)


@dataclass(frozen=True)
class Built:
    """A network and the inputs that it takes."""

    net: nn.Module
    args: tuple[Tensor, ...]
    kwargs: dict[str, Tensor]


def _start(recipe: Recipe) -> tuple[nn.Module, Shape, Tensor]:
    """The stem, what it makes, and the network's first input."""
    r = random.Random(recipe.seed)
    c = r.choice([4, 6, 8, 12])
    if recipe.start == IMAGE:
        size = (r.choice([4, 6]), r.choice([4, 6]))
        return nn.Conv2d(3, c, r.choice([1, 3]), padding="same"), Shape(IMAGE, c, size), torch.randn(BATCH, 3, *size)
    t = r.choice([4, 6])
    if recipe.start == "tokens":
        return nn.Embedding(9, c), Shape(SEQUENCE, c, (t,)), torch.randint(0, 9, (BATCH, t))
    if recipe.start == SEQUENCE:
        return nn.Linear(5, c), Shape(SEQUENCE, c, (t,)), torch.randn(BATCH, t, 5)
    return nn.Linear(5, c), Shape(VECTOR, c), torch.randn(BATCH, 5)


def _make(step: Step, s: Shape, needs: set[str]) -> tuple[nn.Module, Shape] | None:
    """Build one step; None where it does not fit what comes in."""
    entry = PIECES[step.name]
    if not entry.fits(s):
        return None
    bodies = [_chain(body, s, needs) for body in step.bodies]
    needs.update(entry.needs)
    torch.manual_seed(step.seed)
    return entry.make(Pick(step.seed), s, *bodies)


def _chain(steps: tuple[Step, ...], s: Shape, needs: set[str]) -> tuple[nn.Module, Shape]:
    blocks = []
    for step in steps:
        made = _make(step, s, needs)
        if made is not None:
            blocks.append(made[0])
            s = made[1]
    return Chain(blocks), s


def _head(recipe: Recipe, s: Shape) -> tuple[nn.Module | None, str]:
    if recipe.head == "tied" and recipe.start == "tokens" and s.kind == SEQUENCE:
        return None, "tied"
    if recipe.head == "none":
        return None, "none"
    if recipe.head == "pooled" and s.kind == IMAGE:
        return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(s.c, 3)), "pooled"
    return s.linear(3), "linear"


def build(recipe: Recipe) -> Built:
    """Build a network with generic weights: nothing in it is zero or equal by accident."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        stem, shape, x = _start(recipe)
        needs: set[str] = set()
        width = shape.c
        chain, shape = _chain(recipe.steps, shape, needs)
        torch.manual_seed(recipe.seed + 1)
        how = "linear" if recipe.head == "tied" and shape.c != width else recipe.head
        head, how = _head(replace(recipe, head=how), shape)
        net = Net(replace(recipe, head=how), stem, chain, head)
        generic(net)
        inputs = {
            "condition": torch.randn(BATCH, 5),
            "label": torch.randint(0, 7, (BATCH,)),
            "mask": torch.arange(LONGEST) < torch.tensor([[2], [LONGEST], [3]]),
        }
    net.train(recipe.training)
    return Built(net, (x,), {name: inputs[name] for name in sorted(needs)})


def generic(net: nn.Module) -> None:
    """Move every parameter away from its initial value, and running statistics too."""
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(1 + 0.2 * torch.rand_like(parameter)).add_(0.1 * torch.randn_like(parameter))
        for module in net.modules():
            if isinstance(getattr(module, "running_mean", None), Tensor):
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 1.5)


def draw(seed: int) -> Recipe:
    """A random recipe."""
    r = random.Random(seed)
    head = r.choices(["linear", "pooled", "tied", "none"], [6, 2, 3, 1])[0]
    recipe = Recipe(r.choice(STARTS), seed, (), r.choice(ENDS), head, r.random() < 0.3, r.random() < 0.2)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        shape = _start(recipe)[1]
        steps, _ = _draw_chain(r, shape, r.choice([2, 3, 4, 5, 6]), 0)
    return replace(recipe, steps=steps)


def _draw_chain(r: random.Random, s: Shape, n: int, depth: int) -> tuple[tuple[Step, ...], Shape]:
    steps: list[Step] = []
    for _ in range(n):
        if s.c > MOST_CHANNELS or s.c * math.prod(s.size) > MOST_NUMBERS:
            break
        fitting = [p for p in PIECES.values() if p.fits(s) and (depth < 2 or not p.bodies)]
        entry = r.choices(fitting, [_share(p, s) for p in fitting])[0]
        bodies = tuple(_draw_chain(r, s, r.choice([1, 2, 3]), depth + 1)[0] for _ in range(entry.bodies))
        step = Step(entry.name, r.randrange(10**6), bodies)
        made = _make(step, s, set())
        steps.append(step)
        s = s if made is None else made[1]
    return tuple(steps), s


def _share(entry: Piece, s: Shape) -> float:
    """Pieces of the very kind are fewer in the table: each is drawn as often as two that take any kind."""
    return entry.weight * (1 if entry.kind != s.kind else 2)


def smaller(recipe: Recipe) -> Iterator[Recipe]:
    """Recipes with one piece less, a chain in place of what holds it, or a plainer end."""
    for steps in _smaller(recipe.steps):
        yield replace(recipe, steps=steps)
    for plainer in ({"end": "plain"}, {"head": "linear"}, {"training": False}, {"used": False}):
        if {**vars(recipe), **plainer} != vars(recipe):
            yield replace(recipe, **plainer)


def _smaller(steps: tuple[Step, ...]) -> Iterator[tuple[Step, ...]]:
    for k, step in enumerate(steps):
        yield steps[:k] + steps[k + 1 :]
        for body in step.bodies:
            yield steps[:k] + body + steps[k + 1 :]
        for b, body in enumerate(step.bodies):
            for less in _smaller(body):
                bodies = (*step.bodies[:b], less, *step.bodies[b + 1 :])
                yield (*steps[:k], replace(step, bodies=bodies), *steps[k + 1 :])
