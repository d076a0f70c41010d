"""Rules of sums, norms, pools and resampling."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from weightfold.graph import algebra
from weightfold.graph.labels import FROZEN, NO_MERGE, NO_REMOVE, OFFSET, Field, Store, Value
from weightfold.graph.rules.core import (
    NORMALISED,
    RULES,
    module_class,
    node_name,
    on,
    out_shape,
    rule,
    values_in,
    without_gauge,
)
from weightfold.graph.rules.pointwise import choose

_NORMS = ("norm", "linalg_vector_norm", "linalg_norm")
_EXTREME = ("max", "amax", "min", "amin", "median", *_NORMS)
_LINEAR = ("sum", "mean")
_PLACES = ("argmax", "argmin")
_PLACED = ("max", "min", "median")
"""Reductions that return the place of what they find, too."""


def _places_used(node: torch.fx.Node) -> bool:
    """Whether the second result of a node, the places, is looked at."""
    second = [user for user in node.users if user.target is operator.getitem and user.args[1] == 1]
    whole = any(user.target is not operator.getitem for user in node.users)
    return isinstance(node.meta["val"], (tuple, list)) and (whole or any(user.users for user in second))


@rule("sum", "mean", "amax", "amin", "max", "min", "var", "std", "var_mean", "norm", "linalg_vector_norm", "logsumexp",
      "linalg_norm", "prod", "any", "all", "argmax", "argmin", "median", "std_mean")  # fmt: skip
def reduction(store: Store, node: torch.fx.Node, x: Value, *args: Any, **kwargs: Any) -> Any:
    name = node_name(node)
    if name in ("max", "min") and args and isinstance(args[0], Value):
        return choose(store, node, x, *args)
    val = node.meta["val"]
    shape = tuple(val[0].shape) if isinstance(val, (tuple, list)) else tuple(val.shape)
    position = 1 if name in _NORMS else 0
    dims_arg = args[position] if len(args) > position else kwargs.get("dim")
    if isinstance(dims_arg, bool):
        dims_arg = None
    if dims_arg is None or dims_arg == []:
        dims = frozenset(range(len(x.shape)))
    else:
        dims = frozenset(on(x, d) for d in (dims_arg if isinstance(dims_arg, (list, tuple)) else [dims_arg]))
    if name in _PLACES or (name in _PLACED and _places_used(node)):
        for item in x.fields:
            if item.support & dims:
                store.forbid(x, item, item.support & dims, FROZEN, f"has its places told by '{name}'")
    bits = NO_MERGE if name == "sum" else NO_MERGE | NO_REMOVE
    result = algebra.reduce(store, x, dims, bits, f"is reduced by '{name}' across the group")
    fields = list(result.fields)
    if name not in _LINEAR:
        for i, item in enumerate(fields):
            if name in _EXTREME:
                store.kill_sgn(item.sgn)
                fields[i] = replace(item, sgn=torch.zeros_like(item.sgn))
            else:
                fields[i] = without_gauge(store, item)
            offset = name not in (*_EXTREME, "var", "std")
            store.flag(item.labels, OFFSET) if offset else None
            fields[i] = replace(fields[i], curved=True, loud=item.loud or offset)
    if len(shape) < len(x.shape):
        keep = [d for d in range(len(x.shape)) if d not in dims]
        fields = [f.map(lambda a: a.permute(*keep, *sorted(dims)).reshape([a.shape[d] for d in keep])) for f in fields]
    out = Value(shape, tuple(fields), state=x.state)
    return [out] * len(val) if isinstance(val, (tuple, list)) else out


@rule("softmax", "log_softmax", "_softmax", "_log_softmax", "softmin")
def softmax(store: Store, node: torch.fx.Node, x: Value, dim: int, *_: Any, **__: Any) -> Value:
    dims = frozenset({on(x, dim)})
    result = algebra.reduce(store, x, dims, NO_MERGE | NO_REMOVE, "goes through a softmax across the group", keep=True)
    for item in result.fields:
        store.flag(item.labels, OFFSET) if item.level == 0 else None
    fields = tuple(replace(without_gauge(store, f), loud=True, curved=True) for f in result.fields)
    return replace(result, fields=fields)


@rule("cumsum", "cumprod", "sort", "topk", "argsort", "logcumsumexp", "cummax", "flip_along", "diff", "kthvalue")
def ordered(store: Store, node: torch.fx.Node, x: Value, *args: Any, **kwargs: Any) -> Any:
    name = node_name(node)
    position = 1 if name in ("topk", "kthvalue", "diff") else 0
    dim = kwargs.get("dim", args[position] if len(args) > position else -1)
    dim = on(x, dim if isinstance(dim, int) and not isinstance(dim, bool) else -1)
    fields = []
    for item in x.fields:
        if dim in item.support:
            store.forbid(x, item, frozenset({dim}), FROZEN, f"is ordered by '{name}'")
        else:
            fields.append(item if name == "cumsum" else replace(without_gauge(store, item), loud=True, curved=True))
    val = node.meta["val"]
    if isinstance(val, (tuple, list)):
        return [Value(tuple(v.shape), tuple(fields)) for v in val]
    return Value(tuple(val.shape), tuple(fields))


def _affine(store: Store, x: Value, dim: int, weight: Value | None, bias: Value | None) -> Value:
    """Scale and shift per channel: whatever the input answered, the output answers as the scale and shift do."""
    shape = lambda v: tuple(v.shape[0] if d == dim else 1 for d in range(len(x.shape)))  # noqa: E731
    x = replace(x, fields=tuple(replace(without_gauge(store, f), curved=True) for f in x.fields))
    if weight is not None:
        x = algebra.meet(store, x, algebra.reshape(store, weight, shape(weight)), "mul")
    if bias is not None:
        for item in x.fields:
            store.flag(item.labels, OFFSET) if weight is None else None
        x = algebra.meet(store, x, algebra.reshape(store, bias, shape(bias)), "add")
    return replace(x, uniform=False, zero=False)


@rule("batch_norm", "_batch_norm_impl_index", "cudnn_batch_norm", "native_batch_norm", "instance_norm")
def batch_norm(
    store: Store, node: torch.fx.Node, x: Value, weight: Any, bias: Any, mean: Any, var: Any, *_: Any
) -> Any:
    others = frozenset(d for d in range(len(x.shape)) if d != 1)
    x = algebra.reduce(store, x, others, NO_MERGE | NO_REMOVE, NORMALISED, keep=True)
    for buffer in (mean, var):
        if buffer is not None:
            shape = tuple(buffer.shape[0] if d == 1 else 1 for d in range(len(x.shape)))
            algebra.meet(store, x, algebra.reshape(store, buffer, shape), "none")
    out = _affine(store, x, 1, weight, bias)
    if weight is None or mean is not None:
        _statistics_offset(store, out)
    return [out, Value(()), Value(())] if isinstance(node.meta.get("val"), (tuple, list)) else out


def _statistics_offset(store: Store, value: Value) -> None:
    """A silent channel stays silent behind a batch norm only once its scale and shift are zero too: no flag needed
    with an affine part; without one the running mean shows through."""
    for item in value.fields:
        if not bool((item.pos != 0).any()):
            store.flag(item.labels, OFFSET)


@rule("layer_norm", "rms_norm", "native_layer_norm", "_fused_rms_norm")
def layer_norm(
    store: Store, node: torch.fx.Node, x: Value, normalized: Sequence[int], *rest: Any, **kwargs: Any
) -> Any:
    name = node_name(node)
    weight = rest[0] if rest else kwargs.get("weight")
    bias = None if "rms" in name else (rest[1] if len(rest) > 1 else kwargs.get("bias"))
    first = len(x.shape) - len(normalized)
    dims = frozenset(range(first, len(x.shape)))
    out = algebra.reduce(store, x, dims, NO_MERGE | NO_REMOVE, NORMALISED, keep=True)
    out = replace(out, fields=tuple(replace(without_gauge(store, f), curved=True) for f in out.fields))
    if weight is not None:
        out = algebra.meet(store, out, weight, "mul")
    if bias is not None:
        out = algebra.meet(store, out, bias, "add")
    return [out, Value(()), Value(())] if isinstance(node.meta.get("val"), (tuple, list)) else out


@rule("group_norm")
def group_norm(
    store: Store, node: torch.fx.Node, x: Value, groups: int, weight: Any = None, bias: Any = None, *_: Any, **__: Any
) -> Value:
    channels = x.shape[1]
    grid = algebra.reshape(store, x, (x.shape[0], groups, channels // groups, *x.shape[2:]))
    dims = frozenset(range(2, len(grid.shape)))
    grid = algebra.reduce(store, grid, dims, NO_MERGE | NO_REMOVE, NORMALISED, keep=True)
    if 1 < groups < channels:
        algebra.mark_used(store, grid, dims)
        if "GroupNorm" not in module_class(node):
            _number_of_groups(store, grid)
    return _affine(store, algebra.reshape(store, grid, x.shape), 1, weight, bias)


def _number_of_groups(store: Store, grid: Value) -> None:
    """Only a `GroupNorm` module can be told that it has fewer groups; a number in the forward stays."""
    for item in grid.blocks():
        for bit in (NO_REMOVE, NO_MERGE):
            store.flag(item.labels, bit, "is normalised in a number of groups that the forward writes down")


def _idle(x: Value, n: int, name: str, args: Sequence[Any], kwargs: dict[str, Any]) -> frozenset[int]:
    """Dimensions that a pool has in its window with size and stride 1: nothing happens there."""
    if name.startswith("adaptive") or not name.startswith(("max_pool", "avg_pool")) or not args:
        return frozenset()
    kernel = args[0] if isinstance(args[0], (list, tuple)) else [args[0]]
    stride = args[1] if len(args) > 1 and args[1] else kwargs.get("stride") or kernel
    padding = args[2] if len(args) > 2 else kwargs.get("padding", 0)
    spread = [list(v) * n if len(v) == 1 else list(v) for v in (kernel, _listed(stride), _listed(padding))]
    first = len(x.shape) - n
    return frozenset(first + i for i, (k, s, p) in enumerate(zip(*spread, strict=True)) if (k, s, p) == (1, 1, 0))


def _listed(value: Any) -> Sequence[int]:
    return value if isinstance(value, (list, tuple)) else [value]


def _spatial(store: Store, x: Value, n: int, name: str, idle: frozenset[int] = frozenset()) -> tuple[Field, ...]:
    """Fields that do not vary over the last n dimensions; the others are frozen."""
    dims = frozenset(range(len(x.shape) - n, len(x.shape))) - idle
    fields = []
    for item in x.fields:
        if item.support & dims:
            store.forbid(x, item, item.support & dims, FROZEN, f"is mixed with its neighbours by '{name}'")
        else:
            fields.append(item)
    return tuple(fields)


def pool(store: Store, node: torch.fx.Node, x: Value, *args: Any, **kwargs: Any) -> Any:
    name = node_name(node)
    n = next(int(c) for c in reversed(name.replace("_with_indices", "").replace("_aa", "")) if c.isdigit())
    fields = _spatial(store, x, n, name, _idle(x, n, name, args, kwargs))
    if "max" in name or "lp" in name:
        for item in fields:
            store.kill_sgn(item.sgn)
        fields = tuple(replace(f, sgn=torch.zeros_like(f.sgn), curved=True) for f in fields)
    val = node.meta["val"]
    if isinstance(val, (tuple, list)):
        return [Value(tuple(v.shape), fields) for v in val]
    return Value(tuple(val.shape), fields)


for _d in (1, 2, 3):
    for _name in ("max_pool{}d", "avg_pool{}d", "adaptive_avg_pool{}d", "adaptive_max_pool{}d", "_adaptive_avg_pool{}d",
                  "max_pool{}d_with_indices", "upsample_nearest{}d", "_upsample_nearest_exact{}d"):  # fmt: skip
        RULES[_name.format(_d)] = pool
for _name in ("upsample_linear1d", "upsample_bilinear2d", "upsample_bicubic2d", "upsample_trilinear3d",
              "_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa"):  # fmt: skip
    RULES[_name] = pool


@rule("max_unpool2d", "max_unpool3d")
def unpool(store: Store, node: torch.fx.Node, x: Value, places: Value, *_: Any) -> Value:
    """Each channel's values go where its own maxima were."""
    n = int(node_name(node)[-2])
    where = Value(places.shape, tuple(f.without_gauge() for f in _spatial(store, places, n, "max_unpool")))
    values = replace(x, fields=_spatial(store, x, n, "max_unpool"))
    return Value(out_shape(node), algebra.meet(store, values, where, "mul").fields)


@rule("__interpolate", "grid_sampler", "affine_grid_generator")
def sample(store: Store, node: torch.fx.Node, x: Value, *rest: Any, **__: Any) -> Value:
    for other in values_in(rest):
        store.freeze(other, "is a sampling position")
    return Value(out_shape(node), _spatial(store, x, len(x.shape) - 2, node_name(node)))


@rule("col2im")
def col2im(store: Store, node: torch.fx.Node, x: Value, size: Sequence[int], kernel: Sequence[int], *_: Any) -> Value:
    """Fold patches back: all places of a patch hold one channel."""
    n = math.prod(kernel)
    d = len(x.shape) - 2
    shape = out_shape(node)
    fields = []
    for item in _spatial(store, x, 1, "fold"):
        if item.support != {d}:
            store.freeze(replace(x, fields=(item,)), "varies over space under 'fold'")
            continue
        grid = item.map(lambda a: a.reshape(*a.shape[:d], shape[d], n))
        merged = algebra.merge_along(store, grid, frozenset({d + 1}))
        if merged is not None:
            fields.append(merged.map(lambda a: a.reshape(*a.shape[: d + 1], *(1,) * len(size))))
    return Value(shape, tuple(fields))


@rule("im2col")
def im2col(store: Store, node: torch.fx.Node, x: Value, kernel: Sequence[int], *_: Any) -> Value:
    fields = _spatial(store, x, 2, "unfold")
    n = math.prod(kernel)
    d = len(x.shape) - 3
    wide = tuple(
        f.map(lambda a: a.repeat_interleave(n, d).squeeze(-1) if a.shape[d] > 1 else a.squeeze(-1)) for f in fields
    )
    return Value(out_shape(node), wide)
