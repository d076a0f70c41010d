"""Rules of operators that work element by element; functions of one tensor are measured, not listed."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from weightfold.graph import algebra
from weightfold.graph.labels import NO_MERGE, NO_REMOVE, OFFSET, UNIFORM, ZERO, Field, Store, Value, kept
from weightfold.graph.rules.core import node_name, on, rule, without_gauge


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
                item = replace(item, labels=item.labels.masked_fill(item.labels == ZERO, UNIFORM))
        fields.append(replace(item, loud=item.loud or not zero, curved=item.curved or not (scaled and odd)))
    return replace(x, fields=tuple(fields), zero=x.zero and zero, name=None)


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
    below = tuple(replace(f.without_gauge(), curved=True) for f in b.fields)
    result = algebra.meet(store, a, replace(b, fields=below), "mul")
    through = frozenset(d - len(b.shape) for f in b.fields if not f.loud for d in f.support)
    return replace(result, fields=tuple(_loud_along(f, through) for f in result.fields))


def _loud_along(item: Field, dims: frozenset[int]) -> Field:
    """A quotient along dimensions, counted from the last, where what it is divided by may come to zero."""
    return replace(item, loud=True) if any(d - item.labels.ndim in dims for d in item.support) else item


@rule("maximum", "minimum", "where", "lerp", "masked_fill")
def choose(store: Store, node: torch.fx.Node, *args: Any, **kwargs: Any) -> Value:
    values = [a for a in args if isinstance(a, Value)]
    name = node_name(node)
    if len(values) == 1:
        return pointwise(store, node, *args, **kwargs)
    if name == "masked_fill":
        filled = args[2]
        zero = filled.zero if isinstance(filled, Value) else filled == 0
        result = algebra.meet(
            store, values[0], replace(values[1], uniform=values[1].uniform), "mul" if zero else "none"
        )
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
        fields = tuple(replace(f, sgn=torch.zeros_like(f.sgn), curved=True) for f in result.fields)
        result = replace(result, fields=fields)
    if name == "lerp" and len(values) > 2:
        result = algebra.meet(store, result, values[2], "mul")
    return result


@rule("prelu", "_prelu_kernel")
def prelu(store: Store, node: torch.fx.Node, x: Value, slope: Value) -> Value:
    """A leaky ReLU; slopes lie along dimension 1, whatever the rank (the kernel behind it broadcasts them itself)."""
    if node_name(node) == "prelu" and slope.shape and slope.shape[0] > 1:
        wide = tuple(slope.shape[0] if d == min(1, len(x.shape) - 1) else 1 for d in range(len(x.shape)))
        slope = algebra.reshape(store, slope, wide)
    for item in (*x.fields, *slope.fields):
        store.kill_sgn(item.sgn)
    x, slope = (
        replace(v, fields=tuple(replace(f, sgn=torch.zeros_like(f.sgn), curved=True) for f in v.fields))
        for v in (x, slope)
    )
    slope = replace(slope, fields=tuple(without_gauge(store, f) for f in slope.fields))
    return replace(algebra.meet(store, x, slope, "mul"), uniform=x.uniform and slope.uniform)


@rule("addcmul", "addcdiv")
def addcmul(store: Store, node: torch.fx.Node, x: Value, a: Value, b: Value, **_: Any) -> Value:
    if node_name(node) == "addcdiv":
        return pointwise(store, node, x, a, b)
    return algebra.meet(store, x, algebra.meet(store, a, b, "mul"), "add")


@rule("_weight_norm")
def weight_norm(store: Store, node: torch.fx.Node, v: Value, g: Value, dim: int = 0) -> Value:
    dims = frozenset(d for d in range(len(v.shape)) if d != on(v, dim))
    norm = algebra.reduce(store, v, dims, NO_MERGE | NO_REMOVE, "lies under a weight norm")
    norm = replace(norm, fields=tuple(without_gauge(store, f) for f in norm.fields))
    unit = algebra.meet(
        store, replace(v, name=None, fields=tuple(without_gauge(store, f) for f in v.fields)), norm, "mul"
    )
    weight = algebra.meet(store, unit, g, "mul")
    # both parts have the rows of the weight: it reads and writes as a plain parameter does; a direction of length zero
    # is no number
    fields = tuple(replace(f, loud=True, curved=True) for f in weight.fields)
    return replace(weight, fields=fields, computed=False)


@rule("glu")
def glu(store: Store, node: torch.fx.Node, x: Value, dim: int = -1) -> Value:
    """The first half of a dimension times the sigmoid of the second."""
    d, n = on(x, dim), x.shape[on(x, dim)] // 2
    shape = tuple(n if i == d else m for i, m in enumerate(x.shape))

    def half(start: int) -> Value:
        fields: list[Field] = []
        for item in x.fields:
            wide = [x.shape[d] if i == d else m for i, m in enumerate(item.labels.shape)]
            cut = item.map(lambda a, w=tuple(wide): a.expand(w).narrow(d, start, n))
            fields += kept(store, cut) if d in item.support else [item]
        return Value(shape, tuple(fields))

    gate = half(n)
    _offset(store, gate)
    gate = replace(gate, fields=tuple(without_gauge(store, f) for f in gate.fields))
    return algebra.meet(store, half(0), gate, "mul")
