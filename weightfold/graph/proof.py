"""A graph is proved on the model at hand before it is used: every admitted edit is run and its outputs are compared.

Rules per operator will never be complete. So the edits that they admit are tried on a copy with generic weights
(`twin`), in evaluation and in training mode: first all kinds on all groups at once (`trials`); where an output differs,
kind by kind, then half by half, down to the group. What fails is withdrawn, with what was seen. With nothing wrong this
takes a few forwards, however many groups there are.

A network without storage, or one too large for the stated limits, is left unproved, and `graph.proved` says so.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

from torch import nn

from weightfold.graph.group import ChannelGraph, ChannelGroup, Proof
from weightfold.graph.resize import Sizer, kind_of
from weightfold.graph.trace import Example, trace
from weightfold.graph.trials import (
    BLIND,
    DOING,
    KINDS,
    MERGE,
    PERMUTE,
    RESCALE,
    SIGN,
    SPLIT,
    UNREAD,
    EditTrials,
    Finding,
    Item,
    kinds_of,
    rounds,
    trials_for,
    waves,
)
from weightfold.graph.twin import Limits

SYMMETRIES = (PERMUTE, RESCALE, SIGN)
DEAR = (UNREAD, MERGE, SPLIT)
LARGE = 32_000_000
"""Weights from which like blocks are tried once for the kinds that move all weights through a matrix."""
MAX_ROUNDS = 4
"""How often what is left is tried again after a withdrawal."""


def prepared(
    model: nn.Module,
    example: Example,
    *,
    graph: ChannelGraph | None = None,
    names: Collection[str] | None = None,
    limits: Limits = Limits(),  # noqa: B008 (frozen)
) -> ChannelGraph:
    """The model's channel graph with what must follow each size, and every admitted edit proved on this model.

    Args:
        graph: as traced, if it is at hand.
        names: groups that will be touched; the others are left as the rules have them. All by default.
        limits: past them the graph is left unproved and says so.
    Raises:
        TraceError: the forward fails on the example, or branches on data.
    Example:
        >>> import torch
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> graph = prepared(net, torch.zeros(1, 4))
        >>> bool(graph.proved), sorted(graph["0"].admits)
        (True, ['merge', 'permute', 'remove', 'rescale'])
    """
    graph = trace(model, example) if graph is None else graph
    names = [g.name for g in graph if names is None or g.name in names]
    trials = trials_for(model, example, graph, names, limits)
    if isinstance(trials, str):
        return replace(Sizer(model, example, None).sized(graph, names), proved=Proof(left_out=trials))
    return proved(model, Sizer(model, example, trials).cut(graph, names), names, trials)


def with_symmetries_proved(model: nn.Module, example: Example) -> ChannelGraph:
    """The model's channel graph; permutations, rescales and signs are proved in evaluation mode, nothing else is.

    Raises:
        TraceError: the forward fails on the example, or branches on data.
    """
    graph = trace(model, example)
    names = [g.name for g in graph]
    trials = trials_for(model, example, graph, names, training=False)
    if isinstance(trials, str):
        return replace(graph, proved=Proof(left_out=trials))
    return proved(model, graph, names, trials, SYMMETRIES)


def proved(
    model: nn.Module, graph: ChannelGraph, names: Sequence[str], trials: EditTrials, kinds: Collection[str] = KINDS
) -> ChannelGraph:
    """Try all kinds of edit on the named groups; withdraw what is wrong.

    Args:
        model: the traced module; it is not touched.
        trials: on a copy of it.
    """
    withdrawn: list[tuple[str, str, str]] = []
    places = {name: kind_of(model, graph[name]) for name in names} if _weights(model) > LARGE else {}
    for _ in range(MAX_ROUNDS):
        found = _all_at_once(trials, graph, _items(graph, names, kinds, places))
        if not found:
            break
        for (name, kind), finding in found.items():
            graph, reason = _withdrawn(graph, name, kind, finding)
            withdrawn.append((name, kind, reason))
            places = {other: place for other, place in places.items() if place != places.get(name)}
    else:
        for name in names:
            graph = _replaced(graph, graph[name].without(set(graph[name].admits), "no edit could be proved right"))
    twin = trials.twin
    return replace(graph, proved=Proof(twin.compared, tuple(names), tuple(withdrawn), twin.left_out))


def _weights(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def _items(
    graph: ChannelGraph, names: Sequence[str], kinds: Collection[str], places: Mapping[str, object]
) -> list[Item]:
    """What is to be tried.

    Args:
        places: groups with equal places stand for each other where a kind is dear, until one of them is refuted.
    """
    first: dict[object, str] = {}
    items = []
    for name in names:
        leads = name not in places or first.setdefault(places[name], name) == name
        items += [(name, k) for k in kinds_of(graph[name]) if k in kinds and (leads or k not in DEAR)]
    return items


def _all_at_once(trials: EditTrials, graph: ChannelGraph, items: Sequence[Item]) -> dict[Item, Finding]:
    """Everything that is wrong among some items, found with few forwards where nothing is."""
    kinds: dict[str, list[str]] = {}
    for name, kind in items:
        kinds.setdefault(name, []).append(kind)
    found: dict[Item, Finding] = {}
    parts = {name: rounds(graph[name], wanted) for name, wanted in kinds.items()}
    for number in range(max(map(len, parts.values()), default=0)):
        here = [name for name in parts if number < len(parts[name])]
        for wave in waves(graph, here):
            found |= _narrowed(trials, graph, [(name, kind) for name in wave for kind in parts[name][number]])
    return found


def _narrowed(trials: EditTrials, graph: ChannelGraph, items: list[Item]) -> dict[Item, Finding]:
    """Which of some items are wrong: none if all together are right, else by kinds, then by halves of the groups."""
    finding = trials.run(graph, items) if items else None
    if finding is None:
        return {}
    if len(items) == 1:
        return {items[0]: finding}
    kinds = list(dict.fromkeys(kind for _, kind in items))
    names = list(dict.fromkeys(name for name, _ in items))
    parts: list[list[Item]]
    if len(kinds) > 1:
        parts = [[item for item in items if item[1] == kind] for kind in kinds]
    else:
        parts = [items[: len(items) // 2], items[len(items) // 2 :]]
    found: dict[Item, Finding] = {}
    for part in parts:
        found |= _narrowed(trials, graph, part)
    if found:
        return found
    if len(names) > 1 and len(kinds) > 1:
        half = len(names) // 2
        for some in (names[:half], names[half:]):
            found |= _narrowed(trials, graph, [item for item in items if item[0] in some])
    if finding is BLIND:
        return {}  # each kind alone could be tried, and was right
    return found or dict.fromkeys(items, finding)


def _withdrawn(graph: ChannelGraph, name: str, kind: str, finding: Finding) -> tuple[ChannelGraph, str]:
    """The graph without what a trial saw fail, and the reason."""
    group = graph[name]
    reason = f"tried on this model: {DOING[kind]} '{name}' changes the function: {finding}"
    if kind == PERMUTE:
        group = group.without(set(group.admits), reason)
        group = replace(group, gauges=())
    elif kind in (RESCALE, SIGN):
        lost = "positive" if kind == RESCALE else "sign"
        group = group.without({kind}, reason)
        group = replace(group, gauges=tuple(g for g in group.gauges if g.kind != lost))
    else:
        group = group.without({"merge"} if kind in (MERGE, SPLIT) else {"remove", "merge"}, reason)
    return _replaced(graph, group), reason


def _replaced(graph: ChannelGraph, group: ChannelGroup) -> ChannelGraph:
    return graph.with_groups(tuple(group if g.name == group.name else g for g in graph.groups))
