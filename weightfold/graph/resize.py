"""Can a group change its size? Cut one channel on a copy without storage, run the forward again, compare.

A forward may derive sizes from its tensors, from attributes of its modules (``num_heads``, ``split_size``), or write
them down (``x.view(-1, 512)``). The first needs nothing. For the second the attributes that must follow are found by
trying. The third is refused with file, line and remedy. A trial counts as passed only if tracing the cut copy gives the
graph that the edit predicts, with the same operators and the same constants: a slice at a written-down position, or a
scale that silently follows the size, is caught as well.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from weightfold.errors import EditError, GraphError, TraceError
from weightfold.graph import edit as edits
from weightfold.graph.apply import apply
from weightfold.graph.group import ChannelGraph, ChannelGroup
from weightfold.graph.sizes import owner_of
from weightfold.graph.trace import Example, arguments, meta_tensor, quiet, structural_copy, trace, user_line

Attribute = tuple[str, str, Fraction]
REMEDY = "Derive the size from the tensor (-1, x.shape) or from an attribute of the module."
MAX_TRIALS = 48
"""Trials per kind of group before giving up."""
TRUE_COPY_BYTES = 512 * 2**20
"""Models up to this size are tried on a true copy."""


@dataclass(frozen=True)
class Outcome:
    """A trial's result: the attributes that made it pass, or why none did."""

    attributes: tuple[Attribute, ...] | None
    problem: str = ""


@dataclass(frozen=True)
class Bench:
    """Where trials run: small models on a true copy, large ones on a copy without storage."""

    model: nn.Module
    example: Example
    meta: bool

    @classmethod
    def of(cls, model: nn.Module, example: Example) -> Bench:
        size = sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))
        args, kwargs = arguments(example)
        if size <= TRUE_COPY_BYTES:
            return cls(model, (args, kwargs), meta=False)
        return cls(model, pytree.tree_map_only(Tensor, lambda t: t.to("meta"), (args, kwargs)), meta=True)

    def twin(self) -> nn.Module:
        return structural_copy(self.model, meta_tensor if self.meta else _cloned)


def _cloned(source: Tensor) -> Tensor:
    copy = source.detach().clone()
    return nn.Parameter(copy, requires_grad=source.requires_grad) if isinstance(source, nn.Parameter) else copy


def unit_change(group: ChannelGroup, at: int = -1) -> edits.Edit | None:
    """Remove one channel of every block; where a single one would be left, which is no group any more, copy it.

    Args:
        at: which of each block: -1 the last, 0 the first.
    Returns:
        None when a block has a single channel.
    """
    block = torch.zeros(group.n_channels, dtype=torch.long) if group.block is None else group.block
    chosen = [int((block == b).nonzero()[at]) for b in torch.unique(block)]
    smallest = int(torch.bincount(block).min())
    if smallest < 2:
        return None
    copies = torch.ones(group.n_channels, dtype=torch.long)
    copies[chosen] = 0 if smallest > 2 else 2
    carry = torch.repeat_interleave(torch.arange(group.n_channels), copies)
    return edits.Edit(group.name, "trial", group.n_channels, carry)


def with_sizes(model: nn.Module, example: Example, graph: ChannelGraph) -> ChannelGraph:
    """The same graph with the attributes that must follow each group's size, and `remove`/`merge` revoked where the
    forward has a size written down.

    Args:
        model: the traced module; it is not touched.
        example: what it was traced with.
    """
    candidates = [g.name for g in graph if "remove" in g.admits and unit_change(g) is not None]
    bench = Bench.of(model, example)
    if bench.meta:
        plain = trace(bench.twin(), bench.example)
        graph = replace(graph, operators=plain.operators, constants=plain.constants)
    if not _trial_all(bench, graph, candidates):
        return graph
    solved: dict[Any, Outcome] = {}
    kinds: dict[Any, list[str]] = {}
    for name in candidates:
        key = kind_of(model, graph[name])
        kinds.setdefault(key, []).append(name)
        if key not in solved:
            solved[key] = _solve(bench, graph, name)
    graph = _with_outcomes(graph, kinds, solved)
    good = [name for key, names in kinds.items() if solved[key].attributes is not None for name in names]
    if good and _trial_all(bench, graph, good):
        return _one_by_one(bench, graph, good)
    return graph


def _trial_all(bench: Bench, graph: ChannelGraph, names: Sequence[str]) -> str:
    """Try many groups with few traces: those that share no axis and no attribute are cut together."""
    waiting = list(names)
    while waiting:
        now = _disjoint(graph, waiting)
        problem = _trial(bench, graph, now)
        if problem:
            return problem
        waiting = [name for name in waiting if name not in now]
    return ""


def _disjoint(graph: ChannelGraph, names: Sequence[str]) -> list[str]:
    """Groups that share no axis and no attribute, so that their trials do not disturb each other."""
    taken: set[Any] = set()
    out = []
    for name in names:
        mine = {(a.tensor, a.dim) for a in graph[name].axes} | {a[:2] for a in graph[name].attributes}
        if not mine & taken:
            out.append(name)
            taken |= mine
    return out


def _one_by_one(bench: Bench, graph: ChannelGraph, names: Sequence[str]) -> ChannelGraph:
    for name in names:
        problem = _trial(bench, graph, [name])
        if problem:
            graph = _revoked(graph, name, problem)
    return graph


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


def _solve(bench: Bench, graph: ChannelGraph, name: str) -> Outcome:
    """Find the attributes that must follow one group."""
    group = graph[name]
    problem = _trial(bench, graph, [name])
    if not problem:
        return Outcome(())
    for chosen in _subsets(candidates_of(bench.model, group)):
        attempt = _replaced(graph, replace(group, attributes=chosen))
        trouble = _trial(bench, attempt, [name])
        if not trouble:
            return Outcome(chosen)
    return Outcome(None, problem)


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


def _trial(bench: Bench, graph: ChannelGraph, names: Sequence[str]) -> str:
    """Cut one unit of every named group on a copy and trace it; "" when all is as predicted, else what is not.

    Once at the end of every group and once at its beginning: what is picked by position shows in one of the two.
    """
    return _trial_at(bench, graph, names, -1) or _trial_at(bench, graph, names, 0)


def _trial_at(bench: Bench, graph: ChannelGraph, names: Sequence[str], at: int) -> str:
    twin = bench.twin()
    expected = graph
    grown: set[str] = set()
    try:
        for name in names:
            current = next((g for g in expected.groups if g.name == name), None)
            change = None if current is None else unit_change(current, at)
            if change is not None:
                grown |= {name} if change.n_after > change.n_channels else set()
                expected, _ = apply(twin, expected, change)
    except (EditError, RuntimeError, AttributeError, ValueError, TypeError) as error:
        return f"cannot be cut: {str(error).splitlines()[0][:160]}"
    problem = _forward_problem(twin, bench.example)
    if problem:
        return problem
    try:
        found = trace(twin, bench.example)
    except TraceError as error:
        return f"has its size written down: {error.message[:300]}"
    except GraphError as error:
        return f"cannot be traced after a trial cut: {error.message[:200]}"
    return difference(expected, found, grown)


def _forward_problem(twin: nn.Module, example: Example) -> str:
    """Run the forward without storage: most written-down sizes show at once. What cannot run so is left to tracing."""
    args, kwargs = arguments(example)
    try:
        with quiet(), torch.no_grad():
            twin(*args, **kwargs)
    except NotImplementedError:
        return ""
    except Exception as error:
        if "meta" in str(error).lower() or "data-dependent" in str(error).lower() or "item()" in str(error):
            return ""
        text = (str(error).splitlines() or [type(error).__name__])[0]
        return f"has its size written down{user_line(error)}: {text[:200]}"
    return ""


def difference(expected: ChannelGraph, found: ChannelGraph, only: Collection[str] = ()) -> str:
    """The first way in which a traced graph is not the predicted one, or "".

    Args:
        only: groups to compare where some were grown (others that overlap a copy are not followed); all if empty.
    """
    if expected.operators != found.operators:
        return "takes part in a forward whose operators depend on its size"
    if len(expected.constants) != len(found.constants):
        return "takes part in a forward whose constants depend on its size"
    for a, b in zip(expected.constants, found.constants, strict=True):
        if abs(a - b) > 1e-12 * max(abs(a), abs(b)):
            return f"sets a constant of the forward by its size ({a:g} becomes {b:g})"
    have = {group.name: group for group in found.groups}
    for group in expected.groups:
        if group.n_channels < 2 or not group.free or (only and group.name not in only):
            continue
        other = have.get(group.name)
        if other is None or other.n_channels != group.n_channels:
            return f"is cut at written-down positions (group '{group.name}' falls apart)"
        mine = {(a.tensor, a.dim, a.slabs): a.index for a in group.axes}
        theirs = {(a.tensor, a.dim, a.slabs): a.index for a in other.axes}
        if mine.keys() != theirs.keys() or any(not _same_index(mine[k], theirs[k]) for k in mine):
            return f"is cut at written-down positions (group '{group.name}' changes its members)"
    return ""


def _same_index(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.equal(torch.sort(a, 1).values, torch.sort(b, 1).values)
