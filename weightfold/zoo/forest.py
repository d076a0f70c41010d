"""Which model is kept as the difference to which: the cheapest forest, no chain longer than a limit.

What a difference takes is nearly the same in both directions, so the cheapest arborescence below a root that stands for
"in full" is a minimum spanning tree (Prim), rooted where chains are shortest. Models that are differences already, and
those that others are differences to, stay as they are and only take on children.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping

Costs = Mapping[tuple[str, str], float]
"""Bytes of the difference between two models, by their names in order."""


def forest(
    full: Mapping[str, float],
    costs: Costs,
    *,
    depth: int,
    fixed: Mapping[str, int] | None = None,
    wished: Mapping[str, str] | None = None,
) -> dict[str, str]:
    """Choose parents.

    Args:
        full: what each model takes in full.
        costs: what the difference between two takes, for the pairs that were looked at.
        depth: differences in a chain at most.
        fixed: models that stay as they are, and how many differences lie above each.
        wished: declared parents: the one of a pair that is to be the parent where both ways are as good.
    Returns:
        parents: of the models that are better kept as differences, parents before children.
    Example:
        >>> forest({"a": 9, "b": 9, "c": 9}, {("a", "b"): 1, ("b", "c"): 2, ("a", "c"): 8}, depth=8)
        {'a': 'b', 'c': 'b'}
    """
    fixed, near = fixed or {}, _neighbours(full, costs)
    start = {name: fixed[name] for name in fixed if name in near}
    parents: dict[str, str] = {}
    levels = dict(start)
    _grow(parents, levels, list(start), near, depth)
    for name in _by_reach(near):
        if name not in levels:
            root = _root(name, near, levels, wished or {})
            levels[root] = 0
            _grow(parents, levels, [root], near, depth)
    return parents


def _neighbours(full: Mapping[str, float], costs: Costs) -> dict[str, dict[str, float]]:
    """For each model those to which a difference takes less than what it takes in full."""
    near: dict[str, dict[str, float]] = {name: {} for name in full}
    for (one, two), cost in costs.items():
        for a, b in ((one, two), (two, one)):
            if a in near and b in near and cost < full[a]:
                near[a][b] = cost
    return near


def _by_reach(near: Mapping[str, Mapping[str, float]]) -> list[str]:
    return sorted(near, key=lambda name: (-len(near[name]), name))


def _grow(
    parents: dict[str, str],
    levels: dict[str, int],
    roots: list[str],
    near: Mapping[str, Mapping[str, float]],
    depth: int,
) -> None:
    """Take on the cheapest model that can be reached, again and again."""
    reverse: dict[str, list[tuple[str, float]]] = {}
    for child, options in near.items():
        for parent, cost in options.items():
            reverse.setdefault(parent, []).append((child, cost))
    queue: list[tuple[float, int, str, str]] = []

    def open_(parent: str) -> None:
        if levels[parent] < depth:
            for child, cost in reverse.get(parent, ()):
                if child not in levels:
                    heapq.heappush(queue, (cost, levels[parent], parent, child))

    for root in roots:
        open_(root)
    while queue:
        _, _, parent, child = heapq.heappop(queue)
        if child not in levels:
            parents[child], levels[child] = parent, levels[parent] + 1
            open_(child)


def _root(
    name: str, near: Mapping[str, Mapping[str, float]], levels: Mapping[str, int], wished: Mapping[str, str]
) -> str:
    """The root of a family: the declared ancestor of most, else the middle of its spanning tree."""
    free = {n: {m: c for m, c in options.items() if m not in levels} for n, options in near.items() if n not in levels}
    tree: dict[str, str] = {}
    reached = {name: 0}
    _grow(tree, reached, [name], free, len(near))
    ancestors = [a for child in reached if (a := wished.get(child)) in reached and wished.get(a) not in reached]
    if ancestors:
        return min(sorted(set(ancestors)), key=lambda a: -ancestors.count(a))
    edges: dict[str, list[str]] = {n: [] for n in reached}
    for child, parent in tree.items():
        edges[child].append(parent)
        edges[parent].append(child)
    far = _path_to_farthest(edges, name)[-1]
    path = _path_to_farthest(edges, far)
    return path[len(path) // 2]


def _path_to_farthest(edges: Mapping[str, list[str]], start: str) -> list[str]:
    before: dict[str, str | None] = {start: None}
    order = [start]
    for name in order:
        for other in sorted(edges[name]):
            if other not in before:
                before[other] = name
                order.append(other)
    path = [order[-1]]
    while (last := before[path[-1]]) is not None:
        path.append(last)
    return path[::-1]
