"""Fold: keep some channels of a group and express the others through them, by least squares on what their readers read.

Let a be a group's channels as a reader sees them, C = E[a aᵀ] (centred where the reader has a bias to take up the mean,
raw elsewhere: under zero padding a constant is not the same at the border) and V the reader's columns. Keeping K and
dropping S, each reader becomes

    V_K + V_S M,  M = C_SK (C_KK + λ I)⁻¹,  at the error  tr(V_S (C_SS - C_SK C_KK⁻¹ C_KS) V_Sᵀ)

in its output. Channels are dropped one by one, each time the one whose loss costs least after compensation:

    cost_i = |v_i|² / (C⁻¹)_ii,    V -= v_i h / h_i,    C⁻¹ -= hᵀ h / h_i    with h the i-th row of C⁻¹

(optimal brain surgeon for neurons), relative to the reader's output energy tr(V C Vᵀ), added up over readers. Groups
wider than 1024 are chosen by pivoted Cholesky instead. Kept channels keep their own norm statistics.

Cost: O(C³) a group once; statistics are second moments of a few batches.
Reference: Chee et al., NeurIPS 2022 (interpolative decomposition); Hassibi & Stork, NeurIPS 1992 (optimal brain
surgeon); differs in: the choice is made on the compensated readers, of which a group may have several.
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
from torch import Tensor, nn

from weightfold.config import Config, nearest
from weightfold.errors import ConfigError, DataError
from weightfold.graph.apply import find_tensor
from weightfold.graph.edit import Edit, fold
from weightfold.graph.group import Axis, ChannelGraph, ChannelGroup
from weightfold.graph.observe import SecondMoment, axis_rows, gather
from weightfold.methods.base import Key, Method, Moment, Proposal
from weightfold.size import MacModel
from weightfold.widths import Grid, Widths, by_cost, uniform

MAX_EXACT = 1024
"""Widest group (channels) whose channels are chosen by exact elimination."""

Floats = np.ndarray
"""float64 arrays."""


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


# readers --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Reader:
    """One reader of a group: what it reads and how strongly.

    Args:
        second_CC: second moment of the channels, centred if ``mean_C`` is given, float64.
        gram_CC: VᵀV, inner products of the reader's columns, float64.
        count: samples behind the moment.
        mean_C: mean of the channels where the reader's bias can take it up, else None.
    """

    key: Key
    second_CC: Floats
    gram_CC: Floats
    count: int
    mean_C: Floats | None = None

    @property
    def energy(self) -> float:
        """tr(V C Vᵀ): mean square of the reader's output, summed over outputs."""
        return float((self.second_CC * self.gram_CC).sum())

    @property
    def weight(self) -> float:
        """One over the energy; 0 for a reader without output."""
        energy = self.energy
        return 1 / energy if energy > 0 else 0.0

    def ridge(self, share: float) -> float:
        """The λ that stands for a share of the mean diagonal."""
        mean = float(np.diag(self.second_CC).mean())
        return share * (mean if mean > 0 else 1.0)

    def map(self, keep: Floats, drop: Floats, ridge: float) -> Floats:
        """M = C_SK (C_KK + λ I)⁻¹, shape (S, K): dropped channels as combinations of kept ones."""
        inner = self.second_CC[np.ix_(keep, keep)] + self.ridge(ridge) * np.eye(len(keep))
        return _solve(inner, self.second_CC[np.ix_(keep, drop)]).T

    def error(self, keep: Floats, drop: Floats, map_SK: Floats) -> float:
        """tr(V_S E[(a_S - M a_K)(a_S - M a_K)ᵀ] V_Sᵀ) over the output energy."""
        cross = map_SK @ self.second_CC[np.ix_(keep, drop)]
        inner = map_SK @ self.second_CC[np.ix_(keep, keep)] @ map_SK.T
        residual = self.second_CC[np.ix_(drop, drop)] - cross - cross.T + inner
        return float((residual * self.gram_CC[np.ix_(drop, drop)]).sum()) * self.weight

    def shift(self, keep: Floats, drop: Floats, map_SK: Floats) -> Floats:
        """What the dropped channels leave for the bias: their mean less what the kept ones bring of it, shape (C,)."""
        assert self.mean_C is not None
        out = np.zeros_like(self.mean_C)
        out[drop] = self.mean_C[drop] - map_SK @ self.mean_C[keep]
        return out


def _solve(a: Floats, b: Floats) -> Floats:
    """Solve a symmetric positive semidefinite system; a singular one with the least ridge that helps."""
    matrix, mean = torch.from_numpy(a), float(np.diag(a).mean())
    factor, info = torch.linalg.cholesky_ex(matrix)
    share = 1e-13
    while int(info):
        share *= 10
        factor, info = torch.linalg.cholesky_ex(matrix + share * (mean or 1.0) * torch.eye(len(a), dtype=torch.float64))
    return torch.cholesky_solve(torch.from_numpy(b), factor).numpy()


def readers_of(model: nn.Module, group: ChannelGroup, statistics: Mapping[Key, SecondMoment]) -> list[Reader]:
    """Gather a group's readers.

    Raises:
        DataError: fewer samples than channels; names the reader.
    """
    return [_reader(model, axis, statistics[axis.key]) for axis in group.role("read")]


def _reader(model: nn.Module, axis: Axis, moment: SecondMoment) -> Reader:
    own = moment.of(axis)
    if own.count < own.n_channels:
        raise DataError(
            f"'{axis.tensor}' reads {own.n_channels} channels; {own.count} samples are too few to relate them.",
            remedy="Raise 'stats_batches', or observe more data.",
        )
    centred = _takes_mean(model, axis)
    second_CC = (own.covariance() if centred else own.second()).numpy()
    gram_CC = sum((rows @ rows.T for rows in axis_rows(model, axis)), torch.zeros(())).numpy()
    apart = _apart(axis)
    return Reader(axis.key, second_CC * apart, gram_CC * apart, own.count, own.mean_C.numpy() if centred else None)


def _takes_mean(model: nn.Module, axis: Axis) -> bool:
    """Whether the reader is a linear layer with a bias."""
    owner, leaf, weight = find_tensor(model, axis.tensor)
    bias = getattr(owner, leaf.replace("weight", "bias"), None)
    return weight.ndim == 2 and leaf.endswith("weight") and isinstance(bias, Tensor)


def _apart(axis: Axis) -> Floats:
    """1 where two channels reach the same outputs, 0 where they lie in different groups of a grouped convolution."""
    slab = (axis.index[:, 0] // (axis.size // axis.slabs)).numpy()
    return (slab[:, None] == slab[None, :]).astype(np.float64)


# choice ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Path:
    """The order in which channels are dropped, and what it has cost after each.

    Args:
        order: channels in the order of dropping, shape (D,); with blocks, one of every block in turn.
        cost: relative error of the readers' outputs after 0..D channels, shape (D + 1,).
    """

    order: Floats
    cost: Floats

    def kept(self, n_channels: int, width: int) -> Floats:
        """The channels left at a width, ascending."""
        keep = np.ones(n_channels, bool)
        keep[self.order[: n_channels - width]] = False
        return np.flatnonzero(keep)


def choose(readers: Sequence[Reader], block: Floats | None, ridge: float) -> Path:
    """Order a group's channels from the most to the least dispensable, down to one of every block."""
    n_channels = len(readers[0].second_CC)
    blocks = np.zeros(n_channels, np.int64) if block is None else block
    return (eliminate if n_channels <= MAX_EXACT else cholesky_path)(readers, blocks, ridge)


def eliminate(readers: Sequence[Reader], block: Floats, ridge: float) -> Path:
    """Drop the channel that costs least after compensation, again and again (see the module's equations)."""
    states = [_State.of(reader, ridge) for reader in readers]
    left = np.ones(len(block), bool)
    order, cost = [], [0.0]
    for number in _rounds(block):
        score = np.where(left & (block == number), _rounded(np.sum([s.costs(left) for s in states], 0)), np.inf)
        i = int(score.argmin())
        order.append(i)
        cost.append(cost[-1] + max(float(score[i]), 0.0))
        left[i] = False
        for state in states:
            state.drop(i)
    return Path(np.array(order, np.int64), np.array(cost))


def _rounds(block: Floats) -> list[int]:
    """The block to drop from at each step: all in turn, until each has one channel left."""
    n_blocks = int(block.max()) + 1
    return list(range(n_blocks)) * (len(block) // n_blocks - 1)


def _rounded(score: Floats) -> Floats:
    """Scores without their last digits, so that equal channels tie and the first one is taken."""
    return np.round(score, 13)


@dataclass(eq=False)
class _State:
    """The inverse C⁻¹ and the Gram matrix of a reader's compensated columns, while channels are dropped."""

    inverse: Floats
    gram: Floats
    weight: float

    @classmethod
    def of(cls, reader: Reader, ridge: float) -> _State:
        jitter = reader.ridge(max(ridge, 1e-10)) * np.eye(len(reader.second_CC))
        inverse = _solve(reader.second_CC + jitter, np.eye(len(jitter)))
        return cls((inverse + inverse.T) / 2, reader.gram_CC.copy(), reader.weight)

    def costs(self, left: Floats) -> Floats:
        diagonal = np.where(left, np.diag(self.inverse), 1.0)
        return self.weight * np.diag(self.gram) / np.maximum(diagonal, 1e-30)

    def drop(self, i: int) -> None:
        """Compensate for channel i: rank-one on the inverse, rank-two on the Gram matrix."""
        h = self.inverse[i] / self.inverse[i, i]
        g = self.gram[i].copy()
        self.gram += np.outer(h, h) * g[i] - np.outer(h, g) - np.outer(g, h)
        self.inverse -= np.outer(h, self.inverse[i])
        self.inverse[i] = self.inverse[:, i] = self.gram[i] = self.gram[:, i] = 0.0


def cholesky_path(readers: Sequence[Reader], block: Floats, ridge: float) -> Path:
    """Choose what to keep by pivoted Cholesky on C, weighted by the norms of the readers' columns.

    Each pivot is the channel that is explained worst by those before it. O(C³ / 3), for wide groups.
    """
    total = np.zeros_like(readers[0].second_CC)
    for reader in readers:
        norm = np.sqrt(np.maximum(np.diag(reader.gram_CC), 0))
        total += reader.weight * norm[:, None] * norm * (reader.second_CC + reader.ridge(ridge) * np.eye(len(norm)))
    n = len(block)
    factor, rest = np.zeros((n, n)), np.diag(total).copy()
    left, pivots, cost = np.ones(n, bool), [], [float(rest.sum())]
    for number in [*range(int(block.max()) + 1), *_rounds(block)]:
        i = int(np.where(left & (block == number), _rounded(rest), -np.inf).argmax())
        k = len(pivots)
        column = total[:, i] - factor[:, :k] @ factor[i, :k]
        factor[:, k] = column / np.sqrt(max(rest[i], 1e-300))
        rest = np.maximum(rest - factor[:, k] ** 2, 0)
        left[i], rest[i] = False, 0.0
        pivots.append(i)
        cost.append(float(rest.sum()))
    n_blocks = int(block.max()) + 1
    return Path(np.array(pivots[n_blocks:][::-1], np.int64), np.array(cost[n_blocks:][::-1]))


# the method -----------------------------------------------------------------------------------------------------------


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
        correlation = _rounded(second[i, keep] / scale)
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
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
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
        readers, ridge = readers_of(moment.model, group, moment.statistics), self._ridge(moment)
        path = choose(readers, None if group.block is None else group.block.numpy(), ridge)
        norms = gather(moment.model, group).norm(dim=1).numpy()
        random = torch.rand(group.n_channels, generator=moment.generator).numpy()
        return _Job(group, readers, path, norms, random, ridge, self._grid())

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
