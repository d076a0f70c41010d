"""Matrices of 2, 4 or 8 bits in blocks: ONNX Runtime's operator `MatMulNBits`.

    W[o, i] = scale[o, block of i] * (code[o, i] - 2**(bits - 1))

Codes that a network has learned are taken as they are; other weights are rounded, each block with the scale that leaves
the least squared error.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

BLOCK = 128
BITS = (2, 4, 8)
"""Widths for which ONNX Runtime has kernels on the CPU."""
_TRIALS = np.linspace(0.55, 1.0, 19)
"""Scales that are tried, as shares of the one that just holds the largest weight."""


def block_size(n_inputs: int) -> int:
    """The block of a matrix with so many inputs: 128, less where that would be mostly padding.

    Example:
        >>> block_size(1000), block_size(84), block_size(10)
        (128, 128, 16)
    """
    return min(BLOCK, max(16, 1 << (n_inputs - 1).bit_length()))


def held_by(codes_OI: Array) -> int | None:
    """The least of 2, 4 and 8 bits that holds some codes; None if none does.

    Example:
        >>> held_by(np.array([[1, -2]])), held_by(np.array([[7]])), held_by(np.array([[300]]))
        (2, 4, None)
    """
    low, high = int(codes_OI.min()), int(codes_OI.max())
    return next((b for b in BITS if -(1 << (b - 1)) <= low and high < 1 << (b - 1)), None)


def rounded(matrix_OI: Array, bits: int, block: int) -> tuple[Array, Array]:
    """Round a matrix in blocks of its inputs.

    Returns:
        codes_OI: int64, shape (O, I), within the bits.
        scale_OB: float32, shape (O, blocks).
    Example:
        >>> codes, scale = rounded(np.array([[0.5, -1.0, 0.25, 0.0]], np.float32), 4, 16)
        >>> bool(np.abs(codes * scale - [[0.5, -1.0, 0.25, 0.0]]).max() < 0.05)
        True
    """
    n_out, n_in = matrix_OI.shape
    blocks = _blocks(matrix_OI.astype(np.float32), block)
    low, high = -(1 << (bits - 1)), (1 << (bits - 1)) - 1
    at = np.abs(blocks).argmax(2)[..., None]
    largest = np.take_along_axis(blocks, at, 2)[..., 0]
    full = np.where(largest == 0, 1.0, largest / low)
    best, scale_OB = np.full(full.shape, np.inf), full
    for share in _TRIALS:
        trial = full * share
        error = ((np.clip(np.rint(blocks / trial[..., None]), low, high) * trial[..., None] - blocks) ** 2).sum(2)
        scale_OB, best = np.where(error < best, trial, scale_OB), np.minimum(best, error)
    codes = np.clip(np.rint(blocks / scale_OB[..., None]), low, high).astype(np.int64)
    return codes.reshape(n_out, -1)[:, :n_in], scale_OB.astype(np.float32)


def packed(codes_OI: Array, bits: int, block: int) -> npt.NDArray[np.uint8]:
    """Codes end to end, the first in the lowest bits, shape (O, blocks, block * bits / 8).

    Example:
        >>> packed(np.array([[-8, 7]]), 4, 16)[0, 0, 0]
        np.uint8(240)
    """
    per_byte = 8 // bits
    shifted = (_blocks(codes_OI, block) + (1 << (bits - 1))).astype(np.uint8)
    parts = shifted.reshape(*shifted.shape[:2], -1, per_byte)
    return np.bitwise_or.reduce(parts << (bits * np.arange(per_byte, dtype=np.uint8)), axis=-1).astype(np.uint8)


def _blocks(matrix_OI: Array, block: int) -> Array:
    """Rows cut into blocks, filled up with zeros, shape (O, blocks, block)."""
    n_out, n_in = matrix_OI.shape
    n_blocks = -(-n_in // block)
    return np.pad(matrix_OI, ((0, 0), (0, n_blocks * block - n_in))).reshape(n_out, n_blocks, block)
