"""Parts of models of decisions: contexts that learn, whole numbers as decisions, a meter of what they cost."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

import numpy as np
import numpy.typing as npt

from weightfold.artifact.coded import MAX_BITS, Ints, corrupt
from weightfold.artifact.rangecoder import HALF, SCALE, Counts, Decoder, learned_bits

Flags = npt.NDArray[np.bool_]


class Coder(Protocol):
    """What takes decisions: an encoder, or a meter that only counts what they cost."""

    def flags(self, decisions: Iterable[int], chances: Iterable[int]) -> None: ...
    def learn(self, yes: int, counts: Counts) -> None: ...
    def raw(self, number: int, n_bits: int) -> None: ...


class Meter:
    """Counts what decisions would cost, in bits."""

    def __init__(self) -> None:
        self.bits = 0.0

    def flags(self, decisions: Iterable[int], chances: Iterable[int]) -> None:
        """Count decisions with known chances."""
        yes = np.asarray(decisions, bool)
        chance = np.asarray(chances, np.float64) / SCALE
        self.bits -= float(np.log2(np.where(yes, chance, 1.0 - chance)).sum())

    def learn(self, yes: int, counts: Counts) -> None:
        """Count a decision of a context that learns."""
        before = learned_bits(*counts)
        counts[1 if yes else 0] += 1
        self.bits += learned_bits(*counts) - before

    def raw(self, number: int, n_bits: int) -> None:  # noqa: ARG002
        """Count a number of known length."""
        self.bits += n_bits


class Contexts:
    """What each context has seen, by number; context 0 never learns: its decisions take a bit each."""

    def __init__(self) -> None:
        self._counts: dict[int, Counts] = {}

    def of(self, context: int) -> Counts:
        """The counts of a context, to be changed."""
        return self._counts.setdefault(context, [0, 0])

    def code(self, coder: Coder, contexts_N: Ints, decisions_N: Flags) -> None:
        """Code decisions one after another, each in its context; a meter takes them all at once."""
        if isinstance(coder, Meter):
            self._count(coder, contexts_N, decisions_N)
            return
        for context, yes in zip(contexts_N.tolist(), decisions_N.tolist(), strict=True):
            if context:
                coder.learn(yes, self.of(context))
            else:
                coder.flags((yes,), (HALF,))

    def _count(self, meter: Meter, contexts_N: Ints, decisions_N: Flags) -> None:
        for context in np.unique(contexts_N).tolist():
            here = contexts_N == context
            n, yes = int(here.sum()), int((here & decisions_N).sum())
            if context == 0:
                meter.bits += n
                continue
            counts = self.of(context)
            before = learned_bits(*counts)
            counts[0] += n - yes
            counts[1] += yes
            meter.bits += learned_bits(*counts) - before


class Whole:
    """Whole numbers near zero as decisions that learn: zero or not, sign, number of digits in unary, digits."""

    def __init__(self) -> None:
        self._contexts = Contexts()

    def write(self, coder: Coder, number: int) -> None:
        """Code a number."""
        of = self._contexts.of
        coder.learn(number != 0, of(1))
        if not number:
            return
        coder.learn(number < 0, of(2))
        size = abs(number)
        digits = size.bit_length()
        for n in range(1, digits):
            coder.learn(1, of(2 + n))
        coder.learn(0, of(2 + digits))
        for place in range(digits - 2, -1, -1):
            bit = (size >> place) & 1
            if digits - place <= 3:
                coder.learn(bit, of(digits * 32 + (size >> (place + 1))))
            else:
                coder.raw(bit, 1)

    def read(self, decoder: Decoder) -> int:
        """Read a number."""
        of = self._contexts.of
        if not decoder.learn(of(1)):
            return 0
        negative, digits = decoder.learn(of(2)), 1
        while decoder.learn(of(2 + digits)):
            digits += 1
            if digits > 2 * MAX_BITS:
                raise corrupt("a number has too many digits")
        size = 1
        for place in range(digits - 2, -1, -1):
            bit = decoder.learn(of(digits * 32 + size)) if digits - place <= 3 else decoder.raw(1)
            size = 2 * size + bit
        return -size if negative else size
