"""Find the moves that make a parent look like its child: orders, signs, scales, without data.

As in `weightfold.weights.align`, one group after the other, from those whose neighbours are settled, by linear
assignment between rows; then twice more with all neighbours. Two things differ. Rows are compared by their cosine,
tensor by tensor, for a channel may be scaled where it is written and divided where it is read. And only moves are
sought that act on single numbers: no rotation inside a head or of a residual stream, which a decoder could not repeat
to the bit.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from weightfold.graph import Gauge
from weightfold.graph.layout import from_front, to_front
from weightfold.weights.symmetry import Members, Slot, Symmetries
from weightfold.weights.work import assign, graph_slots, in_reach, permute_, touched_twice
from weightfold.zoo.delta.moves import FINE_DIGITS, Alignment, Factors, Order, Place, rounded
from weightfold.zoo.delta.predicted import REAL

SWEEPS = 2
AGREEING, ROUNDING = 4, 1e-6
"""So many ratios so close together are no chance."""
LEAST_SCALE = 0.1
"""A gauge is used if it scales some channel by more than e^0.1: training alone moves norms by less."""


@dataclass(eq=False)
class _Pair:
    """Both models' floating tensors, and what was done to the parent's."""

    found: Symmetries
    child: dict[str, Tensor]
    parent: dict[str, Tensor]

    def slots(self, group: Members) -> tuple[Slot, ...]:
        return tuple(s for s in graph_slots(self.found, group) if s.tensor in self.child)


def match(
    found: Symmetries,
    child: Mapping[str, Tensor],
    parent: Mapping[str, Tensor],
    *,
    digits: int = FINE_DIGITS,
) -> Alignment:
    """Find orders, signs and scales that bring a parent to its child.

    Args:
        found: symmetries of the architecture; tensors that either model lacks, or has in another shape, are left out.
        digits: binary digits that factors keep.
    Returns:
        Moves, or none where they bring the parent no nearer. Tensors are numbered in the order of the child's names.
    Example:
        >>> from torch import nn
        >>> from weightfold.weights.symmetry import symmetries
        >>> net = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
        >>> parent = {n: t.detach() for n, t in net.state_dict().items()}
        >>> order = torch.tensor([2, 0, 1])
        >>> child = parent | {"0.weight": parent["0.weight"][order], "0.bias": parent["0.bias"][order]}
        >>> child["2.weight"] = parent["2.weight"][:, order]
        >>> moves = match(symmetries(net, torch.zeros(1, 4)), child, parent)
        >>> moves.orders[0].order.tolist(), moves.factors
        ([2, 0, 1], ())
    """
    pair = _pair(found, child, parent)
    groups = [g for g in _blocks_first(found) if all(s.tensor in pair.child for s in graph_slots(found, g))]
    orders = _orders(pair, groups)
    pair.parent = _pair(found, child, parent).parent
    for group in groups:
        if group.name in orders:
            permute_(pair.parent, pair.slots(group), orders[group.name])
    factors = _factors(pair, [g.name for g in groups])
    number = {name: i for i, name in enumerate(sorted(child))}
    moves = Alignment(
        tuple(
            Order(tuple(_place(s, number) for s in pair.slots(g)), orders[g.name].numpy())
            for g in groups
            if g.name in orders
        ),
        tuple(
            Factors(tuple(_place(s, number, e) for s, e in _gauge_slots(gauge)), rounded(value.numpy(), digits))
            for gauge, value in factors
        ),
    )
    before, after = _distance(_pair(found, child, parent)), _distance(pair)
    return moves if after < 0.999 * before else Alignment()


def _pair(found: Symmetries, child: Mapping[str, Tensor], parent: Mapping[str, Tensor]) -> _Pair:
    names = [
        n
        for n in found.shapes
        if n in child and n in parent and child[n].shape == parent[n].shape
        if child[n].dtype in REAL and parent[n].dtype in REAL
    ]
    one, two = ({n: torch.nan_to_num(s[n].detach().cpu().double(), 0, 0, 0) for n in names} for s in (child, parent))
    return _Pair(found, one, two)


def _place(slot: Slot, number: Mapping[str, int], power: int = 1) -> Place:
    return Place(number[slot.tensor], slot.dim, slot.slabs, slot.index.numpy().astype(np.int64), power)


def _distance(pair: _Pair) -> float:
    return sum(float((pair.child[n] - pair.parent[n]).square().sum()) for n in pair.child)


def _blocks_first(found: Symmetries) -> list[Members]:
    """Free groups as they come into reach, heads before the channels inside them."""
    out: list[Members] = []
    groups = in_reach(found)
    for group in groups:
        if group.block is not None:
            out += [g for g in groups if g.kind == "blocks" and _touch(found, g, group) and g not in out]
        if group not in out:
            out.append(group)
    return out


def _touch(found: Symmetries, one: Members, two: Members) -> bool:
    places = [{(s.tensor, s.dim) for s in graph_slots(found, g)} for g in (one, two)]
    return bool(places[0] & places[1])


# orders ---------------------------------------------------------------------------------------------------------------


def _orders(pair: _Pair, groups: list[Members]) -> dict[str, Tensor]:
    """The order of each group that moves; the pair's parent is moved along."""
    orders: dict[str, Tensor] = {}
    settled: set[str] = set()
    for sweep in range(1 + SWEEPS):
        again = False
        for group in groups:
            if sweep and group.kind == "blocks":
                continue
            slots = pair.slots(group) if sweep else _settled(pair, group, settled)
            scores = (
                _block_scores(pair, group, groups, slots) if group.kind == "blocks" else _scores(pair, group, slots)
            )
            order = assign(scores, group.block)
            settled.add(group.name)
            if _gain(scores, order) > 1e-6:
                permute_(pair.parent, pair.slots(group), order)
                orders[group.name] = orders.get(group.name, torch.arange(group.n))[order]
                again = True
            if not sweep:
                _settle_factors(pair, group, {s.tensor for s in slots})
        if not again:
            break
    return {name: order for name, order in orders.items() if not torch.equal(order, torch.arange(len(order)))}


def _settle_factors(pair: _Pair, group: Members, known: set[str]) -> None:
    """Multiply a group's channels by what their settled places ask for, so that the next group sees them so."""
    for gauge in pair.found.graph[group.name].gauges:
        slots = [(s, e) for s, e in _gauge_slots(gauge) if s.tensor in known]
        if slots and _known(pair, gauge):
            _multiply(pair, gauge, _fit(pair, gauge, slots))


def _gain(scores: Tensor, order: Tensor) -> float:
    then, now = scores[torch.arange(len(order)), order].sum(), scores.diagonal().sum()
    return float((then - now) / (scores.abs().amax(1).sum() + 1e-300))


def _settled(pair: _Pair, group: Members, settled: set[str]) -> tuple[Slot, ...]:
    """The slots of a group in tensors whose other dimensions are settled; all, if there are none."""
    open_ = {
        s.tensor
        for other in pair.found.members
        if other.free and other.n > 1 and other.name not in settled and other.name != group.name
        if not _touch(pair.found, other, group)
        for s in graph_slots(pair.found, other)
    }
    mine = pair.slots(group)
    open_ |= touched_twice(mine)
    found = tuple(s for s in mine if s.tensor not in open_)
    return found if any(pair.child[s.tensor].ndim > 1 for s in found) else mine


def _scores(pair: _Pair, group: Members, slots: tuple[Slot, ...]) -> Tensor:
    """Cosines between the rows of child and parent, summed over tensors, shape (C, C)."""
    signed = any(g.kind == "sign" for g in pair.found.graph[group.name].gauges)
    wide = tuple(s for s in slots if pair.child[s.tensor].ndim > 1) or slots
    total = torch.zeros(group.n, group.n, dtype=torch.float64)
    for slot in wide:
        for one, two in zip(_rows(pair.child, slot), _rows(pair.parent, slot), strict=True):
            cosine = _unit(one) @ _unit(two).T
            total += cosine.abs() if signed else cosine
    return total


def _rows(tensors: Mapping[str, Tensor], slot: Slot) -> list[Tensor]:
    """One matrix for each position that channels have at a slot, shape (C, F) each."""
    front = to_front(tensors[slot.tensor], slot.dim, slot.slabs)
    flat = front.reshape(front.shape[0], -1)
    have = (slot.index >= 0).double()
    parts = [flat[slot.index[:, m].clamp_min(0)] * have[:, m : m + 1] for m in range(slot.index.shape[1])]
    return parts if flat.shape[1] > 1 and len(parts) <= 3 else [torch.cat(parts, 1)]


def _unit(rows: Tensor) -> Tensor:
    return rows / rows.norm(dim=1, keepdim=True).clamp_min(1e-30) if rows.shape[1] > 1 else rows


def _block_scores(pair: _Pair, group: Members, groups: list[Members], slots: tuple[Slot, ...]) -> Tensor:
    """What the best assignment of channels between each two blocks scores."""
    inner = [g for g in groups if g.block is not None and _touch(pair.found, g, group)]
    if not inner:
        return _scores(pair, group, slots)
    total = torch.zeros(group.n, group.n, dtype=torch.float64)
    for g in inner:
        assert g.block is not None
        mine = tuple(s for s in pair.slots(g) if s.tensor in {t.tensor for t in slots})
        scores = _scores(pair, g, mine).numpy()
        parts = [np.flatnonzero(g.block.numpy() % group.n == i) for i in range(group.n)]
        for i, one in enumerate(parts):
            for j, two in enumerate(parts):
                if len(one) == len(two):
                    part = scores[np.ix_(one, two)]
                    total[i, j] += float(part[linear_sum_assignment(part, maximize=True)].sum())
    return total


# factors --------------------------------------------------------------------------------------------------------------


def _factors(pair: _Pair, groups: list[str]) -> list[tuple[Gauge, Tensor]]:
    """Signs and scales of each gauge that has any; the pair's parent is multiplied along."""
    gauges = [g for name in groups for g in pair.found.graph[name].gauges if _known(pair, g)]
    values = [torch.ones(len(g), dtype=torch.float64) for g in gauges]
    for sweep in range(2 + SWEEPS):
        for i, gauge in enumerate(gauges):
            open_ = {t for g in gauges[i + 1 :] for t, *_ in g.axes} if not sweep else set()
            slots = [(s, e) for s, e in _gauge_slots(gauge) if s.tensor not in open_] or _gauge_slots(gauge)
            factor = _fit(pair, gauge, slots)
            values[i] = values[i] * factor
            _multiply(pair, gauge, factor)
    kept = [i for i, gauge in enumerate(gauges) if _matters(gauge, values[i])]
    for i in set(range(len(gauges))) - set(kept):
        _multiply(pair, gauges[i], 1 / values[i])
    for i in kept * SWEEPS:
        if gauges[i].kind != "sign":
            factor = _ratios(pair, gauges[i])
            values[i] = values[i] * factor
            _multiply(pair, gauges[i], factor)
    return [(gauges[i], values[i]) for i in kept]


def _known(pair: _Pair, gauge: Gauge) -> bool:
    return all(tensor in pair.child for tensor, *_ in gauge.axes)


def _gauge_slots(gauge: Gauge) -> list[tuple[Slot, int]]:
    return [(Slot(tensor, dim, slabs, index), exponent) for tensor, dim, slabs, exponent, index in gauge.axes]


def _matters(gauge: Gauge, value: Tensor) -> bool:
    if gauge.kind == "sign":
        return bool((value < 0).any())
    return bool((value.log().abs() > LEAST_SCALE).any())


def _fit(pair: _Pair, gauge: Gauge, slots: list[tuple[Slot, int]]) -> Tensor:
    """The factor of each channel that brings the parent nearest to the child at some places, shape (G,)."""
    n = len(gauge)
    same, logs, weight = (torch.zeros(n, dtype=torch.float64) for _ in range(3))
    for slot, power in slots:
        one, two = (torch.cat(_rows(side, slot), 1) for side in (pair.child, pair.parent))
        aa, bb, ab = one.square().sum(1), two.square().sum(1), (one * two).sum(1)
        alive = (aa > 0) & (bb > 0)
        size = torch.where(alive, float(one.shape[1]) ** 2, 0.0)
        same += torch.where(alive, size * ab / (aa * bb).sqrt().clamp_min(1e-300), 0.0)
        logs += torch.where(alive, size * power * 0.5 * (aa.clamp_min(1e-300) / bb.clamp_min(1e-300)).log(), 0.0)
        weight += size
    if gauge.kind == "sign":
        return torch.where(same < 0, -1.0, 1.0).double()
    return (logs / weight.clamp_min(1e-300)).clamp(-40, 40).exp()


def _ratios(pair: _Pair, gauge: Gauge) -> Tensor:
    """What most ratios of child and parent agree on to rounding, else their median, shape (G,).

    Weights that training left alone (a dead input, a frozen layer) give a channel's factor away to the last bit.
    """
    parts = []
    for slot, power in _gauge_slots(gauge):
        one, two = (torch.cat(_rows(side, slot), 1) for side in (pair.child, pair.parent))
        parts.append(torch.where(one * two > 0, (one / two) ** power, torch.nan))
    ratios = torch.cat(parts, 1)
    found = ratios.nanmedian(1).values
    if ratios.shape[1] > AGREEING:
        ordered = ratios.sort(1).values
        width, first = torch.nan_to_num(ordered[:, AGREEING:] / ordered[:, :-AGREEING] - 1, torch.inf).min(1)
        middle = ordered.gather(1, first[:, None] + AGREEING // 2)[:, 0]
        found = torch.where(width < ROUNDING, middle, found)
    return torch.nan_to_num(found, 1.0).clamp(1e-12, 1e12)


def _multiply(pair: _Pair, gauge: Gauge, factor: Tensor) -> None:
    for slot, power in _gauge_slots(gauge):
        front = to_front(pair.parent[slot.tensor], slot.dim, slot.slabs)
        line = torch.ones(front.shape[0], dtype=torch.float64)
        have = slot.index >= 0
        line[slot.index[have]] = (factor**power)[:, None].expand_as(slot.index)[have]
        scaled = front * line.reshape(-1, *[1] * (front.ndim - 1))
        pair.parent[slot.tensor] = from_front(scaled, slot.dim, slot.slabs)
