"""Rules of operators that put values at places which data choose: sums over a graph's edges, masked assignment.

Whatever is put somewhere goes along samples, positions or nodes; channels pass where all of them go the same way.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from weightfold.graph import algebra
from weightfold.graph.labels import FROZEN, OFFSET, Field, Store, Value
from weightfold.graph.rules.core import node_name, on, out_shape, rule, unknown, without_gauge

ACROSS = "is put at places across the group"
EXTREMES = ("amax", "amin")


def is_zero(value: Any) -> bool:
    """Whether a number, or a tensor that the forward writes down, is zero."""
    if isinstance(value, Value):
        return value.zero or (value.known is not None and not bool(value.known.any()))
    return value == 0


@rule("fill", "zero", move=True)
def fill(store: Store, node: torch.fx.Node, x: Value, value: Any = 0) -> Value:
    """What was there is gone."""
    if isinstance(value, Value) and value.fields:
        return unknown(store, node, x, value)
    return Value(out_shape(node), uniform=True, zero=is_zero(value))


def _passing(store: Store, value: Value, dims: frozenset[int], index: Value | None = None) -> Value:
    """A value without what varies along dimensions in which it is put somewhere, or where channels go their own way."""
    fields = []
    for item in value.fields:
        apart = index is not None and any(index.varies(d) for d in item.support)
        if apart and index is not None and not algebra.alike_for_all(item, index.copies):
            store.forbid(value, item, item.support, FROZEN, "is put at places that differ per channel")
        elif item.support & dims:
            store.forbid(value, item, item.support & dims, FROZEN, ACROSS)
        else:
            fields.append(item)
    shape = tuple(1 if d in dims else n for d, n in enumerate(value.shape))
    return replace(value, shape=shape, fields=tuple(fields), name=None, copies=None)


def _placed(store: Store, node: torch.fx.Node, base: Value, source: Value, how: str = "add") -> Value:
    result = algebra.meet(store, base, source, how)
    if how == "none":
        for item in result.fields:
            store.flag(item.labels, OFFSET)
    return Value(out_shape(node), result.fields)


@rule("index_add", "index_copy", "index_reduce", "scatter_add", "scatter", "scatter_reduce", "index_fill", move=True)
def put(
    store: Store, node: torch.fx.Node, x: Value, dim: int, index: Value, source: Any, *rest: Any, **kwargs: Any
) -> Value:
    """Rows of ``source`` are added to or put in place of rows of ``x`` along one dimension."""
    name, dims = node_name(node), frozenset({on(x, dim)})
    per_element = name.startswith("scatter")
    store.freeze(index, "is used as an index")
    kind = kwargs.get("reduce") or next((a for a in rest if isinstance(a, str)), "sum")
    base = _passing(store, x, dims, index if per_element else None)
    if not isinstance(source, Value) or source.shape == ():
        source = Value((1,) * len(x.shape), uniform=True, zero=is_zero(source))
    else:
        source = _passing(store, source, dims, index if per_element else None)
    result = _placed(store, node, base, source, "none" if kind in ("prod", "multiply") else "add")
    if kind not in EXTREMES:
        return result
    for item in result.fields:
        store.kill_sgn(item.sgn)
    return replace(result, fields=tuple(replace(f, sgn=torch.zeros_like(f.sgn)) for f in result.fields))


def _indexed(indices: Sequence[Value | None], node: torch.fx.Node) -> list[int]:
    """Dimensions that indices speak of: a mask speaks of as many as it has."""
    dims, d = [], 0
    for index, source in zip(indices, node.args[1], strict=True):  # type: ignore[arg-type]
        is_mask = index is not None and source.meta["val"].dtype in (torch.bool, torch.uint8)
        n = len(index.shape) if is_mask and index is not None else 1
        dims += [] if index is None else range(d, d + n)
        d += n
    return dims


@rule("index_put", "_unsafe_index_put", "_index_put_impl", move=True)
def index_put(
    store: Store, node: torch.fx.Node, x: Value, indices: Sequence[Value | None], source: Value, *_: Any
) -> Value:
    """``x[mask] = source``: of a source with dimensions, the last ones are those of ``x`` behind the indices."""
    dims = _indexed(indices, node)
    for index in indices:
        if index is not None:
            store.freeze(index, "is used as an index")
    base = _passing(store, x, frozenset(dims))
    if source.shape == () or source.uniform:
        source = Value((1,) * len(x.shape), uniform=True, zero=is_zero(source))
        return _placed(store, node, base, source)
    if dims != list(range(len(dims))):
        return unknown(store, node, x, source)
    rest = len(x.shape) - len(dims)
    gone = frozenset(range(len(source.shape) - rest))
    behind = _passing(store, source.lifted(rest), gone)
    fields = tuple(f.map(lambda a: a.reshape((1,) * len(dims) + tuple(a.shape[len(gone) :]))) for f in behind.fields)
    shape = (1,) * len(dims) + tuple(behind.shape[len(gone) :])
    return _placed(store, node, base, replace(behind, shape=shape, fields=fields))


@rule("masked_scatter", move=True)
def masked_scatter(store: Store, node: torch.fx.Node, x: Value, mask: Value, source: Value) -> Value:
    """Numbers of ``source`` fill the places of a mask in their order: whole rows, if all channels are masked alike."""
    last = len(x.shape) - 1
    rows = len(mask.shape) == len(x.shape) and not mask.varies(last) and source.shape[-1:] == x.shape[-1:]
    if not rows:
        return unknown(store, node, x, mask, source)
    base = _passing(store, x, frozenset(range(last)))
    store.freeze(
        replace(source, fields=tuple(f for f in source.fields if len(source.shape) - 1 not in f.support)), ACROSS
    )
    fields = tuple(
        Field(*(a.reshape((1,) * last + (-1,)) for a in f.arrays()), level=f.level, loud=f.loud)
        for f in source.fields
        if f.support == {len(source.shape) - 1}
    )
    return _placed(store, node, base, replace(source, shape=(1,) * last + x.shape[-1:], fields=fields, name=None))


@rule("_sparse_mm", "_sparse_addmm", "_sparse_sum")
def sparse(store: Store, node: torch.fx.Node, *args: Any) -> Any:
    """A product with a sparse matrix that is data: the rows it mixes are nodes, not channels."""
    if node_name(node) != "_sparse_mm" or not isinstance(args[1], Value) or args[0].fields:
        return unknown(store, node, *args)
    mixed = _passing(store, args[1], frozenset({0}))
    return Value(out_shape(node), mixed.fields)


@rule("broadcast_tensors", move=True)
def broadcast_tensors(_: Store, node: torch.fx.Node, values: Sequence[Value]) -> list[Value]:
    ndim = max(len(v.shape) for v in values)
    shapes = [tuple(v.shape) for v in node.meta["val"]]
    return [replace(v.lifted(ndim), shape=s, name=None) for v, s in zip(values, shapes, strict=True)]


def drop_gauge(store: Store, value: Value) -> Value:
    """The same value, which no rescale passes any more."""
    return replace(value, fields=tuple(without_gauge(store, f) for f in value.fields))
