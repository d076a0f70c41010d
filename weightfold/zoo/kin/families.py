"""Families: which models of a zoo were trained on from the same weights, whatever was permuted and rescaled since.

Models of one architecture whose embeddings are near are aligned in pairs (`weightfold.weights.align`, on balanced
weights). What training changes is small beside what it starts from: relatives agree to a cosine above .95 once aligned,
strangers to .45 to .7 by chance, more the narrower they are. A pair counts as related above .85.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from weightfold.weights import compare
from weightfold.weights.align import align_tensors
from weightfold.weights.canon import structure_digest
from weightfold.weights.point import points
from weightfold.weights.symmetry import Symmetries
from weightfold.zoo.cache import Cache
from weightfold.zoo.distance import neighbours, relative_distance

if TYPE_CHECKING:
    from weightfold.zoo.store import Zoo

RELATED = 0.85
"""Cosine of aligned weights above which two models are relatives."""
N_NEAR, N_FAILURES = 8, 4
"""Nearest embeddings that a model is compared with; comparisons in vain after which it is left alone."""
CACHE_BYTES = 1 << 29
Tensors = dict[str, Tensor]
Progress = Callable[[int, int, str], None]


@dataclass(frozen=True, eq=False)
class Item:
    """One model, as far as relatives are sought.

    Args:
        name: in the zoo.
        digest: of its content.
        kind: equal for models of one architecture, names of tensors included, as far as that is known.
        vector: its embedding, or None.
        semantic_hash: or None.
        load: reads its tensors.
        found: its architecture's symmetries, or None: then it is compared as it stands.
    """

    name: str
    digest: str
    kind: str
    vector: npt.NDArray[np.float32] | None
    semantic_hash: str | None
    load: Callable[[], Mapping[str, Tensor]]
    found: Symmetries | None


def items_of(zoo: Zoo) -> list[Item]:
    """All models of a zoo, in the order in which they were added."""
    out = []
    for card in zoo.cards():
        found = zoo.symmetries(card.name) if card.semantic_hash is not None else None
        kind = f"raw {card.n_parameters}"
        if found is not None:
            kind = " ".join([structure_digest(found), *found.shapes])
        load = lambda name=card.name: zoo.state(name)  # noqa: E731
        out.append(Item(card.name, card.digest, kind, card.embedding, card.semantic_hash, load, found))
    return out


class Shelf:
    """Balanced tensors of models, kept while there is room, and alignments of pairs."""

    def __init__(self, items: Sequence[Item], cache_bytes: int = CACHE_BYTES) -> None:
        self.items = items
        self._held: Cache[int, Tensors] = Cache(cache_bytes, least=2)

    def tensors(self, i: int) -> Tensors:
        """Balanced float32 tensors of a model; those it stands with where its architecture is unknown."""
        if (held := self._held.get(i)) is not None:
            return held
        item = self.items[i]
        state = item.load()
        if item.found is None:
            made = {n: t.float().nan_to_num(0.0, 0.0, 0.0) for n, t in sorted(state.items()) if t.is_floating_point()}
        else:
            made = {name: t[0].float() for name, t in points(item.found, [state]).items()}
        return self._held.put(i, made)

    def aligned(self, i: int, j: int) -> tuple[Tensors, Tensors]:
        """The tensors of model i, and those of model j in its basis."""
        one, two = self.tensors(i), self.tensors(j)
        found = self.items[i].found
        return (one, dict(two)) if found is None else (one, align_tensors(found, one, two)[0])

    def cosine(self, i: int, j: int) -> float:
        """Cosine of all weights of two models of one architecture, aligned."""
        return cosine(*self.aligned(i, j))


def cosine(one: Tensors, two: Tensors) -> float:
    """Cosine of two sets of tensors; 0 if they have other names or shapes.

    Example:
        >>> cosine({"w": torch.tensor([1.0, 0.0])}, {"w": torch.tensor([2.0, 0.0])})
        1.0
    """
    if one.keys() != two.keys() or any(one[n].shape != two[n].shape for n in one):
        return 0.0
    return compare.cosine(one, two)


def by_kind(items: Sequence[Item]) -> list[list[int]]:
    """Numbers of the models of each architecture that have an embedding, in order of first use."""
    out: dict[str, list[int]] = {}
    for i, item in enumerate(items):
        if item.vector is not None:
            out.setdefault(item.kind, []).append(i)
    return list(out.values())


def families(items: Sequence[Item], shelf: Shelf | None = None, progress: Progress | None = None) -> list[list[int]]:
    """Group models into families of relatives.

    Args:
        items: see `items_of`.
        progress: called with models done, all of them, and a name.
    Returns:
        Numbers of the members, ascending, largest family first; a model without relatives is a family of its own.
    Raises:
        ArtifactError: a model cannot be read.
    """
    shelf = Shelf(items) if shelf is None else shelf
    sets = Sets(len(items))
    seen = 0

    def step(i: int) -> None:
        nonlocal seen
        seen += 1
        if progress is not None:
            progress(seen, len(items), items[i].name)

    for mine in by_kind(items):
        vectors = np.stack([items[i].vector for i in mine])  # type: ignore[arg-type]
        _join(sets, shelf, mine, neighbours(vectors, N_NEAR), step)
        _join_groups(sets, shelf, mine, vectors)
    return sets.groups()


def _join(
    sets: Sets, shelf: Shelf, mine: Sequence[int], near: list[list[int]], step: Callable[[int], None] | None = None
) -> None:
    for i, others in zip(mine, near, strict=True):
        failures = 0
        if step is not None:
            step(i)
        for at in others:
            j = mine[at]
            if sets.root(i) == sets.root(j):
                continue
            if shelf.items[i].digest == shelf.items[j].digest or shelf.cosine(i, j) >= RELATED:
                sets.join(i, j)
            else:
                failures += 1
            if failures >= N_FAILURES:
                break


def _join_groups(sets: Sets, shelf: Shelf, mine: Sequence[int], vectors: npt.NDArray[np.float32]) -> None:
    """Families in two parts that are no near neighbours: compare the middle members of groups that are near."""
    place = {i: at for at, i in enumerate(mine)}
    groups = [g for g in sets.groups() if g[0] in place]
    if len(groups) < 2:
        return
    centres = np.stack([vectors[[place[i] for i in g]].mean(0) for g in groups])
    middle = []
    for group, centre in zip(groups, centres, strict=True):
        far = np.square(vectors[[place[i] for i in group]] - centre).sum(1)
        middle.append(group[int(far.argmin())])
    _join(sets, shelf, middle, neighbours(centres, N_NEAR))


class Sets:
    """Disjoint sets of numbers.

    Example:
        >>> sets = Sets(4)
        >>> sets.join(0, 2)
        >>> sets.groups()
        [[0, 2], [1], [3]]
    """

    def __init__(self, n: int) -> None:
        self._up = list(range(n))

    def root(self, i: int) -> int:
        """The number that stands for i's set."""
        while self._up[i] != i:
            self._up[i] = self._up[self._up[i]]
            i = self._up[i]
        return i

    def join(self, i: int, j: int) -> None:
        """Make two sets one."""
        a, b = sorted((self.root(i), self.root(j)))
        self._up[b] = a

    def groups(self) -> list[list[int]]:
        """All sets, the largest first, then by their first number."""
        out: dict[int, list[int]] = {}
        for i in range(len(self._up)):
            out.setdefault(self.root(i), []).append(i)
        return sorted(out.values(), key=lambda g: (-len(g), g[0]))


def common_basis(shelf: Shelf, members: Iterable[int]) -> tuple[Tensors, list[float]]:
    """All members' tensors in the basis of the one in their middle, stacked, shapes (n, ...); and distances to it."""
    order = list(members)
    vectors = [shelf.items[i].vector for i in order]
    known = np.stack([v for v in vectors if v is not None])
    middle = order[int(np.square(known - known.mean(0)).sum(1).argmin())]
    pairs = [shelf.aligned(middle, i) if i != middle else (shelf.tensors(middle), shelf.tensors(middle)) for i in order]
    stack = {name: torch.stack([two[name] for _, two in pairs]) for name in pairs[0][0]}
    return stack, [relative_distance(one, two) for one, two in pairs]
