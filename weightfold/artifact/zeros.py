"""Which codes of a matrix are zero: the chance of each, learned from the rows before it.

odds(i, j) = odds of row i's density class * f_j * h. f_j = (m_j + a f_g) / (e + a) compares the m_j codes of column j
that were not zero so far with the e that the classes of these rows let expect; f_g is the same ratio over the columns
of one group (kernel positions of one input channel), and a weighs it. h is the same kind of ratio over all codes that
have 0, 1 or 2 neighbours that are not zero, in the kernel or image that a group of columns is.

Counts are whole numbers; all else is + - * / of single float64 numbers: the same chances on every machine.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from math import isqrt, prod
from typing import Any

import numpy as np
import numpy.typing as npt

from weightfold.artifact.rangecoder import HIGHEST, LOWEST, SCALE

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Flags = npt.NDArray[np.bool_]

N_CLASSES = 26
PRIORS = (0.5, 2.0, 8.0, 64.0)
"""How many codes the expectation weighs against what a column shows."""
_GROUP_PRIOR = 4.0
_JOINT_PRIOR = 2.0
N_NEAR = 7
"""Values of the sum of a flag's neighbours: two count twice, two once."""
_BLOCK = 1 << 18

_SMALL = np.array([SCALE >> (1 + s // 2) if s % 2 == 0 else 92682 >> (2 + s // 2) for s in range(N_CLASSES + 1)])
_CHANCES = np.concatenate([SCALE - _SMALL[:0:-1], _SMALL])[::-1].astype(np.int64)
"""Chance of a code that is not zero, by density class from -26 to 26; class 0 is one half."""


def class_chances(classes_R: Ints) -> Ints:
    """The share of codes that are not zero in a row of each class, out of 65,536.

    Example:
        >>> class_chances(np.array([-4, -1, 0, 2])).tolist()
        [8192, 23170, 32768, 49152]
    """
    return _CHANCES[classes_R + N_CLASSES]


def density_classes(counts_R: Ints, n_columns: int) -> Ints:
    """The class of a row by its codes that are not zero: share 2^(-1 - s/2) for class -s, 1 less that for class s.

    Example:
        >>> density_classes(np.array([1, 12, 50, 100]), 100).tolist()
        [-11, -4, 0, 14]
    """
    few = np.minimum(counts_R, n_columns - counts_R)
    share = np.maximum(few, 0.35) * SCALE / n_columns
    middles = _SMALL[:-1] * 0.8408964152537145  # 2^(-1/4): the geometric middle of two classes
    depth = (share[:, None] < middles).sum(axis=1)
    return np.where(2 * counts_R <= n_columns, -depth, depth).astype(np.int64)


@dataclass(frozen=True)
class Grid:
    """What a group of columns is: an image of `width` to a row, `size` pixels in all; size 1: nothing.

    Args:
        size: columns of one group.
        width: columns of one row of the image.
    """

    size: int
    width: int

    @classmethod
    def candidates(cls, shape: tuple[int, ...], n_columns: int) -> tuple[Grid, ...]:
        """What the columns of a tensor may be, the likeliest first; 8 at most.

        Kernels know it; for matrices, every square that divides their columns, as they may read flattened images.

        Example:
            >>> Grid.candidates((8, 3, 5, 5), 75), Grid.candidates((9, 100), 100)[:2]
            ((Grid(size=25, width=5), Grid(size=1, width=1)), (Grid(size=1, width=1), Grid(size=100, width=10)))
        """
        kernel = prod(shape[2:])
        if len(shape) > 2 and kernel > 1 and n_columns == prod(shape[1:]):
            return cls(kernel, shape[-1]), cls(1, 1)
        sides = [side for side in range(isqrt(n_columns), 1, -1) if n_columns % (side * side) == 0]
        return cls(1, 1), *(cls(side * side, side) for side in sides[:7])

    def neighbours(self, n_columns: int) -> Ints:
        """The columns to the left of each, above, above left and above right, -1 where there is none; shape (4, C)."""
        place = np.arange(n_columns)
        across, lower = place % self.width, place % self.size >= self.width
        first, last = across == 0, across == self.width - 1
        known = np.stack([~first, lower, lower & ~first, lower & ~last])
        steps = np.array([[1], [self.width], [self.width + 1], [self.width - 1]])
        return np.where(known, place - steps, -1)


@dataclass(frozen=True, eq=False)
class Columns:
    """The columns that are coded, and how they lie to each other.

    Args:
        n_all: columns of the matrix.
        live_C: the columns that are coded, in order, int64, shape (C,).
        grid: what they are.
    """

    n_all: int
    live_C: Ints
    grid: Grid

    @cached_property
    def neighbours(self) -> Ints:
        """Places of each column's neighbours among the coded ones; C where there is none; shape (4, C)."""
        n = len(self.live_C)
        place = np.full(self.n_all + 1, n)
        place[self.live_C] = np.arange(n)
        return place[self.grid.neighbours(self.n_all)[:, self.live_C]]

    @cached_property
    def group_C(self) -> Ints:
        """The group of each coded column, counted from 0; shape (C,)."""
        return np.unique(self.live_C // self.grid.size, return_inverse=True)[1].astype(np.int64)

    @cached_property
    def group_sizes(self) -> Ints:
        """Coded columns of each group, shape (G,)."""
        return np.bincount(self.group_C).astype(np.int64)

    @cached_property
    def group_starts(self) -> Ints:
        """The first coded column of each group, shape (G,)."""
        return np.concatenate([[0], np.cumsum(self.group_sizes)[:-1]])

    @property
    def joint(self) -> bool:
        """Whether a code has neighbours."""
        return self.grid.size > 1

    def near(self, matrix_RC: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """The sum of the neighbours of each number, those beside it twice, in its own type; shape (R, C)."""
        padded = np.concatenate([matrix_RC, np.zeros((len(matrix_RC), 1), matrix_RC.dtype)], axis=1)
        left, above, above_left, above_right = self.neighbours
        return 2 * (padded[:, left] + padded[:, above]) + padded[:, above_left] + padded[:, above_right]


class Zeros:
    """The chances of a matrix, row after row.

    Args:
        columns: of the matrix.
        prior: a, see above.
    """

    def __init__(self, columns: Columns, prior: float) -> None:
        self._columns, self._prior = columns, prior
        self._seen_C = np.zeros(len(columns.live_C), np.int64)
        self._expected = 0
        self._joint_seen = np.zeros(N_NEAR, np.int64)
        self._joint_expected = np.zeros(N_NEAR, np.int64)

    def matrix(self, flags_RC: Flags, chances_R: Ints) -> npt.NDArray[np.int64]:
        """The chance of each flag, given all rows before it and its neighbours in its own row.

        Args:
            flags_RC: whether codes are not zero.
            chances_R: of each row's class.
        Returns:
            chances_RC: out of 65,536, int64.
        """
        rows = max(1, _BLOCK // max(flags_RC.shape[1], 1))
        parts = [
            self._block(flags_RC[at : at + rows], chances_R[at : at + rows]) for at in range(0, len(flags_RC), rows)
        ]
        return np.concatenate(parts) if parts else np.zeros(flags_RC.shape, np.int64)

    def _block(self, flags_RC: Flags, chances_R: Ints) -> Ints:
        total_RC = np.cumsum(flags_RC, axis=0, dtype=np.int64) + self._seen_C
        expected_R = np.cumsum(chances_R) + self._expected
        odds_RC = self._odds(total_RC - flags_RC, expected_R - chances_R, chances_R)
        self._seen_C, self._expected = total_RC[-1], int(expected_R[-1])
        plain_RC = _chances(odds_RC)
        if not self._columns.joint:
            return plain_RC
        near_RC = self._columns.near(flags_RC.astype(np.int8))
        ratio_RN = np.empty((len(flags_RC), N_NEAR))
        for k in range(N_NEAR):
            here_RC = near_RC == k
            seen_R = np.cumsum((here_RC & flags_RC).sum(axis=1)) + self._joint_seen[k]
            hoped_R = np.cumsum(np.where(here_RC, plain_RC, 0).sum(axis=1)) + self._joint_expected[k]
            before = np.concatenate([[self._joint_seen[k]], seen_R[:-1]])
            ratio_RN[:, k] = _ratio(before, np.concatenate([[self._joint_expected[k]], hoped_R[:-1]]), _JOINT_PRIOR)
            self._joint_seen[k], self._joint_expected[k] = seen_R[-1], hoped_R[-1]
        return _chances(odds_RC * np.take_along_axis(ratio_RN, near_RC.astype(np.int64), axis=1))

    def row(self, chance: int) -> list[Ints]:
        """The chances of the next row, of shape (C,): one array, or three, by how many neighbours are not zero."""
        before = np.array([self._expected], np.int64)
        self._odds_C = self._odds(self._seen_C[None], before, np.array([chance], np.int64))[0]
        self._chance = chance
        if not self._columns.joint:
            return [_chances(self._odds_C)]
        ratios = _ratio(self._joint_seen, self._joint_expected, _JOINT_PRIOR)
        return [_chances(self._odds_C * ratio) for ratio in ratios]

    def saw(self, flags_C: Flags) -> None:
        """Learn from the row whose chances were given last."""
        self._seen_C = self._seen_C + flags_C
        self._expected += self._chance
        if self._columns.joint:
            near_C = self._columns.near(flags_C.astype(np.int8)[None])[0]
            plain_C = _chances(self._odds_C)
            for k in range(N_NEAR):
                here_C = near_C == k
                self._joint_seen[k] += (here_C & flags_C).sum()
                self._joint_expected[k] += plain_C[here_C].sum()

    def _odds(self, seen_RC: Ints, expected_R: Ints, chances_R: Ints) -> Floats:
        """Odds of a code that is not zero, before its neighbours are known; shape (R, C)."""
        columns = self._columns
        class_R1 = (chances_R / (SCALE - chances_R))[:, None]
        hoped_R1 = (expected_R / SCALE)[:, None]
        if not columns.joint:
            return class_R1 * ((seen_RC + self._prior) / (hoped_R1 + self._prior))
        groups_RG = np.add.reduceat(seen_RC, columns.group_starts, axis=1)
        group_RG = (groups_RG + _GROUP_PRIOR) / (hoped_R1 * columns.group_sizes + _GROUP_PRIOR)
        prior_RC = (self._prior * group_RG)[:, columns.group_C]
        return class_R1 * ((seen_RC + prior_RC) / (hoped_R1 + self._prior))


def _ratio(seen: Ints, expected: Ints, prior: float) -> Floats:
    return (seen + prior) / (expected / SCALE + prior)


def _chances(odds: Floats) -> Ints:
    return np.clip((SCALE * (odds / (1.0 + odds))).astype(np.int64), LOWEST, HIGHEST)
