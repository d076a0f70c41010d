"""A model as the difference to another one: exact to the bit, or in steps of a stated size.

    byte    kind (1) | checksum (8) | length of the side part | side part | body

1. The parent is **moved** towards the child by symmetries (`moves`): channels change places, signs, scales.
2. Each tensor then is one of: what is predicted; a copy of an earlier one (ties); a difference exact to the bit
   (`lossless`); multiples of a step (`lossy`); plain bytes.
3. The side part is one range-coded stream: layout where it is not the parent's, moves, modes, scales, tables, codes. The
   body holds the interleaved streams and raw bits of exact differences.

Lossless decoding gives the child whatever the prediction is worth: a residual makes up for it. The prediction itself is
gathers and single products only, so every machine makes the same. The checksum covers the file and the decoded tensors:
damage and the wrong parent are refused. Sizes are bounded by the parent and the length of the file before anything is
allocated.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from weightfold.artifact.coded import corrupt
from weightfold.artifact.decisions import Contexts
from weightfold.artifact.rangecoder import Decoder, Encoder
from weightfold.errors import ArtifactError, ConfigError
from weightfold.fingerprint import digest
from weightfold.zoo import lossless, lossy, moves
from weightfold.zoo.layout import (
    Entry,
    Reader,
    bits_of,
    entries_of,
    kind_of,
    read_layout,
    rounded_bits,
    same_layout,
    tensor_of,
    values_of,
    varint,
    write_layout,
)
from weightfold.zoo.moves import FACTOR_DIGITS, FINE_DIGITS, Alignment
from weightfold.zoo.numbers import Array

State = Mapping[str, Tensor]
EXACT, STEPS = 0xD1, 0xD2
"""First byte of a difference."""
N_CHECK = 8
SAME, NEAR, COPY, CODES, PLAIN = range(5)
"""Modes of a tensor."""
REAL = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
"""Types that may be rounded to steps."""
FINE, COARSE = (FACTOR_DIGITS, FINE_DIGITS), (3,)
"""Binary digits of factors that are tried for exact differences, and where weights are rounded anyway."""



def encode(
    child: State, parent: State, *, moves: Alignment | None = None, step: float | None = None, relative: bool = False
) -> bytes:
    """Code a child as the difference to a parent.

    Args:
        child: tensors by name, on the CPU, of any type.
        parent: what `decode` will be given, to the bit. Tensors of the same name and shape predict the child's; others
            are coded alone.
        moves: what makes the parent look like the child (`matching.match`), in the child's order of tensors.
        step: None for a child exact to the bit; else the step of differences, > 0: those below 0.7 steps are dropped,
            larger ones are off by half a step at most, in the parent's scale. Whole numbers, and tensors with infinite
            numbers or NaN, stay exact.
        relative: the step is a share of the root mean square of all differences.
    Raises:
        ArtifactError: a tensor is sparse or quantised, and cannot be stored so.
        ConfigError: the step is not above 0.
    Example:
        >>> parent = {"w": torch.arange(6.0).reshape(2, 3)}
        >>> child = {"w": parent["w"] + torch.tensor([0.0, 0.5, 0.0])}
        >>> torch.equal(decode(encode(child, parent), parent)["w"], child["w"])
        True
        >>> decode(encode(child, parent, step=0.25), parent)["w"].tolist()
        [[0.0, 1.5, 2.0], [3.0, 4.5, 5.0]]
    """
    if step is not None and not 0 < step < float("inf"):
        raise ConfigError(f"The step of a lossy difference must be above 0. Got {step} instead.")
    entries = entries_of(child, parent)
    found = moves or Alignment()
    tried = FINE[: 1 + bool(found.factors)] if step is None else COARSE
    payloads = [_write(child, parent, entries, found, step, relative, False, digits) for digits in tried]
    payload = min(payloads, key=len)
    if not _fits(entries, parent, len(payload)):
        payload = _write(child, parent, entries, found, step, relative, True, tried[payloads.index(payload)])
    kind = bytes([EXACT if step is None else STEPS])
    state = child if step is None else _read(payload, parent)
    return kind + _check(kind, payload, state) + payload


def decode(data: bytes, parent: State) -> dict[str, Tensor]:
    """Read a child back.

    Raises:
        ArtifactError: the bytes are damaged, cut short or foreign, or the parent is another one.
    """
    kind, payload = data[:1], data[1 + N_CHECK :]
    if kind not in (bytes([EXACT]), bytes([STEPS])):
        raise corrupt("it is no difference between models")
    try:
        state = _read(payload, parent)
    except (ValueError, IndexError, OverflowError, MemoryError) as error:
        raise corrupt(str(error) or type(error).__name__) from None
    if _check(kind, payload, state) != data[1 : 1 + N_CHECK]:
        raise ArtifactError(
            "A difference does not give the tensors that its checksum is of.",
            remedy="It is damaged, or belongs to another parent.",
        )
    return state


def is_lossy(data: bytes) -> bool:
    """Whether a difference gives its child in steps only."""
    return data[:1] == bytes([STEPS])


def _check(kind: bytes, payload: bytes, state: State) -> bytes:
    return hashlib.sha256(kind + payload + digest(state).encode()).digest()[:N_CHECK]


def _fits(entries: Sequence[Entry], parent: State, n_bytes: int) -> bool:
    """Whether a decoder may believe in tensors so large: no more than the parent and the length of the file explain."""
    owned = sum(value.numel() * value.dtype.itemsize for value in parent.values())
    return sum(e.size_bytes for e in entries) <= 8 * owned + 256 * n_bytes + 65536


# the moved parent -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Moved:
    """The parent in the child's order: bits of each tensor of the child's layout, shaped, and their types.

    ``factors`` are what numbers are multiplied by then, for the tensors that have any.
    """

    entries: Sequence[Entry]
    arrays: Sequence[Array]
    dtypes: Sequence[torch.dtype]
    factors: Mapping[int, Array]
    balance: Mapping[int, Array]

    def predicted(self, i: int) -> Array:
        """The bits that are predicted for a tensor, in a line; zeros where it has no counterpart."""
        entry, array = self.entries[i], np.ascontiguousarray(self.arrays[i])
        if i not in self.factors and self.dtypes[i] == entry.dtype:
            return array.reshape(-1)
        return rounded_bits(self.values(i) * self.factor(i), entry.dtype).reshape(-1)

    def values(self, i: int) -> Array:
        """The parent's numbers, float64, before factors."""
        return _floats(self.arrays[i], self.dtypes[i])

    def factor(self, i: int) -> Array:
        """What takes the parent's numbers to the child's scale."""
        return self.factors.get(i, np.ones(1))

    def basis(self, i: int) -> tuple[Array, Array]:
        """The parent's numbers in the scale in which steps are taken, and what takes that to the child's."""
        balance = self.balance.get(i, np.ones(1))
        return self.values(i) * balance, self.factor(i) / balance


def _floats(bits: Array, dtype: torch.dtype) -> Array:
    return values_of(np.ascontiguousarray(bits), dtype).astype(np.float64)


def _moved(entries: Sequence[Entry], parent: State, found: Alignment, lossy_: bool) -> _Moved:
    owned = list(parent.values())
    arrays, dtypes = [], []
    for entry in entries:
        dtype = entry.dtype if entry.source is None else owned[entry.source].dtype
        shape = (*entry.shape, 2) if dtype.is_complex else entry.shape
        bits = np.zeros(entry.n_units, kind_of(dtype).unsigned) if entry.source is None else bits_of(owned[entry.source])
        arrays.append(bits.reshape(shape))
        dtypes.append(dtype)
    shapes = [entry.shape for entry in entries]
    arrays = moves.moved(found, arrays)
    balance = {}
    if lossy_ and found.factors:
        named = {p.tensor for m in found.factors for p in m.places}
        values = [_floats(a, t) if i in named else a for i, (a, t) in enumerate(zip(arrays, dtypes, strict=True))]
        balance = moves.balance_of(found, values, shapes)
    return _Moved(entries, arrays, dtypes, moves.factors_of(found, shapes), balance)


def _movable(entries: Sequence[Entry]) -> list[tuple[int, ...]]:
    """Shapes of the tensors that moves may name; others count as having no dimension."""
    real = [e.source is not None and e.dtype.is_floating_point for e in entries]
    return [e.shape if yes else () for e, yes in zip(entries, real, strict=True)]


# writing --------------------------------------------------------------------------------------------------------------


def _write(
    child: State,
    parent: State,
    entries: Sequence[Entry],
    found: Alignment,
    step: float | None,
    relative: bool,
    plain: bool,
    digits: int,
) -> bytes:
    coder, flags = Encoder(), Contexts()
    _write_layout(coder, flags, entries, parent)
    bits = [bits_of(child[e.name]) for e in entries]
    whole, found = found, moves.with_digits(found, digits)
    if step is not None:
        bits = _rescaled(entries, bits, whole, found)
    moves.write(coder, found, digits)
    moved = _moved(entries, parent, found, step is not None)
    coder.learn(step is not None, flags.of(2))
    if step is not None:
        step = lossy.rounded_step(_absolute(moved, bits, step) if relative else step)
        lossy.write_step(coder, step)
    body = _write_tensors(coder, flags, moved, bits, _ties(child), step, plain)
    side = coder.finish()
    return varint(len(side)) + side + body


def _rescaled(entries: Sequence[Entry], bits: Sequence[Array], whole: Alignment, coarse: Alignment) -> list[Array]:
    """A child whose channels have the scales that coarse factors give them: other numbers, the same function."""
    shapes = [e.shape for e in entries]
    one, two = moves.factors_of(whole, shapes), moves.factors_of(coarse, shapes)
    out = list(bits)
    for i in one:
        entry = entries[i]
        values = values_of(bits[i], entry.dtype).reshape(entry.shape).astype(np.float64) * (two[i] / one[i])
        out[i] = np.where(np.isfinite(values).reshape(-1), rounded_bits(values, entry.dtype).reshape(-1), bits[i])
    return out


def _write_layout(coder: Encoder, flags: Contexts, entries: Sequence[Entry], parent: State) -> None:
    own = not same_layout(entries, parent)
    coder.learn(own, flags.of(1))
    if own:
        data = write_layout(entries)
        coder.raw(len(data), 32)
        for byte in data:
            coder.raw(byte, 8)


def _write_tensors(
    coder: Encoder,
    flags: Contexts,
    moved: _Moved,
    bits: Sequence[Array],
    ties: Mapping[int, int],
    step: float | None,
    plain: bool,
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
                codes, grain = _codes(moved, i, bits[i], predicted, step)
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


def _ties(state: State) -> dict[int, int]:
    """Numbers of tensors that are the same object as an earlier one, and of that."""
    first: dict[int, int] = {}
    pairs = [(i, first.setdefault(id(value), i)) for i, value in enumerate(state.values())]
    return {i: owner for i, owner in pairs if owner != i}


def _twins(entries: Sequence[Entry], bits: Sequence[Array], ties: Mapping[int, int]) -> dict[int, int]:
    """Numbers of tensors that equal an earlier one to the bit, and of that."""
    first: dict[object, int] = {}
    keys = [(hashlib.sha256(own).digest(), e.dtype, e.shape) for e, own in zip(entries, bits, strict=True)]
    pairs = [(i, ties.get(i, first.setdefault(key, i))) for i, key in enumerate(keys)]
    return {i: owner for i, owner in pairs if owner != i}


def _codes(
    moved: _Moved, i: int, bits: Array, predicted: Array, step: float
) -> tuple[Array | None, lossy.Grain]:
    entry = moved.entries[i]
    values = values_of(bits, entry.dtype).reshape(entry.shape)
    parent, factor = moved.basis(i)
    grain = lossy.grain_of(values, parent * factor, entry, step)
    own = grain.step(step)
    if grain.ladder:
        return lossy.ladder_codes(bits, predicted, entry, own), grain
    return lossy.codes_of(values, parent, factor, own), grain


def _absolute(moved: _Moved, bits: Sequence[Array], share: float) -> float:
    """A share of the root mean square of all differences as a step."""
    away = [
        np.nan_to_num(_away(moved, i, bits[i]), posinf=0, neginf=0)
        for i, e in enumerate(moved.entries)
        if e.source is not None and e.dtype in REAL and len(e.shape) > 1
    ]
    return share * lossy.spread(away) or share


def _away(moved: _Moved, i: int, bits: Array) -> Array:
    parent, factor = moved.basis(i)
    return values_of(bits, moved.entries[i].dtype).reshape(moved.entries[i].shape) / factor - parent


def _write_mode(coder: Encoder, flags: Contexts, mode: int, before: int) -> None:
    for n in range(PLAIN):
        coder.learn(mode > n, flags.of(16 + 8 * before + n))
        if mode == n:
            return


# reading --------------------------------------------------------------------------------------------------------------


def _read(payload: bytes, parent: State) -> dict[str, Tensor]:
    reader = Reader(payload)
    decoder, flags = Decoder(reader.take(reader.count(len(payload)))), Contexts()
    entries = _read_layout(decoder, flags, parent, len(payload))
    if not _fits(entries, parent, len(payload)):
        raise corrupt("its tensors are larger than its parent and its length explain")
    found = moves.read(decoder, _movable(entries))
    step = lossy.read_step(decoder) if decoder.learn(flags.of(2)) else None
    moved = _moved(entries, parent, found, step is not None)
    bits, ties = _read_tensors(decoder, flags, moved, step, reader)
    made: list[Tensor] = []
    for i, entry in enumerate(entries):
        made.append(made[ties[i]] if i in ties else tensor_of(bits[i], entry.dtype, entry.shape))
    return {entry.name: value for entry, value in zip(entries, made, strict=True)}


def _read_layout(decoder: Decoder, flags: Contexts, parent: State, n_bytes: int) -> list[Entry]:
    if not decoder.learn(flags.of(1)):
        return [Entry(name, v.dtype, tuple(v.shape), i) for i, (name, v) in enumerate(parent.items())]
    size = decoder.raw(32)
    if size > n_bytes:
        raise corrupt(f"a list of tensors of {size} bytes")
    return read_layout(bytes(decoder.raw(8) for _ in range(size)), parent)


def _read_tensors(
    decoder: Decoder, flags: Contexts, moved: _Moved, step: float | None, reader: Reader
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


def _read_codes(decoder: Decoder, grains: lossy.Grains, moved: _Moved, i: int, step: float | None) -> Array:
    entry = moved.entries[i]
    if step is None or entry.source is None or entry.dtype not in REAL:
        raise corrupt("codes where there can be none")
    grain = grains.read(decoder)
    codes, own = lossy.read_codes(decoder, entry), grain.step(step)
    if grain.ladder:
        return lossy.ladder_bits(codes, moved.predicted(i), entry, own)
    values = lossy.values_of_codes(codes.reshape(entry.shape), *moved.basis(i), own)
    return rounded_bits(values, entry.dtype).reshape(-1)
