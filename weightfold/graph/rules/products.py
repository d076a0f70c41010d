"""Rules of matrix products, attention and embeddings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from weightfold.graph import algebra
from weightfold.graph.labels import FROZEN, NO_MERGE, NO_REMOVE, WRITE, Store, Value
from weightfold.graph.rules.core import (
    call,
    module_path,
    node_name,
    rule,
    squeeze,
    unknown,
    unsqueeze,
    without_gauge,
)


def tap(store: Store, node: torch.fx.Node, weight: Value, dim: int, x_dim: int, x_at: int = 0) -> None:
    """Note where the channels that a weight reads can be observed: the first input of the module that owns the weight.

    Args:
        x_at: position of what is read among the operator's arguments; the weight follows it.
    """
    if weight.name is None:
        return
    path, places = module_path(node), store.taps.setdefault((weight.name, dim), set())
    seen = weight.name.rpartition(".")[0] == path and is_first_input(store, node, weight, x_at, x_dim)
    places.add((path or "", x_dim) if seen else None)
    store.reads.setdefault((weight.name, dim), set()).add((node.args[x_at], x_dim))
    users = getattr(node.args[x_at + 1], "users", ())
    if any(user.target is not node.target or module_path(user) != path for user in users):
        places.add(None)


STILL = frozenset({"clone", "contiguous", "alias", "detach", "to", "_to_copy", "float", "double", "half"})
"""Movements that leave all dimensions as they are."""
REGROUPING = frozenset({"view", "reshape", "_unsafe_view", "flatten", "unsqueeze"})
"""Movements that leave the last dimension as it is, if it keeps its length."""
PADDING = ("pad", "constant_pad", "reflection_pad", "replication_pad")
"""Movements after which a convolution reads nothing new of a channel, but at the border."""


def is_first_input(store: Store, node: torch.fx.Node, weight: Value, x_at: int, x_dim: int) -> bool:
    """Whether an operator reads what its module was called with, not something that the module made of it.

    The program does not say which argument came first; so the module has one input alone, or is an attention layer of
    torch, whose first is the query.
    """
    stack = node.meta.get("nn_module_stack") or {}
    own = next(reversed(stack), None)
    x: Any = node.args[x_at]
    if own is None or not isinstance(x, torch.fx.Node):
        return False
    while own in (x.meta.get("nn_module_stack") or {}):
        before = x.args[0] if x.args else None
        if not isinstance(before, torch.fx.Node) or not _keeps(x, before, x_dim):
            return False
        x = before
    leaf = str(weight.name).rpartition(".")[2]
    if leaf in ("in_proj_weight", "q_proj_weight") and str(stack[own][1]).startswith("torch.nn.modules."):
        return True
    return store.entering(node.graph)[own] <= {x}


def _keeps(node: torch.fx.Node, before: torch.fx.Node, x_dim: int) -> bool:
    """Whether an operator leaves the channels where they are, and every number with its channel."""
    name, shape, after = node_name(node), before.meta["val"].shape, node.meta["val"].shape
    if name in STILL:
        return True
    if x_dim != -1:
        return name.startswith(PADDING) and len(shape) == len(after) and shape[: x_dim + 1] == after[: x_dim + 1]
    if name in ("transpose", "permute"):
        order = torch.empty([1] * (len(shape) - 1) + [2], device="meta")
        return call(node, order, *node.args[1:], **node.kwargs).shape[-1] == 2
    return name in REGROUPING and shape[-1:] == after[-1:]


def product(store: Store, left: Value, right: Value) -> Value:
    """left (..., N, K) @ right (..., K, M)."""
    nd = max(len(left.shape), len(right.shape))
    a = unsqueeze(left.lifted(nd), nd - 1)
    b = right.lifted(nd)
    b = unsqueeze(algebra.permute(b, (*range(nd - 2), nd - 1, nd - 2)) if nd >= 2 else b, nd - 2)
    return squeeze(algebra.contract(store, a, b, frozenset({nd})), nd)


@rule("linear")
def linear(store: Store, node: torch.fx.Node, x: Value, weight: Value, bias: Value | None = None) -> Value:
    tap(store, node, weight, 1, -1)
    return plus_bias(store, read(store, x, weight), bias)


def read(store: Store, x: Value, weight: Value) -> Value:
    """x (..., I) @ weight (O, I) transposed."""
    nd = len(x.shape)
    return squeeze(algebra.contract(store, unsqueeze(x, nd - 1), weight, frozenset({nd})), nd)


def plus_bias(store: Store, out: Value, bias: Value | None) -> Value:
    if bias is None:
        return out
    for item in bias.fields:
        store.flag(item.labels, WRITE)
    return algebra.meet(store, out, bias, "add")


@rule("matmul", "mm", "bmm", "mv", "dot", "vdot")
def matmul(store: Store, node: torch.fx.Node, a: Value, b: Value) -> Value:
    left = unsqueeze(a, 0) if len(a.shape) == 1 else a
    right = unsqueeze(b, 1) if len(b.shape) == 1 else b
    tap(store, node, right, 0, -1, 1 if node_name(node).startswith("add") or node_name(node) == "baddbmm" else 0)
    out = product(store, left, right)
    if len(b.shape) == 1:
        out = squeeze(out, len(out.shape) - 1)
    if len(a.shape) == 1:
        out = squeeze(out, len(out.shape) - (1 if len(b.shape) == 1 else 2))
    return replace(out, name=None)


@rule("addmm", "baddbmm", "addmv", "addbmm")
def addmm(store: Store, node: torch.fx.Node, bias: Value, a: Value, b: Value, **kwargs: Any) -> Value:
    out = matmul(store, node, a, b)
    return out if kwargs.get("beta") == 0 else plus_bias(store, out, bias)


@rule("outer", "ger")
def outer(store: Store, node: torch.fx.Node, a: Value, b: Value) -> Value:
    return algebra.meet(store, unsqueeze(a, 1), unsqueeze(b, 0), "mul")


@rule("einsum")
def einsum(store: Store, node: torch.fx.Node, equation: str, operands: Sequence[Value], **_: Any) -> Value:
    left, _arrow, result = equation.replace(" ", "").partition("->")
    terms = left.split(",")
    if not _arrow or any(len(set(t)) < len(t.replace("...", ".")) for t in terms):
        return unknown(store, node, *operands)
    spelled = [_spell(t, len(v.shape)) for t, v in zip(terms, operands, strict=True)]
    free = max((sum(c.isdigit() for c in t) for t in spelled), default=0)
    result = result.replace("...", "".join(str(i) for i in range(10 - free, 10)))
    acc, letters = operands[0], spelled[0]
    for position, (value, term) in enumerate(zip(operands[1:], spelled[1:], strict=True), start=1):
        later = set("".join(spelled[position + 1 :]) + result)
        space = [c for c in dict.fromkeys(letters + term) if c in later]
        gone = [c for c in dict.fromkeys(letters + term) if c not in later]
        joint = space + gone
        out = algebra.contract(
            store, _into(acc, letters, joint), _into(value, term, joint), frozenset(range(len(space), len(joint)))
        )
        acc, letters = _narrowed(out, len(space)), "".join(space)
    gone = [d for d, c in enumerate(letters) if c not in result]
    if gone:
        acc = algebra.reduce(store, acc, frozenset(gone), NO_MERGE, "is summed without weights")
        for d in reversed(gone):
            acc = squeeze(acc, d)
        letters = "".join(c for c in letters if c in result)
    return replace(algebra.permute(acc, [letters.index(c) for c in result]), name=None)


def _narrowed(value: Value, n: int) -> Value:
    """Drop all dimensions of size 1 behind the first n."""
    fields = tuple(f.map(lambda a: a.reshape(a.shape[:n])) for f in value.fields)
    return replace(value, shape=value.shape[:n], fields=fields)


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
            value = unsqueeze(value, d)
    return value


@rule("scaled_dot_product_attention", "_scaled_dot_product_flash_attention_for_cpu")
def attention(
    store: Store, node: torch.fx.Node, q: Value, k: Value, v: Value, mask: Any = None, *rest: Any, **kwargs: Any
) -> Value:
    mask = kwargs.get("attn_mask", mask)
    if kwargs.get("enable_gqa"):
        n = q.shape[-3] // k.shape[-3]
        k, v = (_repeat_heads(store, t, n) for t in (k, v))
    if kwargs.get("scale") is None:
        last = len(q.shape) - 1
        for item in q.fields:
            if last in item.support:
                store.forbid(
                    q, item, frozenset({last}), NO_REMOVE, "sets the default scale 1/sqrt(channels) of attention"
                )
                store.forbid(
                    q, item, frozenset({last}), NO_MERGE, "sets the default scale 1/sqrt(channels) of attention"
                )
    nd = len(k.shape)
    scores = product(store, q, algebra.permute(k, (*range(nd - 2), nd - 1, nd - 2)))
    if isinstance(mask, Value):
        scores = algebra.meet(store, scores, mask, "add")
    scores = replace(scores, fields=tuple(replace(without_gauge(store, f), loud=True) for f in scores.fields))
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
