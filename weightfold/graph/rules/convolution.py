"""Rules for convolutions: plain, depthwise, grouped, transposed."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from weightfold.graph import algebra
from weightfold.graph.labels import (
    FROZEN,
    NO_MERGE,
    NO_MERGE_IN,
    NO_REMOVE,
    NO_REMOVE_IN,
    Field,
    Store,
    Value,
    compress,
)
from weightfold.graph.rules.core import out_shape, rule
from weightfold.graph.rules.products import plus_bias, tap

WINDOW = "is the window of a kernel"


def _flat_input(store: Store, x: Value) -> Value:
    """Drop the spatial dimensions: a channel whose label varies over space is read as a whole."""
    spatial = frozenset(range(2, len(x.shape)))
    fields: list[Field] = []
    for item in x.fields:
        if not item.support & spatial:
            fields.append(item)
        elif 1 in item.support and item.level == 0:
            merged = algebra.merge_along(store, item, item.support & spatial)
            if merged is not None:
                store.kill(merged)
                fields.append(merged.without_gauge())
        else:
            store.flag(item.labels, FROZEN, "varies over space under a convolution")
            store.kill(item)
    keep = tuple(f.map(lambda a: a.reshape(a.shape[:2])) for f in fields)
    return replace(x, shape=x.shape[:2], fields=keep)


def _flat_kernel(store: Store, weight: Value) -> Value:
    fields = []
    for item in weight.fields:
        if item.support & frozenset(range(2, len(weight.shape))):
            store.flag(item.labels, FROZEN, WINDOW)
            store.kill(item)
        else:
            fields.append(item.map(lambda a: a.reshape(a.shape[:2])))
    return replace(weight, shape=weight.shape[:2], fields=tuple(fields))


def _plain(store: Store, x: Value, w_oi: Value) -> Value:
    left = replace(
        x, shape=(x.shape[0], 1, x.shape[1]), fields=tuple(f.map(lambda a: a.unsqueeze(1)) for f in x.fields)
    )
    out = algebra.contract(store, left, w_oi, frozenset({2}))
    return replace(out, shape=out.shape[:2], fields=tuple(f.map(lambda a: a.squeeze(2)) for f in out.fields))


def _field(value: Value, dim: int) -> Field | None:
    return next((f for f in value.fields if f.support == {dim}), None)


def _depthwise(store: Store, x: Value, weight: Value, groups: int) -> Value:
    """Every output channel looks at one input channel: pointwise, up to a multiplier."""
    rows = _field(weight, 0)
    if rows is None:
        return _fixed_kernel(store, x, weight)
    grid = rows.map(lambda a: a.reshape(1, groups, -1))
    kernel = Value((1, groups, weight.shape[0] // groups), (grid,), state=weight.state)
    left = replace(x, shape=(*x.shape, 1), fields=tuple(f.map(lambda a: a.unsqueeze(2)) for f in x.fields))
    out = algebra.meet(store, left, kernel, "mul")
    n = weight.shape[0]
    fields = []
    for item in out.fields:
        full = [groups if item.labels.shape[1] > 1 else 1, item.labels.shape[2]]
        if full[0] == 1 and full[1] == 1:
            continue
        wide = item.map(lambda a: a.expand(a.shape[0], groups, n // groups).reshape(a.shape[0], n))
        small = compress(wide)
        fields += [small] if small is not None else []
    return Value((x.shape[0], n), tuple(fields))


def _fixed_kernel(store: Store, x: Value, weight: Value) -> Value:
    """A depthwise kernel that is no parameter (a blur): all channels alike may pass, but their number is its own."""
    alike = weight.uniform and x.shape[1] == weight.shape[0]
    for item in x.fields:
        for bit in (NO_REMOVE, NO_MERGE) if alike else (FROZEN,):
            store.forbid(x, item, item.support, bit, "is read by a fixed kernel, one channel each")
    return Value((x.shape[0], weight.shape[0]), x.fields if alike else ())


def _slab(store: Store, weight: Value, name: str | None, groups: int, transposed: bool) -> list[Field]:
    """The side of a kernel that has a meaning per group: of a parameter; if it is computed, all groups share it."""
    columns = _field(weight, 1)
    shape = (1, groups, -1, 1) if transposed else (1, groups, 1, -1)
    if name is None:
        shared = (1, 1, -1, 1) if transposed else (1, 1, 1, -1)
        return [] if columns is None else [columns.map(lambda a: a.reshape(shared))]
    if columns is not None:
        store.flag(columns.labels, FROZEN, "is read in slabs, one per group of the convolution")
        store.kill(columns)
    slab = store.slab(name, 1, groups, weight.shape[1]).reshape(shape)
    return [Field(slab, slab, slab)]


def _grouped(store: Store, x: Value, weight: Value, name: str | None, groups: int, transposed: bool) -> Value:
    """Each group of output channels reads its own group of input channels: the groups are blocks.

    A kernel (O, I / groups), or (I, O / groups) if it is transposed: its rows are told apart by themselves, its columns
    once for every group.
    """
    per_group, n_columns = weight.shape[0] // groups, weight.shape[1]
    n_out, n_in = (n_columns, per_group) if transposed else (per_group, n_columns)
    blocks = store.fresh_blocks(groups).reshape(1, groups, 1, 1)
    none = torch.zeros_like(blocks)
    block = Field(blocks, none, none, 1)
    store.used.append(blocks.flatten())
    rows, slab = _field(weight, 0), _slab(store, weight, name, groups, transposed)
    kernel_fields = [block, *slab]
    if rows is not None:
        rows = rows.map(lambda a: a.reshape((1, groups, 1, n_in) if transposed else (1, groups, n_out, 1)))
        kernel_fields.insert(1, rows)
    outer, inner = (slab, [rows]) if transposed else ([rows], slab)
    for n, side in ((n_out, outer), (n_in, inner)):
        for item in (f for f in side if f is not None and n == 1):
            for bit in (NO_REMOVE_IN, NO_MERGE_IN):
                store.flag(item.labels, bit, "is alone in its group of a convolution: edit the groups as wholes")
    if transposed:
        for bit in (NO_MERGE, NO_REMOVE) if n_in == 1 else (NO_MERGE,):
            store.flag(blocks, bit, "lies in the groups of a transposed convolution")
    writers = slab if transposed else [rows] if rows is not None else []
    for item in writers:
        store.members.append(tuple(torch.broadcast_tensors(item.labels, blocks)))
        store.rect(item.labels.expand(1, groups, n_out, 1).reshape(groups, n_out))
    kernel = Value((1, groups, n_out, n_in), tuple(kernel_fields), state=True)
    fields = []
    for item in x.fields:
        wide = compress(item.map(lambda a: a.expand(a.shape[0], groups * n_in).reshape(a.shape[0], groups, 1, n_in)))
        if wide is not None and item.level == 1 and wide.support == {1}:
            store.same(wide.labels, blocks)
        elif wide is not None:
            fields.append(wide)
            if item.level == 0:
                store.members.append(tuple(torch.broadcast_tensors(wide.labels, blocks)))
                store.rect(
                    wide.labels.expand(x.shape[0] if wide.labels.shape[0] > 1 else 1, groups, 1, n_in).reshape(-1, n_in)
                )
    left = Value((x.shape[0], groups, 1, n_in), (*fields, block) if fields else ())
    out = algebra.contract(store, left, kernel, frozenset({3}))
    kept = []
    for item in out.fields:
        wide = compress(item.map(lambda a: a.expand(a.shape[0], groups, n_out, 1).reshape(a.shape[0], groups * n_out)))
        kept += [wide] if wide is not None else []
    return Value((x.shape[0], groups * n_out), tuple(kept))


def _convolve(
    store: Store, node: torch.fx.Node, x: Value, weight: Value, bias: Value | None, groups: int, transposed: bool
) -> Any:
    unbatched = len(x.shape) == len(weight.shape) - 1
    if unbatched:
        x = replace(x, shape=(1, *x.shape), fields=tuple(f.map(lambda a: a.unsqueeze(0)) for f in x.fields))
    flat, kernel = _flat_input(store, x), _flat_kernel(store, weight)
    if groups == 1:
        tap(store, node, weight, 0 if transposed else 1, 1 - unbatched)
        out = _plain(store, flat, algebra.permute(kernel, (1, 0)) if transposed else kernel)
    elif kernel.shape[1] == 1 and (not transposed or kernel.shape[0] == groups):
        out = _depthwise(store, flat, kernel, groups)
    else:
        if not transposed:
            tap(store, node, weight, 1, 1 - unbatched)
        out = _grouped(store, flat, kernel, weight.name, groups, transposed)
    out = plus_bias(store, out, bias)
    shape = out_shape(node)
    pad = len(shape) - 2 + unbatched
    fields = tuple(f.map(lambda a: a.reshape(*a.shape[int(unbatched) :], *(1,) * pad)) for f in out.fields)
    return Value(shape, fields)


@rule("conv1d", "conv2d", "conv3d")
def conv(
    store: Store, node: torch.fx.Node, x: Value, weight: Value, bias: Any = None, *rest: Any, **kwargs: Any
) -> Any:
    groups = rest[3] if len(rest) > 3 else kwargs.get("groups", 1)
    return _convolve(store, node, x, weight, bias, groups, False)


@rule("conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
def conv_transpose(
    store: Store, node: torch.fx.Node, x: Value, weight: Value, bias: Any = None, *rest: Any, **kwargs: Any
) -> Any:
    groups = rest[3] if len(rest) > 3 else kwargs.get("groups", 1)
    return _convolve(store, node, x, weight, bias, groups, True)


@rule("convolution")
def convolution(store: Store, node: torch.fx.Node, x: Value, weight: Value, bias: Any, *rest: Any) -> Any:
    return _convolve(store, node, x, weight, bias, rest[5], rest[3])
