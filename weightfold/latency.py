"""How long a training step takes at other widths: measured on copies of the network, never guessed from FLOPs.

A copy is cut to each plan of widths and takes real steps: forward, backward, the optimiser's update. Between measured
plans the time is interpolated over multiply-accumulates. Copies share nothing with the network; random state is put
back. Cost: three steps a plan, at the plan's own speed; two, where it is slow. One would not do: the first step at new
shapes pays for kernels that are made then.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from weightfold.gate import Batch, Loss
from weightfold.graph.apply import apply
from weightfold.graph.copies import independent_copy
from weightfold.graph.edit import Edit
from weightfold.graph.group import ChannelGraph, ChannelGroup
from weightfold.stats.running import call
from weightfold.widths import Widths

LONG_ENOUGH = 0.5
"""Seconds of steps after which a plan is timed well enough."""


@dataclass(frozen=True)
class StepTime:
    """One measured row.

    Args:
        widths: channels of each group.
        macs: multiply-accumulates an inference.
        seconds: the quickest of the training steps taken.
    """

    widths: Mapping[str, int]
    macs: float
    seconds: float


@dataclass(frozen=True)
class Latency:
    """A table of training-step times, widest network first.

    Example:
        >>> table = Latency((StepTime({}, 100.0, 1.0), StepTime({}, 25.0, 0.4)))
        >>> round(table.ratio(50.0), 3), table.ratio(100.0)
        (0.6, 1.0)
    """

    rows: tuple[StepTime, ...]

    @classmethod
    def recorded(cls, ratios: Mapping[str, float], total_macs: float) -> Latency:
        """A table from an earlier run: time over the dense one's, by share of MACs."""
        shares = {float(share): ratio for share, ratio in ratios.items()} | {1.0: 1.0}
        return cls(tuple(StepTime({}, share * total_macs, shares[share]) for share in sorted(shares, reverse=True)))

    def ratio(self, macs: float) -> float:
        """A step's time over that of the network as it is, interpolated over MACs; never above 1."""
        dense = self.rows[0]
        points = sorted((row.macs, min(row.seconds / dense.seconds, 1.0)) for row in self.rows)
        if macs <= points[0][0]:
            return points[0][1] * macs / points[0][0]
        for (low, at_low), (high, at_high) in pairwise(points):
            if macs <= high:
                share = (macs - low) / max(high - low, 1e-300)
                return at_low + share * (at_high - at_low)
        return 1.0


def measure(
    model: nn.Module,
    graph: ChannelGraph,
    plans: Sequence[tuple[Widths, float]],
    batch: Batch,
    loss: Loss,
    optimizers: Sequence[torch.optim.Optimizer] = (),
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    steps: int = 2,
) -> Latency:
    """Time training steps at planned widths.

    Args:
        plans: widths and the MACs that they leave; the first is the network as it is.
        batch: inputs and targets of the size that training uses.
        optimizers: built anew over the copy, with their settings.
        steps: further steps a plan, after the first, while they are quick.
    """
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})
    rows = []
    with torch.random.fork_rng(devices=devices):
        for widths, n_macs in plans:
            twin = cut(model, graph, widths)
            rows.append(StepTime(dict(widths), n_macs, _time(twin, model, batch, loss, optimizers, autocast, steps)))
    return Latency(tuple(rows))


def cut(model: nn.Module, graph: ChannelGraph, widths: Widths) -> nn.Module:
    """A copy that keeps the first channels of each group, equally many of every block."""
    twin = independent_copy(model)
    for name, width in widths.items():
        group = graph[name]
        if width < group.n_channels:
            graph, _ = apply(twin, graph, Edit(name, "remove", group.n_channels, _first(group, width)))
    return twin


def _first(group: ChannelGroup, width: int) -> Tensor:
    if group.block is None:
        return torch.arange(width)
    each = width // (int(group.block.max()) + 1)
    return torch.cat([(group.block == b).nonzero().flatten()[:each] for b in range(int(group.block.max()) + 1)])


def _time(
    twin: nn.Module,
    model: nn.Module,
    batch: Batch,
    loss: Loss,
    optimizers: Sequence[torch.optim.Optimizer],
    autocast: Callable[[], AbstractContextManager[Any]],
    steps: int,
) -> float:
    names = {id(p): name for name, p in model.named_parameters()}
    params = dict(twin.named_parameters())
    own = [_rebuilt(optimizer, names, params) for optimizer in optimizers]
    twin.train()
    for module in twin.modules():
        if isinstance(module, nn.SyncBatchNorm):
            module.eval()
    device = next((p.device for p in twin.parameters()), torch.device("cpu"))
    best = spent = float("inf")
    for number in range(steps + 1):
        _wait(device)
        start = time.perf_counter()
        with autocast():
            value = loss(call(twin, batch[0]), batch[1])
        value.backward()
        for optimizer in own:
            optimizer.step()
            optimizer.zero_grad()
        _wait(device)
        took = time.perf_counter() - start
        best = min(best, took)
        spent = took if number == 0 else spent + took
        if number and spent > LONG_ENOUGH:
            break
    return best


def _rebuilt(
    optimizer: torch.optim.Optimizer, names: Mapping[int, str], params: Mapping[str, nn.Parameter]
) -> torch.optim.Optimizer:
    """The same kind of optimiser over the copy's parameters."""
    groups = [
        {**{k: v for k, v in group.items() if k != "params"}, "params": [params[names[id(p)]] for p in group["params"]]}
        for group in optimizer.param_groups
    ]
    kind: Any = type(optimizer)
    return kind(groups)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
