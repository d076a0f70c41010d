"""Moves as bytes: places as regular steps where they are, permutations in about log2(n!) bits, factors in a few."""

from __future__ import annotations

import math

import numpy as np

from weightfold.artifact.coded import corrupt
from weightfold.artifact.decisions import Contexts, Whole
from weightfold.artifact.rangecoder import SCALE, Decoder, Encoder
from weightfold.zoo.delta.moves import Alignment, Array, Factors, Order, Place, Shapes

MAX_MOVES = 1 << 14
MOST_TOUCHES = 64
"""Moves that may name one position of a tensor, on the average."""


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
    model = _Model(4096 + MOST_TOUCHES * sum(sum(shape) for shape in shapes))
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

    def __init__(self, room: int = 0) -> None:
        self._room = room
        self._flags = Contexts()
        self._numbers: dict[int, Whole] = {}
        self._tensor = 0
        self._last: Array | None = None

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
        """Code positions: as those before; as channel c, slot m at start + c step + m stride; or one by one."""
        same = self._last is not None and np.array_equal(self._last, index)
        coder.learn(same, self.of(13))
        if same:
            return
        self._last, width = index, index.shape[1]
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
        if decoder.learn(self.of(13)):
            return self._again(n, size)
        width = self.read_number(decoder, 7) + 1
        self._room -= n * max(width, 1)
        if width < 1 or n * width > MOST_TOUCHES * size or self._room < 0:
            raise corrupt(f"{n} channels of {width} positions in a dimension of {size}")
        if not decoder.learn(self.of(8)):
            start, step = self.read_number(decoder, 9), self.read_number(decoder, 10) + width
            stride = self.read_number(decoder, 11) + 1 if width > 1 else 1
            index = start + step * np.arange(n)[:, None] + stride * np.arange(width)
        else:
            steps = np.array([self.read_number(decoder, 12) + 1 for _ in range(n * width)], np.int64)
            index = np.cumsum(steps.reshape(n, width), axis=0) - 1
        used = index[index >= 0]
        if (used.size and (int(used.max()) >= size or len(np.unique(used)) != used.size)) or int(index.min()) < -1:
            raise corrupt(f"channels outside a dimension of {size}, or two in one place")
        self._last = index
        return index

    def _again(self, n: int, size: int) -> Array:
        """The positions of the place before, if they fit here."""
        index = self._last
        if index is None or len(index) != n or int(index.max()) >= size:
            raise corrupt(f"{n} channels cannot stand where those before did")
        self._room -= index.size
        if self._room < 0:
            raise corrupt(f"{n} channels of {index.shape[1]} positions in a dimension of {size}")
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
