"""Numbers that enter the arithmetic of a forward: a width among them must not change, or the function changes with it.

``h / h.shape[-1]`` reaches the traced program as ``h / 10``. Of an operator's numbers, those that say where or how much
of a labelled dimension to take, and those that only name a size, are free to follow it: what they do shows in the
labels. All others are compared when a size is tried. What an operator makes of known numbers alone is not compared
there but where it meets data: a sum of ones is a width too.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from weightfold.graph.labels import Value
from weightfold.graph.rules.core import node_name, on, values_in

SIZES = frozenset({
    "size", "sizes", "shape", "repeats", "groups", "num_groups", "group", "normalized_shape", "split_size",
    "split_sizes", "chunks", "sections", "indices_or_sections", "N", "C", "HxW",
})  # fmt: skip
"""Arguments that name sizes: a wrong one does not run, or shows in the labels."""

PICKS = frozenset({"index", "gather", "take_along_dim", "_unsafe_index", "index_select", "index_copy"})
"""Movements along positions that they are given: what they pick shows in the labels."""


def numbers_of(node: torch.fx.Node, args: Sequence[Any], result: Any) -> list[float]:
    """The numbers that an operator computes with.

    Args:
        node: the operator's place in the traced program.
        args: what it is called with, values in place of tensors.
        result: what its rule returned.
    """
    outputs = values_in([result])
    if outputs and all(v.known is not None for v in outputs):
        return []
    out: list[float] = []
    for name, kind, given in _given(node):
        counts = _counts(node, name, kind, args)
        found = _pads(given, args) if name == "pad" else pytree.tree_leaves(given)
        out += [float(a) for a in found if isinstance(a, float) or (counts and isinstance(a, int))]
    for position, value in enumerate(values_in(args)):
        if value.known is not None and not (position and node_name(node) in PICKS):
            out += digest(value.known)
    return out


def _given(node: torch.fx.Node) -> Iterator[tuple[str, str, Any]]:
    """Name, type and value of every argument that an operator is given."""
    for position, argument in enumerate(node.target._schema.arguments):  # type: ignore[union-attr]
        if position < len(node.args):
            yield argument.name, str(argument.type), node.args[position]
        elif argument.name in node.kwargs:
            yield argument.name, str(argument.type), node.kwargs[argument.name]


def _counts(node: torch.fx.Node, name: str, kind: str, args: Sequence[Any]) -> bool:
    """Whether the integers of an argument are values, and no sizes or positions that the labels follow."""
    if "number" in kind or "Scalar" in kind or kind.startswith("Tensor"):
        return True
    return name not in SIZES and node_name(node) != "as_strided" and not _along_channels(node, args)


def _along_channels(node: torch.fx.Node, args: Sequence[Any]) -> bool:
    """Whether an operator works along a dimension that holds channels."""
    x = next(iter(values_in(args)), None)
    given = {name: a for name, _, a in _given(node) if name in ("dim", "dims", "dimension")}
    dims = [d for d in pytree.tree_leaves(list(given.values())) if type(d) is int]
    return x is not None and any(on(x, d) in item.support for d in dims for item in x.fields)


def _pads(pads: Any, args: Sequence[Any]) -> list[Any]:
    """Of what is padded around each dimension, counted from the last, that of dimensions without channels."""
    x = next(iter(values_in(args)), Value(()))
    held = frozenset(d for item in x.fields for d in item.support)
    return [n for i, n in enumerate(pads) if len(x.shape) - 1 - i // 2 not in held]


def digest(known: Tensor) -> list[float]:
    """Two numbers that stand for a tensor's: its mean, and how its entries differ; of any shape, if all are equal."""
    flat = torch.view_as_real(known).flatten() if known.is_complex() else known.flatten()
    flat = torch.nan_to_num(flat.double(), nan=1.25e9, posinf=1.5e9, neginf=-1.75e9)
    if not flat.numel() or bool((flat == flat[0]).all()):
        return [float(flat[0]) if flat.numel() else 0.0, 0.0]
    return [float(flat.mean()), float((flat * torch.cos(torch.arange(1, flat.numel() + 1, dtype=torch.float64))).sum())]
