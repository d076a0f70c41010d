"""The tensors of a child, each in the mode that suits it: as predicted, a copy, exact, in steps, or plain bytes."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

import numpy as np
from torch import Tensor

from weightfold.artifact.coded import corrupt
from weightfold.artifact.decisions import Contexts
from weightfold.artifact.rangecoder import Decoder, Encoder
from weightfold.zoo.delta import lossless, lossy
from weightfold.zoo.delta.layout import Entry, Reader, kind_of, rounded_bits, values_of
from weightfold.zoo.delta.numbers import Array
from weightfold.zoo.delta.predicted import REAL, Moved

SAME, NEAR, COPY, CODES, PLAIN = range(5)
"""What is predicted; a difference exact to the bit; a copy of an earlier tensor; multiples of a step; plain bytes."""


def write_tensors(
    coder: Encoder,
    flags: Contexts,
    moved: Moved,
    bits: Sequence[Array],
    ties: Mapping[int, int],
    step: float | None,
    plain: bool,
    carry: bool = False,
) -> bytes:
    """Code each tensor in the mode that suits it."""
    grains, lines, body = lossy.Grains(), [], bytearray()
    twins = _twins(moved.entries, bits, ties)
    before = SAME
    for i, entry in enumerate(moved.entries):
        codes, grain = None, lossy.Grain(False, 0)
        predicted = moved.predicted(i)
        alone = plain and entry.source is None
        if i not in ties and not alone and np.array_equal(bits[i], predicted):
            mode = SAME
        elif i in twins:
            mode = COPY
        elif alone:
            mode = PLAIN
        else:
            mode = NEAR
            if step is not None and entry.source is not None and entry.dtype in REAL:
                codes, grain = _codes(moved, i, bits[i], predicted, step, carry)
                mode = NEAR if codes is None else CODES
        _write_mode(coder, flags, mode, before)
        before = mode
        if mode == COPY:
            coder.raw(twins[i], 24)
            coder.learn(i in ties, flags.of(3))
        elif mode == PLAIN:
            body += bits[i].tobytes()
        elif mode == NEAR:
            lines.append((lossless.Line(entry, predicted), bits[i]))
        elif mode == CODES and codes is not None:
            grains.write(coder, grain)
            lossy.write_codes(coder, codes, entry)
    return bytes(body) + lossless.write(coder, [line for line, _ in lines], [own for _, own in lines])


def ties_of(state: Mapping[str, Tensor]) -> dict[int, int]:
    """Numbers of tensors that are the same object as an earlier one, and of that."""
    first: dict[int, int] = {}
    pairs = [(i, first.setdefault(id(value), i)) for i, value in enumerate(state.values())]
    return {i: owner for i, owner in pairs if owner != i}


def _twins(entries: Sequence[Entry], bits: Sequence[Array], ties: Mapping[int, int]) -> dict[int, int]:
    """Numbers of tensors that equal an earlier one to the bit, and of that."""
    first: dict[object, int] = {}
    keys = [(hashlib.sha256(own.data).digest(), e.dtype, e.shape) for e, own in zip(entries, bits, strict=True)]
    pairs = [(i, ties.get(i, first.setdefault(key, i))) for i, key in enumerate(keys)]
    return {i: owner for i, owner in pairs if owner != i}


def _codes(
    moved: Moved, i: int, bits: Array, predicted: Array, step: float, carry: bool
) -> tuple[Array | None, lossy.Grain]:
    entry = moved.entries[i]
    values = values_of(bits, entry.dtype).reshape(entry.shape)
    parent, factor = moved.basis(i)
    grain = lossy.grain_of(values, parent * factor, entry, step)
    own = grain.step(step)
    if grain.ladder:
        return lossy.ladder_codes(bits, predicted, entry, own), grain
    return lossy.codes_of(values, parent, factor, own, carry), grain


def _write_mode(coder: Encoder, flags: Contexts, mode: int, before: int) -> None:
    for n in range(PLAIN):
        coder.learn(mode > n, flags.of(16 + 8 * before + n))
        if mode == n:
            return


def read_tensors(
    decoder: Decoder, flags: Contexts, moved: Moved, step: float | None, reader: Reader
) -> tuple[list[Array], dict[int, int]]:
    """The bits of each tensor, and which are tied to which."""
    grains, before = lossy.Grains(), SAME
    found: list[Array] = []
    lines: list[tuple[int, lossless.Line]] = []
    copies: list[tuple[int, int]] = []
    ties: dict[int, int] = {}
    for i, entry in enumerate(moved.entries):
        before = _read_mode(decoder, flags, before)
        empty = np.empty(0, kind_of(entry.dtype).unsigned)
        found.append(empty)
        if before == COPY:
            copies.append((i, _earlier(decoder, moved.entries, i)))
            if decoder.learn(flags.of(3)):
                ties[i] = copies[-1][1]
        elif before == PLAIN:
            found[i] = np.frombuffer(bytearray(reader.take(entry.size_bytes)), empty.dtype)
        elif before == NEAR:
            lines.append((i, lossless.Line(entry, moved.predicted(i))))
        elif before == SAME:
            found[i] = moved.predicted(i).copy()
        else:
            found[i] = _read_codes(decoder, grains, moved, i, step)
    exact = lossless.read(decoder, [line for _, line in lines], reader.take(reader.n_left))
    for (i, _), own in zip(lines, exact, strict=True):
        found[i] = own
    for i, source in copies:
        found[i] = found[source].copy()
    return found, ties


def _read_mode(decoder: Decoder, flags: Contexts, before: int) -> int:
    mode = 0
    while mode < PLAIN and decoder.learn(flags.of(16 + 8 * before + mode)):
        mode += 1
    return mode


def _earlier(decoder: Decoder, entries: Sequence[Entry], i: int) -> int:
    source = decoder.raw(24)
    if source >= i or (entries[source].dtype, entries[source].shape) != (entries[i].dtype, entries[i].shape):
        raise corrupt(f"tensor {i} copies tensor {source}, which is another")
    return source


def _read_codes(decoder: Decoder, grains: lossy.Grains, moved: Moved, i: int, step: float | None) -> Array:
    entry = moved.entries[i]
    if step is None or entry.source is None or entry.dtype not in REAL:
        raise corrupt("codes where there can be none")
    grain = grains.read(decoder)
    codes, own = lossy.read_codes(decoder, entry), grain.step(step)
    if grain.ladder:
        return lossy.ladder_bits(codes, moved.predicted(i), entry, own)
    values = lossy.values_of_codes(codes.reshape(entry.shape), *moved.basis(i), own)
    return rounded_bits(values, entry.dtype).reshape(-1)
