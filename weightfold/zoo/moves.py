"""Moves along the symmetries of a network as plain data: channels that change places, channels that are multiplied.

A model that is a disguised copy of another (permuted, rescaled, flipped) is predicted by moving the other one. What is
written down is self-contained: the places of each channel in tensors of given shapes, the order, the factors. A decoder
needs neither the module nor its graph. Factors have few binary digits, so that products with them are exact in float64
before they are rounded once: the same bits on every machine.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from weightfold.artifact.coded import corrupt
from weightfold.artifact.decisions import Contexts, Whole
from weightfold.artifact.rangecoder import SCALE, Decoder, Encoder

Array = npt.NDArray[Any]
Shapes = Sequence[tuple[int, ...]]
MAX_MOVES = 1 << 14
BALANCE_SWEEPS = 3
FACTOR_DIGITS, FINE_DIGITS = 12, 24
"""Binary digits of factors: enough for weights that moved; for copies that were rescaled and nothing else."""


@dataclass(frozen=True, eq=False)
class Place:
    """Where the channels of a group stand along one dimension of one tensor.

    Args:
        tensor: number of the tensor among those of the layout.
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
    exponents = {i: np.where(arrays[i] == 0, -10000, np.frexp(arrays[i])[1]).astype(np.int64) for i in named}
    levels = [np.zeros(len(m.factors), np.int64) for m in moves.factors]
    for _ in range(BALANCE_SWEEPS):
        for level, move in zip(levels, moves.factors, strict=True):
            sides = [_mean_exponent(exponents, shapes, [p for p in move.places if p.power == s]) for s in (1, -1)]
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


def _mean_exponent(exponents: dict[int, Array], shapes: Shapes, places: Sequence[Place]) -> Array:
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
    out = np.ldexp(np.rint(np.ldexp(mantissa, digits)), np.clip(exponent, -120, 120) - digits)
    return out


def with_digits(moves: Alignment, digits: int) -> Alignment:
    """The same moves with factors of so many binary digits."""
    return replace(moves, factors=tuple(replace(m, factors=rounded(m.factors, digits)) for m in moves.factors))


# bytes ----------------------------------------------------------------------------------------------------------------


def write(coder: Encoder, moves: Alignment, digits: int) -> None:
    """Code moves; the factors must be `rounded` to so many digits."""
    model = _Model()
    coder.learn(bool(moves), model.of(1))
    if not moves:
        return
    model.number(coder, len(moves.orders), 1)
    model.number(coder, len(moves.factors), 1)
    for move in moves.orders:
        model.places(coder, move.places, signed=False)
        write_order(coder, move.order)
    if moves.factors:
        coder.raw(digits, 6)
    for move in moves.factors:
        model.places(coder, move.places, signed=True)
        model.factors(coder, move.factors, digits)


def read(decoder: Decoder, shapes: Shapes) -> Alignment:
    """Read moves for tensors of some shapes.

    Raises:
        ArtifactError: a place lies outside its tensor, or is named twice.
    """
    model = _Model()
    if not decoder.learn(model.of(1)):
        return Alignment()
    counts = [model.read_number(decoder, 1) for _ in range(2)]
    if any(not 0 <= n <= MAX_MOVES for n in counts):
        raise corrupt(f"{counts} moves")
    orders = []
    for _ in range(counts[0]):
        places = model.read_places(decoder, shapes, signed=False)
        orders.append(Order(places, read_order(decoder, len(places[0].index))))
    digits = decoder.raw(6) if counts[1] else 0
    if digits > 32:
        raise corrupt(f"factors of {digits} digits")
    factors = []
    for _ in range(counts[1]):
        places = model.read_places(decoder, shapes, signed=True)
        factors.append(Factors(places, model.read_factors(decoder, len(places[0].index), digits)))
    return Alignment(tuple(orders), tuple(factors))


class _Model:
    """How moves are coded: each number by what was seen at the same point of earlier ones."""

    def __init__(self) -> None:
        self._flags = Contexts()
        self._numbers: dict[int, Whole] = {}
        self._tensor = 0

    def of(self, context: int) -> list[int]:
        return self._flags.of(context)

    def number(self, coder: Encoder, value: int, context: int) -> None:
        self._numbers.setdefault(context, Whole()).write(coder, value)

    def read_number(self, decoder: Decoder, context: int) -> int:
        return self._numbers.setdefault(context, Whole()).read(decoder)

    def places(self, coder: Encoder, places: tuple[Place, ...], *, signed: bool) -> None:
        """Code where channels stand."""
        self.number(coder, len(places), 2)
        self.number(coder, len(places[0].index), 3)
        for place in places:
            self.number(coder, place.tensor - self._tensor, 4)
            self._tensor = place.tensor
            self.number(coder, place.dim, 5)
            coder.learn(place.slabs > 1, self.of(2))
            if place.slabs > 1:
                self.number(coder, place.slabs, 6)
            if signed:
                coder.learn(place.power < 0, self.of(3 + place.dim % 2))
            self._index(coder, place.index)

    def _index(self, coder: Encoder, index: Array) -> None:
        """Code positions: as channel c, slot m at start + c step + m stride if they are, else one by one."""
        width = index.shape[1]
        self.number(coder, width - 1, 7)
        line = _line(index)
        coder.learn(line is None, self.of(8))
        if line is not None:
            start, step, stride = line
            self.number(coder, start, 9)
            self.number(coder, step - width, 10)
            if width > 1:
                self.number(coder, stride - 1, 11)
            return
        steps = np.diff(index, axis=0, prepend=-1) - 1
        for value in steps.reshape(-1).tolist():
            self.number(coder, value, 12)

    def read_places(self, decoder: Decoder, shapes: Shapes, *, signed: bool) -> tuple[Place, ...]:
        n_places, n = self.read_number(decoder, 2), self.read_number(decoder, 3)
        if not 1 <= n_places <= MAX_MOVES or n < 1:
            raise corrupt(f"a move of {n} channels in {n_places} places")
        return tuple(self._read_place(decoder, shapes, n, signed) for _ in range(n_places))

    def _read_place(self, decoder: Decoder, shapes: Shapes, n: int, signed: bool) -> Place:
        self._tensor += self.read_number(decoder, 4)
        if not 0 <= self._tensor < len(shapes):
            raise corrupt(f"it moves tensor {self._tensor} of {len(shapes)}")
        shape, dim = shapes[self._tensor], self.read_number(decoder, 5)
        if not 0 <= dim < len(shape):
            raise corrupt(f"it moves dimension {dim} of a tensor of shape {shape}")
        slabs = self.read_number(decoder, 6) if decoder.learn(self.of(2)) else 1
        if not 1 <= slabs <= max(1, shape[0]) or shape[0] % slabs:
            raise corrupt(f"{slabs} slabs in a tensor of shape {shape}")
        power = -1 if signed and decoder.learn(self.of(3 + dim % 2)) else 1
        size = slabs * shape[dim] if dim else shape[0]
        return Place(self._tensor, dim, slabs, self._read_index(decoder, n, size), power)

    def _read_index(self, decoder: Decoder, n: int, size: int) -> Array:
        width = self.read_number(decoder, 7) + 1
        if width < 1 or n * width > 64 * size:
            raise corrupt(f"{n} channels of {width} positions in a dimension of {size}")
        if not decoder.learn(self.of(8)):
            start, step = self.read_number(decoder, 9), self.read_number(decoder, 10) + width
            stride = self.read_number(decoder, 11) + 1 if width > 1 else 1
            index = start + step * np.arange(n)[:, None] + stride * np.arange(width)
        else:
            steps = np.array([self.read_number(decoder, 12) + 1 for _ in range(n * width)], np.int64)
            index = np.cumsum(steps.reshape(n, width), axis=0) - 1
        used = index[index >= 0]
        if used.size and (int(used.max()) >= size or len(np.unique(used)) != used.size) or int(index.min()) < -1:
            raise corrupt(f"channels outside a dimension of {size}, or two in one place")
        return index

    def factors(self, coder: Encoder, factors: Array, digits: int) -> None:
        """Code factors: 1 or not, sign, exponent, mantissa."""
        scaled = bool((np.abs(factors) != 1).any())
        signed = bool((factors < 0).any())
        coder.learn(scaled, self.of(9))
        coder.learn(signed, self.of(10))
        mantissa, exponent = np.frexp(np.abs(factors))
        whole = np.rint(np.ldexp(mantissa, digits)).astype(np.int64)
        for value, m, e in zip(factors.tolist(), whole.tolist(), exponent.tolist(), strict=True):
            if signed:
                coder.learn(value < 0, self.of(11))
            if not scaled:
                continue
            coder.learn(abs(value) == 1, self.of(12))
            if abs(value) != 1:
                self.number(coder, e, 13)
                coder.raw(m - (1 << (digits - 1)), digits - 1)

    def read_factors(self, decoder: Decoder, n: int, digits: int) -> Array:
        scaled, signed = decoder.learn(self.of(9)), decoder.learn(self.of(10))
        out = np.ones(n)
        for channel in range(n):
            sign = -1.0 if signed and decoder.learn(self.of(11)) else 1.0
            value = 1.0
            if scaled and not decoder.learn(self.of(12)):
                exponent = self.read_number(decoder, 13)
                if abs(exponent) > 200 or digits < 1:
                    raise corrupt(f"a factor of exponent {exponent}")
                value = math.ldexp((1 << (digits - 1)) + decoder.raw(digits - 1), exponent - digits)
            out[channel] = sign * value
        return out


def _line(index: Array) -> tuple[int, int, int] | None:
    """Start, step from channel to channel, stride from slot to slot, if positions are that regular."""
    if (index < 0).any():
        return None
    start = int(index[0, 0])
    step = int(index[1, 0]) - start if len(index) > 1 else index.shape[1]
    stride = int(index[0, 1]) - start if index.shape[1] > 1 else 1
    straight = start + step * np.arange(len(index))[:, None] + stride * np.arange(index.shape[1])
    return (start, step, stride) if np.array_equal(straight, index) else None


def write_order(coder: Encoder, order: Array) -> None:
    """Code a permutation in about log2(n!) bits: each entry among those that are left."""
    left = list(range(len(order)))
    for value in order.tolist():
        place = left.index(value)
        write_below(coder, place, len(left))
        del left[place]


def read_order(decoder: Decoder, n: int) -> Array:
    """Read a permutation of n."""
    left = list(range(n))
    return np.array([left.pop(read_below(decoder, len(left))) for _ in range(n)], np.int64)


def write_below(coder: Encoder, value: int, n: int) -> None:
    """Code a number that may be any of 0 to n - 1 alike."""
    low, high = 0, n
    while high - low > 1:
        middle = (low + high) // 2
        yes = value >= middle
        coder.flag(yes, _chance(high - middle, high - low))
        low, high = (middle, high) if yes else (low, middle)


def read_below(decoder: Decoder, n: int) -> int:
    """Read a number below n."""
    low, high = 0, n
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if decoder.flag(_chance(high - middle, high - low)) else (low, middle)
    return low


def _chance(part: int, whole: int) -> int:
    return min(max(part * SCALE // whole, 2), SCALE - 2)

