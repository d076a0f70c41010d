"""Cut a unit of some groups on a copy, trace the copy, and compare with the graph that the edit predicts.

This needs no storage: it is how sizes are checked on `meta` and past the limits of a proof, and it says why a cut fails
(a slice at a written-down position, a scale that follows the size) where outputs only show that it does.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from weightfold.errors import EditError, GraphError, TraceError
from weightfold.graph import edit as edits
from weightfold.graph.apply import apply
from weightfold.graph.copies import flush_caches, meta_tensor, structural_copy
from weightfold.graph.export import Example, arguments, quiet
from weightfold.graph.failures import user_line
from weightfold.graph.group import ChannelGraph, ChannelGroup
from weightfold.graph.trace import trace

TRUE_COPY_BYTES = 512 * 2**20
"""Models up to this size are cut on a true copy."""


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


def retraced(bench: Bench, graph: ChannelGraph, ends: Mapping[str, int]) -> str:
    """Cut one unit of some groups on a copy and trace it; "" when all is as predicted, else what is not.

    Args:
        ends: which unit of each group: -1 the last, 0 the first. What is picked by position shows in one of the two.
    """
    twin = bench.twin()
    expected = graph
    grown: set[str] = set()
    try:
        for name, at in ends.items():
            current = next((g for g in expected.groups if g.name == name), None)
            change = None if current is None else unit_change(current, at)
            if change is not None:
                grown |= {name} if change.n_after > change.n_channels else set()
                expected, _ = apply(twin, expected, change, flush=False)
    except (EditError, RuntimeError, AttributeError, ValueError, TypeError) as error:
        return f"cannot be cut: {next(iter(str(error).splitlines()), type(error).__name__)[:160]}"
    flush_caches(twin)
    if problem := _forward_problem(twin, bench.example):
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
