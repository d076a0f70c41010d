"""A model as the difference to another one: exact to the bit, or in steps of a stated size.

    byte    kind (1) | checksum (8) | length of the side part | side part | body

1. The parent is **moved** towards the child by symmetries (`moves`): channels change places, signs, scales.
2. Each tensor then is one of: what is predicted; a copy of an earlier one (ties); a difference exact to the bit
   (`lossless`); multiples of a step (`lossy`); plain bytes.
3. The side part is one range-coded stream: layout where it is not the parent's, moves, modes, scales, tables, codes.
   The body holds the interleaved streams and raw bits of exact differences.

Lossless decoding gives the child whatever the prediction is worth: a residual makes up for it. The prediction itself is
gathers and single products only, so every machine makes the same. The checksum covers the file and the decoded tensors:
damage and the wrong parent are refused. Sizes are bounded by the parent and the length of the file before anything is
allocated.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

import numpy as np
from torch import Tensor

from weightfold.artifact.coded import corrupt
from weightfold.artifact.decisions import Contexts
from weightfold.artifact.rangecoder import Decoder, Encoder
from weightfold.errors import ArtifactError, ConfigError
from weightfold.fingerprint import digest
from weightfold.zoo.delta import lossy, movecode, moves, numbers
from weightfold.zoo.delta.layout import (
    Entry,
    Reader,
    bits_of,
    entries_of,
    kind_of,
    read_layout,
    same_layout,
    tensor_of,
    values_of,
    varint,
    write_layout,
)
from weightfold.zoo.delta.modes import read_tensors, ties_of, write_tensors
from weightfold.zoo.delta.moves import FACTOR_DIGITS, FINE_DIGITS, Alignment
from weightfold.zoo.delta.predicted import REAL, movable, moved_parent, rescaled, spread

State = Mapping[str, Tensor]
EXACT, STEPS = 0xD1, 0xD2
"""First byte of a difference."""
N_CHECK = 8
FINE, COARSE = (FACTOR_DIGITS, FINE_DIGITS), (3,)
"""Binary digits of factors that are tried for exact differences, and where weights are rounded anyway."""


def encode(
    child: State,
    parent: State,
    *,
    moves: Alignment | None = None,
    step: float | None = None,
    relative: bool = False,
    carry: bool = False,
) -> bytes:
    """Code a child as the difference to a parent.

    Args:
        child: tensors by name, on the CPU, of any type.
        parent: what `decode` will be given, to the bit. Tensors of the same name and shape predict the child's; others
            are coded alone.
        moves: what makes the parent look like the child (`matching.match`).
        step: None for a child exact to the bit; else the step of differences, > 0: those below 0.7 steps are dropped,
            larger ones are off by half a step at most, in the parent's scale. Whole numbers, and tensors with infinite
            numbers or NaN, stay exact.
        relative: the step is a share of the root mean square of all differences.
        carry: what rounding leaves of a weight is added to the next of its row, so that sums over inputs stay: single
            weights are off by up to 1.4 steps, but units whose inputs are mostly of one sign (behind a ReLU) by less.
    Raises:
        ArtifactError: a tensor is sparse or quantised, and cannot be stored so.
        ConfigError: the step is not above 0.
    Example:
        >>> import torch
        >>> parent = {"w": torch.arange(6.0).reshape(2, 3)}
        >>> child = {"w": parent["w"] + torch.tensor([0.0, 0.5, 0.0])}
        >>> torch.equal(decode(encode(child, parent), parent)["w"], child["w"])
        True
        >>> decode(encode(child, parent, step=0.25), parent)["w"].tolist()
        [[0.0, 1.5, 2.0], [3.0, 4.5, 5.0]]
    """
    if step is not None and not 0 < step < float("inf"):
        raise ConfigError(f"The step of a lossy difference must be above 0. Got {step} instead.")
    child, parent = _by_name(child), _by_name(parent)
    entries = entries_of(child, parent)
    found = moves or Alignment()
    tried = FINE[: 1 + bool(found.factors)] if step is None else COARSE
    payloads = [_write(child, parent, entries, found, step, relative, carry, False, digits) for digits in tried]
    payload = min(payloads, key=len)
    if not _fits(entries, parent, len(payload)):
        payload = _write(child, parent, entries, found, step, relative, carry, True, tried[payloads.index(payload)])
    kind = bytes([EXACT if step is None else STEPS])
    state = child if step is None else _read(payload, parent)
    return kind + _check(kind, payload, state) + payload


def decode(data: bytes, parent: State) -> dict[str, Tensor]:
    """Read a child back, its tensors in the order of their names.

    Raises:
        ArtifactError: the bytes are damaged, cut short or foreign, or the parent is another one.
    """
    kind, payload = data[:1], data[1 + N_CHECK :]
    if kind not in (bytes([EXACT]), bytes([STEPS])):
        raise corrupt("it is no difference between models")
    try:
        state = _read(payload, _by_name(parent))
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


def _by_name(state: State) -> dict[str, Tensor]:
    return dict(sorted(state.items()))


def _check(kind: bytes, payload: bytes, state: State) -> bytes:
    return hashlib.sha256(kind + payload + digest(state).encode()).digest()[:N_CHECK]


def _fits(entries: Sequence[Entry], parent: State, n_bytes: int) -> bool:
    """Whether a decoder may believe in tensors so large: no more than the parent and the length of the file explain."""
    owned = sum(value.numel() * value.dtype.itemsize for value in parent.values())
    return sum(e.size_bytes for e in entries) <= 8 * owned + 256 * n_bytes + 65536


def estimate(
    child: State, parent: State, *, moves: Alignment | None = None, step: float | None = None, n: int = 1 << 15
) -> float:
    """About how many bytes `encode` would take, told by some numbers of each tensor and by no coding.

    Args:
        n: numbers of each tensor that are looked at.
    Example:
        >>> import torch
        >>> parent = {"w": torch.randn(64, 64, generator=torch.Generator().manual_seed(0))}
        >>> child = {"w": parent["w"] + 0.01}
        >>> 0.8 < estimate(child, parent) / len(encode(child, parent)) < 1.25
        True
    """
    child, parent = _by_name(child), _by_name(parent)
    entries = entries_of(child, parent)
    moved, bits = moved_parent(entries, parent, moves or Alignment(), False), 0.0
    for i, entry in enumerate(entries):
        if entry.numel == 0:
            continue
        some = slice(None, None, 1 + entry.n_units // n)
        own, predicted = bits_of(child[entry.name])[some], moved.predicted(i)[some]
        kind = kind_of(entry.dtype)
        places = [numbers.ordered(b, kind).astype(np.float64) for b in (own, predicted)]
        away = np.abs(places[0] - places[1])
        each = np.where(away > 0, np.log2(away + 1) + 1.5, 0.0)
        if step is not None and entry.dtype in REAL:
            q = np.abs(np.nan_to_num(values_of(own, entry.dtype) - values_of(predicted, entry.dtype))) / step
            each = np.where(q > lossy.DEAD, 2 * np.log2(q + 1) + 3, 0.05)
        bits += float(np.minimum(each, kind.n_bits).mean()) * entry.n_units
    return bits / 8 + 32


def spread_of(child: State, parent: State, moves: Alignment | None = None) -> float:
    """The root mean square of the differences between a child's matrices and its moved parent's."""
    child, parent = _by_name(child), _by_name(parent)
    entries = entries_of(child, parent)
    moved = moved_parent(entries, parent, moves or Alignment(), True)
    return spread(moved, [bits_of(child[e.name]) for e in entries])


# writing --------------------------------------------------------------------------------------------------------------


def _write(
    child: State,
    parent: State,
    entries: Sequence[Entry],
    found: Alignment,
    step: float | None,
    relative: bool,
    carry: bool,
    plain: bool,
    digits: int,
) -> bytes:
    coder, flags = Encoder(), Contexts()
    _write_layout(coder, flags, entries, parent)
    bits = [bits_of(child[e.name]) for e in entries]
    whole, found = found, moves.with_digits(found, digits)
    if step is not None:
        bits = rescaled(entries, bits, whole, found)
    movecode.write(coder, found, digits)
    moved = moved_parent(entries, parent, found, step is not None)
    coder.learn(step is not None, flags.of(2))
    if step is not None:
        step = lossy.rounded_step(step * (spread(moved, bits) or 1.0) if relative else step)
        lossy.write_step(coder, step)
    body = write_tensors(coder, flags, moved, bits, ties_of(child), step, plain, carry)
    side = coder.finish()
    return varint(len(side)) + side + body


def _write_layout(coder: Encoder, flags: Contexts, entries: Sequence[Entry], parent: State) -> None:
    own = not same_layout(entries, parent)
    coder.learn(own, flags.of(1))
    if own:
        data = write_layout(entries)
        coder.raw(len(data), 32)
        for byte in data:
            coder.raw(byte, 8)


# reading --------------------------------------------------------------------------------------------------------------


def _read(payload: bytes, parent: State) -> dict[str, Tensor]:
    reader = Reader(payload)
    decoder, flags = Decoder(reader.take(reader.count(len(payload)))), Contexts()
    entries = _read_layout(decoder, flags, parent, len(payload))
    if not _fits(entries, parent, len(payload)):
        raise corrupt("its tensors are larger than its parent and its length explain")
    found = movecode.read(decoder, movable(entries))
    step = lossy.read_step(decoder) if decoder.learn(flags.of(2)) else None
    moved = moved_parent(entries, parent, found, step is not None)
    bits, ties = read_tensors(decoder, flags, moved, step, reader)
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
