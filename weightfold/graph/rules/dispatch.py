"""Find the rule of an operator and run it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch.utils import _pytree as pytree

from weightfold.graph.labels import Store, Value
from weightfold.graph.rules.core import (
    MOVES,
    RULES,
    call,
    in_place,
    node_name,
    on,
    out_shape,
    shapes_of,
    unknown,
    values_in,
)
from weightfold.graph.rules.pointwise import pointwise

CONSTANTS = {"zeros": 0, "ones": 1, "full": 1, "zeros_like": 0, "ones_like": 1, "full_like": 1, "new_zeros": 0,
             "new_ones": 1, "new_full": 1, "empty": 1, "empty_like": 1, "new_empty": 1, "empty_strided": 1,
             "scalar_tensor": 1}  # fmt: skip


UNTAGGED = frozenset({
    "celu", "elu", "gelu", "hardshrink", "hardsigmoid", "hardswish", "hardtanh", "leaky_relu", "log_sigmoid", "mish",
    "prelu", "relu6", "rrelu", "selu", "silu", "softplus", "softshrink", "threshold",
})  # fmt: skip
"""Pointwise operators that PyTorch does not tag as such."""


KEEPING = frozenset({"slice", "narrow", "to", "_to_copy", "clone", "contiguous", "alias", "detach", "dropout", "float",
                     "double", "half", "type_as", "lift_fresh_copy", "requires_grad", "positive"})  # fmt: skip
"""Movements that leave every dimension in its place."""

JOINS = frozenset({"cat", "concat", "concatenate", "stack", "select_scatter", "slice_scatter", "index_copy"})
PADS = frozenset({"pad", "constant_pad_nd"})
"""Movements whose result need not be the same all over where their operands are."""

MINDING_REPEATS = KEEPING - {"slice", "narrow"} | {
    "add", "addmm", "baddbmm", "bmm", "broadcast_to", "div", "einsum", "expand", "expand_as", "masked_fill",
    "matmul", "mul", "permute", "repeat", "reshape", "scaled_dot_product_attention", "softmax", "squeeze", "sub",
    "transpose", "unsqueeze", "view", "where",
}  # fmt: skip
"""Operators whose rules follow what is the same all along a dimension; the others are not told of it."""

REPEATING = frozenset({"repeat", "repeat_interleave", "tile"})
RANDOM = frozenset({"dropout", "feature_dropout", "alpha_dropout", "native_dropout", "bernoulli"})
KNOWN_COPIES = 1 << 22
"""Data of up to this many numbers are followed where they are copies of each other."""

KNOWN_NUMBERS = 1 << 18
"""Numbers that the forward makes from nothing but written-down ones are followed up to this many."""


def apply_rule(store: Store, node: torch.fx.Node, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """Find the rule of a node's operator and run it."""
    name = node_name(node)
    values = values_in(list(args) + list(kwargs.values()))
    if name in CONSTANTS:
        return Value(out_shape(node), uniform=True, zero=CONSTANTS[name] == 0, known=_filled(node, name, args, kwargs))
    if name in ("fill", "zero"):
        return RULES[name](store, node, *args, **kwargs)
    if name == "_assert_tensor_metadata":
        return None
    tags = getattr(node.target, "tags", ())
    if not any(v.fields for v in values) and not _fills_up(node, name, values):
        return _unlabelled(node, args, kwargs, torch.Tag.pointwise in tags or name in ("where", "masked_fill"))
    if name not in MINDING_REPEATS:
        args, kwargs = pytree.tree_map_only(Value, Value.without_repeats, (list(args), kwargs))
    if name not in MOVES:
        store.touch(*values)
    else:
        _note_sizes(store, node, values)
        _touch_places(store, node, args)
    if name in RULES:
        return RULES[name](store, node, *args, **kwargs)
    if torch.Tag.pointwise in tags or name in UNTAGGED:
        return pointwise(store, node, *args, **kwargs)
    return unknown(store, node, *args, **kwargs)


def _fills_up(node: torch.fx.Node, name: str, values: Sequence[Value]) -> bool:
    """Whether data are filled up with one number, as by a state that starts from zeros: any channel may stand there."""
    some = {v.uniform for v in values if 0 not in v.shape}
    return name in ("cat", "concat", "concatenate") and len(some) > 1 and node.meta["val"].is_floating_point()


ALONG = frozenset({"slice", "narrow", "select", "index_select", "roll", "flip", "unfold", "gather", "rot90"})
PADDING = frozenset(
    {"pad", "constant_pad_nd"} | {f"{how}_pad{d}d" for how in ("reflection", "replication") for d in (1, 2, 3)}
)
"""Movements along some dimensions only."""


def _touch_places(store: Store, node: torch.fx.Node, args: Sequence[Any]) -> None:
    """A movement through time or space is a step of the computation for channels that lie along other dimensions: those
    that it moves and those that it leaves are not of one kind."""
    x, name = args[0] if args else None, node_name(node)
    if not isinstance(x, Value):
        return
    dims = _dims_moved(x, node, name, args)
    fields = tuple(item for item in x.fields if dims - item.support)
    if fields:
        store.touch(replace(x, fields=fields))


def _dims_moved(x: Value, node: torch.fx.Node, name: str, args: Sequence[Any]) -> frozenset[int]:
    """Dimensions along which a movement moves."""
    if name in PADDING:
        return frozenset(len(x.shape) - 1 - i // 2 for i, n in enumerate(args[1]) if n)
    if name not in ALONG or (name == "slice" and out_shape(node) == x.shape):
        return frozenset()
    at = 2 if name == "roll" else 1
    given = node.kwargs.get("dims", node.kwargs.get("dim", args[at] if len(args) > at else 0))
    dims = given if isinstance(given, (list, tuple)) else [given]
    return frozenset(on(x, d) for d in dims if type(d) is int)


def _note_sizes(store: Store, node: torch.fx.Node, values: Sequence[Value]) -> None:
    """Remember where a movement names sizes or positions in numbers: the suspects, should a size not be free."""
    numbers = {a for a in pytree.tree_leaves((node.args, node.kwargs)) if type(a) is int and a > 1}
    for value in values:
        for item in value.fields:
            first = item.labels[item.labels > 0][:1]
            if item.level == 0 and first.numel() and numbers & set(out_sizes(node, value, item.support)):
                store.written.append((store.node, first))


def out_sizes(node: torch.fx.Node, value: Value, support: frozenset[int]) -> list[int]:
    """Sizes of the labelled dimensions, and of everything that the node makes of them."""
    first = node.meta["val"][0] if isinstance(node.meta.get("val"), (tuple, list)) else node.meta.get("val")
    after = [] if first is None else [int(n) for n in first.shape]
    return [value.shape[d] for d in support] + [n for n in after if n not in value.shape]


def _filled(node: torch.fx.Node, name: str, args: Sequence[Any], kwargs: dict[str, Any]) -> torch.Tensor | None:
    """The numbers of a tensor that is made with one number all over."""
    number: Any = CONSTANTS[name]
    if "full" in name or name == "scalar_tensor":
        position = 0 if name == "scalar_tensor" else 1
        number = args[position] if len(args) > position else kwargs.get("fill_value")
    val = node.meta["val"]
    if not isinstance(number, bool | int | float) or val.numel() > KNOWN_NUMBERS:
        return None
    return torch.full((), number, dtype=val.dtype).expand(out_shape(node))


def _known(node: torch.fx.Node, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """The numbers that an operator makes of known ones, for each tensor that it returns; None where not known."""
    made = [v for v in pytree.tree_leaves(node.meta.get("val")) if v is not None]
    if not made or not all(isinstance(v, torch.Tensor) and v.numel() <= KNOWN_NUMBERS for v in made):
        return None
    if in_place(node) or torch.Tag.nondeterministic_seeded in node.target.tags or "empty" in node_name(node):  # type: ignore[union-attr]
        return None
    if any(v.known is None for v in values_in([*args, *kwargs.values()])):
        return None
    args, kwargs = pytree.tree_map_only(Value, lambda v: v.known, (list(args), kwargs))
    if any(argument.name == "device" for argument in node.target._schema.arguments):  # type: ignore[union-attr]
        kwargs = {**kwargs, "device": "cpu"}
    try:
        return call(node, *args, **kwargs)
    except (RuntimeError, TypeError, ValueError, NotImplementedError):
        return None


def _copies(node: torch.fx.Node, name: str, args: Sequence[Any], kwargs: dict[str, Any]) -> torch.Tensor | None:
    """Which numbers of data are copies of each other, once a repeated dimension was joined with another."""
    values = values_in([*args, *kwargs.values()])
    if node.meta["val"].numel() > KNOWN_COPIES or name in RANDOM | JOINS | PADS:
        return None
    if name not in MOVES:
        followed = any(v.copies is not None for v in values)
        return _together([_numbered(v) for v in values if not v.uniform]) if followed else None
    if len(values) != 1 or args[0] is not values[0] or name in KEEPING - {"slice", "narrow"}:
        return values[0].copies if args[0] is values[0] else None
    full = tuple(node.args[0].meta["val"].shape)  # type: ignore[union-attr]
    if values[0].copies is None and values[0].shape == full and name not in REPEATING:
        return None
    return call(node, _numbered(values[0]).expand(full), *args[1:], **kwargs)


def _numbered(value: Value) -> torch.Tensor:
    """A number for each of a value's numbers, the same for those that are known to be copies."""
    return torch.arange(math.prod(value.shape)).reshape(value.shape) if value.copies is None else value.copies


def _together(numbers: Sequence[torch.Tensor]) -> torch.Tensor | None:
    """Of data that met element by element: copies are those that are copies in every operand."""
    out = None
    for other in numbers:
        out = other if out is None else torch.unique(out * (1 + other.max()) + other, return_inverse=True)[1]
    return out


def _unlabelled(node: torch.fx.Node, args: Sequence[Any], kwargs: dict[str, Any], pointwise_op: bool) -> Any:
    """No channel is met: only remember whether the result is a constant.

    Its shape has 1 where it was merely expanded: it does not vary there.
    """
    result, name = shapes_of(node), node_name(node)
    values = values_in([*args, *kwargs.values()])
    numbers = _known(node, args, kwargs)
    if isinstance(result, Value):
        result = replace(result, known=numbers)
    elif isinstance(numbers, (tuple, list)) and len(numbers) == len(result):
        result = [replace(v, known=n) for v, n in zip(result, numbers, strict=True)]
    if not isinstance(result, Value) or not values or not (name in MOVES or pointwise_op):
        return result
    result = replace(result, copies=_copies(node, name, args, kwargs))
    zero = name in MOVES and name not in PADS and all(v.zero for v in values)
    uniform = zero if name in JOINS | PADS else all(v.uniform or v.shape == () for v in values)
    result = replace(result, uniform=uniform, zero=zero, state=all(v.state for v in values))
    if name in KEEPING and len(values[0].shape) == len(result.shape):
        thin = tuple(1 if a == 1 else b for a, b in zip(values[0].shape, result.shape, strict=True))
        result = replace(result, shape=thin)
    elif pointwise_op or name in ("expand", "expand_as", "broadcast_to"):
        varying = [v.shape for v in values[: 1 if name in MOVES else None] if not v.uniform]
        shape = tuple(torch.broadcast_shapes((), *varying))
        result = replace(result, shape=(1,) * (len(result.shape) - len(shape)) + shape)
    return result
