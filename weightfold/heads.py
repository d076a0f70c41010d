"""Whole attention heads about to be folded: those that others can stand in for go; the output layer is repaired.

With a the concatenated outputs of the heads, C = E[a aᵀ], P = (C + λ I)⁻¹ and V the columns of the layer that reads
them, dropping head h and compensating through all others costs

    tr(V_h (P_hh)⁻¹ V_hᵀ),    then V -= V_h T, P -= Tᵀ P_hh T    with T = (P_hh)⁻¹ P_h:

(optimal brain surgeon, a block of channels at a time). The fold is two edits: the reader takes over what the dropped
heads gave, then the heads are removed with all that computes them.

Reference: Hassibi & Stork, NeurIPS 1992; differs in: blocks of channels. For dropping heads without compensation:
Michel et al., NeurIPS 2019, arXiv 1905.10650.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from weightfold.graph.edit import Edit, remove
from weightfold.graph.group import Axis, ChannelGraph, ChannelGroup
from weightfold.price import Trails
from weightfold.redundancy import Floats, Reader

MAX_CHANNELS = 2048
"""Widest concatenation of heads that is inverted."""


@dataclass(frozen=True, eq=False)
class HeadJob:
    """The heads of one attention layer, in the order in which they go.

    Args:
        group: the heads, one channel each.
        observed: the group of single channels that the output layer reads, block by block.
        reader: the output layer.
        order: heads from the most dispensable on.
        costs: relative error of the output after 0, 1, ... heads.
    """

    group: ChannelGroup
    observed: ChannelGroup
    reader: Reader
    order: Floats
    costs: Floats
    ridge: float

    @classmethod
    def of(cls, group: ChannelGroup, observed: ChannelGroup, reader: Reader, ridge: float) -> HeadJob:
        """Order the heads of a layer."""
        members = _members(group, observed, reader)
        order, costs = _eliminate(reader, members, ridge)
        return cls(group, observed, reader, order, costs, ridge)

    def kept(self, width: int) -> Floats:
        """The heads that stay, ascending."""
        return np.sort(self.order[self.group.n_channels - width :])

    def cost(self, width: int) -> float:
        """What the order has cost down to a width."""
        return float(self.costs[self.group.n_channels - width])

    def lost_energy(self, keep: Floats) -> float:
        """Relative error of the output layer's result, compensated."""
        stay, go = self._channels(keep)
        return self.reader.error(stay, go, self.reader.map(stay, go, self.ridge), self.ridge)

    def residual(self, trails: Trails, width: int) -> Tensor | None:
        """What folding to a width does to each sample's loss, first order; None where the reader left no trail."""
        if (self.observed.name, self.reader.key) not in trails.by_reader:
            return None
        stay, go = self._channels(self.kept(width))
        map_SK = self.reader.map(stay, go, self.ridge)
        left = None if self.reader.mean_C is None else self.reader.shift(stay, go, map_SK)[go]
        return trails.residual(self.observed.name, self.reader.key, stay, go, map_SK, left)

    def repair(self, keep: Floats) -> Edit:
        """The output layer takes over what the dropped heads gave."""
        stay, go = self._channels(keep)
        n = self.observed.n_channels
        read = torch.zeros(n, n, dtype=torch.float64)
        read[stay, stay] = 1
        map_SK = self.reader.map(stay, go, self.ridge)
        read[np.ix_(go, stay)] = torch.from_numpy(np.ascontiguousarray(map_SK))
        shift = {}
        if self.reader.mean_C is not None:
            shift[self.reader.key] = torch.from_numpy(self.reader.shift(stay, go, map_SK))
        return Edit(self.observed.name, "fold", n, torch.arange(n), reads={self.reader.key: read}, shift=shift)

    def edit(self, keep: Floats) -> Edit:
        """The removal of the others."""
        return remove(self.group, torch.from_numpy(keep))

    def why(self, keep: Floats, lost_energy: float) -> dict[str, Any]:
        """Metric, value and costs, as plain data."""
        n_dropped = self.group.n_channels - len(keep)
        costs = np.diff(self.costs)[:n_dropped]
        return {
            "metric": "error of the output layer after compensation",
            "unit": "share of the output's energy",
            "value": lost_energy,
            "choice": "elimination by heads",
            "ridge": self.ridge,
            "readers": {self.reader.key[0]: self.reader.count},
            "dropped": [
                {"channel": int(i), "cost": float(c)} for i, c in zip(self.order[:n_dropped], costs, strict=True)
            ],
            "rejected": [],
        }

    def _channels(self, keep: Floats) -> tuple[Floats, Floats]:
        members = _members(self.group, self.observed, self.reader)
        stay = np.sort(np.concatenate([members[int(h)] for h in keep]))
        return stay, np.setdiff1d(np.arange(self.observed.n_channels), stay)


def partner_of(graph: ChannelGraph, group: ChannelGroup) -> ChannelGroup | None:
    """The group of single channels behind a layer's heads; None where heads share keys and values or cannot be seen."""
    if group.kind != "blocks" or "remove" not in group.admits or len(group.role("read")) != 1:
        return None
    [axis] = group.role("read")
    for other in graph:
        mine = [a for a in other.role("read") if a.key == axis.key]
        if other.kind != "channels" or other.block is None or len(mine) != 1 or len(other.role("read")) != 1:
            continue
        [read] = mine
        complete = read.index.shape[1] == 1 and bool((read.index >= 0).all()) and axis.slabs == read.slabs == 1
        if complete and read.tap is not None and other.n_channels == axis.index.numel() <= MAX_CHANNELS:
            return other
    return None


def members_of(group: ChannelGroup, observed: ChannelGroup, axis: Axis) -> dict[int, Floats]:
    """The single channels of each head, in the order in which the layer reads them."""
    place = observed.axis(*axis.key).index[:, 0].numpy()
    channel_at = np.full(place.max() + 1, -1)
    channel_at[place] = np.arange(len(place))
    index = group.axis(*axis.key).index.numpy()
    return {head: channel_at[np.sort(row[row >= 0])] for head, row in enumerate(index)}


def _members(group: ChannelGroup, observed: ChannelGroup, reader: Reader) -> Mapping[int, Floats]:
    """The single channels of each head, ascending."""
    found = members_of(group, observed, observed.axis(*reader.key))
    return {head: np.sort(channels) for head, channels in found.items()}


def _eliminate(reader: Reader, members: Mapping[int, Floats], ridge: float) -> tuple[Floats, Floats]:
    """Drop the head that costs least after compensation, again and again, until one is left."""
    n = len(reader.second_CC)
    inverse = np.linalg.inv(reader.second_CC + reader.ridge(max(ridge, 1e-10)) * np.eye(n))
    gram = reader.gram_CC.copy()
    left, order, costs = list(members), [], [0.0]
    while len(left) > 1:
        prices = [_price(inverse, gram, members[h]) * reader.weight for h in left]
        at = int(np.argmin(np.round(prices, 13)))
        costs.append(costs[-1] + max(prices[at], 0.0))
        mine = members[left[at]]
        order.append(left.pop(at))
        through = np.linalg.solve(inverse[np.ix_(mine, mine)], inverse[mine])
        lost = gram[:, mine] @ through
        gram = gram - lost - lost.T + through.T @ gram[np.ix_(mine, mine)] @ through
        inverse = inverse - inverse[:, mine] @ through
    return np.array([*order, *left], np.int64), np.array(costs)


def _price(inverse: Floats, gram: Floats, mine: Floats) -> float:
    block = np.ix_(mine, mine)
    return float(np.trace(np.linalg.solve(inverse[block], gram[block])))
