"""Duplicates in a zoo, by level: the same bytes, the same function, almost the same weights.

| level | what it takes |
|---|---|
| identical | equal digests |
| permuted | equal semantic hashes, and every tensor holds the same numbers in another order |
| rescaled | equal semantic hashes: the same function by scales, signs and mixtures of channels too |
| quantised | aligned, every number is the other's rounded to float16, bfloat16 or a grid of at most 2^8 steps |
| noisy | aligned, a relative distance of at most a threshold |

Nothing is compared with everything: candidates share a key of the semantic hash (`weightfold.weights.canon.hash_keys`)
or are among the nearest embeddings of one architecture. Of a group the model that was added first stays, but what was
rounded never stays for what it was rounded from; each of the others is held against it or against another member.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from weightfold.config import nearest
from weightfold.errors import ConfigError
from weightfold.weights.canon import hash_distance, hash_keys, same_hash
from weightfold.zoo.delta.matching import match
from weightfold.zoo.delta.moves import moved
from weightfold.zoo.distance import neighbours, relative_distance
from weightfold.zoo.kin.families import RELATED, Item, Progress, Sets, Shelf, by_kind, cosine

LEVELS = ("identical", "permuted", "rescaled", "quantised", "noisy")
EXACT = LEVELS[:3]
NOISE = 1e-3
"""Relative distance of aligned weights up to which a model counts as a noisy copy."""
N_NEAR = 8
MOST_LEVELS, LEAST_ROW, MOST_PARTS = 256, 16, 4
"""Steps of a grid; numbers from which on it is recognised; how many steps the smallest gap may hold."""
AGREEING = 0.999
"""Share of the numbers that have to be the other's, rounded."""
ROUNDED = (torch.float16, torch.bfloat16)
_Edge = tuple[int, int, str, str]


@dataclass(frozen=True)
class Copy:
    """A model that another one makes superfluous.

    Args:
        name: of the model.
        of: the model that it is a copy of.
        level: one of `LEVELS`.
        evidence: what was compared, in words.
    """

    name: str
    of: str
    level: str
    evidence: str


@dataclass(frozen=True)
class Group:
    """A model that stays, and its copies, in the order in which they were added."""

    keeper: str
    copies: tuple[Copy, ...]


def dedupe(
    items: Sequence[Item],
    *,
    level: str = "noisy",
    noise: float = NOISE,
    shelf: Shelf | None = None,
    progress: Progress | None = None,
) -> list[Group]:
    """Find duplicates.

    Args:
        items: see `weightfold.zoo.kin.families.items_of`.
        level: the loosest level looked for.
        noise: largest relative distance of aligned weights that counts as noise.
        progress: called with pairs done, all of them, and a name.
    Returns:
        Groups of two or more, in the order of their keepers.
    Raises:
        ArtifactError: a model cannot be read.
        ConfigError: there is no such level.
    """
    if level not in LEVELS:
        raise ConfigError(f"There is no level '{level}' of duplicates.", remedy=nearest(level, LEVELS))
    shelf = Shelf(items) if shelf is None else shelf
    reach = LEVELS.index(level)
    edges: list[_Edge] = []
    sets = Sets(len(items))

    def enter(i: int, j: int, kind: str, evidence: str) -> None:
        if sets.root(i) != sets.root(j):
            sets.join(i, j)
            edges.append((i, j, kind, evidence))

    first: dict[str, int] = {}
    for i, item in enumerate(items):
        j = first.setdefault(item.digest, i)
        if j != i:
            enter(j, i, "identical", f"digest {item.digest[:12]}")
    alone = sorted(first.values())
    if reach >= 1:
        for i, j in _same_function(items, alone):
            kind, evidence = _order_or_scale(items[i], items[j])
            if LEVELS.index(kind) <= reach:
                enter(i, j, kind, evidence)
    if reach >= 3:
        pairs = _near(items, alone)
        for at, (i, j) in enumerate(pairs):
            if progress is not None:
                progress(at, len(pairs), items[i].name)
            if sets.root(i) != sets.root(j):
                told = _almost(items, shelf, i, j, noise if reach >= 4 else -1.0)
                if told is not None:
                    enter(*told)
    around: dict[int, list[_Edge]] = {}
    for i, j, kind, evidence in edges:
        around.setdefault(i, []).append((i, j, kind, evidence))
        around.setdefault(j, []).append((j, i, kind, evidence))
    rounded = _rounded(edges, around)
    groups = [g for g in sets.groups() if len(g) > 1]
    keepers = (next((i for i in group if i not in rounded), group[0]) for group in groups)
    return [_group(items, keeper, around) for keeper in sorted(keepers)]


def _rounded(edges: Sequence[_Edge], around: Mapping[int, Sequence[_Edge]]) -> list[int]:
    """Models that are rounded copies of others, and the exact copies of those."""
    out = [j for _, j, kind, _ in edges if kind == "quantised"]
    for i in out:
        out += [j for _, j, kind, _ in around[i] if kind in EXACT and j not in out]
    return out


def _group(items: Sequence[Item], keeper: int, around: Mapping[int, Sequence[_Edge]]) -> Group:
    """One member stays; every other one is a copy of its neighbour on the way there."""
    copies: dict[int, Copy] = {}
    reached = [keeper]
    for i in reached:
        for _, j, kind, evidence in around[i]:
            if j != keeper and j not in copies:
                reached.append(j)
                copies[j] = Copy(items[j].name, items[i].name, kind, evidence)
    return Group(items[keeper].name, tuple(copies[j] for j in sorted(copies)))


def _same_function(items: Sequence[Item], alone: Sequence[int]) -> list[tuple[int, int]]:
    """Pairs of equal semantic hashes; each model with the first of its like."""
    by_key: dict[str, list[int]] = {}
    pairs = []
    for i in alone:
        text = items[i].semantic_hash
        if text is None:
            continue
        keys = hash_keys(text)
        near = sorted({j for key in keys for j in by_key.get(key, ())})
        same = next((j for j in near if same_hash(text, items[j].semantic_hash or "")), None)
        if same is not None:
            pairs.append((same, i))
        for key in keys:
            by_key.setdefault(key, []).append(i)
    return pairs


def _order_or_scale(one: Item, two: Item) -> tuple[str, str]:
    """Whether two models of the same function differ by the order of channels alone."""
    a, b = one.load(), two.load()
    apart = hash_distance(one.semantic_hash or "", two.semantic_hash or "")
    evidence = f"semantic hashes {apart:.1e} apart"
    ordered = all(
        name in b and a[name].dtype == b[name].dtype and torch.equal(_sorted(a[name]), _sorted(b[name])) for name in a
    )
    if ordered:
        return "permuted", f"{evidence}, the same numbers in another order"
    return "rescaled", f"{evidence}, other numbers"


def _sorted(tensor: Tensor) -> Tensor:
    return tensor.flatten() if tensor.is_complex() else tensor.flatten().double().sort().values


def _near(items: Sequence[Item], alone: Sequence[int]) -> list[tuple[int, int]]:
    """Pairs of near embeddings of one architecture, the nearest first."""
    kept = set(alone)
    pairs: dict[tuple[int, int], float] = {}
    for mine in by_kind(items):
        mine = [i for i in mine if i in kept]
        if len(mine) < 2:
            continue
        vectors = np.stack([items[i].vector for i in mine])  # type: ignore[arg-type]
        for at, others in enumerate(neighbours(vectors, N_NEAR)):
            for other in others:
                pair = (min(mine[at], mine[other]), max(mine[at], mine[other]))
                pairs[pair] = float(np.linalg.norm(vectors[at] - vectors[other]))
    return sorted(pairs, key=lambda pair: (pairs[pair], pair))


def _almost(items: Sequence[Item], shelf: Shelf, i: int, j: int, noise: float) -> _Edge | None:
    """Whether one of two models is the other's, rounded or with noise; the rounded one comes second."""
    one, two = shelf.aligned(i, j)
    if cosine(one, two) < RELATED:
        return None
    apart = relative_distance(one, two)
    if apart <= 0.2:
        for a, b in ((i, j), (j, i)):
            kind = rounding(*_moved_states(items[a], items[b]))
            if kind is not None:
                return a, b, "quantised", f"{items[b].name} is {items[a].name} rounded to {kind}, {apart:.1e} apart"
    return (i, j, "noisy", f"{apart:.1e} apart once aligned, at most {noise:.0e}") if apart <= noise else None


def _moved_states(one: Item, two: Item) -> tuple[Mapping[str, Tensor], Mapping[str, Tensor]]:
    """The first model's tensors in the order of the second's, and the second's, as they are stored."""
    a, b = one.load(), two.load()
    if one.found is None or a.keys() != b.keys():
        return a, b
    names = sorted(b)
    if any(a[n].is_complex() or a[n].shape != b[n].shape for n in names):
        return a, b
    arrays = moved(match(one.found, b, a), [a[n].double().numpy() for n in names])
    return {n: torch.from_numpy(x) for n, x in zip(names, arrays, strict=True)}, b


def rounding(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> str | None:
    """What the matrices of b are rounded to, if they are those of a, rounded; None if they are not.

    Example:
        >>> a = {"w": torch.randn(8, 8, generator=torch.Generator().manual_seed(0))}
        >>> rounding(a, {"w": a["w"].bfloat16().float()}), rounding(a, {"w": (a["w"] / 0.1).round() * 0.1})
        ('bfloat16', 'a grid')
        >>> rounding(a, {"w": a["w"] + 1e-3}) is None
        True
    """
    names = [n for n in b if n in a and b[n].is_floating_point() and b[n].ndim > 1 and a[n].shape == b[n].shape]
    if not names or all(torch.equal(a[n].double(), b[n].double()) for n in names):
        return None
    for dtype in ROUNDED:
        right = [(a[n].to(dtype).double() == b[n].double()).double().mean() for n in names]
        if min(float(r) for r in right) >= AGREEING:
            return str(dtype).removeprefix("torch.")
    return "a grid" if all(_on_grid(a[n].double(), b[n].double()) for n in names) else None


def _on_grid(a: Tensor, b: Tensor) -> bool:
    """Whether all of b, or each row of it, lies on a grid of few steps, and each number is the nearest to a's."""
    whole = (a.reshape(1, -1), b.reshape(1, -1))
    return any(
        all(_row_on_grid(x, y) for x, y in zip(one, two, strict=True))
        for one, two in (whole, (a.flatten(1), b.flatten(1)))
    )


def _row_on_grid(a: Tensor, b: Tensor) -> bool:
    values = torch.unique(b)
    size = float(b.abs().max())
    gaps = values.diff()
    gaps = gaps[gaps > 1e-5 * size]
    if len(b) < LEAST_ROW or not len(gaps):
        return False
    for parts in range(1, MOST_PARTS + 1):
        step = float(gaps.min()) / parts
        places = (values - values[0]) / step
        even = bool((places - places.round()).abs().max() <= 0.02)
        near = (a - b).abs() <= 0.51 * step + 1e-6 * size
        if even and float(places.max()) < MOST_LEVELS and float(near.double().mean()) >= AGREEING - 1 / len(b):
            return True
    return False
