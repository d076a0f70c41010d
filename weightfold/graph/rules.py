"""One small rule per operator: what it does to labels.

A rule takes (store, node, *args, **kwargs) with `Value`s in place of tensors and returns a `Value` or a list of them.
Rules are found by the operator's name (``aten.relu_.default`` -> ``relu``). What has no rule and is tagged pointwise by
PyTorch is handled by measuring it; whatever is left freezes everything that it touches.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from weightfold.graph import algebra
from weightfold.graph.labels import (
    FOREIGN,
    FROZEN,
    NO_MERGE,
    NO_REMOVE,
    OFFSET,
    UNIFORM,
    WRITE,
    ZERO,
    Field,
    Store,
    Value,
    compress,
    kept,
)

Rule = Callable[..., Any]
RULES: dict[str, Rule] = {}
MOVES: set[str] = set()
"""Operators that only move data: meeting one of them says nothing about what kind of channel it is."""

NORMALISED = "is normalised across the group"


def rule(*names: str, move: bool = False) -> Callable[[Rule], Rule]:
    """Register a rule under operator names."""

    def register(function: Rule) -> Rule:
        for name in names:
            RULES[name] = function
        if move:
            MOVES.update(names)
        return function

    return register


def out_shape(node: torch.fx.Node, index: int | None = None) -> tuple[int, ...]:
    """Shape of a node's output, from the tracer's own record."""
    value = node.meta["val"] if index is None else node.meta["val"][index]
    return tuple(int(n) for n in value.shape)


def on(value: Value, dim: int) -> int:
    return dim % max(len(value.shape), 1)


# movement -----------------------------------------------------------------------------------------------------------


@rule("view", "reshape", "_unsafe_view", "flatten", "unflatten", "squeeze", "unsqueeze", "view_as", "reshape_as", move=True)
def view(store: Store, node: torch.fx.Node, x: Value, *_: Any, **__: Any) -> Value:
    return algebra.reshape(store, x, out_shape(node))


@rule("clone", "contiguous", "alias", "detach", "to", "_to_copy", "lift_fresh_copy", "type_as", "float", "double", "half",
      "dropout", "feature_dropout", "alpha_dropout", "native_dropout", "requires_grad", "positive", "bernoulli",
      "convert_element_type", "lift", move=True)  # fmt: skip
def same(store: Store, node: torch.fx.Node, x: Value, *_: Any, **__: Any) -> Any:
    return [x, Value(x.shape)] if isinstance(node.meta.get("val"), (tuple, list)) else x


@rule("permute", "transpose", "t", "movedim", "swapaxes", "swapdims", "numpy_T", "mT", "moveaxis", "adjoint", move=True)
def reorder(store: Store, node: torch.fx.Node, x: Value, *args: Any, **_: Any) -> Value:
    probe = [1] * len(x.shape)
    order: list[int] = []
    for d in range(len(x.shape)):
        probe[d] = 2
        order.append(list(call(node, torch.empty(probe, device="meta"), *args).shape).index(2))
        probe[d] = 1
    inverse = sorted(range(len(order)), key=order.__getitem__)
    return algebra.permute(x, inverse)


@rule("expand", "expand_as", "broadcast_to", move=True)
def expand(store: Store, node: torch.fx.Node, x: Value, *_: Any, **__: Any) -> Value:
    shape = out_shape(node)
    return replace(x.lifted(len(shape)), shape=shape, name=None)


def call(node: torch.fx.Node, *args: Any, **kwargs: Any) -> Any:
    """Run the node's own operator (its functional form) on other arguments."""
    target = node.target
    packet = getattr(target, "overloadpacket", target)
    name = getattr(packet, "__name__", "")
    if name.endswith("_") and not name.endswith("__"):
        packet = getattr(torch.ops.aten, name[:-1])
    return packet(*args, **kwargs)


def along(store: Store, node: torch.fx.Node, x: Value, dim: int, args: tuple, kwargs: dict, index: int | None) -> Value:
    """Run a movement along one dimension on the labels that vary there; other labels pass."""
    shape = out_shape(node, index)
    gone = len(shape) < len(x.shape)
    fields = []
    for item in x.fields:

        def run(array: Tensor) -> Tensor:
            full = [x.shape[dim] if d == dim else n for d, n in enumerate(array.shape)]
            out = call(node, array.expand(full), *args, **kwargs)
            return out if index is None else out[index]

        if dim in item.support:
            fields += kept(store, item.map(run))
        elif 0 not in shape:
            fields.append(item.map(lambda array: array.squeeze(dim)) if gone else item)
    return replace(x, shape=shape, fields=tuple(fields), name=None)


@rule("slice", "narrow", "index_select", "roll", "unfold", move=True)
def cut(store: Store, node: torch.fx.Node, x: Value, dim: int = 0, *args: Any, **kwargs: Any) -> Value:
    if isinstance(dim, (list, tuple)) or any(isinstance(a, Value) for a in args) or kwargs or node_name(node) in (
        "roll",
        "unfold",
    ):
        return execute(store, node, x, dim, *args, **kwargs)
    d = on(x, dim)
    return along(store, node, x, d, (d, *args), {}, None)


@rule("select", move=True)
def select(store: Store, node: torch.fx.Node, x: Value, dim: int, index: int) -> Value:
    d = on(x, dim)
    return along(store, node, x, d, (d, index), {}, None)


@rule("unbind", move=True)
def unbind(store: Store, node: torch.fx.Node, x: Value, dim: int = 0) -> list[Value]:
    d = on(x, dim)
    return [along(store, node, x, d, (d,), {}, i) for i in range(x.shape[d])]


@rule("split", "chunk", "split_with_sizes", "tensor_split", move=True)
def split(store: Store, node: torch.fx.Node, x: Value, sizes: Any, dim: int = 0) -> list[Value]:
    d = on(x, dim)
    parts = [along(store, node, x, d, (sizes, d), {}, i) for i in range(len(node.meta["val"]))]
    lengths = {part.shape[d] for part in parts}
    if len(lengths) == 1 and len(parts) > 1 and not x.raw:
        for item in x.fields:
            if item.level == 0 and d in item.support:
                shape = [x.shape[d] if i == d else n for i, n in enumerate(item.labels.shape)]
                labels = item.labels.expand(shape).movedim(d, -1)
                store.rect(labels.reshape(*labels.shape[:-1], len(parts), -1))
    return parts


@rule("repeat", "tile", "flip", "pixel_shuffle", "pixel_unshuffle", "channel_shuffle", "native_channel_shuffle",
      "repeat_interleave", "rot90", "diagonal", "as_strided", move=True)  # fmt: skip
def execute(store: Store, node: torch.fx.Node, x: Value, *args: Any, **kwargs: Any) -> Value:
    """Run any movement on the fully expanded labels; data-dependent indices must not touch labelled dimensions."""
    shape = out_shape(node)
    if any(isinstance(a, Value) for a in args):
        return indexed(store, node, x, *args, **kwargs)
    return algebra.moved(store, x, shape, lambda array: call(node, array, *args, **kwargs))


@rule("index", "gather", "take_along_dim", "_unsafe_index", "index_copy", move=True)
def indexed(store: Store, node: torch.fx.Node, x: Value, *args: Any, **kwargs: Any) -> Value:
    """Indexing by data: labels pass only where the result does not depend on the indices."""
    shape = out_shape(node)
    for a in _flat(args):
        store.freeze(a, "is used as an index")

    def fill(a: Any, constant: int) -> Any:
        if isinstance(a, Value):
            return torch.full(a.shape, constant, dtype=torch.long)
        return [fill(b, constant) for b in a] if isinstance(a, (list, tuple)) else a

    fields = []
    for item in x.fields:
        try:
            low, high = (
                item.map(lambda array, c=c: call(node, array.expand(x.shape), *fill(args, c), **kwargs)) for c in (0, -1)
            )
        except (RuntimeError, IndexError):
            low, high = (
                item.map(lambda array, c=c: call(node, array.expand(x.shape), *fill(args, c), **kwargs)) for c in (0, 0)
            )
            high = None
        if high is None or low.labels.shape != torch.Size(shape) or bool((low.labels != high.labels).any()):
            store.forbid(x, item, item.support, FROZEN, "is picked by data")
            continue
        fields += kept(store, low)
    return Value(shape, tuple(fields), state=x.state)


@rule("cat", "concat", "concatenate", move=True)
def cat(store: Store, node: torch.fx.Node, parts: Sequence[Value], dim: int = 0) -> Value:
    shape = out_shape(node)
    d = on(max(parts, key=lambda p: len(p.shape)), dim)
    parts = [p for p in parts if 0 not in p.shape] or list(parts)
    fields = []
    for level in (0, 1):
        item = _joined(store, parts, d, level)
        fields += [item] if item is not None else []
    thin = [_without(part, d) for part in parts]
    rest = thin[0]
    for part in thin[1:]:
        rest = algebra.meet(store, rest, part, "add")
    return Value(
        shape,
        tuple(fields) + rest.fields,
        state=all(p.state for p in parts),
        uniform=all(p.zero for p in parts),
        zero=all(p.zero for p in parts),
    )


def _without(part: Value, d: int) -> Value:
    shape = tuple(1 if i == d else n for i, n in enumerate(part.shape))
    return replace(part, shape=shape, fields=tuple(f for f in part.fields if d not in f.support), name=None)


def _joined(store: Store, parts: Sequence[Value], d: int, level: int) -> Field | None:
    """The field of a concatenation along ``d``: every part's labels, constants where a part has none."""
    found = [[f for f in part.fields if f.level == level and d in f.support] for part in parts]
    if not any(found) or (level == 1 and not all(found)):
        return None
    for extra in (f for fs in found for f in fs[1:]):
        store.flag(extra.labels, FROZEN, "is concatenated in more than one way")
        store.kill(extra)
    ndim = len(parts[0].shape)
    others = torch.broadcast_shapes(
        *(tuple(1 if i == d else n for i, n in enumerate(fs[0].labels.shape)) for fs in found if fs)
    )
    columns: list[list[Tensor]] = [[], [], []]
    for part, fs in zip(parts, found, strict=True):
        shape = tuple(part.shape[d] if i == d else others[i] for i in range(ndim))
        code = ZERO if part.zero else UNIFORM if part.uniform else FOREIGN
        none = torch.zeros(shape, dtype=torch.long)
        arrays = fs[0].arrays() if fs else (none + code, none, none)
        for column, array in zip(columns, arrays, strict=True):
            column.append(array.expand(shape))
    return compress(Field(*(torch.cat(column, d) for column in columns), level))


@rule("stack", move=True)
def stack(store: Store, node: torch.fx.Node, parts: Sequence[Value], dim: int = 0) -> Value:
    d = dim % (len(parts[0].shape) + 1)
    lifted = [algebra.reshape(store, p, p.shape[:d] + (1,) + p.shape[d:]) for p in parts]
    pairs = [[f for f in p.fields if f.level == 0] for p in lifted]
    if any(len(fs) != 1 for fs in pairs):
        return cat(store, node, lifted, d)
    shapes = torch.broadcast_shapes(*(fs[0].labels.shape for fs in pairs))
    arrays = [
        torch.cat([getattr(fs[0], kind).expand(shapes) for fs in pairs], d) for kind in ("labels", "pos", "sgn")
    ]
    item = compress(Field(arrays[0], arrays[1], arrays[2]))
    rest = cat(store, node, [replace(p, fields=p.blocks()) for p in lifted], d)
    return replace(rest, fields=rest.fields + ((item,) if item is not None else ()), state=all(p.state for p in parts))


@rule("pad", "constant_pad_nd", "reflection_pad1d", "reflection_pad2d", "reflection_pad3d", "replication_pad1d",
      "replication_pad2d", "replication_pad3d", move=True)  # fmt: skip
def pad(store: Store, node: torch.fx.Node, x: Value, pads: Sequence[int], *rest: Any, **kwargs: Any) -> Value:
    shape = out_shape(node)
    ndim = len(x.shape)
    padded = {ndim - 1 - i // 2 for i, n in enumerate(pads) if n}
    name = node_name(node)
    constant = name == "constant_pad_nd" or (name == "pad" and (rest[0] if rest else kwargs.get("mode", "constant")) == "constant")
    number = (rest[0] if rest else kwargs.get("value", 0)) if name == "constant_pad_nd" else (rest[1] if len(rest) > 1 else kwargs.get("value"))
    code = UNIFORM if number else ZERO
    fields = []
    for item in x.fields:
        if not item.support & padded:
            fields.append(item)
            continue
        if not constant:
            store.forbid(x, item, item.support, FROZEN, "is padded with copies of its neighbours")
            continue
        if code == UNIFORM:
            store.kill(item)
            item = item.without_gauge()
        wide = [n if d in padded else item.labels.shape[d] for d, n in enumerate(x.shape)]
        run = [0 if ndim - 1 - i // 2 not in padded else n for i, n in enumerate(pads)]
        arrays = [
            torch.constant_pad_nd(a.expand(wide), run, value) for a, value in zip(item.arrays(), (code, 0, 0), strict=True)
        ]
        fields += kept(store, Field(arrays[0], arrays[1], arrays[2], item.level))
    return Value(shape, tuple(fields), state=x.state, zero=x.zero and code == ZERO, uniform=x.zero and code == ZERO)


# pointwise ----------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=4096)
def _measure(packet: Any, slot: int, args: tuple, kwargs: tuple) -> tuple[bool, bool, bool]:
    """Whether a function of one number is positively homogeneous, odd, and zero at zero: measured, in float64."""
    x = torch.tensor([1e-30, 1e-6, 0.01, 0.3, 0.7, 1.0, 1.7, 3.0, 11.0, 1e3, 1e9, 1e25], dtype=torch.float64)
    x = torch.cat([x, -x])

    def f(value: Tensor) -> Tensor:
        filled = list(args)
        filled.insert(slot, value)
        return packet(*filled, **dict(kwargs)).double()

    try:
        y = f(x)
        scaled = all(torch.allclose(f(x * s), y * s, rtol=1e-12, atol=0, equal_nan=False) for s in (0.5, 3.7, 1e-4))
        odd = torch.allclose(f(-x), -y, rtol=1e-12, atol=0, equal_nan=False)
        zero = float(f(torch.zeros(1, dtype=torch.float64))) == 0.0
    except (RuntimeError, TypeError, NotImplementedError):
        return False, False, False
    return scaled, odd, zero


def _hashable(value: Any) -> Any:
    return tuple(_hashable(v) for v in value) if isinstance(value, (list, tuple)) else value


def unary(store: Store, node: torch.fx.Node, x: Value, slot: int, args: tuple, kwargs: dict) -> Value:
    """A function of one tensor, element by element: its symmetries are measured, not listed."""
    packet = getattr(node.target, "overloadpacket", node.target)
    name = getattr(packet, "__name__", "")
    if name.endswith("_") and not name.endswith("__"):
        packet = getattr(torch.ops.aten, name[:-1])
    try:
        scaled, odd, zero = _measure(packet, slot, _hashable(args), tuple(sorted(kwargs.items())))
    except TypeError:
        scaled = odd = zero = False
    fields = []
    for item in x.fields:
        if item.level == 0:
            if not scaled:
                store.kill_pos(item.pos)
                item = replace(item, pos=torch.zeros_like(item.pos))
            if not odd:
                store.kill_sgn(item.sgn)
                item = replace(item, sgn=torch.zeros_like(item.sgn))
            if not zero:
                store.flag(item.labels, OFFSET)
        fields.append(item)
    return replace(x, fields=tuple(fields), zero=x.zero and zero, name=None)


def _flat(args: Any) -> list[Value]:
    if isinstance(args, Value):
        return [args]
    return [v for a in args for v in _flat(a)] if isinstance(args, (list, tuple)) else []


def pointwise(store: Store, node: torch.fx.Node, *args: Any, **kwargs: Any) -> Value:
    """Any operator that PyTorch tags as pointwise."""
    values = [(i, a) for i, a in enumerate(args) if isinstance(a, Value)]
    if len(values) == 1:
        slot, x = values[0]
        rest = tuple(a for i, a in enumerate(args) if i != slot)
        return unary(store, node, x, slot, rest, kwargs)
    result = values[0][1]
    for _, other in values[1:]:
        result = algebra.meet(store, result, other, "none")
    _offset(store, result)
    return replace(result, uniform=result.uniform, zero=False)


def _offset(store: Store, value: Value) -> None:
    for item in value.fields:
        if item.level == 0:
            store.flag(item.labels, OFFSET)


@rule("add", "sub", "rsub", "add_relu")
def add(store: Store, node: torch.fx.Node, a: Any, b: Any, *args: Any, **kwargs: Any) -> Value:
    if not (isinstance(a, Value) and isinstance(b, Value)):
        return pointwise(store, node, a, b, *args, **kwargs)
    return algebra.meet(store, a, b, "add")


@rule("mul", "multiply")
def mul(store: Store, node: torch.fx.Node, a: Any, b: Any) -> Value:
    if not (isinstance(a, Value) and isinstance(b, Value)):
        return pointwise(store, node, a, b)
    return algebra.meet(store, a, b, "mul")


@rule("div", "true_divide")
def div(store: Store, node: torch.fx.Node, a: Any, b: Any, **kwargs: Any) -> Value:
    if not (isinstance(a, Value) and isinstance(b, Value)) or kwargs.get("rounding_mode"):
        return pointwise(store, node, a, b, **kwargs)
    for item in b.fields:
        store.kill(item)
        store.flag(item.labels, OFFSET)
    return algebra.meet(store, a, replace(b, fields=tuple(f.without_gauge() for f in b.fields)), "mul")


@rule("maximum", "minimum", "where", "lerp", "masked_fill")
def choose(store: Store, node: torch.fx.Node, *args: Any, **kwargs: Any) -> Value:
    values = [a for a in args if isinstance(a, Value)]
    name = node_name(node)
    if len(values) == 1:
        return pointwise(store, node, *args, **kwargs)
    if name == "masked_fill":
        filled = args[2]
        zero = (filled.zero if isinstance(filled, Value) else filled == 0)
        result = algebra.meet(store, values[0], replace(values[1], uniform=values[1].uniform), "mul" if zero else "none")
        if not zero:
            _offset(store, result)
        return replace(result, uniform=False, zero=False)
    if name == "where":
        branches = values[1:]
        if len(branches) < 2 or branches[0].shape == () or branches[1].shape == ():
            return pointwise(store, node, *args, **kwargs)
        both = algebra.meet(store, branches[0], branches[1], "add")
        return replace(algebra.meet(store, both, values[0], "mul"), uniform=False, zero=False)
    result = algebra.meet(store, values[0], values[1], "add")
    if name in ("maximum", "minimum"):
        for item in result.fields:
            store.kill_sgn(item.sgn)
        result = replace(result, fields=tuple(replace(f, sgn=torch.zeros_like(f.sgn)) for f in result.fields))
    if name == "lerp" and len(values) > 2:
        result = algebra.meet(store, result, values[2], "mul")
    return result


@rule("addcmul", "addcdiv")
def addcmul(store: Store, node: torch.fx.Node, x: Value, a: Value, b: Value, **_: Any) -> Value:
    if node_name(node) == "addcdiv":
        return pointwise(store, node, x, a, b)
    return algebra.meet(store, x, algebra.meet(store, a, b, "mul"), "add")


@rule("_weight_norm")
def weight_norm(store: Store, node: torch.fx.Node, v: Value, g: Value, dim: int = 0) -> Value:
    dims = frozenset(d for d in range(len(v.shape)) if d != on(v, dim))
    norm = algebra.reduce(store, v, dims, NO_MERGE | NO_REMOVE, "lies under a weight norm")
    norm = replace(norm, fields=tuple(_dead(store, f) for f in norm.fields))
    unit = algebra.meet(store, replace(v, name=None, fields=tuple(_dead(store, f) for f in v.fields)), norm, "mul")
    return algebra.meet(store, unit, g, "mul")


def _dead(store: Store, item: Field) -> Field:
    store.kill(item)
    return item.without_gauge()


# sums, norms, pools -------------------------------------------------------------------------------------------------

_EXTREME = ("max", "amax", "min", "amin", "norm", "linalg_vector_norm", "median")
_LINEAR = ("sum", "mean")


@rule("sum", "mean", "amax", "amin", "max", "min", "var", "std", "var_mean", "norm", "linalg_vector_norm", "logsumexp",
      "prod", "any", "all", "argmax", "argmin", "median", "std_mean")  # fmt: skip
def reduction(store: Store, node: torch.fx.Node, x: Value, *args: Any, **kwargs: Any) -> Any:
    name = node_name(node)
    if name in ("max", "min") and args and isinstance(args[0], Value):
        return choose(store, node, x, *args)
    val = node.meta["val"]
    shape = tuple(val[0].shape) if isinstance(val, (tuple, list)) else tuple(val.shape)
    position = 1 if name in ("norm", "linalg_vector_norm") else 0
    dims_arg = args[position] if len(args) > position else kwargs.get("dim")
    if isinstance(dims_arg, bool):
        dims_arg = None
    if dims_arg is None or dims_arg == []:
        dims = frozenset(range(len(x.shape)))
    else:
        dims = frozenset(on(x, d) for d in (dims_arg if isinstance(dims_arg, (list, tuple)) else [dims_arg]))
    bits = NO_MERGE if name == "sum" else NO_MERGE | NO_REMOVE
    result = algebra.reduce(store, x, dims, bits, f"is reduced by '{name}' across the group")
    fields = list(result.fields)
    if name not in _LINEAR:
        for i, item in enumerate(fields):
            if name in _EXTREME:
                store.kill_sgn(item.sgn)
                fields[i] = replace(item, sgn=torch.zeros_like(item.sgn))
            else:
                fields[i] = _dead(store, item)
            store.flag(item.labels, OFFSET) if name not in (*_EXTREME, "var", "std") else None
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
    return replace(result, fields=tuple(_dead(store, f) for f in result.fields))


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
            fields.append(item if name == "cumsum" else _dead(store, item))
    val = node.meta["val"]
    if isinstance(val, (tuple, list)):
        return [Value(tuple(v.shape), tuple(fields)) for v in val]
    return Value(tuple(val.shape), tuple(fields))


def _affine(store: Store, x: Value, dim: int, weight: Value | None, bias: Value | None) -> Value:
    """Scale and shift per channel: whatever the input answered, the output answers as the scale and shift do."""
    shape = lambda v: tuple(v.shape[0] if d == dim else 1 for d in range(len(x.shape)))  # noqa: E731
    x = replace(x, fields=tuple(_dead(store, f) for f in x.fields))
    if weight is not None:
        x = algebra.meet(store, x, algebra.reshape(store, weight, shape(weight)), "mul")
    if bias is not None:
        for item in x.fields:
            store.flag(item.labels, OFFSET) if weight is None else None
        x = algebra.meet(store, x, algebra.reshape(store, bias, shape(bias)), "add")
    return replace(x, uniform=False, zero=False)


@rule("batch_norm", "_batch_norm_impl_index", "cudnn_batch_norm", "native_batch_norm", "instance_norm")
def batch_norm(store: Store, node: torch.fx.Node, x: Value, weight: Any, bias: Any, mean: Any, var: Any, *_: Any) -> Any:
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
def layer_norm(store: Store, node: torch.fx.Node, x: Value, normalized: Sequence[int], *rest: Any, **kwargs: Any) -> Any:
    name = node_name(node)
    weight = rest[0] if rest else kwargs.get("weight")
    bias = None if "rms" in name else (rest[1] if len(rest) > 1 else kwargs.get("bias"))
    first = len(x.shape) - len(normalized)
    dims = frozenset(range(first, len(x.shape)))
    out = algebra.reduce(store, x, dims, NO_MERGE | NO_REMOVE, NORMALISED, keep=True)
    out = replace(out, fields=tuple(_dead(store, f) for f in out.fields))
    if weight is not None:
        out = algebra.meet(store, out, weight, "mul")
    if bias is not None:
        out = algebra.meet(store, out, bias, "add")
    return [out, Value(()), Value(())] if isinstance(node.meta.get("val"), (tuple, list)) else out


@rule("group_norm")
def group_norm(store: Store, node: torch.fx.Node, x: Value, groups: int, weight: Any = None, bias: Any = None, *_: Any, **__: Any) -> Value:
    channels = x.shape[1]
    grid = algebra.reshape(store, x, (x.shape[0], groups, channels // groups, *x.shape[2:]))
    dims = frozenset(range(2, len(grid.shape)))
    grid = algebra.reduce(store, grid, dims, NO_MERGE | NO_REMOVE, NORMALISED, keep=True)
    if 1 < groups < channels:
        algebra.mark_used(store, grid, dims)
    return _affine(store, algebra.reshape(store, grid, x.shape), 1, weight, bias)


def _spatial(store: Store, x: Value, n: int, name: str) -> tuple[Field, ...]:
    """Fields that do not vary over the last n dimensions; the others are frozen."""
    dims = frozenset(range(len(x.shape) - n, len(x.shape)))
    fields = []
    for item in x.fields:
        if item.support & dims:
            store.forbid(x, item, item.support & dims, FROZEN, f"varies over space under '{name}'")
        else:
            fields.append(item)
    return tuple(fields)


def pool(store: Store, node: torch.fx.Node, x: Value, *_: Any, **__: Any) -> Any:
    name = node_name(node)
    n = next(int(c) for c in reversed(name.replace("_with_indices", "").replace("_aa", "")) if c.isdigit())
    fields = _spatial(store, x, n, name)
    if "max" in name or "lp" in name:
        for item in fields:
            store.kill_sgn(item.sgn)
        fields = tuple(replace(f, sgn=torch.zeros_like(f.sgn)) for f in fields)
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


@rule("__interpolate", "grid_sampler", "affine_grid_generator")
def sample(store: Store, node: torch.fx.Node, x: Value, *rest: Any, **__: Any) -> Value:
    for other in _flat(rest):
        store.freeze(other, "is a sampling position")
    return Value(out_shape(node), _spatial(store, x, len(x.shape) - 2, node_name(node)))


@rule("im2col")
def im2col(store: Store, node: torch.fx.Node, x: Value, kernel: Sequence[int], *_: Any) -> Value:
    fields = _spatial(store, x, 2, "unfold")
    n = math.prod(kernel)
    d = len(x.shape) - 3
    wide = tuple(f.map(lambda a: a.repeat_interleave(n, d).squeeze(-1) if a.shape[d] > 1 else a.squeeze(-1)) for f in fields)
    return Value(out_shape(node), wide)


# products -----------------------------------------------------------------------------------------------------------


def _squeeze(value: Value, dim: int) -> Value:
    return replace(
        value,
        shape=value.shape[:dim] + value.shape[dim + 1 :],
        fields=tuple(f.map(lambda a: a.squeeze(dim)) for f in value.fields),
    )


def _unsqueeze(value: Value, dim: int) -> Value:
    return replace(
        value,
        shape=value.shape[:dim] + (1,) + value.shape[dim:],
        fields=tuple(f.map(lambda a: a.unsqueeze(dim)) for f in value.fields),
    )


def tap(store: Store, node: torch.fx.Node, weight: Value, dim: int, x_dim: int) -> None:
    """Note where the channels that a weight reads can be observed: the input of the module that owns the weight."""
    path = module_path(node)
    if weight.name is not None and path is not None and weight.name.rpartition(".")[0] == path:
        store.taps[weight.name, dim] = (path, x_dim)


def product(store: Store, left: Value, right: Value) -> Value:
    """left (..., N, K) @ right (..., K, M)."""
    nd = max(len(left.shape), len(right.shape))
    a = _unsqueeze(left.lifted(nd), nd - 1)
    b = right.lifted(nd)
    b = _unsqueeze(algebra.permute(b, (*range(nd - 2), nd - 1, nd - 2)) if nd >= 2 else b, nd - 2)
    return _squeeze(algebra.contract(store, a, b, frozenset({nd})), nd)


@rule("linear")
def linear(store: Store, node: torch.fx.Node, x: Value, weight: Value, bias: Value | None = None) -> Value:
    nd = len(x.shape)
    out = algebra.contract(store, _unsqueeze(x, nd - 1), weight, frozenset({nd}))
    tap(store, node, weight, 1, -1)
    return plus_bias(store, _squeeze(out, nd), bias)


def plus_bias(store: Store, out: Value, bias: Value | None) -> Value:
    if bias is None:
        return out
    for item in bias.fields:
        store.flag(item.labels, WRITE)
    return algebra.meet(store, out, bias, "add")


@rule("matmul", "mm", "bmm", "mv", "dot")
def matmul(store: Store, node: torch.fx.Node, a: Value, b: Value) -> Value:
    left = _unsqueeze(a, 0) if len(a.shape) == 1 else a
    right = _unsqueeze(b, 1) if len(b.shape) == 1 else b
    tap(store, node, right, 0, -1)
    out = product(store, left, right)
    if len(b.shape) == 1:
        out = _squeeze(out, len(out.shape) - 1)
    if len(a.shape) == 1:
        out = _squeeze(out, len(out.shape) - (1 if len(b.shape) == 1 else 2))
    return replace(out, name=None)


@rule("addmm", "baddbmm", "addmv", "addbmm")
def addmm(store: Store, node: torch.fx.Node, bias: Value, a: Value, b: Value, **kwargs: Any) -> Value:
    out = matmul(store, node, a, b)
    return out if kwargs.get("beta") == 0 else plus_bias(store, out, bias)


@rule("outer", "ger")
def outer(store: Store, node: torch.fx.Node, a: Value, b: Value) -> Value:
    return algebra.meet(store, _unsqueeze(a, 1), _unsqueeze(b, 0), "mul")


@rule("einsum")
def einsum(store: Store, node: torch.fx.Node, equation: str, operands: Sequence[Value], **_: Any) -> Value:
    left, _arrow, result = equation.replace(" ", "").partition("->")
    terms = left.split(",")
    if not _arrow or any(len(set(t)) < len(t.replace("...", ".")) for t in terms):
        return unknown(store, node, *operands)
    spelled = [_spell(t, len(v.shape)) for t, v in zip(terms, operands, strict=True)]
    free = max((t.count("1") + sum(c.isdigit() for c in t if c != "1") for t in spelled), default=0)
    result = result.replace("...", "".join(str(i) for i in range(9, 9 - free, -1))[::-1] if free else "")
    acc, letters = operands[0], spelled[0]
    for position, (value, term) in enumerate(zip(operands[1:], spelled[1:], strict=True), start=1):
        later = set("".join(spelled[position + 1 :]) + result)
        space = [c for c in dict.fromkeys(letters + term) if c in later]
        gone = [c for c in dict.fromkeys(letters + term) if c not in later]
        joint = space + gone
        out = algebra.contract(
            store, _into(acc, letters, joint), _into(value, term, joint), frozenset(range(len(space), len(joint)))
        )
        acc, letters = replace(out, shape=out.shape[: len(space)], fields=tuple(
            f.map(lambda a, n=len(space): a.reshape(a.shape[:n])) for f in out.fields)), "".join(space)  # fmt: skip
    gone = [d for d, c in enumerate(letters) if c not in result]
    if gone:
        acc = algebra.reduce(store, acc, frozenset(gone), NO_MERGE, "is summed without weights")
        for d in reversed(gone):
            acc = _squeeze(acc, d)
        letters = "".join(c for c in letters if c in result)
    return replace(algebra.permute(acc, [letters.index(c) for c in result]), name=None)


def _spell(term: str, ndim: int) -> str:
    """Give the dimensions behind an ellipsis digits, counted from the right."""
    if "..." not in term:
        return term
    n = ndim - len(term.replace("...", ""))
    return term.replace("...", "".join(str(i) for i in range(10 - n, 10)))


def _into(value: Value, letters: str, joint: list[str]) -> Value:
    """Lay a value out in a joint index space."""
    present = [c for c in joint if c in letters]
    value = algebra.permute(value, [letters.index(c) for c in present])
    for d, c in enumerate(joint):
        if c not in letters:
            value = _unsqueeze(value, d)
    return value


@rule("scaled_dot_product_attention", "_scaled_dot_product_flash_attention_for_cpu")
def attention(store: Store, node: torch.fx.Node, q: Value, k: Value, v: Value, mask: Any = None, *rest: Any, **kwargs: Any) -> Value:
    mask = kwargs.get("attn_mask", mask)
    if kwargs.get("enable_gqa"):
        n = q.shape[-3] // k.shape[-3]
        k, v = (_repeat_heads(store, t, n) for t in (k, v))
    if kwargs.get("scale") is None:
        last = len(q.shape) - 1
        for item in q.fields:
            if last in item.support:
                store.forbid(q, item, frozenset({last}), NO_REMOVE, "sets the default scale 1/sqrt(channels) of attention")
                store.forbid(q, item, frozenset({last}), NO_MERGE, "sets the default scale 1/sqrt(channels) of attention")
    nd = len(k.shape)
    scores = product(store, q, algebra.permute(k, (*range(nd - 2), nd - 1, nd - 2)))
    if isinstance(mask, Value):
        scores = algebra.meet(store, scores, mask, "add")
    scores = replace(scores, fields=tuple(_dead(store, f) for f in scores.fields))
    return product(store, scores, v)


def _repeat_heads(store: Store, value: Value, n: int) -> Value:
    d = len(value.shape) - 3
    shape = tuple(m * n if i == d else m for i, m in enumerate(value.shape))
    fields = tuple(f.map(lambda a: a.repeat_interleave(n, d) if a.shape[d] > 1 else a) for f in value.fields)
    return replace(value, shape=shape, fields=fields)


@rule("embedding")
def embedding(store: Store, node: torch.fx.Node, weight: Value, indices: Value, *_: Any, **__: Any) -> Value:
    store.freeze(indices, "is used as an index")
    fields = []
    ndim = len(indices.shape) + 1
    for item in weight.fields:
        if 0 in item.support:
            store.flag(item.labels, FROZEN, "is picked by data")
            store.kill(item)
        else:
            store.flag(item.labels, WRITE)
            fields.append(item.map(lambda a: a.reshape((1,) * (ndim - 1) + (a.shape[1],))))
    return Value((*indices.shape, weight.shape[1]), tuple(fields))


# helpers and the last resort ----------------------------------------------------------------------------------------


def node_name(node: torch.fx.Node) -> str:
    """``aten.relu_.default`` -> ``relu``."""
    packet = getattr(node.target, "overloadpacket", node.target)
    name = getattr(packet, "__name__", str(packet))
    return name[:-1] if name.endswith("_") and not name.endswith("__") else name


def in_place(node: torch.fx.Node) -> bool:
    packet = getattr(node.target, "overloadpacket", None)
    name = getattr(packet, "__name__", "")
    return name.endswith("_") and not name.endswith("__")


def module_path(node: torch.fx.Node) -> str | None:
    """Path of the innermost module that the node belongs to."""
    stack = node.meta.get("nn_module_stack")
    return list(stack.values())[-1][0] if stack else None


def shapes_of(node: torch.fx.Node) -> Any:
    """Values without labels, for every tensor a node returns."""

    def one(val: Any) -> Any:
        if isinstance(val, Tensor):
            return Value(tuple(int(n) if isinstance(n, int) else -1 for n in val.shape))
        return [one(v) for v in val] if isinstance(val, (tuple, list)) else val

    return one(node.meta.get("val"))


def unknown(store: Store, node: torch.fx.Node, *args: Any, **kwargs: Any) -> Any:
    """Freeze everything that meets an operator without a rule."""
    for value in _flat(list(args) + list(kwargs.values())):
        store.freeze(value, f"meets the operator '{node.target}', which has no rule")
    return shapes_of(node)


CONSTANTS = {"zeros": 0, "ones": 1, "full": 1, "zeros_like": 0, "ones_like": 1, "full_like": 1, "new_zeros": 0,
             "new_ones": 1, "new_full": 1, "scalar_tensor": 1}  # fmt: skip


def apply_rule(store: Store, node: torch.fx.Node, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """Find the rule of a node's operator and run it."""
    name = node_name(node)
    values = _flat(list(args) + list(kwargs.values()))
    if name in CONSTANTS:
        return Value(out_shape(node), uniform=True, zero=CONSTANTS[name] == 0)
    if name == "_assert_tensor_metadata":
        return None
    tags = getattr(node.target, "tags", ())
    if not any(v.fields for v in values):
        return _unlabelled(node, name, values, torch.Tag.pointwise in tags)
    if name not in MOVES:
        store.touch(*values)
    if name in RULES:
        return RULES[name](store, node, *args, **kwargs)
    if torch.Tag.pointwise in tags:
        return pointwise(store, node, *args, **kwargs)
    return unknown(store, node, *args, **kwargs)


def _unlabelled(node: torch.fx.Node, name: str, values: Sequence[Value], pointwise_op: bool) -> Any:
    """No channel is met: only remember whether the result is a constant."""
    result = shapes_of(node)
    if isinstance(result, Value) and values and (name in MOVES or pointwise_op):
        uniform = all(v.uniform or v.shape == () for v in values)
        zero = name in MOVES and name != "pad" and all(v.zero for v in values)
        return replace(result, uniform=uniform, zero=zero, state=all(v.state for v in values))
    return result
