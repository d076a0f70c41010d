"""The codes of a matrix as decisions: zero or not, sign, magnitude."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from weightfold.artifact.coded import Ints
from weightfold.artifact.decisions import Coder, Contexts, Flags, Meter
from weightfold.artifact.rangecoder import HALF, Decoder
from weightfold.artifact.rows import Rows, read_classes, write_classes
from weightfold.artifact.zeros import Columns, Zeros, class_chances

Codes = npt.NDArray[Any]
_CHUNK = 1 << 17
_BALANCE = 4
_NEAR = np.array([0, 1, 1, 2, 2, 3, 3, 4, 4, 4, 5, 5, 5, 5, 6])
"""Class of a magnitude's neighbours, by the sum of theirs."""


def write_zeros(coder: Coder, codes_LC: Codes, columns: Columns, prior: float) -> None:
    """Code the density class of each row, and which codes are zero."""
    classes_L = write_classes(coder, codes_LC)
    flags_LC = codes_LC != 0
    chances_LC = Zeros(columns, prior).matrix(flags_LC, class_chances(classes_L))
    for flags, chances in zip(_pieces(flags_LC), _pieces(chances_LC), strict=True):
        if isinstance(coder, Meter):
            coder.flags(flags, chances)  # pyright: ignore[reportArgumentType]
        else:
            coder.flags(flags.tolist(), chances.tolist())


def read_zeros(decoder: Decoder, n_rows: int, columns: Columns, prior: float) -> Flags:
    """Read back which codes are not zero, shape (L, C)."""
    model = Zeros(columns, prior)
    places = columns.neighbours.tolist()
    flags_LC = np.zeros((n_rows, len(columns.live_C)), bool)
    for place, chance in enumerate(class_chances(read_classes(decoder, n_rows)).tolist()):
        chances = [part.tolist() for part in model.row(chance)]
        joint = columns.joint
        flags_LC[place] = decoder.joint_flags(chances, places) if joint else decoder.flags(chances[0])
        model.saw(flags_LC[place])
    return flags_LC


def write_signs(coder: Coder, codes_LC: Codes, columns: Columns, informed: bool) -> None:
    """Code the signs of all codes that are not zero: whether each is that of a sum of others, unless this is 0.

    The others are the neighbours, or, where there are none, the codes of its column and its row so far; if not
    `informed`, there are no others.
    """
    signs_LC = np.sign(codes_LC).astype(np.int64)
    here = signs_LC != 0
    near_N = np.zeros(np.count_nonzero(here), np.int64)
    if informed:
        near_N = (columns.near(signs_LC) if columns.joint else _balance(signs_LC))[here]
    decisions_N = (signs_LC[here] > 0) ^ (near_N < 0)
    Contexts().code(coder, np.abs(near_N), decisions_N)


def _balance(signs_LC: Ints) -> Ints:
    """Of each sign, the sum of those above it and that of those before it in its row, within -4 and 4 each."""
    above_LC = np.cumsum(signs_LC, axis=0) - signs_LC
    before_LC = np.cumsum(signs_LC, axis=1) - signs_LC
    return np.clip(above_LC, -_BALANCE, _BALANCE) + np.clip(before_LC, -_BALANCE, _BALANCE)


def read_signs(decoder: Decoder, flags_LC: Flags, columns: Columns, informed: bool) -> npt.NDArray[np.int16]:
    """Read back the signs, 0 where a flag says so; shape (L, C)."""
    signs_LC = flags_LC.astype(np.int16)
    if not informed:
        signs_LC[flags_LC] = 2 * np.array(decoder.flags([HALF] * int(np.count_nonzero(flags_LC))), np.int16) - 1
        return signs_LC
    left, above, above_left, above_right = columns.neighbours.tolist()
    contexts, totals = Contexts(), [0] * len(left)
    for row, flags_C in enumerate(flags_LC):
        signs, before = [0] * (len(left) + 1), 0
        for place in np.flatnonzero(flags_C).tolist():
            if columns.joint:
                near = 2 * (signs[left[place]] + signs[above[place]])
                near += signs[above_left[place]] + signs[above_right[place]]
            else:
                near = max(-_BALANCE, min(_BALANCE, totals[place])) + max(-_BALANCE, min(_BALANCE, before))
            same = decoder.learn(contexts.of(abs(near))) if near else decoder.flag(HALF)
            signs[place] = 1 if same ^ (near < 0) else -1
            totals[place] += signs[place]
            before += signs[place]
        signs_LC[row] = signs[:-1]
    return signs_LC


def write_sizes(coder: Coder, codes_LC: Codes, rows: Rows, columns: Columns, informed: bool) -> None:
    """Code the magnitudes of all codes that are not zero, in rows of more than two bits.

    The context is the bits of the row, and, if `informed`, the magnitudes of the neighbours or of the column so far.
    """
    wide_LC = np.broadcast_to(rows.bits_L[:, None], codes_LC.shape)
    here = (codes_LC != 0) & (wide_LC > 2)
    sizes_LC = np.abs(codes_LC.astype(np.int64))
    base_N = wide_LC[here] << 8
    if informed:
        base_N |= (_near_class(sizes_LC, columns) if columns.joint else _column_class(sizes_LC))[here] << 13
    sizes_N, contexts = sizes_LC[here], Contexts()
    for at in range(0, len(sizes_N), _CHUNK):
        contexts.code(coder, *_size_decisions(sizes_N[at : at + _CHUNK], base_N[at : at + _CHUNK]))


def _near_class(sizes_LC: Ints, columns: Columns) -> Ints:
    return _NEAR[np.minimum(columns.near(sizes_LC), len(_NEAR) - 1)]


def _column_class(sizes_LC: Ints) -> Ints:
    """How large the magnitudes above each are, on the average: 0 if there are none, else 1 to 7."""
    flags_LC = (sizes_LC > 0).astype(np.int64)
    seen_LC = np.cumsum(flags_LC, axis=0) - flags_LC
    beyond_LC = np.cumsum(sizes_LC, axis=0) - sizes_LC - seen_LC
    return np.where(seen_LC > 0, 1 + np.minimum(4 * beyond_LC // np.maximum(seen_LC, 1), 6), 0)


def _size_decisions(sizes_N: Ints, base_N: Ints) -> tuple[Ints, Flags]:
    """The decisions behind magnitudes, one magnitude after the other, with the context of each.

    A context is 2^13 * class of the neighbours + 2^8 * bits of the row + place in the tree of decisions; beyond the
    first two digits, what the neighbours are does not matter.
    """
    digits_N = np.frexp(sizes_N.astype(np.float64))[1].astype(np.int64)
    alone_N = base_N & 0x1F00
    bits_N = alone_N >> 8
    widest = int(bits_N.max())
    contexts, decisions = [], []
    for n in range(1, widest - 1):  # is it longer than n digits?
        asked = (digits_N >= n) & (n < bits_N - 1)
        contexts.append(np.where(asked, (base_N if n <= 2 else alone_N) + n, -1))
        decisions.append(digits_N > n)
    for n in range(1, widest - 1):  # the digits below the leading one
        place_N = np.maximum(digits_N - 1 - n, 0)
        above_N = sizes_N >> (place_N + 1)
        known = alone_N + 16 + 4 * digits_N + above_N if n <= 2 else np.zeros_like(alone_N)
        contexts.append(np.where(n < digits_N, known, -1))
        decisions.append((sizes_N >> place_N) & 1 > 0)
    contexts_ND, decisions_ND = np.stack(contexts, axis=1), np.stack(decisions, axis=1)
    asked_ND = contexts_ND >= 0
    return contexts_ND[asked_ND], decisions_ND[asked_ND]


def read_sizes(
    decoder: Decoder, flags_LC: Flags, rows: Rows, columns: Columns, informed: bool
) -> npt.NDArray[np.int16]:
    """Read back the magnitudes, 0 where a flag says so; shape (L, C)."""
    sizes_LC = flags_LC.astype(np.int16)
    contexts, near = Contexts(), _NEAR.tolist()
    left, above, above_left, above_right = columns.neighbours.tolist()
    seen, beyond = [0] * len(left), [0] * len(left)
    for row, bits in enumerate(rows.bits_L.tolist()):
        sizes = [*sizes_LC[row].tolist(), 0]
        for place in np.flatnonzero(flags_LC[row]).tolist():
            if bits > 2:
                if not informed:
                    context = 0
                elif columns.joint:
                    total = 2 * (sizes[left[place]] + sizes[above[place]])
                    total += sizes[above_left[place]] + sizes[above_right[place]]
                    context = near[min(total, len(near) - 1)]
                else:
                    context = 1 + min(4 * beyond[place] // seen[place], 6) if seen[place] else 0
                sizes[place] = _read_size(decoder, contexts, bits, context << 13)
            seen[place] += 1
            beyond[place] += sizes[place] - 1
        sizes_LC[row] = sizes[:-1]
    return sizes_LC


def _read_size(decoder: Decoder, contexts: Contexts, bits: int, near: int) -> int:
    alone, digits, size = bits << 8, 1, 1
    while digits < bits - 1 and decoder.learn(contexts.of(alone + digits + (near if digits <= 2 else 0))):
        digits += 1
    for n in range(1, digits):
        known = contexts.of(alone + 16 + 4 * digits + size) if n <= 2 else None
        size = 2 * size + (decoder.flag(HALF) if known is None else decoder.learn(known))
    return size


def _pieces(matrix_RC: Codes) -> Iterator[Codes]:
    """A matrix in pieces of moderate length, row after row."""
    flat = matrix_RC.reshape(-1)
    return (flat[at : at + _CHUNK] for at in range(0, len(flat), _CHUNK))
