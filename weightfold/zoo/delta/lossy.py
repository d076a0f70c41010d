"""Differences as multiples of a step: what a child is worth beyond its parent, at a stated grain.

In the parent's basis and scale the difference of each weight is rounded to q steps, and q is coded with what rows,
columns and neighbours are like (`weightfold.artifact.matrix`). A difference below `DEAD` steps becomes 0: in a
fine-tuned child most are, and a zero costs least. Vectors that are all above zero (variances, scales of norms) are
rounded in proportion, on the ladder of floats, so that they stay above it.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import frexp, ldexp
from typing import Any

import numpy as np

from weightfold.artifact.coded import CodedTensor, corrupt
from weightfold.artifact.decisions import Whole
from weightfold.artifact.matrix import read as read_matrix
from weightfold.artifact.matrix import write as write_matrix
from weightfold.artifact.rangecoder import Decoder, Encoder
from weightfold.zoo.delta import numbers
from weightfold.zoo.delta.layout import Entry, kind_of
from weightfold.zoo.delta.numbers import Array

DEAD = 0.7
"""Share of a step below which a difference is dropped; larger ones are rounded to the nearest multiple."""
MOST, MOST_CARRIED = 32767, 1 << 16
STEP_DIGITS = 8
MOST_HALVINGS = 60


@dataclass(frozen=True)
class Grain:
    """How a tensor is rounded: in steps of 2^-halvings of the common one; on the ladder of floats if `ladder`."""

    ladder: bool
    halvings: int

    def step(self, common: float) -> float:
        """The tensor's own step."""
        return ldexp(common, -self.halvings)


def rounded_step(step: float) -> float:
    """The largest step of eight binary digits that is not above the one asked for.

    Example:
        >>> rounded_step(0.02)
        0.0198974609375
    """
    mantissa, exponent = frexp(step)
    return ldexp(int(ldexp(mantissa, STEP_DIGITS)), exponent - STEP_DIGITS)


def write_step(coder: Encoder, step: float) -> None:
    """Code the common step."""
    mantissa, exponent = frexp(step)
    Whole().write(coder, exponent)
    coder.raw(int(ldexp(mantissa, STEP_DIGITS)), STEP_DIGITS)


def read_step(decoder: Decoder) -> float:
    """Read the common step."""
    exponent, mantissa = Whole().read(decoder), decoder.raw(STEP_DIGITS)
    if abs(exponent) > 300 or mantissa == 0:
        raise corrupt("a step of no size")
    return ldexp(mantissa, exponent - STEP_DIGITS)


def grain_of(child: Array, parent: Array, entry: Entry, step: float) -> Grain:
    """The grain that suits a tensor: a vector's step is a quarter of its numbers' size at most."""
    if len(entry.shape) > 1 or child.size == 0:
        return Grain(False, 0)
    if child.size > 1 and bool((child > 0).all()) and bool((parent > 0).all()):
        return Grain(True, 0)
    size = float(np.sqrt(np.mean(np.square(parent, dtype=np.float64))))
    return Grain(False, int(min(max(0.0, np.ceil(np.log2(4 * step / max(size, 1e-9)))), 8)))


def codes_of(child: Array, parent: Array, factor: Array, step: float, carry: bool = False) -> Array | None:
    """Multiples of the step by which a child differs from its moved parent; None if they are too many.

    All arrays stand in the child's shape: the parent in the child's order, and the factors between the two.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        steps = (child.astype(np.float64) / factor - parent) / step
    return _carried(steps) if carry and steps.ndim > 1 and steps.size else _rounded(steps)


def ladder_codes(child_bits: Array, predicted: Array, entry: Entry, step: float) -> Array | None:
    """The same on the ladder of floats: the step is a share of each number."""
    kind, shift = kind_of(entry.dtype), ladder_shift(entry, step)
    away = numbers.ordered(child_bits, kind).astype(np.int64) - numbers.ordered(predicted, kind).astype(np.int64)
    return _rounded(away / float(1 << shift))


def ladder_shift(entry: Entry, step: float) -> int:
    """Binary digits of a float's mantissa that a share so large leaves open."""
    return max(0, kind_of(entry.dtype).n_mantissa + frexp(min(step, 0.5))[1] - 1)


def _carried(steps: Array) -> Array | None:
    """Round along each row, what is left of each number added to the next: sums over inputs keep their value."""
    rows = steps.reshape(len(steps), -1)
    if _rounded(rows) is None or rows.shape[1] > MOST_CARRIED:
        return _rounded(steps)
    codes, left = np.zeros(rows.shape, np.int32), np.zeros(len(rows))
    for column, own in enumerate(rows.T):
        wanted = own + left
        code = np.where((np.abs(wanted) < DEAD) | (own == 0), 0.0, np.rint(wanted))
        codes[:, column] = code
        left = np.where(own == 0, left, wanted - code)
    return codes.reshape(steps.shape)


def _rounded(steps: Array) -> Array | None:
    if not np.isfinite(steps).all() or (steps.size and float(np.abs(steps).max()) > MOST - 1):
        return None
    size = np.abs(steps)
    return (np.sign(steps) * np.where(size < DEAD, 0.0, np.rint(size))).astype(np.int32)


def values_of_codes(codes: Array, parent: Array, factor: Array, step: float) -> Array:
    """The child that codes stand for, float64: each operation rounds once, the same on every machine."""
    return (parent.astype(np.float64) + codes * step) * factor


def ladder_bits(codes: Array, predicted: Array, entry: Entry, step: float) -> Array:
    """The child that codes on the ladder of floats stand for, as bits; never beyond the largest number."""
    kind, shift = kind_of(entry.dtype), ladder_shift(entry, step)
    found = numbers.ordered(predicted, kind).astype(np.int64) + (codes.astype(np.int64) << shift)
    most = (((1 << (kind.n_bits - 1 - kind.n_mantissa)) - 1) << kind.n_mantissa) - 1
    return numbers.ordered(np.clip(found, 1, most).astype(kind.whole).view(kind.unsigned), kind).view(kind.unsigned)


# bytes ----------------------------------------------------------------------------------------------------------------


class Grains:
    """Codes grains, each by those before it."""

    def __init__(self) -> None:
        self._halvings, self._flag = Whole(), [0, 0]

    def write(self, coder: Encoder, grain: Grain) -> None:
        """Code one."""
        coder.learn(grain.ladder, self._flag)
        self._halvings.write(coder, grain.halvings)

    def read(self, decoder: Decoder) -> Grain:
        """Read one."""
        ladder, halvings = bool(decoder.learn(self._flag)), self._halvings.read(decoder)
        if not 0 <= halvings <= MOST_HALVINGS:
            raise corrupt(f"a step halved {halvings} times")
        return Grain(ladder, halvings)


def write_codes(coder: Encoder, codes: Array, entry: Entry) -> None:
    """Code the multiples of one tensor."""
    matrix = codes.reshape(matrix_shape(entry))
    write_matrix(CodedTensor(matrix, np.zeros(matrix.shape[0], np.int16)), coder)


def read_codes(decoder: Decoder, entry: Entry) -> Array:
    """Read the multiples of one tensor, in a line."""
    return read_matrix(decoder, matrix_shape(entry)).codes.reshape(-1).astype(np.int64)


def matrix_shape(entry: Entry) -> tuple[int, ...]:
    """The shape in which a tensor is coded: vectors are one row."""
    shape = entry.shape
    return shape if len(shape) > 1 and entry.numel else (1, entry.numel)


def spread(differences: list[Array]) -> float:
    """The root mean square of differences over all tensors: what a relative step is a share of."""
    n = sum(d.size for d in differences)
    total: Any = sum(float(np.square(d, dtype=np.float64).sum()) for d in differences)
    return float((total / n) ** 0.5) if n else 0.0
