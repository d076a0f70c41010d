"""Moves along the symmetries of a network as plain data: channels that change places, channels that are multiplied.

A model that is a disguised copy of another (permuted, rescaled, flipped) is predicted by moving the other one. What is
written down is self-contained: the places of each channel in tensors of given shapes, the order, the factors. A decoder
needs neither the module nor its graph. Factors have few binary digits, so that products with them are exact in float64
before they are rounded once: the same bits on every machine.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Shapes = Sequence[tuple[int, ...]]
BALANCE_SWEEPS = 3
FACTOR_DIGITS, FINE_DIGITS = 12, 24
"""Binary digits of factors: enough for weights that moved; for copies that were rescaled and nothing else."""


@dataclass(frozen=True, eq=False)
class Place:
    """Where the channels of a group stand along one dimension of one tensor.

    Args:
        tensor: number of the tensor among the child's, in the order of their names.
        dim: the dimension.
        slabs: equal parts of dimension 0 in which positions count for themselves (grouped convolutions), else 1.
        index: positions of each channel, int64, shape (C, M), -1 where it has none.
        power: 1 where a factor multiplies, -1 where it divides; of no meaning for orders.
    """

    tensor: int
    dim: int
    slabs: int
    index: Array
    power: int = 1


@dataclass(frozen=True, eq=False)
class Order:
    """Channel ``order[k]`` of the parent stands at place k of the child, shape (C,)."""

    places: tuple[Place, ...]
    order: Array


@dataclass(frozen=True, eq=False)
class Factors:
    """Each channel of the child is the parent's times a factor, in places of power 1, or divided by it; shape (C,)."""

    places: tuple[Place, ...]
    factors: Array


@dataclass(frozen=True, eq=False)
class Alignment:
    """Orders first, one after another, then factors: what makes a parent look like its child.

    Example:
        >>> place = Place(0, 0, 1, np.arange(3)[:, None])
        >>> moves = Alignment((Order((place,), np.array([2, 0, 1])),), (Factors((place,), np.array([1.0, -2.0, 1.0])),))
        >>> ordered = moved(moves, [np.array([1.0, 2.0, 3.0])])
        >>> ordered[0].tolist(), factors_of(moves, [(3,)])[0].tolist()
        ([3.0, 1.0, 2.0], [1.0, -2.0, 1.0])
    """

    orders: tuple[Order, ...] = ()
    factors: tuple[Factors, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.orders or self.factors)


def to_front(array: Array, dim: int, slabs: int) -> Array:
    """View an array with positions first, as `weightfold.graph.layout.to_front` does."""
    if slabs == 1:
        return np.moveaxis(array, dim, 0)
    grid = np.moveaxis(array.reshape(slabs, array.shape[0] // slabs, *array.shape[1:]), dim + 1, 1)
    return grid.reshape(slabs * grid.shape[1], *grid.shape[2:])


def from_front(front: Array, dim: int, slabs: int) -> Array:
    """Undo `to_front`."""
    if slabs == 1:
        return np.ascontiguousarray(np.moveaxis(front, 0, dim))
    grid = np.moveaxis(front.reshape(slabs, front.shape[0] // slabs, *front.shape[1:]), 1, dim + 1)
    return np.ascontiguousarray(grid.reshape(-1, *grid.shape[2:]))


def moved(moves: Alignment, arrays: Sequence[Array]) -> list[Array]:
    """Arrays with their channels in the child's order."""
    out = list(arrays)
    for move in moves.orders:
        for place in move.places:
            source = _source(place, move.order, out[place.tensor].shape)
            front = to_front(out[place.tensor], place.dim, place.slabs)
            out[place.tensor] = from_front(front[source], place.dim, place.slabs)
    return out


def _size(place: Place, shape: tuple[int, ...]) -> int:
    """Positions along a place's dimension."""
    return shape[0] if place.dim == 0 else shape[place.dim] * place.slabs


def _source(place: Place, order: Array, shape: tuple[int, ...]) -> Array:
    """The old position of each new one."""
    source = np.arange(_size(place, shape))
    old = place.index[order]
    both = (place.index >= 0) & (old >= 0)
    source[place.index[both]] = old[both]
    return source


def factors_of(moves: Alignment, shapes: Shapes) -> dict[int, Array]:
    """The product of all factors on each tensor that has any: float64, shaped so that it multiplies the tensor."""
    out: dict[int, Array] = {}
    for move in moves.factors:
        for place in move.places:
            shape = shapes[place.tensor]
            line = np.ones(_size(place, shape))
            have = place.index >= 0
            value = np.broadcast_to(move.factors[:, None], place.index.shape)[have]
            line[place.index[have]] = value if place.power > 0 else 1.0 / value
            out[place.tensor] = out.get(place.tensor, np.ones(1)) * _spread(line, place, shape)
    return out


def balance_of(moves: Alignment, arrays: Sequence[Array], shapes: Shapes) -> dict[int, Array]:
    """Powers of two that bring a moved parent near the scales of least norm, along the freedoms that factors name.

    In networks whose units were rescaled a step is then worth the same everywhere. Found in whole numbers, the mean
    exponent of what writes each channel and of what reads it: nothing is stored, and every machine finds the same.

    Args:
        arrays: the parent's numbers, float64, in the child's order.
    """
    named = {p.tensor for m in moves.factors for p in m.places}
    exponents = {i: _exponents(arrays[i]) for i in named}
    levels = [np.zeros(len(m.factors), np.int64) for m in moves.factors]
    for _ in range(BALANCE_SWEEPS):
        for level, move in zip(levels, moves.factors, strict=True):
            sides = [_mean_exponent(exponents, [p for p in move.places if p.power == s]) for s in (1, -1)]
            step = np.where((sides[0] > -5000) & (sides[1] > -5000), (sides[1] - sides[0]) // 2, 0)
            level += step
            for place in move.places:
                line = np.zeros(_size(place, shapes[place.tensor]), np.int64)
                have = place.index >= 0
                line[place.index[have]] = place.power * np.broadcast_to(step[:, None], place.index.shape)[have]
                exponents[place.tensor] = exponents[place.tensor] + _spread(line, place, shapes[place.tensor])
    powers = [np.ldexp(1.0, np.clip(level, -60, 60)) for level in levels]
    balanced = (Factors(m.places, power) for m, power in zip(moves.factors, powers, strict=True))
    return factors_of(Alignment((), tuple(balanced)), shapes)


def _exponents(values: Array) -> Array:
    """Exponents of numbers, int64; -10000 for zeros, and for what is not finite: machines differ in its exponent."""
    return np.where((values == 0) | ~np.isfinite(values), -10000, np.frexp(values)[1]).astype(np.int64)


def _mean_exponent(exponents: dict[int, Array], places: Sequence[Place]) -> Array:
    """The mean exponent of each channel's numbers in some places, rounded down, shape (C,); -10000 for none."""
    total, count = np.zeros(1, np.int64), np.zeros(1, np.int64)
    for place in places:
        front = to_front(exponents[place.tensor], place.dim, place.slabs)
        flat = front.reshape(len(front), -1)
        rows = np.where((place.index >= 0)[:, :, None], flat[np.maximum(place.index, 0)], -10000)
        alive = rows > -5000
        total = total + np.where(alive, rows, 0).sum(axis=(1, 2))
        count = count + alive.sum(axis=(1, 2))
    return np.where(count > 0, total // np.maximum(count, 1), -10000)


def _spread(line: Array, place: Place, shape: tuple[int, ...]) -> Array:
    """Factors by position as an array that multiplies the tensor."""
    if place.slabs == 1 or place.dim == 0:
        return line.reshape([-1 if d == place.dim else 1 for d in range(len(shape))])
    rows = shape[0] // place.slabs
    grid = line.reshape([place.slabs, *[-1 if d == place.dim else 1 for d in range(1, len(shape))]])
    return np.repeat(grid, rows, axis=0)


def rounded(factors: Array, digits: int = FACTOR_DIGITS) -> Array:
    """Factors with so many binary digits; what is no factor becomes 1."""
    fine = np.isfinite(factors) & (factors != 0)
    mantissa, exponent = np.frexp(np.where(fine, factors, 1.0))
    return np.ldexp(np.rint(np.ldexp(mantissa, digits)), np.clip(exponent, -120, 120) - digits)


def with_digits(moves: Alignment, digits: int) -> Alignment:
    """The same moves with factors of so many binary digits."""
    return replace(moves, factors=tuple(replace(m, factors=rounded(m.factors, digits)) for m in moves.factors))
