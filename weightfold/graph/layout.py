"""Where every channel of a group stands along one axis, before and after an edit."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

from weightfold.graph.edit import Edit
from weightfold.graph.group import Axis, ChannelGroup


@dataclass(frozen=True, eq=False)
class Layout:
    """One axis under one edit.

    Args:
        source: old position that each new position takes over, shape (N',).
        channel: new channel at each new position, -1 where it belongs to no channel of the group, shape (N',).
        slot: which of its channel's positions it is, shape (N',).
    """

    source: Tensor
    channel: Tensor
    slot: Tensor

    @property
    def size(self) -> int:
        return self.source.numel()


def places(edit: Edit, block: Tensor | None) -> Tensor:
    """The old channel in whose place each new channel stands: sorted within every block, shape (K,)."""
    if block is None:
        return torch.sort(edit.carry).values
    out = torch.empty_like(edit.carry)
    of = block[edit.carry]
    for b in torch.unique(of):
        mine = (of == b).nonzero().flatten()
        out[mine] = torch.sort(edit.carry[mine]).values
    return out


def layout(group: ChannelGroup, axis: Axis, edit: Edit) -> Layout:
    """Lay an axis out anew. Untouched positions keep their order; a copy stands right behind its original."""
    index = axis.index
    owner = torch.full((axis.size,), -1, dtype=torch.long)
    channels = torch.arange(index.shape[0])[:, None].expand_as(index)
    owner[index[index >= 0]] = channels[index >= 0]
    run = _run_starts(index, axis.size)
    place = places(edit, group.block)
    k, m = (index[place] >= 0).nonzero(as_tuple=True)
    at = index[place][k, m]
    taken = index[edit.carry][k, m]
    copy = _copy_rank(place)[k]
    rest = (owner < 0).nonzero().flatten()
    none = torch.full_like(rest, -1)
    source = torch.cat([taken, rest])
    keys = torch.stack([
        torch.cat([run[at], rest]),
        torch.cat([copy, torch.zeros_like(rest)]),
        torch.cat([at, rest]),
    ])  # fmt: skip
    if edit.resizes and group.block is not None and not rest.numel() and _by_turns(index, group.block):
        keys = _turns(index, group.block, group.block[edit.carry], place, k, at)
    order = _lexsort(keys)
    return Layout(source[order], torch.cat([k, none])[order], torch.cat([m, none])[order])


def _by_turns(index: Tensor, block: Tensor) -> bool:
    """Whether an axis holds the first channel of every block, then the second of every block, and so on (channels that
    were shuffled): then that is how it is laid out when blocks shrink or grow."""
    k, m = (index >= 0).nonzero(as_tuple=True)
    at = index[k, m]
    lines = [index[block == b] for b in torch.unique(block)]
    ends = sorted((int(line[line >= 0].min()), int(line.max())) for line in lines if bool((line >= 0).any()))
    if all(last < first for (_, last), (first, _) in itertools.pairwise(ends)):
        return False
    order = _lexsort(_turns(index, block, block, torch.arange(index.shape[0]), k, at))
    return torch.equal(at[order], torch.arange(at.numel()))


def _turns(index: Tensor, block: Tensor, of: Tensor, place: Tensor, k: Tensor, at: Tensor) -> Tensor:
    """Sorting keys of the positions ``at`` of new channels ``k``: number in the block, the block, the position.

    Args:
        index: positions before.
        block: the block of each channel before.
        of: the block of each new channel.
        place: the old channel in whose place each new channel stands.
    """
    rank, first = torch.zeros_like(place), torch.zeros_like(place)
    for b in torch.unique(of):
        mine, line = (of == b).nonzero().flatten(), index[block == b]
        rank[mine[torch.argsort(place[mine], stable=True)]] = torch.arange(mine.numel())
        first[mine] = line[line >= 0].min() if bool((line >= 0).any()) else 0
    return torch.stack([rank[k], first[k], at])


def _run_starts(index: Tensor, size: int) -> Tensor:
    """First position of the run that each position lies in: a stretch that every channel holds without a gap (a window
    that was flattened). Neighbours in one channel alone are no run: two orders of the same channels may meet there."""
    start = torch.arange(size)
    if index.shape[1] == 1:
        return start
    none = torch.iinfo(torch.long).max
    ordered = torch.sort(torch.where(index < 0, none, index), 1).values
    head = ordered.clone()
    for m in range(1, index.shape[1]):
        both = ordered[:, m] != none
        if bool((ordered[both, m] == ordered[both, m - 1] + 1).all()):
            head[:, m] = head[:, m - 1]
    start[ordered[ordered != none]] = head[ordered != none]
    return start


def _copy_rank(place: Tensor) -> Tensor:
    """How many earlier channels stand in the same place."""
    order = torch.argsort(place, stable=True)
    ranks = torch.zeros_like(place)
    sorted_place = place[order]
    fresh = torch.ones_like(sorted_place, dtype=torch.bool)
    fresh[1:] = sorted_place[1:] != sorted_place[:-1]
    start = torch.cummax(torch.where(fresh, torch.arange(place.numel()), 0), 0).values
    ranks[order] = torch.arange(place.numel()) - start
    return ranks


def _lexsort(keys: Tensor) -> Tensor:
    """Stable sort by the first row, then the second, then the third."""
    order = torch.arange(keys.shape[1])
    for row in reversed(keys):
        order = order[torch.argsort(row[order], stable=True)]
    return order


# tensors ------------------------------------------------------------------------------------------------------------


def to_front(tensor: Tensor, dim: int, slabs: int) -> Tensor:
    """View a tensor with the axis' positions first, shape (N, rest...)."""
    if slabs == 1:
        return tensor.movedim(dim, 0)
    grid = tensor.reshape(slabs, tensor.shape[0] // slabs, *tensor.shape[1:]).movedim(dim + 1, 1)
    return grid.reshape(slabs * grid.shape[1], *grid.shape[2:])


def from_front(front: Tensor, dim: int, slabs: int) -> Tensor:
    """Undo `to_front`."""
    if slabs == 1:
        return front.movedim(0, dim).contiguous()
    grid = front.reshape(slabs, front.shape[0] // slabs, *front.shape[1:]).movedim(1, dim + 1)
    return grid.reshape(-1, *grid.shape[2:]).contiguous()


def select(front: Tensor, plan: Layout) -> Tensor:
    """Every new position takes over an old one."""
    return front.index_select(0, plan.source.to(front.device))


def mix(front: Tensor, axis: Axis, plan: Layout, matrix: Tensor) -> Tensor:
    """Every new channel is a combination of old ones: ``new[k] = sum_c matrix[k, c] old[c]``, slot by slot.

    Args:
        matrix: shape (K, C), float64; products are taken in float64 and rounded once.
    """
    out = select(front, plan).clone()
    flat = front.reshape(front.shape[0], -1)
    for m in range(axis.index.shape[1]):
        have = axis.index[:, m] >= 0
        new = ((plan.slot == m) & (plan.channel >= 0)).nonzero().flatten()
        rows = flat.index_select(0, axis.index[have, m].to(front.device))
        weights = _chosen(matrix, plan.channel[new], have).to(front.device)
        mixed = (weights @ rows.double()).to(front.dtype)
        out[new.to(front.device)] = mixed.reshape(-1, *front.shape[1:])
    return out


def _chosen(matrix: Tensor, rows: Tensor, have: Tensor) -> Tensor:
    """Some rows and columns of a map; the map itself, uncopied, where that is all of it in order."""
    if rows.numel() != matrix.shape[0] or not torch.equal(rows, torch.arange(rows.numel())):
        matrix = matrix[rows]
    return matrix if bool(have.all()) else matrix[:, have]


def scale_rows(front: Tensor, factors: Tensor) -> Tensor:
    """Multiply each position by its own factor, shape (N,)."""
    shape = (-1,) + (1,) * (front.ndim - 1)
    return (front.double() * factors.to(front.device).reshape(shape)).to(front.dtype)


def edited(front: Tensor, axis: Axis, plan: Layout, edit: Edit, factors: Tensor | None) -> Tensor:
    """What an edit makes of weights along one axis: writers are mixed by A, readers by B, the rest is selected."""
    reads = axis.role == "read"
    if reads and (edit.read is not None or axis.key in edit.reads):
        out = mix(front, axis, plan, edit.B_of(axis.key).T)
    elif not reads and edit.write is not None:
        out = mix(front, axis, plan, edit.write)
    else:
        out = select(front, plan)
    return out if factors is None else scale_rows(out, factors)


def gauge_factors(group: ChannelGroup, axis: Axis, edit: Edit, plan: Layout) -> Tensor | None:
    """The factor of each new position under the edit's rescale; None where the gauge does not reach this axis."""
    if edit.scale is None:
        return None
    gauge = group.gauges[edit.gauge]
    out = torch.ones(axis.size, dtype=torch.float64)
    reached = False
    for tensor, dim, slabs, exponent, index in gauge.axes:
        if (tensor, dim, slabs) != (axis.tensor, axis.dim, axis.slabs):
            continue
        reached = True
        valid = index >= 0
        freedom = torch.arange(index.shape[0])[:, None].expand_as(index)[valid]
        if edit.resizes or edit.scale.numel() != len(gauge):
            number = torch.full((group.n_channels,), -1, dtype=torch.long)
            number[edit.carry] = torch.arange(edit.n_after)
            freedom = number[gauge.channel[freedom]]
        keep = freedom >= 0
        out[index[valid][keep]] = edit.scale[freedom[keep]] ** exponent
    return out[plan.source] if reached else None
