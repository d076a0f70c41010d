"""A parent, moved to look like its child: what each tensor of the child is predicted by."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from weightfold.zoo.delta import lossy, moves
from weightfold.zoo.delta.layout import Entry, bits_of, kind_of, rounded_bits, values_of
from weightfold.zoo.delta.moves import Alignment
from weightfold.zoo.delta.numbers import Array

State = Mapping[str, Tensor]
REAL = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
"""Types that may be rounded to steps."""


@dataclass(frozen=True, eq=False)
class Moved:
    """The parent in the child's order: bits of each tensor of the child's layout, shaped, and their types.

    ``factors`` are what numbers are multiplied by then, for the tensors that have any.
    """

    entries: Sequence[Entry]
    arrays: Sequence[Array]
    dtypes: Sequence[torch.dtype]
    factors: Mapping[int, Array]
    balance: Mapping[int, Array]

    def predicted(self, i: int) -> Array:
        """The bits that are predicted for a tensor, in a line; zeros where it has no counterpart."""
        entry, array = self.entries[i], np.ascontiguousarray(self.arrays[i])
        if i not in self.factors and self.dtypes[i] == entry.dtype:
            return array.reshape(-1)
        return rounded_bits(self.values(i) * self.factor(i), entry.dtype).reshape(-1)

    def values(self, i: int) -> Array:
        """The parent's numbers, float64, before factors."""
        return _floats(self.arrays[i], self.dtypes[i])

    def factor(self, i: int) -> Array:
        """What takes the parent's numbers to the child's scale."""
        return self.factors.get(i, np.ones(1))

    def basis(self, i: int) -> tuple[Array, Array]:
        """The parent's numbers in the scale in which steps are taken, and what takes that to the child's."""
        balance = self.balance.get(i, np.ones(1))
        return self.values(i) * balance, self.factor(i) / balance


def _floats(bits: Array, dtype: torch.dtype) -> Array:
    return values_of(np.ascontiguousarray(bits), dtype).astype(np.float64)


def moved_parent(entries: Sequence[Entry], parent: State, found: Alignment, with_balance: bool) -> Moved:
    owned = list(parent.values())
    arrays, dtypes = [], []
    for entry in entries:
        dtype = entry.dtype if entry.source is None else owned[entry.source].dtype
        shape = (*entry.shape, 2) if dtype.is_complex else entry.shape
        bits = (
            np.zeros(entry.n_units, kind_of(dtype).unsigned) if entry.source is None else bits_of(owned[entry.source])
        )
        arrays.append(bits.reshape(shape))
        dtypes.append(dtype)
    shapes = [entry.shape for entry in entries]
    arrays = moves.moved(found, arrays)
    balance = {}
    if with_balance and found.factors:
        named = {p.tensor for m in found.factors for p in m.places}
        values = [_floats(a, t) if i in named else a for i, (a, t) in enumerate(zip(arrays, dtypes, strict=True))]
        balance = moves.balance_of(found, values, shapes)
    return Moved(entries, arrays, dtypes, moves.factors_of(found, shapes), balance)


def movable(entries: Sequence[Entry]) -> list[tuple[int, ...]]:
    """Shapes of the tensors that moves may name; others count as having no dimension."""
    real = [e.source is not None and e.dtype in REAL for e in entries]
    return [e.shape if yes else () for e, yes in zip(entries, real, strict=True)]


def rescaled(entries: Sequence[Entry], bits: Sequence[Array], whole: Alignment, coarse: Alignment) -> list[Array]:
    """A child whose channels have the scales that coarse factors give them: other numbers, the same function."""
    shapes = [e.shape for e in entries]
    one, two = moves.factors_of(whole, shapes), moves.factors_of(coarse, shapes)
    out = list(bits)
    for i in one:
        entry = entries[i]
        values = values_of(bits[i], entry.dtype).reshape(entry.shape).astype(np.float64) * (two[i] / one[i])
        out[i] = np.where(np.isfinite(values).reshape(-1), rounded_bits(values, entry.dtype).reshape(-1), bits[i])
    return out


def away(moved: Moved, i: int, bits: Array) -> Array:
    """How far a child's tensor lies from the parent's, in the scale in which steps are taken."""
    parent, factor = moved.basis(i)
    return values_of(bits, moved.entries[i].dtype).reshape(moved.entries[i].shape) / factor - parent


def spread(moved: Moved, bits: Sequence[Array]) -> float:
    """The root mean square of the differences of all matrices, which a relative step is a share of."""
    apart = [
        np.nan_to_num(away(moved, i, bits[i]), posinf=0, neginf=0)
        for i, e in enumerate(moved.entries)
        if e.source is not None and e.dtype in REAL and len(e.shape) > 1
    ]
    return lossy.spread(apart)
