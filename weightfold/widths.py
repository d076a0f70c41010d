"""How many channels each group keeps: one share for all, or the cheapest widths for a multiply-accumulate budget."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from weightfold.errors import ConfigError
from weightfold.graph.group import ChannelGroup
from weightfold.size import MacModel

Widths = dict[str, int]
"""Channels kept, by group name."""


@dataclass(frozen=True)
class Grid:
    """The widths that a group may have.

    Args:
        align: widths are multiples of it where the group is that wide, for hardware that likes them; 0 or 1: any.
        min_channels: no group gets narrower.
        floor: no group keeps a smaller share.
        vector: in place of ``align`` the largest power of two up to this that is at most a quarter of the group.
        liked: in place of both, by group name: widths that a target's kernels like, as `weightfold.kernels` lists them.
    """

    align: int = 0
    min_channels: int = 1
    floor: float = 0.0
    vector: int = 0
    liked: Mapping[str, Sequence[int]] = field(default_factory=dict)

    def widths(self, group: ChannelGroup) -> list[int]:
        """All allowed widths, from the present one down.

        Example:
            >>> from types import SimpleNamespace
            >>> Grid(align=8, floor=0.3).widths(SimpleNamespace(n_channels=36, block=None))
            [36, 32, 24, 16]
            >>> Grid(liked={"a": [36, 20, 12]}, floor=0.5).widths(SimpleNamespace(name="a", n_channels=36, block=None))
            [36, 20]
        """
        blocks = 1 if group.block is None else int(group.block.max()) + 1
        liked = self.liked.get(group.name) if self.liked else None
        unit = blocks if liked is not None else math.lcm(blocks, max(self.align, 1, self._vector(group.n_channels)))
        least = max(unit, min(self.min_channels, group.n_channels), math.ceil(self.floor * group.n_channels - 1e-9))
        if liked is not None:
            fits = {w for w in liked if least <= w < group.n_channels and w % blocks == 0}
            return [group.n_channels, *sorted(fits, reverse=True)]
        below = range((group.n_channels - 1) // unit * unit, least - 1, -unit)
        return [group.n_channels, *below]

    def _vector(self, n_channels: int) -> int:
        return min(self.vector, 1 << max(n_channels // 4, 1).bit_length() - 1)

    def nearest(self, group: ChannelGroup, width: float) -> int:
        """The allowed width nearest to a wished one; of two equally near, the wider."""
        return min(self.widths(group), key=lambda w: (round(abs(w - width), 9), -w))

    def above(self, group: ChannelGroup, width: int) -> int:
        """The narrowest allowed width that holds so many channels: where what must stay is known, the rest is free.

        Example:
            >>> from types import SimpleNamespace
            >>> Grid(liked={"a": [64, 48, 32]}).above(SimpleNamespace(name="a", n_channels=64, block=None), 37)
            48
        """
        return min(w for w in self.widths(group) if w >= width)

    def given(self, group: ChannelGroup, width: int) -> int:
        """Check a width that the user gave.

        Raises:
            ConfigError: the group cannot have it.
        """
        blocks = 1 if group.block is None else int(group.block.max()) + 1
        if not blocks <= width <= group.n_channels or width % blocks:
            raise ConfigError(
                f"Group '{group.name}' has {group.n_channels} channels in {blocks} block(s); it cannot keep {width}.",
                remedy=f"Give a multiple of {blocks} from {blocks} to {group.n_channels}.",
            )
        return width


def uniform(groups: Sequence[ChannelGroup], share: float, grid: Grid) -> Widths:
    """Keep the same share of every group.

    Example:
        >>> from types import SimpleNamespace
        >>> uniform([SimpleNamespace(name="a", n_channels=10, block=None)], 0.5, Grid())
        {'a': 5}
    """
    return {group.name: grid.nearest(group, share * group.n_channels) for group in groups}


def uniform_for_macs(macs: MacModel, groups: Sequence[ChannelGroup], share: float, grid: Grid) -> Widths:
    """Keep the same share of every group, as large as a budget of MACs allows; by bisection.

    Args:
        macs: MACs as a function of the widths.
        share: the budget, as a share of the present MACs.
    Raises:
        ConfigError: the narrowest widths are still above the budget.
    """
    _check_reach(macs, {g.name: grid.widths(g)[-1] for g in groups}, share)
    low, high = 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        fits = macs.at(uniform(groups, middle, grid)) <= share * macs.total
        low, high = (middle, high) if fits else (low, middle)
    return _topped_up(macs, groups, uniform(groups, low, grid), share, grid)


def _topped_up(macs: MacModel, groups: Sequence[ChannelGroup], widths: Widths, share: float, grid: Grid) -> Widths:
    """Widen groups by one step each, in order, while the budget holds."""
    for group in groups:
        wider = [w for w in grid.widths(group) if w > widths[group.name]]
        trial = {**widths, group.name: wider[-1]} if wider else widths
        if macs.at(trial) <= share * macs.total:
            widths = trial
    return widths


def by_cost(
    macs: MacModel,
    groups: Sequence[ChannelGroup],
    cost: Mapping[str, Callable[[int], float]],
    share: float,
    grid: Grid,
) -> Widths:
    """Narrow the group where the next step costs least per MAC saved, until the budget is met.

    Marginal costs are made to rise with the cut (running maximum), so that a group whose first channels are dear is
    not robbed of its last ones.

    Args:
        cost: for each group its cost at a width, in a unit that can be added up over groups.
        share: the budget, as a share of the present MACs.
    Raises:
        ConfigError: the narrowest widths are still above the budget.
    """
    ladders = {g.name: grid.widths(g) for g in groups}
    _check_reach(macs, {name: ladder[-1] for name, ladder in ladders.items()}, share)
    slopes = {name: _slopes([cost[name](w) for w in ladder], ladder) for name, ladder in ladders.items()}
    rung = dict.fromkeys(ladders, 0)
    widths = {name: ladder[0] for name, ladder in ladders.items()}
    while macs.at(widths) > share * macs.total:
        name = min(
            (n for n in ladders if rung[n] + 1 < len(ladders[n])),
            key=lambda n: (_price(macs, widths, n, ladders[n], slopes[n], rung[n]), n),
        )
        rung[name] += 1
        widths[name] = ladders[name][rung[name]]
    return widths


def _slopes(costs: Sequence[float], ladder: Sequence[int]) -> np.ndarray:
    """Cost per channel of each step down, never falling."""
    return np.maximum.accumulate(np.maximum(np.diff(costs), 0) / -np.diff(ladder)) if len(ladder) > 1 else np.zeros(0)


def _price(macs: MacModel, widths: Widths, name: str, ladder: Sequence[int], slopes: np.ndarray, rung: int) -> float:
    """Cost per MAC saved of a group's next step, rounded so that equal prices are equal."""
    step = ladder[rung] - ladder[rung + 1]
    saved = macs.at(widths) - macs.at({**widths, name: ladder[rung + 1]})
    return float(f"{slopes[rung] * step / max(saved, 1e-300):.9e}")


def _check_reach(macs: MacModel, narrowest: Widths, share: float) -> None:
    least = macs.at(narrowest) / macs.total
    if least > share:
        raise ConfigError(
            f"The 'macs' budget of {share:.3g} cannot be met: the narrowest allowed widths leave {least:.3g}.",
            remedy="Raise the budget, lower 'floor', 'min_channels' or 'align', or allow more groups.",
        )
