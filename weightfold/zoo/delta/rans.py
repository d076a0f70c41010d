"""An entropy coder for arrays: interleaved range asymmetric numeral systems (rANS), NumPy alone.

N symbols stand in T rows of L lanes. Every lane is a coder of its own with a state x in [2^16, 2^32); all lanes take
one step at a time, so that a step is a dozen array operations however many lanes there are:

    decode  s = symbol at slot x mod 2^12 of the table of its context;  x <- f(s) (x >> 12) + (x mod 2^12) - F(s)
            x < 2^16: x <- 2^16 x + the next word of 16 bits

A table holds the frequencies of one context as half-octave classes, about three bits for each symbol that occurs; a
frequency is off by at most a quarter of an octave, which costs 0.007 bits a symbol on the average. All arithmetic is of
whole numbers: the same on every machine.

Reference: Duda 2013, arXiv 1311.2540; Giesen 2014, arXiv 1402.3392 (interleaving); differ in: tables as classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from weightfold.artifact.coded import corrupt
from weightfold.artifact.decisions import Contexts, Whole
from weightfold.artifact.rangecoder import Decoder, Encoder

Array = npt.NDArray[Any]
BITS = 12
TOTAL = 1 << BITS
LOWEST = 1 << 16
N_CLASSES = 2 * BITS + 1
_ROOTS = np.array([1, 1, 2, 3, 4, 6, 8, 11, 16, 23, 32, 45, 64, 91, 128, 181, 256, 362, 512, 724, 1024, 1448, 2048,
                   2896, 4096])  # fmt: skip
"""2^(c / 2), rounded, of class c."""
SYMBOLS_A_LANE = 512
MAX_LANES = 4096


def n_lanes(n_symbols: int) -> int:
    """How many lanes code so many symbols."""
    return max(1, min(MAX_LANES, n_symbols // SYMBOLS_A_LANE))


@dataclass(frozen=True, eq=False)
class Tables:
    """What occurs how often: the class of each symbol by context, int64, shape (K, S); -1 for what does not occur."""

    classes_KS: Array

    @cached_property
    def frequencies_KS(self) -> Array:
        """Frequencies, int64, shape (K, S): each row sums to 4,096, or to 0 where nothing occurs."""
        return np.stack([_frequencies(row) for row in self.classes_KS])

    @classmethod
    def of(cls, symbols_N: Array, contexts_N: Array, n_contexts: int, n_symbols: int) -> Tables:
        """The tables that suit some symbols, as the file will hold them."""
        counts = np.bincount(contexts_N.astype(np.int64) * n_symbols + symbols_N, minlength=n_contexts * n_symbols)
        return cls(np.stack([_classes(row) for row in counts.reshape(n_contexts, n_symbols)]))

    def write(self, coder: Encoder) -> None:
        """Code the tables."""
        place = Whole()
        steps, ends = Contexts(), Contexts()
        for classes in self.classes_KS:
            used = np.flatnonzero(classes >= 0)
            coder.learn(len(used) > 0, ends.of(1))
            if len(used) == 0:
                continue
            first, last = int(used[0]), int(used[-1])
            place.write(coder, first)
            place.write(coder, last - first)
            before = [0, 0]
            for value in (classes[first : last + 1] + 1).tolist():
                _write_class(coder, steps, value, before)
                before = [value, before[0]]

    @classmethod
    def read(cls, decoder: Decoder, n_contexts: int, n_symbols: int) -> Tables:
        """Read tables back."""
        place = Whole()
        steps, ends = Contexts(), Contexts()
        rows = np.full((n_contexts, n_symbols), -1)
        for row in rows:
            if not decoder.learn(ends.of(1)):
                continue
            first, more = place.read(decoder), place.read(decoder)
            if not 0 <= first <= first + more < n_symbols:
                raise corrupt(f"no symbols {first} to {first + more}")
            before = [0, 0]
            for symbol in range(first, first + more + 1):
                value = _read_class(decoder, steps, before)
                before = [value, before[0]]
                row[symbol] = value - 1
        return cls(rows)


def _write_class(coder: Encoder, contexts: Contexts, value: int, before: Sequence[int]) -> None:
    """Code a class 0..25 as its distance from the mean of the two before it."""
    base = 64 * min(before[0], 1) + 128 * min(before[1], 1)
    hoped = max(before[0], before[1])
    coder.learn(value > 0, contexts.of(base + 1))
    if value == 0:
        return
    up = value > hoped
    coder.learn(up, contexts.of(base + 2))
    room = N_CLASSES - hoped - 1 if up else hoped - 1
    away = value - hoped - 1 if up else hoped - value
    for n in range(max(0, room)):
        coder.learn(away > n, contexts.of(base + (4 if up else 34) + min(n, 28)))
        if away == n:
            return


def _read_class(decoder: Decoder, contexts: Contexts, before: Sequence[int]) -> int:
    base = 64 * min(before[0], 1) + 128 * min(before[1], 1)
    hoped = max(before[0], before[1])
    if not decoder.learn(contexts.of(base + 1)):
        return 0
    up = decoder.learn(contexts.of(base + 2))
    room = N_CLASSES - hoped - 1 if up else hoped - 1
    away = 0
    while away < room and decoder.learn(contexts.of(base + (4 if up else 34) + min(away, 28))):
        away += 1
    return min(max(hoped + 1 + away if up else hoped - away, 1), N_CLASSES)


def _classes(counts_S: Array) -> Array:
    """The class of each count, -1 for none: nearest on a logarithmic scale to its share of 4,096."""
    total = int(counts_S.sum())
    if total == 0:
        return np.full(len(counts_S), -1)
    share = np.maximum(counts_S * (TOTAL / total), 1.0)
    classes = np.clip(np.rint(2 * np.log2(share)), 1, N_CLASSES - 1).astype(np.int64)
    return np.where(counts_S > 0, classes, -1)


def _frequencies(classes_S: Array) -> Array:
    """Frequencies that sum to 4,096, none of them zero where there is a class."""
    used = classes_S >= 0
    weight = np.where(used, _ROOTS[np.maximum(classes_S, 0)], 0).astype(np.int64)
    n, total = int(used.sum()), int(weight.sum())
    if n == 0:
        return weight
    if n > TOTAL:
        raise corrupt(f"{n} symbols in a table of {TOTAL}")
    out = np.where(used, 1 + weight * (TOTAL - n) // total, 0)
    out[np.argmax(out)] += TOTAL - int(out.sum())
    return out


@dataclass(frozen=True, eq=False)
class Stream:
    """Coded symbols: the last state of each lane, uint32, and words of 16 bits."""

    states_L: Array
    words: Array


def encode(symbols_N: Array, contexts_N: Array, tables: Tables) -> Stream:
    """Code symbols, each by the table of its context.

    Example:
        >>> symbols, contexts = np.array([0, 1, 0, 0, 2, 0]), np.zeros(6, np.int64)
        >>> tables = Tables.of(symbols, contexts, 1, 3)
        >>> decode(encode(symbols, contexts, tables), contexts, tables).tolist()
        [0, 1, 0, 0, 2, 0]
    """
    n, lanes = len(symbols_N), n_lanes(len(symbols_N))
    n_symbols = tables.frequencies_KS.shape[1]
    flat = tables.frequencies_KS.reshape(-1)
    starts = (np.cumsum(tables.frequencies_KS, axis=1) - tables.frequencies_KS).reshape(-1)
    at = contexts_N.astype(np.int64) * n_symbols + symbols_N
    frequency, start = flat[at].astype(np.uint64), starts[at].astype(np.uint64)
    state = np.full(lanes, LOWEST, np.uint64)
    words: list[Array] = []
    for row in range(-(-n // lanes) - 1, -1, -1):
        here = slice(row * lanes, min((row + 1) * lanes, n))
        f, x = frequency[here], state[: here.stop - here.start]
        full = np.flatnonzero(x >= f << np.uint64(32 - BITS))
        words.append((x[full] & np.uint64(0xFFFF)).astype("<u2"))
        x[full] >>= np.uint64(16)
        quotient = x // f
        x[:] = (quotient << np.uint64(BITS)) + (x - quotient * f) + start[here]
    return Stream(state.astype("<u4"), np.concatenate([*words[::-1], np.empty(0, "<u2")]))


def decode(stream: Stream, contexts_N: Array, tables: Tables) -> Array:
    """Read symbols back, uint16, shape (N,).

    Raises:
        ArtifactError: the words do not end where the symbols do, or a context has no table.
    """
    n, lanes = len(contexts_N), n_lanes(len(contexts_N))
    slots, symbols = _slots(tables)
    base = contexts_N.astype(np.uint32) << np.uint32(BITS)
    known_K = tables.frequencies_KS.sum(axis=1) > 0
    if n and not known_K.take(contexts_N).all():
        raise corrupt("a context without symbols")
    state, words, place = stream.states_L.astype(np.uint32), stream.words.astype(np.uint32), 0
    if len(state) != lanes or int(state.min()) < LOWEST:
        raise corrupt("states of its coder are out of range")
    low, shift, half = np.uint32(TOTAL - 1), np.uint32(BITS), np.uint32(16)
    for row in range(-(-n // lanes)):
        here = slice(row * lanes, min((row + 1) * lanes, n))
        x, at = state[: here.stop - here.start], base[here]
        at |= x & low
        entry = slots.take(at)
        x >>= shift
        x *= entry >> shift
        x += entry & low
        empty = np.flatnonzero(x < LOWEST)
        end = place + len(empty)
        if end > len(words):
            raise corrupt("it ends too soon")
        x[empty] = (x[empty] << half) | words[place:end]
        place = end
    if place != len(words) or bool((state != LOWEST).any()):
        raise corrupt("its coder does not end where it should")
    return symbols.take(base)


def _slots(tables: Tables) -> tuple[Array, Array]:
    """For every context and slot: frequency and offset in one number; and the symbol."""
    n_contexts, n_symbols = tables.frequencies_KS.shape
    slots = np.zeros(n_contexts << BITS, np.uint32)
    symbols = np.zeros(n_contexts << BITS, np.uint16)
    for context in range(n_contexts):
        row = tables.frequencies_KS[context]
        if not row.any():
            continue
        here = slice(context << BITS, (context + 1) << BITS)
        starts = np.cumsum(row) - row
        offset = np.arange(TOTAL) - np.repeat(starts, row)
        slots[here] = (np.repeat(row, row) << BITS) | offset
        symbols[here] = np.repeat(np.arange(n_symbols), row)
    return slots, symbols
