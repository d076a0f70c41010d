"""The rows of a coded tensor: bits, steps and densities."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from weightfold.artifact.coded import MAX_BITS, STEP_LIMIT, CodedTensor, Ints, corrupt
from weightfold.artifact.decisions import Coder, Contexts, Whole
from weightfold.artifact.rangecoder import Decoder
from weightfold.artifact.zeros import N_CLASSES, density_classes


@dataclass(frozen=True, eq=False)
class Rows:
    """The living rows, in the order in which they are coded.

    Args:
        order_L: places of the living rows, by bits, int64, shape (L,).
        bits_L: of each, 2 to 16.
    """

    order_L: Ints
    bits_L: Ints

    @classmethod
    def of(cls, tensor: CodedTensor) -> Rows:
        """Take down the rows of a tensor."""
        bits_R, order_L = tensor.bits_R, _order(tensor.bits_R)
        return cls(order_L, bits_R[order_L])

    def write(self, coder: Coder, tensor: CodedTensor) -> None:
        """Code bits and steps."""
        contexts, before = Contexts(), 0
        for bits in tensor.bits_R.tolist():
            base = 32 * min(before, 6)
            coder.learn(bits > 0, contexts.of(base + 1))
            for n in range(2, min(bits + 1, MAX_BITS)):
                coder.learn(bits > n, contexts.of(base + n))
            before = bits
        _write_running(coder, tensor.steps[self.order_L].astype(np.int64))

    @classmethod
    def read(cls, decoder: Decoder, n_rows: int) -> tuple[Rows, npt.NDArray[np.int16]]:
        """Read back the rows, and the steps of all, zero for rows of zeros."""
        contexts, before = Contexts(), 0
        bits_R = np.zeros(n_rows, np.int64)
        for row in range(n_rows):
            base = 32 * min(before, 6)
            bits = 2 * decoder.learn(contexts.of(base + 1))
            while 0 < bits < MAX_BITS and decoder.learn(contexts.of(base + bits)):
                bits += 1
            bits_R[row] = before = bits
        order_L = _order(bits_R)
        steps_R = np.zeros(n_rows, np.int16)
        steps_R[order_L] = _read_running(decoder, len(order_L), STEP_LIMIT)
        return cls(order_L, bits_R[order_L]), steps_R


def _order(bits_R: Ints) -> Ints:
    return np.argsort(bits_R, kind="stable")[np.count_nonzero(bits_R == 0) :].astype(np.int64)


def write_classes(coder: Coder, codes_LC: npt.NDArray[Any]) -> Ints:
    """Code the density class of each row, and return them, shape (L,)."""
    classes_L = density_classes(np.count_nonzero(codes_LC, axis=1), codes_LC.shape[1])
    _write_running(coder, classes_L)
    return classes_L


def read_classes(decoder: Decoder, n: int) -> Ints:
    """Read back the density classes of n rows."""
    return _read_running(decoder, n, N_CLASSES)


def _write_running(coder: Coder, numbers_L: Ints) -> None:
    """Code numbers, each as its difference to the one before."""
    model, last = Whole(), 0
    for number in numbers_L.tolist():
        model.write(coder, number - last)
        last = number


def _read_running(decoder: Decoder, n: int, limit: int) -> Ints:
    model, last = Whole(), 0
    out = np.zeros(n, np.int64)
    for place in range(n):
        last += model.read(decoder)
        if abs(last) > limit:
            raise corrupt(f"{last} where at most {limit} is possible")
        out[place] = last
    return out
