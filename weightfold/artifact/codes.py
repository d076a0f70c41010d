"""The codes of a matrix as decisions: zero or not, sign, magnitude."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from weightfold.artifact.coded import Ints
from weightfold.artifact.decisions import Coder, Contexts, Flags, Meter
from weightfold.artifact.rangecoder import HALF, Decoder
from weightfold.artifact.rows import Rows
from weightfold.artifact.zeros import Columns, Zeros, class_chances

Codes = npt.NDArray[Any]
_CHUNK = 1 << 17


def write_zeros(coder: Coder, codes_LC: Codes, rows: Rows, columns: Columns, prior: float) -> None:
    flags_LC = codes_LC != 0
    chances_LC = Zeros(columns, prior).matrix(flags_LC, class_chances(rows.classes_L))
    for flags, chances in zip(_pieces(flags_LC), _pieces(chances_LC), strict=True):
        if isinstance(coder, Meter):
            coder.flags(flags, chances)  # pyright: ignore[reportArgumentType]
        else:
            coder.flags(flags.tolist(), chances.tolist())


def read_zeros(decoder: Decoder, rows: Rows, columns: Columns, prior: float) -> Flags:
    model = Zeros(columns, prior)
    above, left = (places.tolist() for places in columns.neighbours)
    flags_LC = np.zeros((len(rows.order_L), len(columns.live_C)), bool)
    for place, chance in enumerate(class_chances(rows.classes_L).tolist()):
        chances = [part.tolist() for part in model.row(chance)]
        joint = columns.joint
        flags_LC[place] = decoder.joint_flags(chances, left, above) if joint else decoder.flags(chances[0])
        model.saw(flags_LC[place])
    return flags_LC


def write_signs(coder: Coder, codes_LC: Codes, columns: Columns) -> None:
    """Code the signs of all codes that are not zero: whether each is that of its neighbours' sum, if this has one."""
    signs_LC = np.sign(codes_LC).astype(np.int8)
    here = signs_LC != 0
    near_N = columns.near(signs_LC)[here] if columns.joint else np.zeros(np.count_nonzero(here), np.int8)
    decisions_N = (signs_LC[here] > 0) ^ (near_N < 0)
    Contexts().code(coder, np.abs(near_N).astype(np.int64), decisions_N)


def read_signs(decoder: Decoder, flags_LC: Flags, columns: Columns) -> npt.NDArray[np.int16]:
    signs_LC = flags_LC.astype(np.int16)
    if not columns.joint:
        signs_LC[flags_LC] = 2 * np.array(decoder.flags([HALF] * np.count_nonzero(flags_LC)), np.int16) - 1
        return signs_LC
    above, left = (places.tolist() for places in columns.neighbours)
    contexts = Contexts()
    for row, flags_C in enumerate(flags_LC):
        signs = [0] * (len(above) + 1)
        for place in np.flatnonzero(flags_C).tolist():
            near = signs[above[place]] + signs[left[place]]
            same = decoder.learn(contexts.of(abs(near))) if near else decoder.flag(HALF)
            signs[place] = 1 if same ^ (near < 0) else -1
        signs_LC[row] = signs[:-1]
    return signs_LC


def write_sizes(coder: Coder, codes_LC: Codes, rows: Rows) -> None:
    wide_LC = np.broadcast_to(rows.bits_L[:, None], codes_LC.shape)
    here = (codes_LC != 0) & (wide_LC > 2)
    sizes_N, bits_N = np.abs(codes_LC[here].astype(np.int64)), wide_LC[here]
    contexts = Contexts()
    for at in range(0, len(sizes_N), _CHUNK):
        contexts.code(coder, *_size_decisions(sizes_N[at : at + _CHUNK], bits_N[at : at + _CHUNK]))


def _size_decisions(sizes_N: Ints, bits_N: Ints) -> tuple[Ints, Flags]:
    """The decisions behind magnitudes, one magnitude after the other, with the context of each."""
    digits_N = np.frexp(sizes_N.astype(np.float64))[1].astype(np.int64)
    widest = int(bits_N.max())
    contexts, decisions = [], []
    for n in range(1, widest - 1):  # is it longer than n digits?
        asked = (digits_N >= n) & (n < bits_N - 1)
        contexts.append(np.where(asked, _size_context(bits_N, n), -1))
        decisions.append(digits_N > n)
    for n in range(1, widest - 1):  # the digits below the leading one
        place_N = np.maximum(digits_N - 1 - n, 0)
        above_N = sizes_N >> (place_N + 1)
        known = _size_context(bits_N, 16 + 4 * digits_N + above_N) if n <= 2 else np.zeros_like(bits_N)
        contexts.append(np.where(n < digits_N, known, -1))
        decisions.append((sizes_N >> place_N) & 1 > 0)
    contexts_ND, decisions_ND = np.stack(contexts, axis=1), np.stack(decisions, axis=1)
    asked_ND = contexts_ND >= 0
    return contexts_ND[asked_ND], decisions_ND[asked_ND]


def _size_context(bits: Any, node: Any) -> Any:
    return 256 * bits + node


def read_sizes(decoder: Decoder, flags_LC: Flags, rows: Rows) -> npt.NDArray[np.int16]:
    sizes_LC = flags_LC.astype(np.int16)
    contexts = Contexts()
    for row, bits in enumerate(rows.bits_L.tolist()):
        if bits > 2:
            n = np.count_nonzero(flags_LC[row])
            sizes_LC[row, flags_LC[row]] = [_read_size(decoder, contexts, bits) for _ in range(n)]
    return sizes_LC


def _read_size(decoder: Decoder, contexts: Contexts, bits: int) -> int:
    digits, size = 1, 1
    while digits < bits - 1 and decoder.learn(contexts.of(_size_context(bits, digits))):
        digits += 1
    for n in range(1, digits):
        known = contexts.of(_size_context(bits, 16 + 4 * digits + size))
        size = 2 * size + (decoder.learn(known) if n <= 2 else decoder.flag(HALF))
    return size


def _pieces(matrix_RC: Codes) -> Iterator[Codes]:
    """A matrix in pieces of moderate length, row after row."""
    flat = matrix_RC.reshape(-1)
    return (flat[at : at + _CHUNK] for at in range(0, len(flat), _CHUNK))
