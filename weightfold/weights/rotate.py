"""Rotations of one model to another: linear blocks, heads, the signs of norms' scales, residual streams."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from weightfold.weights.balance import put_rows_, rows_of
from weightfold.weights.symmetry import Freedom, Gain, Members, Slot, Symmetries
from weightfold.weights.work import Work, graph_slots


def polar(matrix: Tensor) -> Tensor:
    """The orthogonal O that maximises tr(Oᵀ M): U Vᵀ of the singular value decomposition."""
    u, _, vh = torch.linalg.svd(matrix)
    return u @ vh


def sides_of(work: Work, freedom: Freedom) -> tuple[Slot, ...]:
    return work.slots((*freedom.plus, *freedom.minus))


def doubles(tensors: Mapping[str, Tensor], slots: tuple[Slot, ...]) -> dict[str, Tensor]:
    return {name: tensors[name].double() for name in dict.fromkeys(s.tensor for s in slots)}


def rotate_linear(work: Work, freedom: Freedom) -> bool:
    """Rotate every block of the second model to the first's; whether that brought anything."""
    n, slots = freedom.channel.numel(), sides_of(work, freedom)
    one, two = rows_of(doubles(work.a, slots), slots, n), rows_of(doubles(work.b, slots), slots, n)
    gained = 0.0
    new = two.clone()
    for block in torch.unique(freedom.block).tolist():
        mine = (freedom.block == block).nonzero().flatten()
        cross = one[mine] @ two[mine].T
        turn = polar(cross)
        gained += float((turn * cross).sum() - cross.trace())
        new[mine] = turn @ two[mine]
    if gained <= 1e-9 * float(one.norm() * two.norm()):
        return False
    held = doubles(work.b, slots)
    put_rows_(held, slots, new)
    work.b.update({name: value.to(work.b[name].dtype) for name, value in held.items()})
    return True


def head_of(freedom: Freedom, group: Members) -> Tensor | None:
    """The block of a group that each member of a freedom stands in, shape (N,)."""
    for slot in freedom.plus:
        for other in group.slots:
            if (slot.tensor, slot.dim, slot.slabs) == (other.tensor, other.dim, other.slabs):
                size = int(max(slot.index.max(), other.index.max())) + 1
                head = torch.full((size,), -1)
                for h in range(group.n):
                    head[other.index[h][other.index[h] >= 0]] = h
                found = head[slot.index[:, 0].clamp_min(0)]
                if bool((found >= 0).all()):
                    return found
    return None


def match_gains(work: Work) -> bool:
    """Give the scales of the second model's norms the signs of the first's, where readers can take the sign."""
    done: set[str] = set()
    moved = False
    for gain in work.found.gains:
        if gain.weight in done or gain.weight not in work.a:
            continue
        done.add(gain.weight)
        flip = torch.where(work.a[gain.weight] * work.b[gain.weight] < 0, -1.0, 1.0)
        if bool((flip < 0).any()):
            moved = True
            for name in filter(None, (gain.weight, gain.bias)):
                work.b[name] = work.b[name] * flip.to(work.b[name])
            for other in (g for g in work.found.gains if g.weight == gain.weight):
                _scale_reader_(work.b, other, flip)
    return moved


def _scale_reader_(tensors: dict[str, Tensor], gain: Gain, factor: Tensor) -> None:
    """Multiply what reads through a gain by a factor for each of its positions."""
    reader = tensors[gain.reader]
    spread = torch.ones(reader.shape[gain.dim], dtype=reader.dtype)
    spread[gain.reader_at] = factor[gain.vector_at].to(reader.dtype)
    tensors[gain.reader] = (reader.movedim(gain.dim, -1) * spread).movedim(-1, gain.dim).contiguous()


def _rescaled(tensors: Mapping[str, Tensor], gains: list[Gain], factors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Divide the scales of norms by factors, and let the readers take them."""
    out = dict(tensors)
    for gain in gains:
        _scale_reader_(out, gain, factors[gain.weight])
    for name, bias in dict.fromkeys((g.weight, g.bias) for g in gains):
        for each in filter(None, (name, bias)):
            out[each] = out[each] / factors[name].to(out[each].dtype)
    return out


def rotate_stream_(work: Work, group: Members) -> bool:
    """Rotate a residual stream of the second model to the first's; whether that brought anything.

    With the norms' scales in the readers, x -> O x leaves a LayerNorm's part in the stream alone where O is orthogonal
    and keeps the direction of equal numbers, which the norm takes away.
    """
    slots = graph_slots(work.found, group)
    gains = [g for g in work.found.gains if any(s.tensor == g.weight for s in slots)]
    scales = {g.weight: (work.a[g.weight].double(), work.b[g.weight].double()) for g in gains}
    if not gains or any(bool((x == 0).any()) for pair in scales.values() for x in pair):
        return False
    used = tuple(s for s in slots if s.tensor not in scales)
    one = _rescaled({n: t.double() for n, t in work.a.items()}, gains, {n: x for n, (x, _) in scales.items()})
    two = _rescaled({n: t.double() for n, t in work.b.items()}, gains, {n: y for n, (_, y) in scales.items()})
    rows_a, rows_b = rows_of(one, used, group.n), rows_of(two, used, group.n)
    ones = torch.ones(group.n, 1, dtype=torch.float64)
    basis = torch.linalg.qr(torch.cat([ones, torch.eye(group.n, dtype=torch.float64)[:, 1:]], 1))[0]
    rest, cross = basis[:, 1:], rows_a @ rows_b.T
    turn = ones @ ones.T / group.n + rest @ polar(rest.T @ cross @ rest) @ rest.T
    if float((turn * cross).sum() - cross.trace()) <= 1e-7 * float(rows_a.norm() * rows_b.norm()):
        return False
    put_rows_(two, used, turn @ rows_b)
    back = _rescaled(two, gains, {n: 1 / x for n, (x, _) in scales.items()})
    work.b = {name: value.to(work.b[name].dtype) for name, value in back.items()}
    return True


def streams(found: Symmetries) -> list[Members]:
    """Groups that are normalised as a whole and read through the scales of norms."""
    return [
        g
        for g in found.members
        if g.free
        and g.kind == "channels"
        and "normalised" in found.graph[g.name].reasons.get("merge", "")
        and any(s.tensor == gain.weight for s in graph_slots(found, g) for gain in found.gains)
    ]
