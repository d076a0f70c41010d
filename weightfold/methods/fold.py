"""Fold: keep some channels of a group and express the others through them, by least squares on what their readers read.

The equations stand in `weightfold.redundancy`. Kept channels keep their own norm statistics; every reader gets its own
map; what a linear reader loses of the mean goes into its bias. Hidden units, convolution channels, residual streams and
groups with blocks fold alike.

Cost: O(C³) a group, once; second moments of a few batches.
Reference: Chee et al., NeurIPS 2022 (interpolative decomposition); differs in: one choice for several readers.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from weightfold.config import Config, nearest
from weightfold.errors import ConfigError, DataError
from weightfold.graph.edit import Edit, fold
from weightfold.graph.group import ChannelGraph, ChannelGroup
from weightfold.graph.observe import gather
from weightfold.methods.base import Method, Moment, Proposal
from weightfold.redundancy import MAX_EXACT, Floats, Path, Reader, choose, readers_of
from weightfold.size import MacModel
from weightfold.widths import Grid, Widths, by_cost, uniform

STRONG = 0.05
"""Ridge from which a quarter as many samples as channels will do."""


class FoldConfig(Config):
    """Settings of `fold`."""

    keep: float = Field(default=0.7, gt=0, le=1)
    """share of channels that every group keeps"""
    macs: float | None = Field(default=None, gt=0, le=1)
    """share of multiply-accumulates to keep, in place of `keep`: widths are then chosen by cost"""
    widths: dict[str, int] | None = None
    """channels that each group keeps, by name, in place of `keep` and `macs`: the same widths as another plan"""
    at: float = Field(default=0.1, ge=0, lt=1)
    """when to fold, as a share of the run's steps; a one-shot folds at once"""
    ridge: float | None = Field(default=None, ge=0)
    """λ over the mean of C's diagonal; by default 0.1 in mid-training, 0.001 in a one-shot"""
    stats_batches: int = Field(default=16, ge=1)
    """batches before the event during which statistics are taken"""
    align: int = Field(default=0, ge=0)
    """widths are multiples of this; 0 for any"""
    groups: str | None = None
    """pattern of the names of groups to fold, such as "layer?.*.conv1"; all by default"""
    min_channels: int = Field(default=1, ge=1)
    """channels that every group keeps at least"""
    floor: float = Field(default=0.1, ge=0, le=1)
    """share of channels that every group keeps at least when `macs` is given"""


@dataclass(frozen=True, eq=False)
class _Job:
    """One group about to be folded."""

    group: ChannelGroup
    readers: Sequence[Reader]
    path: Path
    norms: Floats
    random: Floats
    ridge: float
    grid: Grid

    def cost(self, width: int) -> float:
        return float(self.path.cost[self.group.n_channels - width])

    def price(self, keep: Floats) -> float:
        """Relative error of the readers' outputs for any kept set, compensated; the mean over readers."""
        drop = np.setdiff1d(np.arange(self.group.n_channels), keep)
        return float(np.mean([r.error(keep, drop, r.map(keep, drop, self.ridge)) for r in self.readers]))

    def proposal(self, width: int) -> Proposal | None:
        """The fold to a width, or None where that would change nothing."""
        n = self.group.n_channels
        if width >= n:
            return None
        keep = self.path.kept(n, width)
        predicted = self.price(keep)
        halfway = self.grid.nearest(self.group, (n + width + 1) // 2)
        less = partial(self.proposal, halfway if halfway > width else n)
        return Proposal(self.edit(keep), self.why(keep, predicted), predicted, less)

    def edit(self, keep: Floats) -> Edit:
        drop = np.setdiff1d(np.arange(self.group.n_channels), keep)
        maps = {r.key: r.map(keep, drop, self.ridge) for r in self.readers}
        shift = {r.key: r.shift(keep, drop, maps[r.key]) for r in self.readers if r.mean_C is not None}
        return fold(
            self.group,
            torch.from_numpy(keep),
            {key: torch.from_numpy(np.ascontiguousarray(value)) for key, value in maps.items()},
            {key: torch.from_numpy(value) for key, value in shift.items()},
        )

    def why(self, keep: Floats, predicted: float) -> dict[str, Any]:
        n = self.group.n_channels
        dropped = self.path.order[: n - len(keep)]
        costs = np.diff(self.path.cost)[: len(dropped)]
        return {
            "metric": "error of the readers' outputs after compensation",
            "unit": "share of the readers' output energy",
            "value": predicted,
            "choice": "elimination" if n <= MAX_EXACT else "pivoted Cholesky",
            "ridge": self.ridge,
            "readers": {r.key[0]: r.count for r in self.readers},
            "dropped": [
                {"channel": int(i), "cost": float(c), **self.partner(int(i), keep)}
                for i, c in zip(dropped, costs, strict=True)
            ],
            "rejected": [
                self.rejected("magnitude", self.norms, len(keep), predicted),
                self.rejected("random", self.random, len(keep), predicted),
            ],
        }

    def partner(self, i: int, keep: Floats) -> dict[str, Any]:
        """The kept channel that is most like a dropped one, where it is read most strongly."""
        second = max(self.readers, key=lambda r: r.gram_CC[i, i] * r.second_CC[i, i] * r.weight).second_CC
        scale = np.sqrt(np.maximum(np.diag(second)[keep] * second[i, i], 1e-300))
        correlation = np.round(second[i, keep] / scale, 13)
        j = int(np.abs(correlation).argmax())
        coefficient = second[i, keep[j]] / max(float(second[keep[j], keep[j]]), 1e-300)
        return {"partner": int(keep[j]), "correlation": float(correlation[j]), "coefficient": float(coefficient)}

    def rejected(self, choice: str, score: Floats, width: int, chosen: float) -> dict[str, Any]:
        """What keeping the channels of the highest scores instead would cost, compensated alike."""
        value = self.price(_top(score, self.group.block, width))
        reason = "larger predicted error" if value > chosen else "no larger predicted error; the choice is greedy"
        return {"choice": choice, "value": value, "reason": reason}


def _top(score: Floats, block: Tensor | None, width: int) -> Floats:
    """The channels of the highest scores, equally many of every block, ascending; the first of equal ones."""
    blocks = np.zeros(len(score), np.int64) if block is None else block.numpy()
    n_blocks = int(blocks.max()) + 1
    best = [np.flatnonzero(blocks == b)[np.argsort(-score[blocks == b], kind="stable")] for b in range(n_blocks)]
    return np.sort(np.concatenate([mine[: width // n_blocks] for mine in best]))


def eligible(graph: ChannelGraph, pattern: str | None) -> tuple[list[ChannelGroup], dict[str, str]]:
    """The groups that can be folded, and why the others cannot.

    Raises:
        ConfigError: the pattern matches no group; names the nearest.
    """
    named = [g for g in graph if pattern is None or fnmatch.fnmatchcase(g.name, pattern)]
    if not named and pattern is not None:
        raise ConfigError(f"No group matches '{pattern}'.", remedy=nearest(pattern, [g.name for g in graph]))
    refused = {g.name: reason for g in named if (reason := _refusal(g)) is not None}
    return [g for g in named if g.name not in refused], refused


def _refusal(group: ChannelGroup) -> str | None:
    if group.kind != "channels":
        return "it consists of whole blocks"
    if "merge" not in group.admits:
        return group.reasons.get("merge", "it does not admit 'merge'")
    blind = [axis.tensor for axis in group.role("read") if axis.tap is None]
    if blind or not group.role("read"):
        return f"what '{blind[0]}' reads cannot be observed" if blind else "nothing reads it"
    return None


class Fold(Method):
    """Folds the network once: after a share of the run's steps, or at once on a trained network.

    Example:
        >>> import weightfold as wf
        >>> from weightfold.graph.observe import Observer
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> x, graph = torch.randn(256, 4, generator=torch.Generator().manual_seed(0)), wf.trace(net, torch.zeros(1, 4))
        >>> with Observer(net, graph) as observer:
        ...     _ = net(x)
        >>> moment = Moment(net, graph, 0, 0, observer.statistics(), torch.zeros(1, 4), torch.Generator())
        >>> [proposal] = Fold(keep=0.5).step(moment)
        >>> proposal.edit.n_channels, proposal.edit.n_after, proposal.less().edit.n_after
        (8, 4, 6)
    """

    name: ClassVar[str] = "fold"
    Config: ClassVar[type[Config]] = FoldConfig

    def __init__(self, config: Config | None = None, **settings: Any) -> None:
        super().__init__(config, **settings)
        self._done = False

    def event(self, total_steps: int) -> int:
        """The step at which the network is folded."""
        return max(1, round(self.config.at * total_steps)) if total_steps else 0

    def prepare(self, moment: Moment) -> None:
        """Check that some group can be folded and that a MACs target can be met.

        Raises:
            ConfigError: nothing can be folded (with the reasons), or the target is out of reach.
        """
        groups, refused = eligible(moment.graph, self.config.groups)
        if not groups:
            reasons = "; ".join(f"'{name}': {why}" for name, why in list(refused.items())[:4])
            raise ConfigError(f"No group of this network can be folded: {reasons or 'it has none'}.")

    def observes(self, step: int, total_steps: int) -> bool:
        """During the last `stats_batches` steps before the event; always in a one-shot."""
        event = self.event(total_steps)
        return total_steps == 0 or (not self._done and event - self.config.stats_batches <= step < event)

    def step(self, moment: Moment) -> list[Proposal]:
        """Propose one fold per group when the time has come."""
        if moment.total_steps and (self._done or moment.step < self.event(moment.total_steps)):
            return []
        self._done = True
        jobs = self._jobs(moment)
        widths = self._widths(moment, jobs)
        proposals = [job.proposal(widths[job.group.name]) for job in jobs]
        return [proposal for proposal in proposals if proposal is not None]

    def _ridge(self, moment: Moment) -> float:
        if self.config.ridge is not None:
            return self.config.ridge
        return 0.1 if moment.total_steps else 1e-3

    def _jobs(self, moment: Moment) -> list[_Job]:
        groups, _ = eligible(moment.graph, self.config.groups)
        seen = [g for g in groups if all(axis.key in moment.statistics for axis in g.role("read"))]
        if groups and not seen:
            raise DataError(
                "No group has statistics to fold by.", remedy="Run some batches under an Observer of the same graph."
            )
        return [self._job(moment, group) for group in seen]

    def _job(self, moment: Moment, group: ChannelGroup) -> _Job:
        ridge = self._ridge(moment)
        readers = readers_of(moment.model, group, moment.statistics, 1.0 if ridge < STRONG else 0.25)
        path = choose(readers, None if group.block is None else group.block.numpy(), ridge, self._least(group))
        norms = gather(moment.model, group).norm(dim=1).numpy()
        random = torch.rand(group.n_channels, generator=moment.generator).numpy()
        return _Job(group, readers, path, norms, random, ridge, self._grid())

    def _least(self, group: ChannelGroup) -> int:
        """The narrowest width that can be asked for."""
        if self.config.widths is not None:
            return self.config.widths.get(group.name, group.n_channels)
        if self.config.macs is None:
            return self._grid().nearest(group, self.config.keep * group.n_channels)
        return self._grid().widths(group)[-1]

    def _grid(self) -> Grid:
        floor = 0.0 if self.config.macs is None else self.config.floor
        return Grid(self.config.align, self.config.min_channels, floor)

    def _widths(self, moment: Moment, jobs: Sequence[_Job]) -> Widths:
        groups = [job.group for job in jobs]
        if self.config.widths is not None:
            return {g.name: self._grid().given(g, self.config.widths.get(g.name, g.n_channels)) for g in groups}
        if self.config.macs is None:
            return uniform(groups, self.config.keep, self._grid())
        macs = MacModel.of(moment.model, moment.graph, moment.example)
        return by_cost(macs, groups, {job.group.name: job.cost for job in jobs}, self.config.macs, self._grid())

    def state_dict(self) -> dict[str, Any]:
        return {"done": self._done}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._done = bool(state["done"])
