"""Channels that stay stand in for those that go: least squares between what readers read before and after.

With a what a reader reads in the whole network and a' what is left of it in a lumped one, on the same inputs,

    B = E[a a'ᵀ] (E[a' a'ᵀ] + λ I)⁻¹,    W' = W B,    b' = b + W (E a - B E a')

is the best the reader can do, whatever its weights W (centred only where a bias can take up the mean). Channels of
different groups of a grouped convolution do not stand in for each other.

Reference: He et al., ICCV 2017, arXiv 1707.06168 (channel pruning, reconstruction step); differs in: solved for what is
read, so that it is one edit on the channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from weightfold.errors import DataError
from weightfold.graph.edit import Edit
from weightfold.graph.group import Axis, ChannelGroup
from weightfold.graph.observe import Key, SecondMoment, axis_rows, rows_of
from weightfold.redundancy import Reader, apart, choose, takes_mean
from weightfold.stats.running import call, evaluating
from weightfold.stats.taps import tapped

MAX_ROWS = 16_384
"""Samples and positions that a reader's least squares take at most."""

Pairs = dict[Key, tuple[Tensor, Tensor]]
"""What a reader reads in the whole network and in the lumped one, shapes (N, C), by reader."""


def represent(model: nn.Module, group: ChannelGroup, width: int, pairs: Pairs, ridge: float) -> tuple[Edit, float]:
    """Keep some channels, and solve the readers for what they read in the whole network.

    Args:
        width: channels to keep.
        pairs: samples of all channels, whole and lumped so far.
    Returns:
        The edit, and the relative error of the readers' outputs that it leaves, the mean over readers.
    """
    readers = []
    for axis in group.role("read"):
        now = pairs[axis.key][1]
        moment = SecondMoment.of_samples(now)
        centred = takes_mean(model, axis)
        second = (moment.covariance() if centred else moment.second()).numpy()
        gram = sum((rows @ rows.T for rows in axis_rows(model, axis)), torch.zeros(())).numpy()
        mask = apart(axis)
        readers.append(Reader(axis.key, second * mask, gram * mask, len(now)))
    block = None if group.block is None else group.block.numpy()
    path = choose(readers, block, max(ridge, 1e-4), least=width)
    keep = torch.from_numpy(path.kept(group.n_channels, width))
    reads, shift, errors = {}, {}, []
    for axis in group.role("read"):
        whole, now = pairs[axis.key]
        reads[axis.key], left = solved(axis, whole, now[:, keep], keep, ridge, takes_mean(model, axis))
        if left is not None:
            shift[axis.key] = left
        weight = torch.cat(axis_rows(model, axis), 1)
        wished = whole - whole.mean(0)
        rest = wished - (now - now.mean(0))[:, keep] @ reads[axis.key].T
        errors.append(float((rest @ weight).square().sum() / (wished @ weight).square().sum().clamp_min(1e-300)))
    return Edit(group.name, "lump", group.n_channels, keep, reads=reads, shift=shift), float(np.mean(errors))


def solved(
    axis: Axis, whole: Tensor, now: Tensor, keep: Tensor, ridge: float, centred: bool
) -> tuple[Tensor, Tensor | None]:
    """B of shape (C, K) and what is left for the bias, drawn towards reading the kept channels as they are.

    Args:
        whole: what the axis read, shape (N, C).
        now: what stays of it, shape (N, K).
        keep: the channels whose places those take, shape (K,).
    """
    n = whole.shape[1]
    start = torch.zeros(n, len(keep), dtype=torch.float64)
    start[keep, torch.arange(len(keep))] = 1
    mean, mean_now = (
        (whole.mean(0), now.mean(0)) if centred else (torch.zeros(n).double(), torch.zeros(len(keep)).double())
    )
    x, y = now - mean_now, whole - mean
    inner = x.T @ x / len(x)
    scale = float(inner.diagonal().mean())
    inner = inner + max(ridge, 1e-12) * (scale if scale > 0 else 1.0) * torch.eye(len(keep), dtype=torch.float64)
    cross = (y - x @ start.T).T @ x / len(x)
    have = (axis.index >= 0).any(1)
    slab = axis.index[:, 0] // (axis.size // axis.slabs)
    mask = have[:, None] & have[keep] & (slab[:, None] == slab[keep])
    found = (start + torch.linalg.solve(inner, cross.T).T) * mask
    return found, (mean - found @ mean_now) * have if centred else None


def observable(group: ChannelGroup) -> bool:
    """Whether all that reads a group can be watched."""
    return bool(group.role("read")) and all(axis.tap is not None for axis in group.role("read"))


@torch.no_grad()
def first_rows(
    model: nn.Module, group: ChannelGroup, example: tuple[tuple[Any, ...], dict[str, Any]]
) -> dict[Key, Tensor]:
    """One row of what each reader reads; empty where one cannot be seen."""
    if not observable(group):
        return {}
    found: dict[Key, Tensor] = {}
    with evaluating(model), watching(model, group, found, None):
        call(model, example)
    return {key: rows[0].double() for key, rows in found.items()} if len(found) == len(group.role("read")) else {}


@torch.no_grad()
def paired(
    whole: nn.Module, before: ChannelGroup, lumped: nn.Module, group: ChannelGroup, inputs: Sequence[Any]
) -> Pairs:
    """What the readers of a group read in two networks on the same inputs."""
    limit = max(1, MAX_ROWS // max(len(inputs), 1))
    kept: tuple[dict[Key, list[Tensor]], dict[Key, list[Tensor]]] = ({}, {})
    for model, own, store in ((whole, before, kept[0]), (lumped, group, kept[1])):
        for batch in inputs:
            seen: dict[Key, Tensor] = {}
            with evaluating(model), watching(model, own, seen, limit):
                call(model, batch)
            for key, rows in seen.items():
                store.setdefault(key, []).append(rows.double().cpu())
    missing = [axis.tensor for axis in group.role("read") if axis.key not in kept[0] or axis.key not in kept[1]]
    if missing:
        raise DataError(f"Nothing reached '{missing[0]}' while the inputs were run.", remedy="Pass other inputs.")
    return {key: (torch.cat(rows), torch.cat(kept[1][key])) for key, rows in kept[0].items()}


def watching(
    model: nn.Module, group: ChannelGroup, store: dict[Key, Tensor], limit: int | None
) -> AbstractContextManager[None]:
    """Take rows from the inputs of a group's readers while a model runs."""
    by_path: dict[str, list[Axis]] = {}
    for axis in group.role("read"):
        assert axis.tap is not None
        by_path.setdefault(axis.tap[0], []).append(axis)

    def take(x: Tensor, axes: list[Axis]) -> None:
        for axis in axes if x.numel() else ():
            assert axis.tap is not None
            rows = rows_of(x.detach(), axis.tap[1], axis.index, limit)
            store[axis.key] = torch.cat([store[axis.key], rows]) if axis.key in store else rows

    return tapped(model, {path: partial(take, axes=axes) for path, axes in by_path.items()})
