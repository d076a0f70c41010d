"""Tensors exact to the bit, given a prediction of each: scales of rows aside, then blocks of tokens and raw bits.

Numbers of one type stand in a line, tensor after tensor, and are coded in blocks of 2^21: tables (`rans`), lanes'
states, words, raw bits (`fields`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from weightfold.artifact.coded import corrupt
from weightfold.artifact.decisions import Whole
from weightfold.artifact.rangecoder import Decoder, Encoder
from weightfold.zoo.delta import fields, numbers, rans
from weightfold.zoo.delta.layout import Entry, Reader, kind_of
from weightfold.zoo.delta.numbers import N_CONTEXTS, N_SYMBOLS, Array, Expected, Kind

BLOCK, SLICE = 1 << 21, 1 << 15
LEAST_ROW = 24
"""Rows shorter than this have no scale of their own."""
MOST_SCALE, MOST_COLUMN = 1 << 13, 64
LARGEST = 1e100


@dataclass(frozen=True, eq=False)
class Scales:
    """How far rows lie from their predictions, and columns beyond that, in half octaves, int32, shapes (R,) and (C,).

    A row that is what was predicted has scale 0; without columns C is 1.
    """

    rows: Array
    columns: Array

    def of(self, line: Line, at: int, end: int) -> Array:
        """The scales of a tensor's numbers from one place to another."""
        width = line.entry.n_units // line.n_rows
        first, last = at // width, (end - 1) // width
        if len(self.columns) == 1:
            spread = np.repeat(self.rows[first : last + 1], width)
        else:
            row = np.repeat(self.columns, width // len(self.columns))
            spread = (self.rows[first : last + 1, None] + row).reshape(-1)
        return spread[at - first * width : end - first * width]


@dataclass(frozen=True, eq=False)
class Line:
    """A tensor to be coded: what it is, and the bits that are predicted."""

    entry: Entry
    predicted: Array

    @property
    def kind(self) -> Kind:
        return kind_of(self.entry.dtype)

    @property
    def n_columns(self) -> int:
        """Positions along the second dimension; 1 where there is none."""
        shape = self.entry.shape
        return shape[1] if len(shape) > 1 and self.n_rows > 1 and not self.entry.dtype.is_complex else 1

    @property
    def n_rows(self) -> int:
        """Rows that have a scale each."""
        entry = self.entry
        rows = entry.shape[0] if entry.shape else 1
        return rows if rows and entry.n_units >= LEAST_ROW * rows else 1


def write(coder: Encoder, lines: Sequence[Line], bits: Sequence[Array]) -> bytes:
    """Code tensors: scales and tables into a coder, the rest as bytes.

    Args:
        lines: the tensors.
        bits: the bit patterns of each, in a line.
    """
    scales = [_scales(line, own) for line, own in zip(lines, bits, strict=True)]
    _write_scales(coder, lines, scales)
    body = bytearray()
    for kind, pieces in _blocks(lines):
        own = np.concatenate([bits[i][at:end] for i, at, end in pieces])
        predicted, scale = _gather(lines, scales, pieces)
        expected = Expected.of(predicted, scale, kind)
        tokens, values, widths = numbers.split(own, predicted, expected, kind)
        tables = rans.Tables.of(tokens, expected.contexts, N_CONTEXTS, N_SYMBOLS)
        tables.write(coder)
        stream = rans.encode(tokens, expected.contexts, tables)
        raw = fields.pack(values, widths)
        for size in (len(stream.words), len(raw)):
            Whole().write(coder, size)
        body += stream.states_L.tobytes() + stream.words.tobytes() + raw
    return bytes(body)


def read(decoder: Decoder, lines: Sequence[Line], body: bytes) -> list[Array]:
    """Read the bit patterns of tensors back.

    Raises:
        ArtifactError: the bytes do not fit.
    """
    scales = _read_scales(decoder, lines)
    out = [np.empty(line.entry.n_units, line.kind.unsigned) for line in lines]
    reader = Reader(body)
    for kind, pieces in _blocks(lines):
        found = _read_block(decoder, reader, *_gather(lines, scales, pieces), kind)
        start = 0
        for i, at, end in pieces:
            out[i][at:end] = found[start : start + end - at]
            start += end - at
    if not reader.done:
        raise corrupt("bytes are left over")
    return out


def _read_block(decoder: Decoder, reader: Reader, predicted: Array, scale: Array, kind: Kind) -> Array:
    """Read a block; all but the symbols in slices that fit into a cache."""
    parts = [slice(at, at + SLICE) for at in range(0, len(predicted), SLICE)]
    expected = [Expected.of(predicted[part], scale[part], kind) for part in parts]
    contexts = np.concatenate([own.contexts for own in expected])
    tables = rans.Tables.read(decoder, N_CONTEXTS, N_SYMBOLS)
    n_words, n_bytes = Whole().read(decoder), Whole().read(decoder)
    states = np.frombuffer(reader.take(4 * rans.n_lanes(len(predicted))), "<u4")
    words = np.frombuffer(reader.take(2 * n_words), "<u2")
    tokens = rans.decode(rans.Stream(states, words), contexts, tables)
    raw = fields.Fields(reader.take(n_bytes))
    out = np.empty(len(predicted), kind.unsigned)
    for part, own in zip(parts, expected, strict=True):
        values = raw.take(numbers.widths(tokens[part], own, kind))
        out[part] = numbers.join(tokens[part], values, predicted[part], own, kind)
    raw.finish()
    return out


def _blocks(lines: Sequence[Line]) -> Iterator[tuple[Kind, list[tuple[int, int, int]]]]:
    """Blocks of numbers of one kind: pieces (line, from, to) of tensors."""
    for kind in dict.fromkeys(line.kind for line in lines):
        pieces, room = [], BLOCK
        for i, line in enumerate(lines):
            at, n = 0, line.entry.n_units if line.kind == kind else 0
            while at < n:
                end = min(n, at + room)
                pieces.append((i, at, end))
                room -= end - at
                at = end
                if room == 0:
                    yield kind, pieces
                    pieces, room = [], BLOCK
        if pieces:
            yield kind, pieces


def _gather(lines: Sequence[Line], scales: Sequence[Scales], pieces: list[tuple[int, int, int]]) -> tuple[Array, Array]:
    """Predictions, and the scale of each number, int32, of a block."""
    predicted = np.concatenate([lines[i].predicted[at:end] for i, at, end in pieces])
    scale = [scales[i].of(lines[i], at, end) for i, at, end in pieces]
    return predicted, np.concatenate(scale)


# scales ---------------------------------------------------------------------------------------------------------------


def _scales(line: Line, bits: Array) -> Scales:
    """How far a tensor's rows, and its columns if that pays, lie from their predictions."""
    if bits.size == 0:
        return Scales(np.zeros(line.n_rows, np.int32), np.zeros(1, np.int32))
    away, bias = _away(line, bits)
    means_RC = np.minimum(away, LARGEST).reshape(line.n_rows, line.n_columns, -1).mean(axis=2)
    rows = _halves(means_RC.mean(axis=1), bias)
    alone = Scales(np.maximum(rows, 0), np.zeros(1, np.int32))
    if line.n_columns == 1:
        return alone
    columns = np.zeros(line.n_columns, np.int32)
    for _ in range(2):
        columns = _halves((means_RC * np.exp2((2 * bias - rows) / 2)[:, None]).mean(axis=0), 0)
        columns = np.clip(columns, -MOST_COLUMN, MOST_COLUMN)
        rows = np.maximum(_halves((means_RC * np.exp2(-columns / 2)).mean(axis=1), bias), 0)
    both = Scales(rows, columns)
    gain = _cost(line, alone, away, bias) - _cost(line, both, away, bias)
    return both if gain > 6 * line.n_columns else alone


def _halves(values: Array, bias: int) -> Array:
    """Numbers > 0 as half octaves above 2^-bias, int32."""
    found = np.rint(2 * np.log2(np.maximum(values, 1e-300))) + 2 * bias
    return np.clip(found, -MOST_SCALE, MOST_SCALE).astype(np.int32)


def _cost(line: Line, scales: Scales, away: Array, bias: int) -> float:
    """About how many bits numbers take, if they scatter by Laplace's law with these scales, to one unit at least."""
    kind = line.kind
    unit = np.maximum(numbers.exponents(line.predicted, kind), 1) - kind.n_mantissa if kind.floating else 0
    scale = np.maximum(scales.of(line, 0, len(away)) / 2.0 - unit, -4)
    share = np.minimum(np.log2(np.maximum(away, 1e-300)) + bias - unit - scale, 30)
    return float((scale + np.exp2(share) * np.log2(np.e)).sum())


def _away(line: Line, bits: Array) -> tuple[Array, int]:
    """How far each number lies from its prediction, and the bias of its type's exponents."""
    kind = line.kind
    if kind.floating:
        return np.abs(_floats(bits, kind) - _floats(line.predicted, kind)), _bias(kind)
    with np.errstate(over="ignore"):
        away = numbers.ordered(bits, kind) - numbers.ordered(line.predicted, kind)
    return np.abs(away.astype(np.float64)), 0


def _bias(kind: Kind) -> int:
    return (1 << (kind.n_bits - 2 - kind.n_mantissa)) - 1


def _floats(bits: Array, kind: Kind) -> Array:
    """Floats of any kind as float64, roughly: exponents and mantissas as they are, no NaN, no infinity."""
    magnitude = (bits & kind.unsigned.type(np.iinfo(kind.whole).max)).astype(np.uint64)
    exponent = (magnitude >> np.uint64(kind.n_mantissa)).astype(np.int64)
    bias = _bias(kind)
    mantissa = (magnitude & np.uint64((1 << kind.n_mantissa) - 1)).astype(np.float64) / (1 << kind.n_mantissa)
    value = np.ldexp(mantissa + (exponent > 0), np.minimum(np.maximum(exponent, 1) - bias, 1000))
    return np.where(bits >> kind.unsigned.type(kind.n_bits - 1), -value, value)


def _write_scales(coder: Encoder, lines: Sequence[Line], scales: Sequence[Scales]) -> None:
    rows, columns, flag = Whole(), Whole(), [0, 0]
    last = 0
    for line, own in zip(lines, scales, strict=True):
        for scale in own.rows.tolist():
            rows.write(coder, scale - last)
            last = scale
        if line.n_columns > 1:
            coder.learn(len(own.columns) > 1, flag)
            for scale in own.columns.tolist() if len(own.columns) > 1 else ():
                columns.write(coder, scale)


def _read_scales(decoder: Decoder, lines: Sequence[Line]) -> list[Scales]:
    rows, columns, flag = Whole(), Whole(), [0, 0]
    last = 0
    out = []
    for line in lines:
        own, more = np.zeros(line.n_rows, np.int32), np.zeros(1, np.int32)
        for row in range(line.n_rows):
            last += rows.read(decoder)
            own[row] = _within(last, 0)
        if line.n_columns > 1 and decoder.learn(flag):
            more = np.array([_within(columns.read(decoder), -MOST_SCALE) for _ in range(line.n_columns)], np.int32)
        out.append(Scales(own, more))
    return out


def _within(scale: int, least: int) -> int:
    if not least <= scale <= MOST_SCALE:
        raise corrupt(f"a scale of {scale}")
    return scale
