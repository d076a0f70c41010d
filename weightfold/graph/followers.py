"""Tensors that follow the rows of others: what a method holds for each output channel, such as bits and steps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from weightfold.graph.group import Axis, ChannelGraph


def with_followers(graph: ChannelGraph, followers: Mapping[str, str]) -> ChannelGraph:
    """The graph in which vectors take part in every edit on the rows of a tensor.

    Args:
        followers: name of the tensor whose dimension 0 is followed, by the follower's own name; followers have one
            number for each row, or one in all and then nothing to follow.
    Example:
        >>> import torch, weightfold as wf
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> graph = with_followers(wf.trace(net, torch.zeros(1, 4)), {"0.scale": "0.weight"})
        >>> [axis.tensor for axis in graph["0"].axes]
        ['0.weight', '0.bias', '2.weight', '0.scale']
    """
    new = {name: tensor for name, tensor in followers.items() if name not in graph.followers}
    if not new:
        return graph
    by_tensor: dict[str, list[str]] = {}
    for name, tensor in new.items():
        by_tensor.setdefault(tensor, []).append(name)
    groups, shapes = [], dict(graph.shapes)
    for group in graph:
        rows = [a for a in group.axes if a.dim == 0 and a.slabs == 1 and a.tensor in by_tensor]
        shapes |= {name: (a.size,) for a in rows for name in by_tensor[a.tensor]}
        more = [Axis(name, 0, "pointwise", a.index, a.size) for a in rows for name in by_tensor[a.tensor]]
        groups.append(replace(group, axes=(*group.axes, *more)) if more else group)
    return replace(graph, groups=tuple(groups), shapes=shapes, followers=graph.followers | new.keys())


def without_followers(graph: ChannelGraph) -> ChannelGraph:
    """The graph of the network alone."""
    groups = (replace(g, axes=tuple(a for a in g.axes if a.tensor not in graph.followers)) for g in graph)
    shapes = {name: shape for name, shape in graph.shapes.items() if name not in graph.followers}
    return replace(graph, groups=tuple(groups), shapes=shapes, followers=frozenset())
