"""The three things that can happen to labels: values meet elementwise, a dimension is summed away, data moves.

Every operator is one of these or a short composition of them (a matrix product is a meeting followed by a sum), so a
rule for a new operator is a few lines in `rules.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from weightfold.graph.labels import (
    COMPUTED,
    COMPUTED_WRITE,
    ELSEWHERE,
    FOREIGN,
    FROZEN,
    NO_MERGE,
    NO_REMOVE,
    OFFSET,
    PAIRED,
    READ,
    REPEAT,
    UNIFORM,
    WRITE,
    ZERO,
    Field,
    Store,
    Value,
    combine_labels,
    compress,
    kept,
    pair_fields,
)

FIXED = "meets data that differs per channel and is no channel itself (an input, a fixed table)"


def broadcast_shape(values: Sequence[Value]) -> tuple[int, ...]:
    return tuple(torch.broadcast_shapes(*(value.shape for value in values)))


def _check_varying(
    store: Store, value: Value, other: Value, covered: frozenset[int], ends: frozenset[int] = frozenset()
) -> None:
    """Freeze what meets data that varies along the channel and carries no label there.

    A product with such data still commutes with a rescale, unless the channel is summed away (``ends``).
    """
    for item in value.fields:
        bad = frozenset(d for d in item.support if other.varies(d) and d not in covered)
        if bad and not alike_for_all(item, other.copies):
            store.forbid(value, item, bad, FROZEN, FIXED, gauge=not bad & ends)


def alike_for_all(item: Field, copies: Tensor | None) -> bool:
    """Whether every channel of a field meets the same numbers, in the same order (a mask that all heads share)."""
    if copies is None or copies.ndim != item.labels.ndim:
        return False
    first = sorted(item.support)
    order = [*first, *(d for d in range(copies.ndim) if d not in item.support)]
    size = [item.labels.shape[d] if d in item.support else n for d, n in enumerate(copies.shape)]
    met = copies.expand(size).permute(order).reshape(item.labels.numel(), -1)
    labels = item.labels.permute(order).flatten()
    if bool((labels <= 0).any()):
        return False
    counts = torch.unique(labels, return_counts=True)[1]
    rows = met[torch.argsort(labels, stable=True)]
    return bool((counts == counts[0]).all()) and bool(
        (rows.reshape(len(counts), -1) == rows[: counts[0]].flatten()).all()
    )


def _check_codes(store: Store, value: Value, item: Field, mine: Tensor, theirs: Tensor) -> None:
    """Freeze atoms whose counterpart is data without a label."""
    mine, theirs = torch.broadcast_tensors(mine, theirs)
    lost = mine[(mine > 0) & (theirs == 0)]
    if lost.numel():
        store.forbid(value, replace(item, labels=lost), item.support, FROZEN, FIXED, gauge=True)


def _gauge_add(store: Store, a: Field, b: Field) -> tuple[Tensor, Tensor]:
    """A sum answers a rescale only if both terms answer it alike; a known zero answers every rescale."""
    out = []
    for kind in ("pos", "sgn"):
        x, y = torch.broadcast_tensors(getattr(a, kind), getattr(b, kind))
        lx, ly = torch.broadcast_tensors(a.labels, b.labels)
        zero_x, zero_y = (lx == ZERO), (ly == ZERO)
        both = (x != 0) & (y != 0)
        same = store.same_pos if kind == "pos" else store.same_sgn
        kill = store.kill_pos if kind == "pos" else store.kill_sgn
        same(x[both], y[both])
        kill(x[(x != 0) & (y == 0) & ~zero_y])
        kill(y[(y != 0) & (x == 0) & ~zero_x])
        out.append(torch.where(both | zero_y, x, torch.where(zero_x, y, torch.zeros_like(x))))
    return out[0], out[1]


def _gauge_mul(store: Store, a: Field, b: Field) -> tuple[Tensor, Tensor]:
    """A product of two gauges: the first passes, the second is held fixed."""
    out = []
    for kind in ("pos", "sgn"):
        x, y = torch.broadcast_tensors(getattr(a, kind), getattr(b, kind))
        both = (x != 0) & (y != 0)
        (store.kill_pos if kind == "pos" else store.kill_sgn)(y[both])
        out.append(torch.where(x != 0, x, y))
    return out[0], out[1]


def _gauge_none(store: Store, a: Field, b: Field) -> tuple[Tensor, Tensor]:
    store.kill(a)
    store.kill(b)
    zero = torch.zeros(torch.broadcast_shapes(a.labels.shape, b.labels.shape), dtype=torch.long)
    return zero, zero


GAUGES: dict[str, Callable[[Store, Field, Field], tuple[Tensor, Tensor]]] = {
    "add": _gauge_add,
    "mul": _gauge_mul,
    "none": _gauge_none,
}


def _loud(a: Field, b: Field, how: str) -> bool:
    """Whether what two blocks make of each other may differ from zero where one of them is silent."""
    loud = (a.loud or a.level == REPEAT, b.loud or b.level == REPEAT)
    return all(loud) if how == "mul" else any(loud) or how == "none"


def _merged_labels(a: Field, b: Field) -> Tensor:
    """Labels of two values that met: those of the one that varies along more dimensions, which tells more apart."""
    first, second = (b, a) if a.support < b.support else (a, b)
    return combine_labels(first.labels, second.labels)


def _merge_pair(store: Store, a: Field, b: Field, how: str) -> Field:
    store.same(a.labels, b.labels)
    loud = _loud(a, b, how)
    if a.level != b.level and REPEAT not in (a.level, b.level):
        store.kill(a)
        store.kill(b)
        labels = _merged_labels(a, b)
        return Field(labels, torch.zeros_like(labels), torch.zeros_like(labels), 1, loud, curved=True)
    labels = _merged_labels(a, b)
    pos, sgn = GAUGES[how](store, a, b)
    level, curved = min(a.level, b.level), how != "add" or a.curved or b.curved
    return Field(labels, pos.expand(labels.shape), sgn.expand(labels.shape), level, loud, curved)


def _refilled(item: Field, other: Value, how: str) -> Field:
    """What becomes of the constants beside channels where another value comes in: they stay alike, or no longer do."""
    if how == "add" and other.zero:
        return item
    varies = any(other.varies(d) for d in item.support)
    lost = (UNIFORM,) if how == "mul" else (ZERO, UNIFORM)
    labels = item.labels
    for code in lost:
        labels = labels.masked_fill(labels == code, FOREIGN if varies else UNIFORM)
    return replace(item, labels=labels)


def _alone(store: Store, item: Field, other: Value, how: str) -> Field:
    """A field meets a value that says nothing of its channels."""
    item = _refilled(item, other, how)
    if how == "mul" or (how == "add" and other.zero):
        return item
    if item.level == 1:
        return replace(item, loud=True)
    if item.level == 0:
        store.flag(item.labels, OFFSET)
    store.kill(item)
    return replace(item.without_gauge(), loud=True, curved=True)


def _join_blocks(store: Store, rest: Sequence[Field], others: Sequence[Field]) -> None:
    """Channels that meet those of another value lie in its blocks, though no view has cut them up."""
    for block in rest:
        for item in others if block.level == 1 else ():
            if item.level == 0 and block.support <= item.support:
                store.members.append(tuple(torch.broadcast_tensors(item.labels, block.labels)))


def _lasts(item: Field, other: Value) -> bool:
    """Whether what a field says still holds once the other value has come in: a repeat ends where that varies."""
    return item.level != REPEAT or not any(other.varies(d) for d in item.support)


def meet(store: Store, left: Value, right: Value, how: str) -> Value:
    """Two values meet elementwise, broadcast against each other.

    Args:
        how: "add" (both must answer a rescale alike), "mul" (degrees add up), "none" (no rescale survives).
    """
    ndim = max(len(left.shape), len(right.shape))
    left, right = left.lifted(ndim), right.lifted(ndim)
    matches, rest_l, rest_r = pair_fields(left.fields, right.fields)
    cover_l = frozenset(d for f in left.fields for d in f.support)
    cover_r = frozenset(d for f in right.fields for d in f.support)
    ends = frozenset(range(ndim)) if how != "mul" else frozenset()
    _check_varying(store, left, right, cover_r, ends)
    _check_varying(store, right, left, cover_l, ends)
    fields = []
    for a, b in matches:
        _check_codes(store, left, a, a.labels, b.labels)
        _check_codes(store, right, b, b.labels, a.labels)
        fields.append(_merge_pair(store, a, b, how))
    _join_blocks(store, rest_l, [b for _, b in matches])
    _join_blocks(store, rest_r, [a for a, _ in matches])
    fields += [_alone(store, a, right, how) for a in rest_l if _lasts(a, right)]
    fields += [_alone(store, b, left, how) for b in rest_r if _lasts(b, left)]
    uniform = left.uniform and right.uniform
    known = [value.state or value.known is not None for value in (left, right)]
    return Value(
        broadcast_shape((left, right)),
        tuple(fields),
        state=all(known) and (left.state or right.state),
        computed=left.state and right.state,
        uniform=uniform,
        zero=uniform and left.zero and right.zero,
    )


def merge_along(store: Store, item: Field, dims: frozenset[int]) -> Field | None:
    """Say that the labels along some dimensions are one channel, and drop those dimensions."""
    first = item
    for d in dims:
        first = first.map(lambda array, d=d: array.narrow(d, 0, 1))
    store.same(item.labels, first.labels)
    for kind, same in (("pos", store.same_pos), ("sgn", store.same_sgn)):
        x, y = torch.broadcast_tensors(getattr(item, kind), getattr(first, kind))
        both = (x != 0) & (y != 0)
        same(x[both], y[both])
    return next(iter(kept(store, first)), None)


def _covered(value: Value, item: Field, dims: frozenset[int]) -> bool:
    """Whether blocks still tell the parts of a channel grid apart once ``dims`` are gone."""
    left = item.support - dims
    blocks = [block.support for block in value.blocks() if not (block.support & dims)]
    return item.level == 0 and bool(blocks) and left <= frozenset().union(*blocks)


def reduce(store: Store, value: Value, dims: frozenset[int], bits: int, reason: str, *, keep: bool = False) -> Value:
    """Sum (or average, or normalise) over dimensions, without weights.

    Args:
        bits: what this forbids for channels that lie along the dimensions (NO_MERGE for a plain sum).
        keep: the dimensions stay, every channel now depends on all (softmax, normalisation).
    """
    fields: list[Field] = []
    for item in value.fields:
        if not item.support & dims:
            fields.append(item)
            continue
        _heard(store, item)
        if item.support <= dims or _covered(value, item, dims) or keep:
            for bit in (NO_MERGE, NO_REMOVE):
                if bits & bit:
                    store.forbid(value, item, dims, bit, reason)
            if not keep and (item.loud or not value.state):
                store.forbid(value, item, dims, ELSEWHERE, reason)
            store.kill(item)
            if keep:
                fields.append(item.without_gauge())
            if not keep and _covered(value, item, dims):
                mark_used(store, value, dims)
            continue
        store.kill(item)
        merged = merge_along(store, item, item.support & dims)
        if merged is not None:
            fields.append(merged.without_gauge())
    shape = value.shape if keep else tuple(1 if d in dims else n for d, n in enumerate(value.shape))
    return replace(value, shape=shape, fields=tuple(fields), name=None)


def mark_used(store: Store, value: Value, dims: frozenset[int]) -> None:
    """Blocks that outlive the summing of their channels are structure, not an accident of a view."""
    for block in value.blocks():
        if not block.support & dims:
            store.used.append(torch.unique(block.labels[block.labels > 0]))


def contract(store: Store, left: Value, right: Value, dims: frozenset[int]) -> Value:
    """Multiply two values in a joint index space and sum over ``dims``: every matrix product and convolution.

    A weight met along a summed dimension reads the channel there (its columns); along the others it writes.
    """
    ndim = max(len(left.shape), len(right.shape))
    left, right = (_varied(value.lifted(ndim), dims) for value in (left, right))
    matches, rest_l, rest_r = pair_fields(left.fields, right.fields)
    for side, other in ((left, right), (right, left)):
        if side.state and not other.state:
            for item in side.fields:
                if not item.support & dims:
                    store.flag(item.labels, WRITE)
                    if side.computed:
                        store.flag(item.labels, COMPUTED_WRITE)
                        store.flag(item.labels, NO_MERGE, "is written by a weight that is computed from others")
    if any((a.support | b.support) & dims for a, b in matches):
        joint = _meet_and_read(store, left, right, matches, rest_l, rest_r, dims)
    else:
        joint = meet(store, left, right, "mul")
        joint = reduce(store, joint, dims, NO_MERGE, "is summed without weights")
    shape = tuple(1 if d in dims else n for d, n in enumerate(broadcast_shape((left, right))))
    state = left.state and right.state
    return Value(shape, joint.fields, state=state, computed=state)


def _heard(store: Store, item: Field) -> None:
    """A block is summed away: if it is loud, removing it takes more than silence."""
    if item.level == 1 and item.loud:
        store.flag(item.labels, OFFSET)


def _varied(value: Value, dims: frozenset[int]) -> Value:
    """The same value, without a word on where it repeats along some dimensions."""
    fields = tuple(f for f in value.fields if f.level != REPEAT or not f.support & dims)
    return replace(value, fields=fields)


def _meet_and_read(
    store: Store,
    left: Value,
    right: Value,
    matches: list[tuple[Field, Field]],
    rest_l: list[Field],
    rest_r: list[Field],
    dims: frozenset[int],
) -> Value:
    """The meeting of `contract` when channels are paired along a summed dimension."""
    cover_l = frozenset(d for f in left.fields for d in f.support)
    cover_r = frozenset(d for f in right.fields for d in f.support)
    _check_varying(store, left, right, cover_r, dims)
    _check_varying(store, right, left, cover_l, dims)
    fields = []
    for a, b in matches:
        _check_codes(store, left, a, a.labels, b.labels)
        _check_codes(store, right, b, b.labels, a.labels)
        if (a.support | b.support) & dims:
            merged = _read_pair(store, left, right, a, b, dims)
            if merged is not None:
                fields.append(merged)
        else:
            fields.append(_merge_pair(store, a, b, "mul"))
    for owner, other, rest in ((left, right, rest_l), (right, left, rest_r)):
        for item in rest:
            if not item.support & dims:
                fields += [item] if _lasts(item, other) else []
                continue
            _heard(store, item)
            if item.level == 0:
                store.forbid(owner, item, item.support, FROZEN, FIXED)
    return Value(broadcast_shape((left, right)), tuple(fields))


def _read_pair(store: Store, left: Value, right: Value, a: Field, b: Field, dims: frozenset[int]) -> Field | None:
    """A channel is read: its two sides answer a rescale inversely, and it ends here."""
    store.same(a.labels, b.labels)
    if _loud(a, b, "mul"):
        _heard(store, a)
        _heard(store, b)
    for kind in ("pos", "sgn"):
        x, y = torch.broadcast_tensors(getattr(a, kind), getattr(b, kind))
        both = (x != 0) & (y != 0)
        kill = store.kill_pos if kind == "pos" else store.kill_sgn
        kill(x[(x != 0) & ~both])
        kill(y[(y != 0) & ~both])
        if kind == "pos":
            store.same_pos(x[both], -y[both])
        else:
            store.same_sgn(x[both], y[both])
    if left.state != right.state:
        reader = b if right.state else a
        computed = (right if right.state else left).computed
        store.flag(reader.labels, COMPUTED if computed else READ)
        if computed:
            store.flag(reader.labels, NO_MERGE, "is read by a weight that is computed from others")
        if reader.curved:
            store.flag(reader.labels, NO_MERGE, "is read by a weight that is no linear function of its parameter")
        if reader.loud:
            store.forbid(
                right if right.state else left, reader, dims, ELSEWHERE, "is read by a weight that is never zero"
            )
    else:
        itself = bool(torch.isin(a.labels[a.labels > 0], b.labels.flatten().contiguous()).any())
        linear = not (a.curved or b.curved) and bool((a.pos != 0).all() and (b.pos != 0).all())
        if linear and not itself:
            store.flag(combine_labels(a.labels, b.labels), PAIRED)
        else:
            for owner, item in ((left, a), (right, b)):
                store.flag(item.labels, NO_MERGE, "is multiplied with itself")
                store.forbid(owner, item, dims, ELSEWHERE, "is multiplied with itself")
    big, owner = (a, left) if len(a.support) >= len(b.support) else (b, right)
    for block in owner.blocks():
        for other in (a, b):
            if block.support <= other.support and block is not other:
                store.members.append(tuple(torch.broadcast_tensors(other.labels, block.labels)))
    left_over = big.support - dims
    if not left_over:
        return None
    if _covered(owner, big, dims):
        mark_used(store, owner, dims)
        return None
    merged = merge_along(store, big, big.support & dims)
    if merged is None:
        return None
    store.kill(merged)
    return merged.without_gauge()


def moved(store: Store, value: Value, shape: tuple[int, ...], function: Callable[[Tensor], Tensor]) -> Value:
    """Run a data movement on the labels; the function takes and returns arrays of the value's full shape."""
    fields = []
    for item in value.fields:
        fields += kept(store, item.map(lambda array: function(array.expand(value.shape))))
    return replace(value, shape=shape, fields=tuple(fields), name=None)


def _factor(old: tuple[int, ...], new: tuple[int, ...]) -> list[tuple[list[int], list[int]]]:
    """Cut a reshape into the smallest runs of dimensions with equal products."""
    runs, i, j = [], 0, 0
    while i < len(old) or j < len(new):
        left, right = ([i], old[i]) if i < len(old) else ([], 1), ([j], new[j]) if j < len(new) else ([], 1)
        dims_old, n_old = list(left[0]), left[1]
        dims_new, n_new = list(right[0]), right[1]
        i, j = i + len(dims_old), j + len(dims_new)
        while n_old != n_new:
            if n_old < n_new:
                dims_old.append(i)
                n_old *= old[i]
                i += 1
            else:
                dims_new.append(j)
                n_new *= new[j]
                j += 1
        runs.append((dims_old, dims_new))
    return runs


def reshape(store: Store, value: Value, shape: tuple[int, ...]) -> Value:
    """A view. Where one labelled dimension is split into several, the leading ones become blocks."""
    runs = _factor(value.shape, shape)
    fields: list[Field] = []
    for item in value.fields:
        if item.level == REPEAT:
            fields += _repeats(value, item, runs, shape)
            continue
        target: list[int] = []
        full = list(item.labels.shape)
        for dims_old, dims_new in runs:
            varies = any(item.labels.shape[d] > 1 for d in dims_old)
            for d in dims_old:
                full[d] = value.shape[d] if varies else 1
            target += [shape[d] if varies else 1 for d in dims_new]
        small = compress(item.map(lambda array, f=tuple(full), t=tuple(target): array.expand(f).reshape(t)))
        if small is not None:
            fields.append(small)
            if item.level == 0 and len(small.support) > len(item.support) and not value.raw:
                store.rect(small.labels)
    result = replace(value, shape=shape, fields=tuple(fields), name=None)
    return result if value.raw else with_blocks(store, result)


def repeat(shape: Sequence[int], d: int) -> Field:
    """Says of a value of this shape that it is the same all along a dimension."""
    labels = torch.full([n if i == d else 1 for i, n in enumerate(shape)], UNIFORM)
    none = torch.zeros_like(labels)
    return Field(labels, none, none, REPEAT)


def _repeats(value: Value, item: Field, runs: list[tuple[list[int], list[int]]], shape: tuple[int, ...]) -> list[Field]:
    """What is left of a repeat in a view: it ends where the dimension is joined with another."""
    same = {d for f in value.fields if f.level == REPEAT for d in f.support}
    for old, new in runs:
        if min(item.support) == min(same & set(old), default=-1) and all(value.shape[d] == 1 or d in same for d in old):
            return [repeat(shape, d) for d in new if shape[d] > 1]
    return []


def with_blocks(store: Store, value: Value) -> Value:
    """Give a channel grid that spans several dimensions a block field for every dimension but the last.

    Indices with the same channels (heads repeated over a batch that was folded in) are the same block.
    """
    extra = []
    for item in value.fields:
        if item.level != 0 or len(item.support) < 2:
            continue
        for d in sorted(item.support)[:-1]:
            if any(block.support == {d} for block in value.blocks()):
                continue
            lines = item.labels.movedim(d, 0).reshape(item.labels.shape[d], -1)
            kinds, number = torch.unique(lines, dim=0, return_inverse=True)
            if len(kinds) < 2:
                continue
            atoms = store.fresh_blocks(len(kinds))[number].reshape(
                [-1 if i == d else 1 for i in range(len(value.shape))]
            )
            none = torch.zeros_like(atoms)
            extra.append(Field(atoms, none, none, 1))
            store.members.append(tuple(torch.broadcast_tensors(item.labels, atoms)))
    return replace(value, fields=value.fields + tuple(extra))


def permute(value: Value, order: Sequence[int]) -> Value:
    """Reorder dimensions."""
    return replace(
        value,
        shape=tuple(value.shape[d] for d in order),
        fields=tuple(f.map(lambda array: array.permute(*order)) for f in value.fields),
        name=None,
        copies=None,
    )
