"""Channels that a quantised network has no more use for: nobody reads them, or nothing but a constant is written.

A channel is **unread** when every weight that reads it is zero on its grid, and **silent** when every weight that
writes it is, or its kernel in a depthwise convolution before its only reader. Where more than weights reads a channel
(a sum, a second output), neither says that it can go. A silent channel is the constant that biases and norms make of
it. What reads the constant can take it over into its own bias, exactly so where it reads every position alike: a linear
layer, or a convolution without padding. Padding with zeros reads less at the border, where no bias can follow; there
the channel has to come to zero by itself first.

Cséfalvay & Imber (arXiv 2301.13142) fold no constants: they pull the biases to zero and wait.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from weightfold.graph.apply import find_tensor
from weightfold.graph.group import Axis, ChannelGraph, ChannelGroup
from weightfold.graph.layout import to_front
from weightfold.stats.running import call, probing
from weightfold.stats.taps import tapped

Key = tuple[str, int]
Span = tuple[Tensor, Tensor]
"""Least and largest value of each position that a reader sees, shape (N,)."""
NEGLIGIBLE = 1e-6
"""A constant this small beside the group's largest value is zero."""


@dataclass(frozen=True, eq=False)
class Dead:
    """What of a group can go.

    Args:
        unread_C: no weight reads it, bool, shape (C,).
        silent_C: no weight writes it.
        constant_C: it is silent, and its readers can take its value over (or it is zero).
        shift: value of each constant channel at each reader, shape (C,), for `Edit.shift`.
        stuck_C: silent, but its value cannot be taken over.
    """

    unread_C: Tensor
    silent_C: Tensor
    constant_C: Tensor
    shift: Mapping[Key, Tensor]
    stuck_C: Tensor

    @property
    def gone_C(self) -> Tensor:
        """What can be cut without changing the network's function."""
        return self.unread_C | self.constant_C


def _zero_along(model: nn.Module, axis: Axis, live: Mapping[str, Tensor]) -> Tensor:
    """Whether all weights of each channel are zero along an axis, shape (C,)."""
    value = live.get(axis.tensor)
    if value is None:
        value = find_tensor(model, axis.tensor)[2].detach() != 0
    front = to_front(value, axis.dim, axis.slabs)
    used_N = front.reshape(front.shape[0], -1).any(1).cpu()
    have = axis.index >= 0
    return ~(used_N[axis.index.clamp_min(0)] & have).any(1)


def _all(parts: Sequence[Tensor], n: int, empty: bool) -> Tensor:
    return torch.stack(list(parts)).all(0) if parts else torch.full((n,), empty)


def dead_channels(
    model: nn.Module, graph: ChannelGraph, group: ChannelGroup, live: Mapping[str, Tensor], spans: Mapping[Key, Span]
) -> Dead:
    """Find what of a group can go.

    Args:
        live: where quantised weights are not zero, bool, by tensor name.
        spans: of readers, from `observe_spans`; without them no silent channel can be taken over.
    """
    n = group.n_channels
    matrices = [a for a in group.axes if len(graph.shapes[a.tensor]) > 1]
    reads = [_zero_along(model, a, live) for a in group.axes if a.role in ("read", "both")]
    writes = [_zero_along(model, a, live) for a in matrices if a.role in ("write", "both")]
    unread_C, silent_C = _all(reads, n, False), _all(writes, n, False)
    if len(group.role("read")) == 1:
        for axis in matrices:
            silent_C |= _zero_along(model, axis, live) & (axis.role == "pointwise")
    constant_C, shift = silent_C.clone(), {}
    for axis in group.role("read"):
        value_C, same_C = _constants(axis, spans)
        zero_C = same_C & (value_C == 0)
        takes = _takes_constant(model, axis)
        constant_C &= (same_C if takes else zero_C) | _zero_along(model, axis, live)
        if takes:
            shift[axis.key] = value_C
    if group.read_elsewhere:
        unread_C[:] = False
    if group.read_elsewhere or group.role("both"):
        constant_C[:] = False
    moved = {key: torch.where(constant_C, value, 0.0).double() for key, value in shift.items()}
    return Dead(
        unread_C, silent_C, constant_C, {k: v for k, v in moved.items() if bool(v.any())}, silent_C & ~constant_C
    )


def _constants(axis: Axis, spans: Mapping[Key, Span]) -> tuple[Tensor, Tensor]:
    """The value of each channel at a reader, and whether it is the same everywhere and small ones count as zero."""
    span = spans.get(axis.key)
    if span is None or axis.slabs != 1 or axis.tap is None:
        return torch.zeros(axis.index.shape[0]), torch.zeros(axis.index.shape[0], dtype=torch.bool)
    low_N, high_N = (part.cpu() for part in span)
    largest = float(torch.maximum(low_N.abs(), high_N.abs()).max())
    have = axis.index >= 0
    at = axis.index.clamp_min(0)
    low_C = torch.where(have, low_N[at], torch.inf).amin(1)
    high_C = torch.where(have, high_N[at], -torch.inf).amax(1)
    empty = ~have.any(1)
    same_C = ((high_C - low_C).abs() <= NEGLIGIBLE * largest) | empty
    value_C = torch.where(empty | ~same_C, 0.0, (high_C + low_C) / 2)
    return torch.where(value_C.abs() <= NEGLIGIBLE * largest, 0.0, value_C), same_C


def _takes_constant(model: nn.Module, axis: Axis) -> bool:
    """Whether the reader's bias can take over what a constant channel adds."""
    path, _, leaf = axis.tensor.rpartition(".")
    owner = model.get_submodule(path)
    if leaf != "weight" or getattr(owner, "bias", None) is None:
        return False
    if isinstance(owner, nn.Linear):
        return True
    plain = isinstance(owner, nn.Conv1d | nn.Conv2d | nn.Conv3d) and owner.groups == 1
    return plain and owner.padding in ((0,), (0, 0), (0, 0, 0), "valid")


def observe_spans(model: nn.Module, graph: ChannelGraph, inputs: Sequence[Any]) -> dict[Key, Span]:
    """The least and largest value that readers see at each position of their channel axis, over some inputs."""
    taps: dict[str, list[tuple[int, Axis]]] = {}
    for group in graph:
        for axis in group.role("read"):
            if axis.tap is not None and axis.slabs == 1:
                taps.setdefault(axis.tap[0], []).append((axis.tap[1], axis))
    spans: dict[Key, Span] = {}

    def look(x: Tensor, axes: list[tuple[int, Axis]]) -> None:
        for dim, axis in axes:
            rows = x.detach().movedim(dim, 0).reshape(x.shape[dim], -1)
            low, high = rows.amin(1).double(), rows.amax(1).double()
            old = spans.get(axis.key)
            spans[axis.key] = (low, high) if old is None else (torch.minimum(old[0], low), torch.maximum(old[1], high))

    with probing(model), tapped(model, {path: partial(look, axes=axes) for path, axes in taps.items()}):
        for batch in inputs:
            call(model, batch)
    return spans


def first_of_blocks(group: ChannelGroup) -> Tensor:
    """One channel of each block."""
    block = torch.zeros(group.n_channels, dtype=torch.long) if group.block is None else group.block
    return torch.stack([(block == b).nonzero()[0, 0] for b in range(int(block.max()) + 1)])


def evenly(gone_C: Tensor, block: Tensor | None, most: int | None = None) -> Tensor:
    """As many channels of every block: those of the block that can spare the fewest, the first ones of each.

    Args:
        gone_C: what can go, bool, shape (C,).
        block: of each channel.
        most: how many may go in all.
    Example:
        >>> evenly(torch.tensor([True, True, False, True]), torch.tensor([0, 0, 1, 1])).tolist()
        [True, False, False, True]
        >>> evenly(torch.tensor([True, True, False, True]), None, most=2).tolist()
        [True, True, False, False]
    """
    blocks = torch.zeros_like(gone_C, dtype=torch.long) if block is None else block
    n_blocks = int(blocks.max()) + 1
    places = [((blocks == b) & gone_C).nonzero().flatten() for b in range(n_blocks)]
    n = min(len(p) for p in places)
    if most is not None:
        n = min(n, most // n_blocks)
    out = torch.zeros_like(gone_C)
    for place in places:
        out[place[:n]] = True
    return out
