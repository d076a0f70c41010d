"""Which channels are combinations of others, as their readers see it: least squares, and the order to drop them in.

Let a be a group's channels as a reader sees them, C = E[a aᵀ] (centred where the reader has a bias to take up the mean,
raw elsewhere: under zero padding a constant is not the same at the border) and V the reader's columns. Keeping K and
dropping S, each reader becomes

    V_K + V_S M,  M = C_SK (C_KK + λ I)⁻¹,  at the error  tr(V_S (C_SS - C_SK C_KK⁻¹ C_KS) V_Sᵀ)

in its output. Channels are dropped one by one, each time the one whose loss costs least after compensation:

    cost_i = |v_i|² / (C⁻¹)_ii,    V -= v_i h / h_i,    C⁻¹ -= hᵀ h / h_i    with h the i-th row of C⁻¹

(optimal brain surgeon for neurons), relative to the reader's output energy tr(V C Vᵀ), added up over readers. Groups
wider than 1024 are ordered by pivoted Cholesky instead. All in float64 on the CPU; equal channels tie to the first.

Reference: Hassibi & Stork, NeurIPS 1992 (optimal brain surgeon); Chee et al., NeurIPS 2022 (interpolative
decomposition); differs in: the choice is made on the compensated readers, of which a group may have several.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from scipy.linalg import get_lapack_funcs
from torch import Tensor, nn

from weightfold.errors import DataError
from weightfold.graph.apply import find_tensor
from weightfold.graph.group import Axis, ChannelGroup
from weightfold.graph.observe import Key, SecondMoment, axis_rows

MAX_EXACT = 1024
"""Widest group (channels) whose channels are chosen by exact elimination."""

SPARSE = 0.85
"""Share of rows still in use below which matrices are cut down during elimination."""

Floats = np.ndarray
"""float64 arrays."""


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

    @cached_property
    def energy(self) -> float:
        """tr(V C Vᵀ): mean square of the reader's output, summed over outputs."""
        return float((self.second_CC * self.gram_CC).sum())

    @cached_property
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
        inner = self.second_CC[np.ix_(keep, keep)]
        np.fill_diagonal(inner, inner.diagonal() + inner.dtype.type(self.ridge(ridge)))
        return _solve(inner, self.second_CC[np.ix_(keep, drop)]).T

    def error(self, keep: Floats, drop: Floats, map_SK: Floats, ridge: float) -> float:
        """tr(V_S E[(a_S - M a_K)(a_S - M a_K)ᵀ] V_Sᵀ) over the output energy, for the M of `map`.

        By the normal equations M C_KK = C_SK - λ M, so it is tr(V_S (C_SS - (C_SK + λ M) Mᵀ) V_Sᵀ).
        """
        gram_SS = self.gram_CC[np.ix_(drop, drop)]
        whole = (gram_SS * self.second_CC[np.ix_(drop, drop)]).sum(dtype=np.float64)
        cross_SK = self.second_CC[np.ix_(drop, keep)] + map_SK * map_SK.dtype.type(self.ridge(ridge))
        return float(whole - ((gram_SS @ map_SK) * cross_SK).sum(dtype=np.float64)) * self.weight

    @cached_property
    def rough(self) -> Reader:
        """The same in float32, for weighing: quicker by half, prices agree to three digits and more."""
        return replace(self, second_CC=self.second_CC.astype(np.float32), gram_CC=self.gram_CC.astype(np.float32))

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
        factor, info = torch.linalg.cholesky_ex(matrix + share * (mean or 1.0) * torch.eye(len(a), dtype=matrix.dtype))
    return torch.cholesky_solve(torch.from_numpy(b), factor).numpy()


def readers_of(
    model: nn.Module, group: ChannelGroup, statistics: Mapping[Key, SecondMoment], per_channel: float = 1.0
) -> list[Reader]:
    """Gather a group's readers.

    Args:
        per_channel: samples needed for each channel; below 1 only a strong ridge gives sense to the result.
    Raises:
        DataError: too few samples; names the reader.
    """
    return [_reader(model, axis, statistics[axis.key], per_channel) for axis in group.role("read")]


def _reader(model: nn.Module, axis: Axis, moment: SecondMoment, per_channel: float) -> Reader:
    own = moment.of(axis)
    if own.count < per_channel * own.n_channels:
        raise DataError(
            f"'{axis.tensor}' reads {own.n_channels} channels; {own.count} samples are too few to relate them.",
            remedy="Raise 'stats_batches', or pass more data to once().",
        )
    centred = takes_mean(model, axis)
    second_CC = (own.covariance() if centred else own.second()).numpy()
    gram_CC = sum((rows @ rows.T for rows in axis_rows(model, axis)), torch.zeros(())).numpy()
    mask = apart(axis)
    return Reader(axis.key, second_CC * mask, gram_CC * mask, own.count, own.mean_C.numpy() if centred else None)


def takes_mean(model: nn.Module, axis: Axis) -> bool:
    """Whether the reader is a linear layer with a bias."""
    owner, leaf, weight = find_tensor(model, axis.tensor)
    bias = getattr(owner, leaf.replace("weight", "bias"), None)
    return weight.ndim == 2 and leaf.endswith("weight") and isinstance(bias, Tensor)


def apart(axis: Axis) -> Floats:
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


def choose(
    readers: Sequence[Reader], block: Floats | None, ridge: float, least: int = 1, exact: int = MAX_EXACT
) -> Path:
    """Order a group's channels from the most dispensable on, until ``least`` are left (at least one of every block).

    Args:
        exact: wider groups are ordered by pivoted Cholesky.
    """
    n_channels = len(readers[0].second_CC)
    blocks = np.zeros(n_channels, np.int64) if block is None else block
    if n_channels > exact:
        return cholesky_path(readers, blocks, ridge)
    return eliminate(readers, blocks, ridge, least)


def eliminate(readers: Sequence[Reader], block: Floats, ridge: float, least: int = 1) -> Path:
    """Drop the channel that costs least after compensation, again and again (see the module's equations)."""
    states = [_State.of(reader, ridge) for reader in readers]
    alive = np.arange(len(block))
    order, cost = [], [0.0]
    for number in _rounds(block)[: max(len(block) - least, 0)]:
        left = states[0].left
        scores = _rounded(np.sum([state.costs() for state in states], 0))
        i = int(np.where(left & (block[alive] == number), scores, np.inf).argmin())
        order.append(alive[i])
        cost.append(cost[-1] + max(float(scores[i]), 0.0))
        for state in states:
            state.drop(i)
        if left.mean() < SPARSE:
            alive = alive[left]
            states = [state.compact() for state in states]
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
    """The inverse C⁻¹ and the Gram matrix VᵀV of a reader's compensated columns, while channels are dropped."""

    inverse: Tensor
    gram: Tensor
    weight: float
    left: Floats

    @classmethod
    def of(cls, reader: Reader, ridge: float) -> _State:
        jitter = reader.ridge(max(ridge, 1e-10)) * np.eye(len(reader.second_CC))
        inverse = torch.from_numpy(_solve(reader.second_CC + jitter, np.eye(len(jitter))))
        gram = torch.from_numpy(reader.gram_CC).clone()
        return cls((inverse + inverse.T) / 2, gram, reader.weight, np.ones(len(gram), bool))

    def costs(self) -> Floats:
        inverse, gram = self.inverse.diagonal().numpy(), self.gram.diagonal().numpy()
        return self.weight * gram / np.maximum(np.where(self.left, inverse, 1.0), 1e-30)

    def drop(self, i: int) -> None:
        """Compensate for channel i: rank-one on the inverse, rank-two on the Gram matrix."""
        row = self.inverse[i].clone()
        h = row / row[i]
        u = self.gram[i] - h * (self.gram[i, i] / 2)
        self.gram.addmm_(torch.stack([h, u], 1), torch.stack([u, h]), alpha=-1)
        self.inverse.addr_(h, row, alpha=-1)
        for matrix in (self.inverse, self.gram):
            matrix[i] = matrix[:, i] = 0.0
        self.left[i] = False

    def compact(self) -> _State:
        """The same without the rows of dropped channels."""
        rows = torch.from_numpy(np.flatnonzero(self.left))
        inverse, gram = (matrix[rows][:, rows] for matrix in (self.inverse, self.gram))
        return _State(inverse, gram, self.weight, np.ones(len(rows), bool))


def cholesky_path(readers: Sequence[Reader], block: Floats, ridge: float) -> Path:
    """Choose what to keep by pivoted Cholesky on C, weighted by the norms of the readers' columns.

    Each pivot is the channel that is explained worst by those before it. O(C³ / 3), for wide groups.
    """
    total = np.zeros_like(readers[0].second_CC)
    for reader in readers:
        norm = np.sqrt(np.maximum(np.diag(reader.gram_CC), 0))
        total += reader.weight * norm[:, None] * norm * (reader.second_CC + reader.ridge(ridge) * np.eye(len(norm)))
    n_blocks = int(block.max()) + 1
    pivots, cost = _pivots(total) if n_blocks == 1 else _pivots_by_block(total, block, n_blocks)
    return Path(pivots[n_blocks:][::-1].copy(), cost[n_blocks:][::-1].copy())


def _pivots(total: Floats) -> tuple[Floats, Floats]:
    """The order of LAPACK's pivoted Cholesky, and what the pivots so far leave unexplained, from none to all."""
    [pivoted_cholesky] = get_lapack_funcs(("pstrf",), (total,))
    factor, order, rank, _ = pivoted_cholesky(total, lower=1)
    pivots = np.concatenate([order[:rank], np.sort(order[rank:])]).astype(np.int64) - 1
    explained = np.square(np.tril(factor)[:, :rank]).sum(0)
    gains = np.concatenate([explained, np.zeros(len(total) - rank)])
    return pivots, np.maximum(np.trace(total) - np.concatenate([[0.0], np.cumsum(gains)]), 0)


def _pivots_by_block(total: Floats, block: Floats, n_blocks: int) -> tuple[Floats, Floats]:
    """The same with one pivot of every block in turn."""
    n = len(block)
    factor, rest = np.zeros((n, n)), np.diag(total).copy()
    left, pivots, cost = np.ones(n, bool), [], [float(rest.sum())]
    for number in [*range(n_blocks), *_rounds(block)]:
        i = int(np.where(left & (block == number), _rounded(rest), -np.inf).argmax())
        k = len(pivots)
        column = total[:, i] - factor[:, :k] @ factor[i, :k]
        factor[:, k] = column / np.sqrt(max(rest[i], 1e-300))
        rest = np.maximum(rest - factor[:, k] ** 2, 0)
        left[i], rest[i] = False, 0.0
        pivots.append(i)
        cost.append(float(rest.sum()))
    return np.array(pivots, np.int64), np.array(cost)


def leading(second_CC: Floats, n_pivots: int) -> set[int]:
    """The channels that pivoted Cholesky would keep first: a signature of what a group holds, O(C k²).

    Example:
        >>> sorted(leading(np.diag([1.0, 5.0, 3.0]), 2))
        [1, 2]
    """
    rest = np.diag(second_CC).copy()
    factor = np.zeros((len(rest), n_pivots))
    pivots: list[int] = []
    for k in range(min(n_pivots, len(rest))):
        i = int(_rounded(rest / max(float(rest.max()), 1e-300)).argmax())
        factor[:, k] = (second_CC[:, i] - factor[:, :k] @ factor[i, :k]) / np.sqrt(max(rest[i], 1e-300))
        rest = np.maximum(rest - factor[:, k] ** 2, 0)
        rest[i] = 0.0
        pivots.append(i)
    return set(pivots)
