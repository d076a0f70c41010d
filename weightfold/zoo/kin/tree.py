"""The family tree of a zoo, told from weights alone: families, parents, direction, and how sure each edge is.

Members of a family are brought into one basis. For each model, every two possible parents are compared (`kinship`); the
logarithms of the probabilities are averaged into a score, and the tree of largest total score is taken (Chu & Liu 1965;
Edmonds 1967). Its root is the model that looks most like an ancestor: of small norm, in the middle. The confidence of
an edge is the share of edges with such scores that were right in zoos of known parents. A model whose parent is not in
the zoo gets the nearest relative for one; that lowers the confidence only in part.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from weightfold.zoo.kin import fitted
from weightfold.zoo.kin.families import Item, Progress, Shelf, common_basis, families
from weightfold.zoo.kin.kinship import Kin, features, kin, matrices, root_features

COPY = 1e-5
"""Relative distance below which two models are copies, without a parent between them."""
Matrix = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Edge:
    """A model and what it comes from.

    Args:
        child, parent: names; the parent of a root is None.
        confidence: probability that the edge, its direction included, is right.
        distance: relative distance of the aligned weights.
        copies: models of the same weights, symmetries apart.
    """

    child: str
    parent: str | None
    confidence: float
    distance: float
    copies: tuple[str, ...] = ()


@dataclass(frozen=True)
class Family:
    """One family: its edges, the root's first, each parent before its children."""

    edges: tuple[Edge, ...]

    @property
    def root(self) -> str:
        """The model that all others come from."""
        return self.edges[0].child

    @property
    def names(self) -> list[str]:
        """All members, copies among them."""
        return [name for edge in self.edges for name in (edge.child, *edge.copies)]


def tree(items: Sequence[Item], shelf: Shelf | None = None, progress: Progress | None = None) -> list[Family]:
    """Tell the families of some models, and their trees.

    Args:
        items: see `weightfold.zoo.kin.families.items_of`.
        progress: called with models done, all of them, and a name.
    Returns:
        Families, the largest first; models without relatives are families of one.
    Raises:
        ArtifactError: a model cannot be read.
    """
    shelf = Shelf(items) if shelf is None else shelf
    return [_family(shelf, members) for members in families(items, shelf, progress)]


def _family(shelf: Shelf, members: list[int]) -> Family:
    names = [shelf.items[i].name for i in members]
    if len(members) == 1:
        return Family((Edge(names[0], None, 1.0, 0.0),))
    stack, _ = common_basis(shelf, members)
    parts = matrices(stack)
    groups = _copies(parts)
    kept = [group[0] for group in groups]
    copies = {group[0]: tuple(names[i] for i in group[1:]) for group in groups}
    if len(kept) == 1:
        return Family((Edge(names[kept[0]], None, 1.0, 0.0, copies[kept[0]]),))
    found = kin([part[kept] for part in parts])
    parents, sure = told(found)
    size = found.size[0]
    edges = []
    for x in _from_root(parents):
        a = parents[x]
        away = 0.0 if a is None else math.sqrt(found.squares["raw"][a, x] / size[a])
        parent = None if a is None else names[kept[a]]
        edges.append(Edge(names[kept[x]], parent, sure[x], away, copies[kept[x]]))
    return Family(tuple(edges))


def _copies(parts: list) -> list[list[int]]:  # type: ignore[type-arg]
    """Members of the same weights up to rounding."""
    groups: list[list[int]] = []
    for i in range(len(parts[0])):
        for group in groups:
            change = sum(float((p[i] - p[group[0]]).square().sum()) for p in parts)
            if change <= COPY**2 * sum(float(p[i].square().sum()) for p in parts):
                group.append(i)
                break
        else:
            groups.append([i])
    return groups


def _from_root(parents: Sequence[int | None]) -> list[int]:
    """Numbers, each parent before its children."""
    out = [x for x, a in enumerate(parents) if a is None]
    for x in out:
        out += [y for y, a in enumerate(parents) if a == x]
    return out


def told(found: Kin) -> tuple[list[int | None], list[float]]:
    """Parents of the members of a family, None for the root, and how sure each is."""
    n = found.size.shape[1]
    root, root_sure = _root(found)
    if n == 2:
        return [None if x == root else root for x in range(2)], [root_sure, root_sure]
    scores = scores_of(found)
    parents = arborescence(scores, root)
    sure = [root_sure if a is None else _confidence(scores[x], a) for x, a in enumerate(parents)]
    return parents, sure


def _root(found: Kin) -> tuple[int, float]:
    values = root_features(found) @ np.array(fitted.ROOT)
    odds = np.exp(values - values.max())
    return int(values.argmax()), float(odds.max() / odds.sum())


def scores_of(found: Kin) -> Matrix:
    """Mean logarithm of the probability that a model comes from this one rather than another, [child, parent]."""
    n = found.size.shape[1]
    total, count = np.zeros((n, n)), np.zeros((n, n))
    places, rows = [], []
    for x in range(n):
        others = sorted(found.near[x], key=lambda a: found.size[0, a])
        for at, a in enumerate(others):
            for b in others[at + 1 :]:
                places.append((x, a, b))
                rows.append(features(found, x, a, b))
        if len(others) == 1:
            count[x, others[0]] = 1
    if rows:
        x, a, b = np.array(places).T
        margin = (np.array(rows) - np.array(fitted.MEAN)) / np.array(fitted.SCALE) @ np.array(
            fitted.WEIGHT
        ) + fitted.BIAS
        margin = margin.clip(-9.2, 9.2)
        np.add.at(total, (x, b), -np.logaddexp(0.0, -margin))
        np.add.at(total, (x, a), -np.logaddexp(0.0, margin))
        np.add.at(count, (x, b), 1)
        np.add.at(count, (x, a), 1)
    return np.where(count > 0, total / np.maximum(count, 1), -np.inf)


def _confidence(scores: Matrix, parent: int) -> float:
    value = float(np.array(fitted.CONFIDENCE) @ confidence_features(scores, parent))
    return 1 / (1 + math.exp(-value))


def confidence_features(scores: Matrix, parent: int) -> Matrix:
    """1, the parent's score, and its lead over the next best, shape (3,)."""
    rest = np.delete(scores, parent)
    lead = scores[parent] - rest.max() if np.isfinite(rest).any() else 1.0
    return np.array([1.0, max(float(scores[parent]), -9.0), float(np.clip(lead, -3.0, 3.0))])


def arborescence(scores: Matrix, root: int) -> list[int | None]:
    """The tree of largest total score in which every node but the root has one parent.

    Args:
        scores: [child, parent], shape (n, n); -inf where there is no edge.
    Returns:
        The parent of each node, None for the root; a node that nothing reaches hangs on the root.
    Example:
        >>> inf = float("inf")
        >>> arborescence(np.array([[-inf, -inf, -inf], [-1, -inf, 0], [-9, 0, -inf]]), 0)
        [None, 0, 1]
    """
    n = len(scores)
    table = np.where(np.isfinite(scores), scores, -1e9)
    np.fill_diagonal(table, -1e18)
    table[root] = -1e18
    best = _best(table, root)
    return [None if x == root else int(best[x]) for x in range(n)]


def _best(table: Matrix, root: int) -> npt.NDArray[np.int64]:
    """Chu and Liu's algorithm: take each node's best parent; shrink a ring to one node, and go on."""
    n = len(table)
    best = table.argmax(1)
    best[root] = root
    ring = _ring(best, root)
    if not ring:
        return best
    outside = [x for x in range(n) if x not in ring]
    place = {x: at for at, x in enumerate(outside)}
    small = np.full((len(outside) + 1, len(outside) + 1), -1e18)
    small[:-1, :-1] = table[np.ix_(outside, outside)]
    small[:-1, -1] = table[np.ix_(outside, ring)].max(1)
    gains = table[np.ix_(ring, outside)] - table[ring, best[ring]][:, None]
    small[-1, :-1] = gains.max(0)
    inner = _best(small, place[root])
    out = best.copy()
    for x in outside:
        up = inner[place[x]]
        out[x] = ring[int(table[x, ring].argmax())] if up == len(outside) else outside[up]
    entry = int(inner[-1])
    out[ring[int(gains[:, entry].argmax())]] = outside[entry]
    out[root] = root
    return out


def _ring(best: npt.NDArray[np.int64], root: int) -> list[int]:
    seen: dict[int, int] = {root: -1}
    for start in range(len(best)):
        x, path = start, []
        while x not in seen:
            seen[x] = start
            path.append(x)
            x = int(best[x])
        if seen[x] == start and x in path:
            return path[path.index(x) :]
    return []
