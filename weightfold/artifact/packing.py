"""Coded tensors packed end to end: no statistics, one width for each row. NumPy alone.

| what | bits |
|---|---|
| one step for the whole tensor; whether columns of zeros are left out | 1 each |
| width of a step difference, lowest step | 4, 11 |
| bits of each row, 0 as 0 and b as b - 1 | 4 each |
| step of each living row, above the lowest | width each |
| which columns hold anything, if columns are left out | 1 each |
| codes of the rows of 2 bits, five to a byte, base 3 | 8 for five |
| codes of the other rows by bits, each plus the row's largest | b each |

Each line begins where the one before ends; the last byte is filled with zeros.
"""

from __future__ import annotations

from math import prod

import numpy as np
import numpy.typing as npt

from weightfold.artifact.coded import MAX_BITS, STEP_LIMIT, CodedTensor, Ints, corrupt

Bits = npt.NDArray[np.uint8]
_THREES = np.array([1, 3, 9, 27, 81])
_FIXED_BITS = 17


def packed_bytes(tensor: CodedTensor) -> int:
    """Bytes of a packed tensor, side information included.

    Example:
        >>> packed_bytes(CodedTensor(np.ones((10, 100), np.int16), np.zeros(10, np.int16)))
        208
    """
    if tensor.codes.size == 0:
        return 0
    bits_R = tensor.bits_R
    live_C, masked = _columns(tensor)
    counts = np.bincount(bits_R, minlength=3)
    codes = 8 * -(-int(counts[2]) * len(live_C) // 5)
    codes += sum(int(n) * bits * len(live_C) for bits, n in enumerate(counts) if bits > 2)
    side = _FIXED_BITS + 4 * len(bits_R) + _step_width(tensor) * int(np.count_nonzero(bits_R))
    return -(-(side + masked * tensor.matrix_RC.shape[1] + codes) // 8)


def encode(tensor: CodedTensor) -> bytes:
    """Pack a tensor; its shape is not kept, nor are the steps of rows of zeros."""
    if tensor.codes.size == 0:
        return b""
    bits_R, steps_R = tensor.bits_R, tensor.steps.astype(np.int64)
    live_R = bits_R > 0
    live_C, masked = _columns(tensor)
    lowest, width = int(steps_R[live_R].min(initial=STEP_LIMIT)), _step_width(tensor)
    codes_RC = tensor.matrix_RC[:, live_C].astype(np.int64)
    parts = [
        _spread([len(steps_R) == 1, masked], 1),
        _spread([width], 4),
        _spread([lowest + STEP_LIMIT], 11),
        _spread(np.maximum(bits_R - 1, 0), 4),
        _spread(steps_R[live_R] - lowest, width),
        _spread(tensor.matrix_RC.any(axis=0), 1) if masked else _spread([], 1),
        _spread(_five_to_a_byte(codes_RC[bits_R == 2].reshape(-1) + 1), 8),
        *(_spread(codes_RC[bits_R == b] + (1 << (b - 1)) - 1, b) for b in range(3, int(bits_R.max()) + 1)),
    ]
    return np.packbits(np.concatenate(parts), bitorder="little").tobytes()


def decode(data: bytes, start: int, shape: tuple[int, ...]) -> tuple[CodedTensor, int]:
    """Read a tensor that `encode` packed.

    Args:
        data: bytes that hold it.
        start: where it begins.
        shape: of the tensor.
    Returns:
        tensor: what was packed.
        end: the byte after its last one.
    Raises:
        ArtifactError: there are too few bytes, or they hold no such tensor.
    """
    n_rows = shape[0] if shape else 1
    if prod(shape) == 0:
        return CodedTensor(np.zeros(shape, np.int16), np.zeros(n_rows, np.int16)), start
    most = _FIXED_BITS + prod(shape) * MAX_BITS + n_rows * 19 + prod(shape) // n_rows
    source = _Bits(np.frombuffer(data[start : start + most // 8 + 2], np.uint8))
    whole, masked = source.take(2, 1).tolist()
    n_rows = 1 if whole else n_rows
    width, lowest = int(source.take(1, 4)[0]), int(source.take(1, 11)[0]) - STEP_LIMIT
    bits_R = source.take(n_rows, 4)
    bits_R = np.where(bits_R > 0, bits_R + 1, 0)
    steps_R = np.zeros(n_rows, np.int16)
    steps_R[bits_R > 0] = lowest + source.take(int(np.count_nonzero(bits_R)), width)
    n_columns = prod(shape) // n_rows
    live_C = np.flatnonzero(source.take(n_columns, 1)) if masked else np.arange(n_columns)
    codes_RC = np.zeros((n_rows, n_columns), np.int16)
    for bits in range(2, int(bits_R.max()) + 1):
        rows = np.flatnonzero(bits_R == bits)
        n = len(rows) * len(live_C)
        if bits == 2:
            codes = (source.take(-(-n // 5), 8)[:, None] // _THREES % 3).reshape(-1)[:n] - 1
        else:
            codes = source.take(n, bits) - ((1 << (bits - 1)) - 1)
        codes_RC[np.ix_(rows, live_C)] = codes.reshape(len(rows), len(live_C))
    return CodedTensor(codes_RC.reshape(shape), steps_R), start + -(-source.at // 8)


class _Bits:
    """Bits of a file, taken in order."""

    def __init__(self, data: Bits) -> None:
        self._bits = np.unpackbits(data, bitorder="little")
        self.at = 0

    def take(self, n: int, width: int) -> Ints:
        """The next n numbers of so many bits."""
        end = self.at + n * width
        if end > len(self._bits):
            raise corrupt(f"{len(self._bits) // 8} bytes where at least {-(-end // 8)} are needed")
        spread = self._bits[self.at : end].reshape(n, width).astype(np.int64)
        self.at = end
        return (spread << np.arange(width)).sum(axis=1)


def _spread(numbers: npt.ArrayLike, width: int) -> Bits:
    """Numbers as bits, the lowest first."""
    flat = np.asarray(numbers, np.int64).reshape(-1, 1)
    return ((flat >> np.arange(width)) & 1).astype(np.uint8).reshape(-1)


def _five_to_a_byte(digits_N: Ints) -> Ints:
    padded = np.concatenate([digits_N, np.zeros(-len(digits_N) % 5, np.int64)])
    return (padded.reshape(-1, 5) * _THREES).sum(axis=1)


def _step_width(tensor: CodedTensor) -> int:
    steps = tensor.steps[tensor.bits_R > 0].astype(np.int64)
    return int(steps.max() - steps.min()).bit_length() if len(steps) else 0


def _columns(tensor: CodedTensor) -> tuple[Ints, bool]:
    """The columns that are packed, and whether the others are left out: where that makes the tensor smaller."""
    some_C = np.asarray(tensor.matrix_RC.any(axis=0))
    bits_R = tensor.bits_R
    a_column = float(np.where(bits_R == 2, 1.6, bits_R).sum())
    if a_column * np.count_nonzero(~some_C) <= len(some_C):
        return np.arange(len(some_C)), False
    return np.flatnonzero(some_C), True
