"""Can a group change its size? Cut silent channels on a generic copy, run the forward again, compare the outputs.

A forward may derive sizes from its tensors, from attributes of its modules (``num_heads``, ``split_size``), or write
them down (``x.view(-1, 512)``). The first needs nothing. For the second the attributes that must follow are found by
trying. The third is refused with file, line and remedy. A width that enters the arithmetic (a mean over channels, a
scale of 1 / sqrt(C)) shows in the outputs. Where no copy can run (no storage, too large), the cut copy is traced again
and must give the graph that the edit predicts, with the same operators and constants (`retrace`).
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

from torch import nn

from weightfold.graph.group import ChannelGraph, ChannelGroup
from weightfold.graph.retrace import Bench, retraced
from weightfold.graph.sizes import owner_of
from weightfold.graph.trace import Example, trace
from weightfold.graph.trials import (
    FIRST,
    LAST,
    SILENT,
    SPLIT,
    UNREAD,
    EditTrials,
    Finding,
    kinds_of,
    smallest_block,
    trials_for,
    waves,
)

Attribute = tuple[str, str, Fraction]
REMEDY = "Derive the size from the tensor (-1, x.shape) or from an attribute of the module."
BOTH_ENDS = (LAST, FIRST)
MAX_TRIALS = 48
"""EditTrials per kind of group before giving up."""


@dataclass(frozen=True)
class Outcome:
    """A trial's result: the attributes that made it pass, or why none did."""

    attributes: tuple[Attribute, ...] | None
    problem: str = ""


def with_sizes(
    model: nn.Module, example: Example, graph: ChannelGraph, names: Collection[str] | None = None
) -> ChannelGraph:
    """The same graph with the attributes that must follow each group's size, and `remove`/`merge` revoked where the
    forward has a size written down or computes with it.

    Args:
        model: the traced module; it is not touched.
        example: what it was traced with.
        names: groups to look at; all by default.
    """
    names = [g.name for g in graph if names is None or g.name in names]
    trials = trials_for(model, example, graph, names)
    return Sizer(model, example, None if isinstance(trials, str) else trials).sized(graph, names)


class Sizer:
    """Finds what must follow the sizes of groups.

    Args:
        model: the traced module; it is not touched.
        trials: on a copy of the model that runs; None where there is none.
    """

    def __init__(self, model: nn.Module, example: Example, trials: EditTrials | None) -> None:
        self.model = model
        self.trials = trials
        self.bench = Bench.of(model, example)

    def sized(self, graph: ChannelGraph, names: Sequence[str]) -> ChannelGraph:
        """The graph with the attributes of the named groups, and without the cuts that no attribute makes right."""
        graph = self.cut(graph, names)
        return self._grown(graph, [n for n in names if "merge" in graph[n].admits])

    def _grown(self, graph: ChannelGraph, names: Sequence[str]) -> ChannelGraph:
        """Revoke `merge` where a copied channel changes the outputs: a split is the inverse of a merge."""
        if self.trials is None:
            return graph
        for wave in waves(graph, names):
            if self.trials.run(graph, [(name, SPLIT) for name in wave], LAST) is None:
                continue
            for name in wave:
                if finding := self.trials.run(graph, [(name, SPLIT)], LAST):
                    graph = _replaced(graph, graph[name].without({"merge"}, _in_words(finding)))
        return graph

    def cut(self, graph: ChannelGraph, names: Sequence[str]) -> ChannelGraph:
        """The same; growth is not looked at."""
        names = [n for n in names if "remove" in graph[n].admits and smallest_block(graph[n]) > 1]
        if self.trials is None and self.bench.meta and not any(p.is_meta for p in self.model.parameters()):
            plain = trace(self.bench.twin(), self.bench.example)
            graph = replace(graph, operators=plain.operators, constants=plain.constants)
        if not self._problem(graph, names, (LAST,)) and not self._problem(graph, names, (FIRST,)):
            return graph
        solved: dict[Any, Outcome] = {}
        kinds: dict[Any, list[str]] = {}
        for name in names:
            key = kind_of(self.model, graph[name])
            kinds.setdefault(key, []).append(name)
            if key not in solved:
                solved[key] = self._solve(graph, name, (LAST,))
        graph = _with_outcomes(graph, kinds, solved)
        good = [name for key, some in kinds.items() if solved[key].attributes is not None for name in some]
        if good and self._problem(graph, good, (FIRST,)):
            return self._one_by_one(graph, good)
        return graph

    def _one_by_one(self, graph: ChannelGraph, names: Sequence[str]) -> ChannelGraph:
        for name in names:
            if self._problem(graph, [name]):
                graph = self._searched(graph, name)
        return graph

    def _searched(self, graph: ChannelGraph, name: str) -> ChannelGraph:
        """A group to which the attributes of its like do not apply: its own, or none."""
        outcome = self._solve(graph, name, BOTH_ENDS)
        if outcome.attributes is None:
            return _revoked(graph, name, outcome.problem)
        return _replaced(graph, replace(graph[name], attributes=outcome.attributes))

    def _solve(self, graph: ChannelGraph, name: str, ends: Sequence[str]) -> Outcome:
        """Find the attributes that must follow one group."""
        group = replace(graph[name], attributes=())
        graph = _replaced(graph, group)
        problem = self._problem(graph, [name], ends)
        if not problem:
            return Outcome(())
        for chosen in _subsets(candidates_of(self.model, group)):
            attempt = _replaced(graph, replace(group, attributes=chosen))
            if not self._problem(attempt, [name], ends):
                return Outcome(chosen)
        return Outcome(None, self._explained(graph, name, problem))

    def _problem(self, graph: ChannelGraph, names: Sequence[str], ends: Sequence[str] = BOTH_ENDS) -> str:
        """Why some groups cannot be cut at some of their ends, all at once; empty where they can."""
        for wave in waves(graph, names):
            if problem := self._seen(graph, wave, ends):
                return problem
        return ""

    def _seen(self, graph: ChannelGraph, names: Sequence[str], ends: Sequence[str]) -> str:
        if self.trials is None:
            return self._seen_without_storage(graph, names, ends)
        cuts = {name: next((k for k in (SILENT, UNREAD) if k in kinds_of(graph[name])), None) for name in names}
        items = [(name, kind) for name, kind in cuts.items() if kind is not None]
        for which in ends if items else ():
            if finding := self.trials.run(graph, items, which):
                return _in_words(finding)
        blind = [name for name, kind in cuts.items() if kind is None]
        return self._retraced_at_both(graph, blind) if blind else ""

    def _seen_without_storage(self, graph: ChannelGraph, names: Sequence[str], ends: Sequence[str]) -> str:
        """At its end first; then at its beginning, where of like groups every second was cut at its end already."""
        if tuple(ends) == (LAST,):
            return retraced(self.bench, graph, dict.fromkeys(names, -1))
        if tuple(ends) == BOTH_ENDS:
            return self._retraced_at_both(graph, names)
        seen: dict[Any, int] = {}
        at: dict[str, int] = {}
        for name in names:
            key = kind_of(self.model, graph[name])
            at[name] = -(seen.get(key, 0) % 2)
            seen[key] = seen.get(key, 0) + 1
        return retraced(self.bench, graph, at)

    def _retraced_at_both(self, graph: ChannelGraph, names: Sequence[str]) -> str:
        return next((p for at in (-1, 0) if (p := retraced(self.bench, graph, dict.fromkeys(names, at)))), "")

    def _explained(self, graph: ChannelGraph, name: str, problem: str) -> str:
        """Say why outputs change, where a second trace tells."""
        if self.trials is None or "written down" in problem:
            return problem
        return self._retraced_at_both(graph, [name]) or problem


def _in_words(finding: Finding) -> str:
    if finding.failed:
        return f"has its size written down: {finding.failed}"
    return f"takes part in a forward that computes with its size: tried on this model, {finding}"


def _with_outcomes(graph: ChannelGraph, kinds: dict[Any, list[str]], solved: dict[Any, Outcome]) -> ChannelGraph:
    for key, names in kinds.items():
        outcome = solved[key]
        first = names[0]
        for name in names:
            if outcome.attributes is None:
                graph = _revoked(graph, name, outcome.problem)
            else:
                moved = tuple(_moved_path(graph[first], graph[name], a) for a in outcome.attributes)
                graph = _replaced(graph, replace(graph[name], attributes=moved))
    return graph


def _replaced(graph: ChannelGraph, group: ChannelGroup) -> ChannelGraph:
    return graph.with_groups(tuple(group if g.name == group.name else g for g in graph.groups))


def _revoked(graph: ChannelGraph, name: str, problem: str) -> ChannelGraph:
    lines = graph[name].written
    suspects = f"; numbers are written at{', '.join(lines[:3])}" if lines and "written" in problem else ""
    reason = f"{problem}{suspects}. {REMEDY}" if "written" in problem else problem
    return _replaced(graph, graph[name].without({"remove", "merge"}, reason))


def kind_of(model: nn.Module, group: ChannelGroup) -> Any:
    """Groups with equal keys sit in equal places of equal modules: one solution serves them all."""
    common = _common_path(group)
    axes = tuple(
        (type(owner_of(model, a.tensor)).__name__, a.tensor[len(common) :], a.dim, a.role, a.size) for a in group.axes
    )
    return type(model.get_submodule(common)).__name__, group.kind, group.n_channels, axes


def _owners(group: ChannelGroup) -> list[str]:
    return list(dict.fromkeys(a.tensor.rpartition(".")[0].split(".parametrizations")[0] for a in group.axes))


def _common_path(group: ChannelGroup) -> str:
    paths = [p.split(".") if p else [] for p in _owners(group)]
    common = [parts[0] for parts in itertools.takewhile(lambda p: len(set(p)) == 1, zip(*paths, strict=False))]
    if len(paths) == 1 and common:
        common = common[:-1]
    return ".".join(common)


def _moved_path(first: ChannelGroup, other: ChannelGroup, attribute: Attribute) -> Attribute:
    """The same attribute at the other group's place."""
    path, name, factor = attribute
    here, there = _common_path(first), _common_path(other)
    if path.startswith(here):
        path = (there + path[len(here) :]).lstrip(".")
    elif here.startswith(path):
        depth = here[len(path) :].count(".")
        path = ".".join(there.split(".")[: len(there.split(".")) - depth]) if depth else there
    return path, name, factor


def candidates_of(model: nn.Module, group: ChannelGroup) -> list[Attribute]:
    """Integer attributes, near the group's tensors, whose value is one of the group's sizes; likeliest first."""
    blocks = 1 if group.block is None else int(group.block.max()) + 1
    sizes = {group.n_channels, group.n_channels // blocks}
    for axis in group.axes:
        used = axis.index >= 0
        sizes |= {int(used.sum()), int(used.sum()) // blocks, axis.size // axis.slabs}
        runs = int(used.sum(1).max())
        sizes |= {group.n_channels * runs // k for k in range(1, runs + 1) if runs % k == 0}
    out: dict[tuple[str, str], Attribute] = {}
    for path in _near(group):
        module = model.get_submodule(path)
        for name, value in _integers(module):
            if value in sizes and value > 1:
                out[path, name] = (path, name, Fraction(value, group.n_channels))
    return sorted(out.values(), key=lambda a: ("." in a[1], a[2] != 1))


def _near(group: ChannelGroup) -> list[str]:
    """The common ancestor, the modules between it and the owners, and its parent."""
    common = _common_path(group)
    paths = [common]
    for owner in _owners(group):
        parts = owner.split(".") if owner else []
        start = len(common.split(".")) if common else 0
        paths += [".".join(parts[:k]) for k in range(start, len(parts))]
    paths += _owners(group)
    if common:
        paths.append(common.rpartition(".")[0])
    return list(dict.fromkeys(paths))


_SYNCED = {"in_features", "out_features", "in_channels", "out_channels", "groups", "num_features", "num_channels",
           "embedding_dim", "num_embeddings", "nf", "nx", "hidden_size_", "normalized_shape"}  # fmt: skip


def _integers(module: nn.Module) -> Iterator[tuple[str, int]]:
    known = module.__class__.__module__.startswith("torch.nn.modules")
    for name, value in vars(module).items():
        if name.startswith("_") or (known and not isinstance(module, nn.MultiheadAttention)) or name in _SYNCED:
            continue
        if isinstance(value, tuple) and len(value) == 1 and type(value[0]) is int:
            yield name, value[0]
        elif type(value) is int:
            yield name, value
    config = vars(module).get("config")
    if config is not None and hasattr(config, "__dict__"):
        for name, value in vars(config).items():
            if type(value) is int and not name.startswith("_"):
                yield f"config.{name}", value


def _subsets(attributes: Sequence[Attribute]) -> Iterator[tuple[Attribute, ...]]:
    """All at once, the exact sizes, one by one, pairs, triples: the usual cases first."""
    own = tuple(a for a in attributes if "." not in a[1])
    seen: set[tuple[Attribute, ...]] = set()
    firsts: Iterable[tuple[Attribute, ...]] = (
        own,
        tuple(a for a in own if a[2] == 1),
        tuple(a for a in own if a[2] != 1),
    )
    rest = itertools.chain.from_iterable(itertools.combinations(attributes, k) for k in range(1, 5))
    for chosen in itertools.islice(itertools.chain(firsts, rest), MAX_TRIALS):
        if chosen and chosen not in seen:
            seen.add(chosen)
            yield chosen
