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
    ends = np.cumsum(widths_N)
    n_bits = int(ends[-1]) if len(ends) else 0
    if len(data) != (n_bits + 7) // 8:
        raise corrupt(f"{len(data)} bytes hold fields of {n_bits} bits")
    words = np.zeros(n_bits // 64 + 2, ">u8")
    words.view(np.uint8)[: len(data)] = np.frombuffer(data, np.uint8)
    words = words.astype(np.uint64)
    start = ends - widths_N
    at, shift = start >> 6, (start & 63).astype(np.uint64)
    out = words.take(at) << shift
    out |= words.take(at + 1) >> _ONE >> (_WORD - shift)
    width = widths_N.astype(np.uint64)
    out >>= np.minimum(np.uint64(64) - width, _WORD)
    out[widths_N == 0] = 0
    return out
