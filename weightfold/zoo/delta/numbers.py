"""Numbers of any type as whole numbers in order, and their distance from a prediction as a token and a few raw bits.

**Order.** The bits of a float, read as sign and magnitude, grow with its value: with the lower bits flipped where the
sign is set they are a whole number that does, one for each pattern (both zeros and every NaN among them).

**Near.** The distance r of a number from its prediction, in units of the last place: a token of sign, number of binary
digits less those expected, and the two digits below the leading one; the rest raw. How far apart two floats of distance
d lie depends on the exponent e of the prediction, so with a scale 2^(s/2) of the distances in a row, s/2 - e digits are
expected, and one table serves all weights but the nearest.

**Far.** Where the prediction is smaller than the distances, or there is none, it says nothing of sign and exponent: the
token is the number's own sign, its exponent less the scale, and the two highest bits of its mantissa.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
N_SYMBOLS = 2048
"""Tokens: 256 classes, two bits below the leading one, a sign."""
BELOW = 8
"""Half octaves below one unit in the last place that scales tell apart: how likely a number is what was predicted."""
NEAREST = 10
"""Octaves above them up to which each half has a context of its own."""
MIDDLE = 64
"""The class of a number with as many digits as expected."""
N_CONTEXTS = 2 * (NEAREST + 1) + 2


@dataclass(frozen=True)
class Kind:
    """How numbers of a type lie in memory.

    Args:
        n_bits: 8, 16, 32 or 64.
        n_mantissa: bits of a float's mantissa; 0 for whole numbers, and for what has no exponent of 8 bits or less.
        floating: whether the highest bit is a sign with a magnitude below it.
        signed: whether it is the sign of a two's complement.
    """

    n_bits: int
    n_mantissa: int = 0
    floating: bool = False
    signed: bool = False

    @property
    def has_far(self) -> bool:
        """Whether exponents are few enough to be tokens."""
        return self.floating and self.n_bits - 1 - self.n_mantissa <= 8

    @property
    def unsigned(self) -> np.dtype[Any]:
        return np.dtype(f"u{self.n_bits // 8}")

    @property
    def whole(self) -> np.dtype[Any]:
        return np.dtype(f"i{self.n_bits // 8}")


def ordered(bits_N: Array, kind: Kind) -> Array:
    """Bit patterns as whole numbers in the order of their values; undone by itself.

    Example:
        >>> bits = np.array([-1.0, -0.0, 0.0, 1.0], np.float32).view(np.uint32)
        >>> ordered(bits, Kind(32, 23, True)).tolist()
        [-1065353217, -1, 0, 1065353216]
    """
    whole = bits_N.view(kind.whole)
    if not kind.floating:
        return whole
    return whole ^ ((whole >> (kind.n_bits - 1)) & np.iinfo(kind.whole).max)


def exponents(bits_N: Array, kind: Kind) -> Array:
    """The exponent field of floats, int32; 0 for whole numbers."""
    if not kind.floating:
        return np.zeros(len(bits_N), np.int32)
    magnitude = bits_N & kind.unsigned.type(np.iinfo(kind.whole).max)
    return (magnitude >> kind.unsigned.type(kind.n_mantissa)).astype(np.int32)


@dataclass(frozen=True, eq=False)
class Expected:
    """What a prediction and the scale of its row say of each number.

    Args:
        contexts: which table, uint8.
        digits: expected digits of the distance, or the exponent that is expected where `far`, int32.
        far: where the prediction says nothing, bool.
    """

    contexts: Array
    digits: Array
    far: Array

    @classmethod
    def of(cls, predicted_N: Array, scales_N: Array, kind: Kind) -> Expected:
        """Expect numbers from the bits of predictions and the scale of each row, in half octaves.

        For floats a scale s means distances of about 2^(s/2 - bias), the bias being that of the type's exponents; for
        whole numbers, of 2^(s/2).
        """
        exponent = exponents(predicted_N, kind)
        if not kind.floating:
            above = scales_N + BELOW
            far = np.zeros(len(above), bool)
        else:
            above = scales_N - 2 * (np.maximum(exponent, 1) - kind.n_mantissa - 1) + BELOW
            far = (exponent < (scales_N >> 1)) if kind.has_far else np.zeros(len(above), bool)
        above = np.clip(above, 0, 2 * kind.n_bits + BELOW)
        contexts = 2 * np.minimum(above >> 1, NEAREST) + (above & 1)
        digits = np.maximum(above - BELOW, 0)
        if kind.has_far:
            contexts = np.where(far, N_CONTEXTS - 2 + (scales_N & 1), contexts)
            digits = np.where(far, scales_N, digits)
        return cls(contexts.astype(np.uint8), (digits >> 1).astype(np.int32), far)


def split(bits_N: Array, predicted_N: Array, expected: Expected, kind: Kind) -> tuple[Array, Array, Array]:
    """Tokens (int64), raw values (uint64) and their widths (int64) of some numbers."""
    whole = kind.whole
    with np.errstate(over="ignore"):
        distance = ordered(bits_N, kind) - ordered(predicted_N, kind)
        size = np.abs(distance).view(kind.unsigned).astype(np.uint64)
    digits = n_digits(size)
    below = np.maximum(digits - 3, 0).astype(np.uint64)
    raised = np.maximum(3 - digits, 0).astype(np.uint64)
    top = (((size >> below) << raised) & np.uint64(3)).astype(np.int64)
    negative = distance < whole.type(0)
    token = (((digits - expected.digits + MIDDLE) & 255) << 3) | (top << 1) | negative
    width, value = below.astype(np.int64), size & ((np.uint64(1) << below) - np.uint64(1))
    here = np.flatnonzero(expected.far)
    if len(here):
        bits, few = bits_N[here].astype(np.uint64), kind.n_mantissa - 2
        exponent = exponents(bits_N[here], kind) - expected.digits[here] + MIDDLE
        upper = ((bits >> np.uint64(few)) & np.uint64(3)).astype(np.int64)
        token[here] = ((exponent & 255) << 3) | (upper << 1) | (bits >> np.uint64(kind.n_bits - 1)).astype(np.int64)
        width[here], value[here] = few, bits & np.uint64((1 << few) - 1)
    return token, value, width


def n_digits(size_N: Array) -> Array:
    """Binary digits of whole numbers, int64; 0 for 0."""
    digits = np.frexp(size_N.astype(np.float64))[1].astype(np.int64)
    return digits - ((size_N >> np.maximum(digits - 1, 0).astype(np.uint64)) == 0) * (size_N > 0)


def widths(tokens_N: Array, expected: Expected, kind: Kind) -> Array:
    """How many raw bits follow each token, int64."""
    out = np.minimum(_digits(tokens_N.astype(np.int32), expected), 64 + 3) - 3
    out = np.where(expected.far, kind.n_mantissa - 2, np.maximum(out, 0))
    return out.astype(np.int64)


def _digits(tokens_N: Array, expected: Expected) -> Array:
    return ((tokens_N >> 3) + (expected.digits - MIDDLE)) & 255


def join(tokens_N: Array, values_N: Array, predicted_N: Array, expected: Expected, kind: Kind) -> Array:
    """Bit patterns from tokens, raw values and predictions: the inverse of `split`."""
    wide = np.uint64 if kind.n_bits > 32 else np.uint32
    tokens, values = tokens_N.astype(np.int32), values_N.astype(wide)
    digits = np.minimum(_digits(tokens, expected), kind.n_bits)
    top = ((tokens >> 1) & 3).astype(wide)
    below = np.maximum(digits - 3, 0).astype(wide)
    size = (((top | wide(4)) << below) | values) >> np.minimum(np.maximum(3 - digits, 0), 3).astype(wide)
    distance = size.astype(kind.unsigned).view(kind.whole) * (1 - 2 * (tokens & 1)).astype(kind.whole)
    found = ordered((ordered(predicted_N, kind) + distance).view(kind.unsigned), kind).view(kind.unsigned)
    here = np.flatnonzero(expected.far)
    if len(here):
        few = wide(kind.n_mantissa - 2)
        exponent = ((tokens[here] >> 3) + (expected.digits[here] - MIDDLE) & 255).astype(wide)
        bits = ((tokens[here] & 1).astype(wide) << wide(kind.n_bits - 1)) | values[here]
        found[here] = (bits | (exponent << wide(kind.n_mantissa)) | (top[here] << few)).astype(kind.unsigned)
    return found
