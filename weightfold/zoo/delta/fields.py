"""Bit fields of changing width, end to end, many at once: what of a number is too random to be worth a model."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from weightfold.artifact.coded import corrupt

Array = npt.NDArray[Any]
_WORD, _ONE = np.uint64(63), np.uint64(1)


def pack(values_N: Array, widths_N: Array) -> bytes:
    """Write the lowest bits of each value, the highest of them first.

    Args:
        values_N: uint64, below 2^width.
        widths_N: bits of each, int64, 0 to 64.
    Example:
        >>> data = pack(np.array([5, 0, 300], np.uint64), np.array([3, 0, 9]))
        >>> len(data), unpack(data, np.array([3, 0, 9])).tolist()
        (2, [5, 0, 300])
    """
    ends = np.cumsum(widths_N)
    n_bits = int(ends[-1]) if len(ends) else 0
    out = np.zeros(n_bits // 64 + 2, np.uint64)
    here = np.flatnonzero(widths_N)
    if len(here):
        values, width, end = values_N[here].astype(np.uint64), widths_N[here], ends[here]
        last, first = (end - 1) >> 6, (end - width) >> 6
        shift = (-end & 63).astype(np.uint64)
        _add(out, last, values << shift)
        over = np.flatnonzero(first < last)
        spill = values[over] >> _ONE >> (_WORD - shift[over])
        _add(out, first[over], spill)
    return out.astype(">u8").tobytes()[: (n_bits + 7) // 8]


def _add(out: Array, words: Array, parts: Array) -> None:
    """Add numbers to words; equal words stand side by side."""
    if len(words):
        starts = np.flatnonzero(np.diff(words, prepend=-1))
        out[words[starts]] += np.add.reduceat(parts, starts)


def unpack(data: bytes, widths_N: Array) -> Array:
    """Read fields back, uint64, shape (N,).

    Raises:
        ArtifactError: the bytes are too few or too many.
    """
    fields = Fields(data)
    out = fields.take(widths_N)
    fields.finish()
    return out


class Fields:
    """Gives fields back, some at a time.

    Args:
        data: what `pack` wrote, and nothing else.
    """

    def __init__(self, data: bytes) -> None:
        words = np.zeros(len(data) // 8 + 2, ">u8")
        words.view(np.uint8)[: len(data)] = np.frombuffer(data, np.uint8)
        self._words = words.astype(np.uint64)
        self._n_bytes, self._at = len(data), 0

    def take(self, widths_N: Array) -> Array:
        """The next fields, uint64.

        Raises:
            ArtifactError: there are not so many bits.
        """
        start = np.cumsum(widths_N)
        n_bits = int(start[-1]) if len(start) else 0
        if self._at + n_bits > 8 * self._n_bytes:
            raise corrupt("its fields end too soon")
        start += self._at - widths_N
        self._at += n_bits
        shift = (start & 63).astype(np.uint64)
        start >>= 6
        out = self._words.take(start)
        out <<= shift
        start += 1
        out |= self._words.take(start) >> _ONE >> (_WORD - shift)
        out >>= np.minimum(64 - widths_N, 63).astype(np.uint64)
        out *= widths_N > 0
        return out

    def finish(self) -> None:
        """Make sure that nothing is left.

        Raises:
            ArtifactError: bytes are left.
        """
        if (self._at + 7) // 8 != self._n_bytes:
            raise corrupt(f"{self._n_bytes} bytes hold fields of {self._at} bits")
