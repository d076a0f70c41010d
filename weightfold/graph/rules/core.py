"""What every rule stands on: the registry, names and shapes of nodes, and the last resort.

A rule takes (store, node, *args, **kwargs) with `Value`s in place of tensors and returns a `Value` or a list of them.
Rules are found by the operator's name (``aten.relu_.default`` -> ``relu``); each family of operators has a file
`rules_*.py`. What has no rule and is tagged pointwise by PyTorch is handled by measuring it; whatever is left freezes
everything that it touches.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from weightfold.graph.labels import Field, Store, Value

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


def values_in(args: Any) -> list[Value]:
    if isinstance(args, Value):
        return [args]
    return [v for a in args for v in values_in(a)] if isinstance(args, (list, tuple)) else []


def without_gauge(store: Store, item: Field) -> Field:
    store.kill(item)
    return item.without_gauge()


def call(node: torch.fx.Node, *args: Any, **kwargs: Any) -> Any:
    """Run the node's own operator (its functional form) on other arguments."""
    target = node.target
    packet: Any = getattr(target, "overloadpacket", target)
    name = getattr(packet, "__name__", "")
    if name.endswith("_") and not name.endswith("__"):
        packet = getattr(torch.ops.aten, name[:-1])
    return packet(*args, **kwargs)


def squeeze(value: Value, dim: int) -> Value:
    return replace(
        value,
        shape=value.shape[:dim] + value.shape[dim + 1 :],
        fields=tuple(f.map(lambda a: a.squeeze(dim)) for f in value.fields),
        copies=None,
    )


def unsqueeze(value: Value, dim: int) -> Value:
    return replace(
        value,
        shape=(*value.shape[:dim], 1, *value.shape[dim:]),
        fields=tuple(f.map(lambda a: a.unsqueeze(dim)) for f in value.fields),
        copies=None,
    )


def node_name(node: torch.fx.Node) -> str:
    """``aten.relu_.default`` -> ``relu``."""
    packet = getattr(node.target, "overloadpacket", node.target)
    name = getattr(packet, "__name__", str(packet))
    return name[:-1] if name.endswith("_") and not name.endswith("__") else name


def in_place(node: torch.fx.Node) -> bool:
    """Whether an operator writes into its first argument (``detach_`` does not, for all its name)."""
    packet = getattr(node.target, "overloadpacket", None)
    name = getattr(packet, "__name__", "")
    return name.endswith("_") and not name.endswith("__") and name != "detach_"


def is_view(node: torch.fx.Node) -> bool:
    """Whether a node's result may lie in the memory of its first argument."""
    return node.target is operator.getitem or node_name(node) in MOVES


def module_path(node: torch.fx.Node) -> str | None:
    """Path of the innermost module that the node belongs to."""
    stack = node.meta.get("nn_module_stack")
    return list(stack.values())[-1][0] if stack else None


def module_class(node: torch.fx.Node) -> str:
    """Class of the innermost module that the node belongs to."""
    stack = node.meta.get("nn_module_stack")
    return str(list(stack.values())[-1][1]) if stack else ""


def shapes_of(node: torch.fx.Node) -> Any:
    """Values without labels, for every tensor a node returns."""

    def one(val: Any) -> Any:
        if isinstance(val, Tensor):
            return Value(tuple(int(n) if isinstance(n, int) else -1 for n in val.shape))
        return [one(v) for v in val] if isinstance(val, (tuple, list)) else val

    return one(node.meta.get("val"))


def unknown(store: Store, node: torch.fx.Node, *args: Any, **kwargs: Any) -> Any:
    """Freeze everything that meets an operator without a rule. What it makes of parameters alone is still theirs."""
    values = values_in([*args, *kwargs.values()])
    name = node.target if isinstance(node.target, torch._ops.OpOverload) else node_name(node)
    path = module_path(node)
    inside = f" in '{path}'" if path else ""
    text = (
        f"meets the operator '{name}'{inside}, which has no rule; "
        "write it as products, sums and elementwise operators instead, to edit what is before it"
    )
    for value in values:
        store.freeze(value, text)
    state = bool(values) and all(v.state for v in values)
    return pytree.tree_map_only(Value, lambda v: replace(v, state=state, computed=state), shapes_of(node))
