"""The range coder gives back what it took, in as many bits as the chances allow (expected: their entropy)."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from weightfold.artifact.rangecoder import HIGHEST, LOWEST, SCALE, Decoder, Encoder, learned, learned_bits

DECISIONS = st.lists(st.tuples(st.booleans(), st.one_of(st.integers(LOWEST, HIGHEST), st.just(LOWEST))), max_size=300)


@given(DECISIONS)
def test_round_trips(decisions: list[tuple[bool, int]]) -> None:
    coder = Encoder()
    flags, chances = [int(yes) for yes, _ in decisions], [chance for _, chance in decisions]
    coder.flags(flags, chances)
    data = coder.finish()
    assert Decoder(data).flags(chances) == flags
    cost = -sum(math.log2((chance if yes else SCALE - chance) / SCALE) for yes, chance in decisions)
    assert coder.bits == pytest.approx(cost, abs=1e-3 * len(decisions) + 1e-6)
    assert len(data) <= cost / 8 + 1.01


@given(st.integers(0, 60))
def test_a_carry_runs_through_any_number_of_full_bytes(n: int) -> None:
    coder = Encoder()
    chances = [SCALE // 2] * (8 * n + 8)
    flags = [0] * (8 * n) + [0, 1, 0, 0, 1, 1, 0, 1]  # the upper half again and again: bytes of 255
    coder.flags(flags, chances)
    coder.flags([0] * 40, [HIGHEST] * 40)
    assert Decoder(coder.finish()).flags(chances + [HIGHEST] * 40) == flags + [0] * 40


@given(st.lists(st.booleans(), max_size=200))
def test_learned_chances_cost_what_their_counts_say(flags: list[bool]) -> None:
    coder, counts = Encoder(), [0, 0]
    for yes in flags:
        coder.learn(yes, counts)
    assert coder.bits == pytest.approx(learned_bits(*counts), abs=0.01 + 1e-3 * len(flags))
    decoder, seen = Decoder(coder.finish()), [0, 0]
    assert [bool(decoder.learn(seen)) for _ in flags] == flags


def test_chances_never_reach_certainty() -> None:
    assert learned([10**7, 0]) == LOWEST
    assert learned([0, 10**7]) == HIGHEST


def test_numbers_of_known_length() -> None:
    coder = Encoder()
    numbers = np.random.default_rng(0).integers(0, 2**13, 50).tolist()
    for number in numbers:
        coder.raw(number, 13)
    data = coder.finish()
    assert len(data) <= 50 * 13 / 8 + 1
    decoder = Decoder(data)
    assert [decoder.raw(13) for _ in numbers] == numbers
