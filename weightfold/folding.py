"""One group about to be folded: whom to keep at any width, at what price, and the edit that does it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from weightfold.graph.edit import Edit, fold
from weightfold.graph.group import ChannelGroup
from weightfold.graph.observe import Key
from weightfold.price import Trails
from weightfold.redundancy import Floats, Path, Reader

MOST = 100.0
"""Factor by which balancing takes a column to have grown or shrunk, at most."""

ROUGH = 0.01
"""Ridge from which float32 solves a wide group's maps to three digits: their condition number is at most C / ridge."""


@dataclass(frozen=True, eq=False)
class Job:
    """A group with its readers and the order in which its channels go.

    Args:
        norms: norm of the weights that write each channel: the control "magnitude", shape (C,).
        random: a random score: the control "random", shape (C,).
        choice: which of the orders is followed: "redundancy", "magnitude" or "random".
        balance: whether the edit evens out writers and readers, where the group admits it.
        exact: whether the order comes from exact elimination.
        latest: each reader's latest map, with the kept set that it is for, by the reader's id.
        energies: lost energy by kept set, as far as it was asked for.
    """

    group: ChannelGroup
    readers: Sequence[Reader]
    path: Path
    norms: Floats
    random: Floats
    ridge: float
    exact: bool
    choice: str = "redundancy"
    balance: bool = False
    latest: dict[int, tuple[bytes, Floats]] = field(default_factory=dict)
    energies: dict[bytes, float] = field(default_factory=dict)

    @property
    def observed(self) -> ChannelGroup:
        """The group whose channels the readers are seen to read."""
        return self.group

    @property
    def _weighing(self) -> Sequence[Reader]:
        """The readers by which candidates are weighed: wide groups in float32, where the ridge is strong enough."""
        return self.readers if self.exact or self.ridge < ROUGH else [reader.rough for reader in self.readers]

    def kept(self, width: int) -> Floats:
        """The channels that stay at a width, ascending."""
        if self.choice == "redundancy":
            return self.path.kept(self.group.n_channels, width)
        return _top(self.norms if self.choice == "magnitude" else self.random, self.group.block, width)

    def cost(self, width: int) -> float:
        """What the order has cost down to a width, in its own unit."""
        return float(self.path.cost[self.group.n_channels - width])

    def lost_energy(self, keep: Floats) -> float:
        """Relative error of the readers' outputs for any kept set, compensated; the mean over readers."""
        if keep.tobytes() not in self.energies:
            drop = self._dropped(keep)
            errors = [r.error(keep, drop, self._map(r, keep, drop), self.ridge) for r in self._weighing]
            self.energies[keep.tobytes()] = float(np.mean(errors))
        return self.energies[keep.tobytes()]

    def residual(self, trails: Trails, width: int) -> Tensor | None:
        """What folding to a width does to each sample's loss, first order; None where a reader left no trail."""
        keep = self.kept(width)
        drop = self._dropped(keep)
        total = torch.zeros(trails.n_samples, dtype=torch.float64)
        for reader in self._weighing:
            if (self.group.name, reader.key) not in trails.by_reader:
                return None
            map_SK = self._map(reader, keep, drop)
            left = None if reader.mean_C is None else reader.shift(keep, drop, map_SK)[drop]
            total += trails.residual(self.group.name, reader.key, keep, drop, map_SK, left)
        return total

    def edit(self, keep: Floats) -> Edit:
        """The fold onto a kept set.

        Readers' columns grow by what they take over, and with them the gradients of what writes the kept channels: at
        the learning rate of the wide network, training can then leap out of its valley. Where channels may be rescaled,
        each is scaled by the root of its columns' growth, so that writers grow as much as readers.
        """
        drop = self._dropped(keep)
        maps = {r.key: self._map(r, keep, drop) for r in self.readers}
        shift = {r.key: r.shift(keep, drop, maps[r.key]) for r in self.readers if r.mean_C is not None}
        found = fold(
            self.group,
            torch.from_numpy(keep),
            {key: torch.from_numpy(np.ascontiguousarray(value)) for key, value in maps.items()},
            {key: torch.from_numpy(value) for key, value in shift.items()},
        )
        gauge = _gauge(self.group) if self.balance else None
        if gauge is None:
            return found
        return replace(found, scale=torch.from_numpy(self._growth(keep, drop, maps) ** 0.5), gauge=gauge)

    def _growth(self, keep: Floats, drop: Floats, maps: Mapping[Key, Floats]) -> Floats:
        """How much the norm of what reads each kept channel grows, shape (K,), between 1 / `MOST` and `MOST`."""
        before_K = after_K = np.zeros(len(keep))
        for reader in self._weighing:
            map_SK = maps[reader.key].astype(reader.gram_CC.dtype)
            gram_SK = reader.gram_CC[np.ix_(drop, keep)]
            own_K = np.diag(reader.gram_CC)[keep]
            taken_SK = reader.gram_CC[np.ix_(drop, drop)] @ map_SK
            before_K = before_K + own_K
            after_K = after_K + own_K + ((2 * gram_SK + taken_SK) * map_SK).sum(0)
        idle_K = before_K <= 0
        growth_K = np.sqrt(np.maximum(after_K, 0) / np.where(idle_K, 1.0, before_K))
        return np.where(idle_K, 1.0, np.clip(growth_K, 1 / MOST, MOST))

    def _map(self, reader: Reader, keep: Floats, drop: Floats) -> Floats:
        """M of a reader; asked for the same kept set again, it is not solved again."""
        known = self.latest.get(id(reader))
        if known is None or known[0] != keep.tobytes():
            known = self.latest[id(reader)] = keep.tobytes(), reader.map(keep, drop, self.ridge)
        return known[1]

    def _dropped(self, keep: Floats) -> Floats:
        return np.setdiff1d(np.arange(self.group.n_channels), keep)

    # reasons --------------------------------------------------------------------------------------------------------

    def why(self, keep: Floats, lost_energy: float) -> dict[str, Any]:
        """Metric, value, partners and rejected choices, as plain data."""
        dropped, costs = self._in_order(len(keep))
        return {
            "metric": "error of the readers' outputs after compensation",
            "unit": "share of the readers' output energy",
            "value": lost_energy,
            "choice": self._method(),
            "ridge": self.ridge,
            "balanced": self.balance and _gauge(self.group) is not None,
            "readers": {r.key[0]: r.count for r in self.readers},
            "dropped": [
                {"channel": int(i), "cost": float(c), **partner}
                for i, c, partner in zip(dropped, costs, self._partners(dropped, keep), strict=True)
            ],
            "rejected": [
                self._rejected(choice, score, len(keep), lost_energy)
                for choice, score in (("magnitude", self.norms), ("random", self.random))
                if choice != self.choice
            ],
        }

    def _method(self) -> str:
        if self.choice != "redundancy":
            return self.choice
        return "elimination" if self.exact else "pivoted Cholesky"

    def _in_order(self, width: int) -> tuple[Floats, Floats]:
        """The dropped channels as they went, and the cost of each."""
        if self.choice == "redundancy":
            dropped = self.path.order[: self.group.n_channels - width]
            return dropped, np.diff(self.path.cost)[: len(dropped)]
        dropped = self._dropped(self.kept(width))
        return dropped, (self.norms if self.choice == "magnitude" else self.random)[dropped]

    def _partners(self, dropped: Floats, keep: Floats) -> list[dict[str, Any]]:
        """For each dropped channel the kept one that is most like it, where it is read most strongly."""
        read_RC = np.stack([np.diag(r.gram_CC) * np.diag(r.second_CC) * r.weight for r in self.readers])
        strongest_S = read_RC[:, dropped].argmax(0)
        found: list[dict[str, Any]] = [{}] * len(dropped)
        for number, reader in enumerate(self.readers):
            mine = np.flatnonzero(strongest_S == number)
            second_SK, energy_C = reader.second_CC[np.ix_(dropped[mine], keep)], np.diag(reader.second_CC)
            scale_SK = np.sqrt(np.maximum(energy_C[keep] * energy_C[dropped[mine], None], 1e-300))
            correlation_SK = np.round(second_SK / scale_SK, 13)
            for at, j, second_K, correlation_K in zip(
                mine, np.abs(correlation_SK).argmax(1), second_SK, correlation_SK, strict=True
            ):
                coefficient = float(second_K[j] / max(float(energy_C[keep[j]]), 1e-300))
                found[at] = {
                    "partner": int(keep[j]), "correlation": float(correlation_K[j]), "coefficient": coefficient
                }  # fmt: skip
        return found

    def _rejected(self, choice: str, score: Floats, width: int, chosen: float) -> dict[str, Any]:
        """What keeping the channels of the highest scores instead would cost, compensated alike."""
        value = self.lost_energy(_top(score, self.group.block, width))
        reason = "larger predicted error" if value > chosen else "no larger predicted error; the choice is greedy"
        return {"choice": choice, "value": value, "reason": reason}


def _gauge(group: ChannelGroup) -> int | None:
    """The number of the gauge that scales each channel by a factor of its own; None where there is none."""
    for number, gauge in enumerate(group.gauges):
        every = torch.equal(torch.sort(gauge.channel).values, torch.arange(group.n_channels))
        if gauge.kind == "positive" and every:
            return number
    return None


def _top(score: Floats, block: Tensor | None, width: int) -> Floats:
    """The channels of the highest scores, equally many of every block, ascending; the first of equal ones."""
    blocks = np.zeros(len(score), np.int64) if block is None else block.numpy()
    n_blocks = int(blocks.max()) + 1
    best = [np.flatnonzero(blocks == b)[np.argsort(-score[blocks == b], kind="stable")] for b in range(n_blocks)]
    return np.sort(np.concatenate([mine[: width // n_blocks] for mine in best]))
