"""A tensor of whole numbers and steps: what a quantised network is made of. NumPy alone.

The value of a code c in a row with step index k is float32(c) * float32(2^(k/8)). The steps are a table of eight
constants times an exact power of two, so every machine, and torch as well as NumPy, makes the same bits of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from weightfold.errors import ArtifactError

Ints = npt.NDArray[np.int64]
Array = npt.NDArray[Any]

MAX_BITS = 16
STEP_LIMIT = 960
"""Step indices lie within -960 and 960: steps from 2^-120 to 2^120."""
_EIGHTHS = ("0x1p0", "0x1.172b84p0", "0x1.306fe0p0", "0x1.4bfdaep0", "0x1.6a09e6p0", "0x1.8ace54p0", "0x1.ae89fap0",
            "0x1.d5818ep0")  # fmt: skip
_TABLE = np.array([float.fromhex(text) for text in _EIGHTHS], np.float32)


def _all_steps() -> npt.NDArray[np.float32]:
    index = np.arange(-STEP_LIMIT, STEP_LIMIT + 1)
    return np.ldexp(_TABLE[index & 7], index >> 3).astype(np.float32)


STEPS = _all_steps()
"""Every step, float32, shape (1921,): step index k stands at place k + STEP_LIMIT."""
STEPS.flags.writeable = False


def step_value(k: npt.ArrayLike) -> npt.NDArray[np.float32]:
    """The step of an index: 2^(k/8) as float32, any shape.

    Raises:
        ArtifactError: an index lies outside -960 to 960.
    Example:
        >>> step_value([-8, 0, 4, 8]).tolist()
        [0.5, 1.0, 1.4142135381698608, 2.0]
    """
    index = np.asarray(k, np.int64)
    if index.size and max(index.max(), -index.min()) > STEP_LIMIT:
        raise ArtifactError(
            f"Step indices must lie within -{STEP_LIMIT} and {STEP_LIMIT}. Got {index.min()} to {index.max()} instead.",
            remedy="Scale the tensor: its step would be no ordinary float32.",
        )
    return STEPS[index + STEP_LIMIT]


def nearest_step(value: npt.ArrayLike) -> npt.NDArray[np.int16]:
    """The index of the step nearest to a positive number, on a logarithmic scale; any shape.

    Example:
        >>> nearest_step([0.5, 1.0, 1.5]).tolist()
        [-8, 0, 5]
    """
    index = np.rint(8 * np.log2(np.asarray(value, np.float64)))
    return np.clip(index, -STEP_LIMIT, STEP_LIMIT).astype(np.int16)


@dataclass(frozen=True, eq=False)
class CodedTensor:
    """A tensor as whole numbers times one step a row.

    Args:
        codes: int16 or int32, the tensor's own shape; within -32767 and 32767.
        steps: step indices, int16, shape (R,): R = shape[0], one for each row, or 1 for the whole tensor.
        dtype: of the values.
    Raises:
        ArtifactError: the shapes do not fit, or a number is out of range.
    Example:
        >>> CodedTensor(np.array([[1, 0], [-3, 2]], np.int16), np.array([0, -8], np.int16)).values().tolist()
        [[1.0, 0.0], [-1.5, 1.0]]
    """

    codes: Array
    steps: Array
    dtype: Literal["float32"] = "float32"

    def __post_init__(self) -> None:
        codes, steps = self.codes, self.steps
        rows = codes.shape[0] if codes.ndim else 1
        if codes.dtype.kind != "i" or steps.dtype.kind != "i":
            raise ArtifactError(f"Codes and steps must be signed integers. Got {codes.dtype} and {steps.dtype}.")
        if steps.shape not in ((rows,), (1,)):
            raise ArtifactError(
                f"Codes of shape {codes.shape} take {rows} steps, or 1. Got steps of shape {steps.shape} instead."
            )
        limit = (1 << (MAX_BITS - 1)) - 1
        if codes.size and max(int(codes.max()), -int(codes.min())) > limit:
            raise ArtifactError(
                f"Codes must lie between {-limit} and {limit}. Got {codes.min()} to {codes.max()} instead.",
                remedy="Choose a larger step.",
            )
        step_value(steps)

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes of the tensor's dimensions."""
        return self.codes.shape

    @property
    def matrix_RC(self) -> Array:
        """The codes with one row for each step, shape (R, C)."""
        return self.codes.reshape(len(self.steps), -1 if self.codes.size else 0)

    @cached_property
    def bits_R(self) -> Ints:
        """Bits of each row, int64, shape (R,); see `row_bits`."""
        return row_bits(self.matrix_RC)

    def values(self) -> npt.NDArray[np.float32]:
        """The tensor itself, float32, in its own shape."""
        out = self.matrix_RC.astype(np.float32) * step_value(self.steps)[:, None]
        return out.reshape(self.codes.shape)

    def same(self, other: CodedTensor) -> bool:
        """Tell whether two hold the same tensor: equal codes, and equal steps in the rows that are not zero."""
        if self.shape != other.shape or self.codes.size == 0:
            return self.shape == other.shape
        if self.steps.shape != other.steps.shape:
            return False
        live = self.bits_R > 0
        return bool((self.codes == other.codes).all() and (self.steps[live] == other.steps[live]).all())


def row_bits(matrix_RC: Array) -> Ints:
    """Bits that each row's codes take: 0 for a row of zeros, else the least b >= 2 with max|c| <= 2^(b-1) - 1.

    Args:
        matrix_RC: codes, shape (R, C).
    Returns:
        bits_R: int64, shape (R,), each 0 or 2 to 16.
    Example:
        >>> row_bits(np.array([[0, 0], [1, -1], [-3, 0], [4, 1], [32767, 0]])).tolist()
        [0, 2, 3, 4, 16]
    """
    largest = np.abs(matrix_RC.astype(np.int32, copy=False)).max(axis=1, initial=0)
    return np.where(largest > 0, 1 + np.frexp(largest.astype(np.float64))[1], 0).astype(np.int64)


def corrupt(reason: str) -> ArtifactError:
    """Say that coded bytes are no tensor, and why."""
    return ArtifactError(f"A coded tensor is corrupt: {reason}.", remedy="Copy or write the file again.")
