"""A binary range coder in plain integers: yes/no decisions with known chances as the fewest bytes, and back.

Each decision splits a range of 32 bits in proportion to its chance; what was decided picks one part. A decision of
chance p costs -log2(p) bits; the arithmetic adds less than 1e-4 bits, the end at most one byte. Chances are whole
numbers out of 65,536. Where a chance is learned as decisions go by, it is (n1 + 1/2) / (n + 1) after n decisions of
which n1 were yes (Krichevsky & Trofimov 1981); the cost of a row of such decisions depends on the two counts alone,
so it can be told without coding (`learned_bits`).

Python alone, no floats: the same bytes on every machine. Reference: G. N. N. Martin, "Range encoding" (1979).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

SCALE_BITS = 16
SCALE = 1 << SCALE_BITS
"""What a chance is counted out of."""
LOWEST, HIGHEST = 2, SCALE - 2
"""Chances lie between these: nothing is impossible."""
HALF = SCALE // 2
_TOP = 1 << 32
_LOW = 1 << 24

Counts = list[int]
"""What one context has seen: [times no, times yes]."""


def learned(counts: Counts) -> int:
    """The chance of a yes after what was seen, out of 65,536.

    Example:
        >>> learned([0, 0]), learned([3, 0])
        (32768, 8192)
    """
    no, yes = counts
    return min(max(((2 * yes + 1) << SCALE_BITS) // (2 * (no + yes) + 2), LOWEST), HIGHEST)


def learned_bits(no: int, yes: int) -> float:
    """What decisions of a context that starts empty cost together, in bits, in any order.

    Example:
        >>> round(learned_bits(0, 1), 6), round(learned_bits(1, 1), 6)  # 1 bit for the first, 2 for a surprise
        (1.0, 3.0)
    """
    if no + yes == 0:
        return 0.0
    log_chance = math.lgamma(no + 0.5) + math.lgamma(yes + 0.5) - math.lgamma(no + yes + 1) - math.log(math.pi)
    return -log_chance / math.log(2)


class Encoder:
    """Takes decisions, gives bytes.

    Example:
        >>> coder = Encoder()
        >>> coder.flags([1, 0, 0, 1] * 8, [6000] * 32)
        >>> data = coder.finish()
        >>> len(data)
        7
        >>> Decoder(data).flags([6000] * 4)
        [1, 0, 0, 1]
    """

    def __init__(self) -> None:
        self._low = 0
        self._range = _TOP
        self._out = bytearray()

    @property
    def bits(self) -> float:
        """Bits that the decisions so far take."""
        return 8 * len(self._out) + 32 - math.log2(self._range)

    def flag(self, yes: int, chance: int) -> None:
        """Code one decision whose chance of a yes is `chance` out of 65,536."""
        self.flags((yes,), (chance,))

    def flags(self, decisions: Iterable[int], chances: Iterable[int]) -> None:
        """Code decisions with known chances."""
        low, size, out = self._low, self._range, self._out
        for yes, chance in zip(decisions, chances, strict=True):
            bound = (size * chance) >> SCALE_BITS
            if yes:
                size = bound
            else:
                low += bound
                size -= bound
            while size < _LOW:
                if low >= _TOP:
                    low -= _TOP
                    _carry(out)
                out.append(low >> 24)
                low = (low & 0xFFFFFF) << 8
                size <<= 8
        self._low, self._range = low, size

    def learn(self, yes: int, counts: Counts) -> None:
        """Code one decision with the chance that its context has learned, and let it learn."""
        self.flags((yes,), (learned(counts),))
        counts[1 if yes else 0] += 1

    def raw(self, number: int, n_bits: int) -> None:
        """Code a number of known length as it is, the highest bit first."""
        self.flags([(number >> place) & 1 for place in range(n_bits - 1, -1, -1)], [HALF] * n_bits)

    def finish(self) -> bytes:
        """End the code with as few bytes as tell it apart; zeros at the end are left away, the decoder adds them."""
        low, high, out = self._low, self._low + self._range - 1, bytearray(self._out)
        rounded = ((low + (1 << n_free) - 1) >> n_free << n_free for n_free in range(40, -1, -8))
        value = next(value for value in rounded if value <= high)
        if value >= _TOP:
            value -= _TOP
            _carry(out)
        return bytes(out + value.to_bytes(4, "big")).rstrip(b"\0")


class Decoder:
    """Gives back the decisions that an encoder took, when it is told the same chances."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 4
        self._range = _TOP
        self._value = int.from_bytes(data[:4].ljust(4, b"\0"), "big")

    def flag(self, chance: int) -> int:
        """Read one decision."""
        return self.flags((chance,))[0]

    def flags(self, chances: Iterable[int]) -> list[int]:
        """Read decisions with known chances."""
        value, size, at, data = self._value, self._range, self._at, self._data
        out: list[int] = []
        add, end = out.append, len(data)
        for chance in chances:
            bound = (size * chance) >> SCALE_BITS
            if value < bound:
                size = bound
                add(1)
            else:
                value -= bound
                size -= bound
                add(0)
            while size < _LOW:
                size <<= 8
                value <<= 8
                if at < end:
                    value |= data[at]
                at += 1
        self._value, self._range, self._at = value, size, at
        return out

    def joint_flags(self, chances: Sequence[Sequence[int]], neighbours: Sequence[Sequence[int]]) -> list[int]:
        """Read flags whose chances depend on four flags read before, the neighbours of the flag to be read.

        Args:
            chances: seven lists of N chances, by the sum of the neighbours; the first two of them count twice.
            neighbours: four lists of N: the place of each flag's neighbour among those read, or N if it has none.
        Returns:
            flags: N of them.
        """
        value, size, at, data = self._value, self._range, self._at, self._data
        out = [0] * (len(chances[0]) + 1)
        end = len(data)
        for place, (a, b, c, d) in enumerate(zip(*neighbours, strict=True)):
            bound = (size * chances[2 * (out[a] + out[b]) + out[c] + out[d]][place]) >> SCALE_BITS
            if value < bound:
                size = bound
                out[place] = 1
            else:
                value -= bound
                size -= bound
            while size < _LOW:
                size <<= 8
                value <<= 8
                if at < end:
                    value |= data[at]
                at += 1
        self._value, self._range, self._at = value, size, at
        out.pop()
        return out

    def learn(self, counts: Counts) -> int:
        """Read one decision with the chance that its context has learned, and let it learn."""
        yes = self.flags((learned(counts),))[0]
        counts[yes] += 1
        return yes

    def raw(self, n_bits: int) -> int:
        """Read a number of known length."""
        number = 0
        for bit in self.flags([HALF] * n_bits):
            number = 2 * number + bit
        return number


def _carry(out: bytearray) -> None:
    """Add one to the number that the bytes written so far make."""
    place = len(out) - 1
    while out[place] == 255:
        out[place] = 0
        place -= 1
    out[place] += 1
