"""Rules of distances, complex numbers and fixed linear transforms (Fourier, quadrature) along a dimension."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from weightfold.graph import algebra
from weightfold.graph.labels import FROZEN, NO_MERGE, NO_REMOVE, Store, Value
from weightfold.graph.rules.core import node_name, on, out_shape, rule, shapes_of, squeeze, unsqueeze, values_in
from weightfold.graph.rules.placing import drop_gauge
from weightfold.graph.rules.pointwise import pointwise
from weightfold.graph.rules.products import einsum


def _compared(store: Store, a: Value, b: Value, how: str, dims: frozenset[int], name: str) -> Value:
    """Two values are compared across all that lies along some dimensions."""
    both = drop_gauge(store, algebra.meet(store, a, b, how))
    return algebra.reduce(store, both, dims, NO_MERGE | NO_REMOVE, f"is compared by '{name}' across the group")


@rule("cosine_similarity", "pairwise_distance", "dist")
def compare(store: Store, node: torch.fx.Node, a: Value, b: Value, *args: Any, **kwargs: Any) -> Value:
    name, shape = node_name(node), out_shape(node)
    ndim = max(len(a.shape), len(b.shape))
    default = 1 if name == "cosine_similarity" else -1
    dim = (args[0] if args else kwargs.get("dim", default)) if name == "cosine_similarity" else default
    dims = frozenset(range(ndim)) if name == "dist" else frozenset({dim % ndim})
    out = _compared(store, a, b, "none", dims, name)
    if len(shape) < ndim:
        for d in sorted(dims, reverse=True):
            out = squeeze(out, d)
    return Value(shape, out.fields)


_LOSSES = ("mse_loss", "l1_loss", "smooth_l1_loss", "huber_loss", "soft_margin_loss", "kl_div", "binary_cross_entropy",
           "binary_cross_entropy_with_logits", "poisson_nll_loss", "margin_ranking_loss", "hinge_embedding_loss",
           "triplet_margin_loss", "cosine_embedding_loss")  # fmt: skip


@rule(*_LOSSES)
def loss(store: Store, node: torch.fx.Node, first: Value, *args: Any, **kwargs: Any) -> Value:
    """Losses that compare place by place, and sum over all places unless they are told not to."""
    name, shape = node_name(node), out_shape(node)
    dims = frozenset(range(len(first.shape))) if shape != first.shape else frozenset()
    for other in values_in([*args, *kwargs.values()]):
        if other.shape == first.shape:
            first = algebra.meet(store, first, other, "none")
        else:
            store.freeze(other, f"is broadcast by '{name}'")
    compared = _compared(store, first, Value(()), "none", dims, name)
    return Value(shape, () if dims else compared.fields)


@rule("cross_entropy_loss", "nll_loss", "nll_loss_nd", "nll_loss2d", "multi_margin_loss", "multilabel_margin_loss")
def class_loss(store: Store, node: torch.fx.Node, *args: Any, **kwargs: Any) -> Any:
    """Losses whose targets name classes by their number."""
    for value in values_in([*args, *kwargs.values()]):
        store.freeze(value, f"has its places named by the targets of '{node_name(node)}'")
    return shapes_of(node)


@rule("cdist")
def cdist(store: Store, node: torch.fx.Node, a: Value, b: Value, *_: Any, **__: Any) -> Value:
    """Distances of all rows of ``a`` (..., P, M) to all of ``b`` (..., R, M)."""
    left, right = unsqueeze(a, len(a.shape) - 1), unsqueeze(b, len(b.shape) - 2)
    last = max(len(left.shape), len(right.shape)) - 1
    return Value(
        out_shape(node), squeeze(_compared(store, left, right, "none", frozenset({last}), "cdist"), last).fields
    )


@rule("tensordot")
def tensordot(
    store: Store, node: torch.fx.Node, a: Value, b: Value, dims_a: Sequence[int], dims_b: Sequence[int]
) -> Any:
    left = [chr(97 + d) for d in range(len(a.shape))]
    right = [chr(97 + len(left) + d) for d in range(len(b.shape))]
    for i, j in zip(dims_a, dims_b, strict=True):
        right[on(b, j)] = left[on(a, i)]
    out = [c for c in left if c not in right] + [c for c in right if c not in left]
    return einsum(store, node, f"{''.join(left)},{''.join(right)}->{''.join(out)}", [a, b])


@rule("view_as_complex", move=True)
def view_as_complex(store: Store, node: torch.fx.Node, x: Value) -> Value:
    """Pairs become complex numbers: what turns one part turns the other, so a pair is one channel."""
    last, fields = len(x.shape) - 1, []
    for item in x.fields:
        merged = algebra.merge_along(store, item, frozenset({last})) if last in item.support else item
        if merged is not None:
            fields.append(merged.map(lambda a: a.squeeze(last)))
    return Value(out_shape(node), tuple(fields))


@rule("view_as_real", move=True)
def view_as_real(_: Store, node: torch.fx.Node, x: Value) -> Value:
    return Value(out_shape(node), tuple(f.map(lambda a: a.unsqueeze(-1)) for f in x.fields))


@rule("real", "imag", "conj", "_conj", "conj_physical", "_conj_physical", "resolve_conj", "resolve_neg", "_neg_view")
def part(_: Store, node: torch.fx.Node, x: Value) -> Value:
    return Value(out_shape(node), x.fields)


@rule("complex", "polar")
def compose(store: Store, node: torch.fx.Node, a: Value, b: Value) -> Value:
    return algebra.meet(store, a, b, "add") if node_name(node) == "complex" else pointwise(store, node, a, b)


FOURIER = {f"fft_{inverse}{kind}fft{n}" for inverse in ("", "i") for kind in ("", "r", "h") for n in ("", "2", "n")}


@rule(*sorted(FOURIER), "fft_fftshift", "fft_ifftshift", "trapezoid", "quantile", "nanquantile")
def along_dimensions(store: Store, node: torch.fx.Node, x: Value, *args: Any, **kwargs: Any) -> Value:
    """A transform along some dimensions, the same for every channel that lies along others."""
    name, shape = node_name(node), out_shape(node)
    position = 0 if name.endswith("shift") else 1
    default = [-2, -1] if name.endswith("2") else None if name.endswith(("n", "shift")) else -1
    dim = kwargs.get("dim", args[position] if len(args) > position else default)
    every = range(len(x.shape)) if dim is None else [dim] if isinstance(dim, int) else dim
    dims = frozenset(on(x, d) for d in every)
    if "quantile" in name:
        x = drop_gauge(store, x)
    fields = []
    for item in x.fields:
        if item.support & dims:
            store.forbid(x, item, item.support & dims, FROZEN, f"is mixed by '{name}' across the group")
        else:
            fields.append(item)
    out = replace(x, fields=tuple(fields), name=None)
    for d in sorted(dims, reverse=True) if len(shape) < len(x.shape) else ():
        out = squeeze(out, d)
    return Value(shape, out.fields)
