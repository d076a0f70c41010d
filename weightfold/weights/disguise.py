"""Disguise a model: a random element of its symmetry group, in the model's own precision."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from weightfold.graph import ChannelGroup
from weightfold.graph import edit as edits
from weightfold.graph.apply import apply, find_tensor, put_tensor
from weightfold.graph.copies import independent_copy
from weightfold.graph.trace import Example
from weightfold.weights.balance import put_rows_, rows_of
from weightfold.weights.compare import fitting
from weightfold.weights.symmetry import Symmetries


@torch.no_grad()
def disguise(
    model: nn.Module,
    example: Example,
    generator: torch.Generator,
    *,
    spread: float = 1.0,
    shift_logits: bool = False,
    found: Symmetries | None = None,
) -> nn.Module:
    """Copy a model and permute, rescale, flip and mix its channels at random; it goes on computing the same.

    Args:
        generator: draws everything.
        spread: standard deviation of the log of scales; 0 leaves scales, and mixtures, alone.
        shift_logits: also add the same random row, as large as the weights, to all classes of a head.
    Example:
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> twin = disguise(net, torch.zeros(1, 4), torch.Generator().manual_seed(0))
        >>> bool(torch.allclose(twin(torch.ones(1, 4)), net(torch.ones(1, 4)), atol=1e-5))
        True
    """
    found = fitting(found, model, example)
    twin = independent_copy(model)
    if spread:
        _mix_(twin, found, generator, spread)
    graph = found.graph
    for name in [group.name for group in graph]:
        if graph[name].free:
            graph, _ = apply(twin, graph, edits.permute(graph[name], _any_order(graph[name], generator)))
        for number, gauge in enumerate(graph[name].gauges):
            if gauge.kind == "sign":
                flip = torch.rand(len(gauge), generator=generator) < 0.5
                graph, _ = apply(twin, graph, edits.sign(graph[name], flip, number))
            elif spread:
                scale = (spread * torch.randn(len(gauge), generator=generator)).exp()
                graph, _ = apply(twin, graph, edits.rescale(graph[name], scale, number))
    for weight, bias in found.heads if shift_logits else ():
        for tensor in (find_tensor(twin, name)[2] for name in (weight, bias) if name is not None):
            row = torch.randn(tensor.shape[1:], generator=generator).to(tensor)
            tensor += row * tensor.square().mean(0).sqrt()
    return twin


def _any_order(group: ChannelGroup, generator: torch.Generator) -> Tensor:
    """A random permutation within each block, shape (C,)."""
    order = torch.arange(group.n_channels)
    blocks = torch.zeros_like(order) if group.block is None else group.block
    for block in torch.unique(blocks):
        mine = (blocks == block).nonzero().flatten()
        order[mine] = mine[torch.randperm(len(mine), generator=generator)]
    return order


def _mix_(twin: nn.Module, found: Symmetries, generator: torch.Generator, spread: float) -> None:
    """Mix every linear block by a random matrix, G here and the inverse transpose there."""
    for freedom in found.freedoms:
        own = [s for s in (*freedom.plus, *freedom.minus) if "@" not in s.tensor]
        if freedom.kind != "linear":
            continue
        tensors = {s.tensor: find_tensor(twin, s.tensor)[2].detach().double().cpu() for s in own}
        n = freedom.channel.numel()
        sides = [tuple(s for s in side if s in own) for side in (freedom.plus, freedom.minus)]
        rows = [rows_of(tensors, side, n) for side in sides]
        for block in torch.unique(freedom.block).tolist():
            mine = (freedom.block == block).nonzero().flatten()
            square = torch.randn(len(mine), len(mine), generator=generator, dtype=torch.float64)
            rotation = torch.linalg.qr(square)[0]
            scale = (0.3 * spread * torch.randn(len(mine), generator=generator, dtype=torch.float64)).exp()
            mixing = rotation * scale
            rows[0][mine], rows[1][mine] = mixing @ rows[0][mine], torch.linalg.inv(mixing).T @ rows[1][mine]
        for side, new in zip(sides, rows, strict=True):
            put_rows_(tensors, side, new)
        for name, value in tensors.items():
            old = find_tensor(twin, name)[2]
            put_tensor(old, value.to(old))
