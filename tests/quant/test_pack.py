"""Bits in a file come back as they were."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from weightfold.errors import ArtifactError, ConfigError
from weightfold.quant.pack import bits_for, deflate, inflate, pack, unpack


@given(st.integers(0, 16), st.lists(st.integers(0, 2**16 - 1), max_size=40))
def test_round_trips(bits: int, raw: list[int]) -> None:
    numbers = np.array([n & ((1 << bits) - 1) for n in raw], np.int64)
    packed = pack(numbers, bits)
    assert len(packed) == -(-len(numbers) * bits // 8)
    assert unpack(packed, bits, len(numbers)).tolist() == numbers.tolist()
    coded = deflate(numbers, bits)
    assert len(coded) <= len(packed) + 1
    assert inflate(coded, bits, len(numbers)).tolist() == numbers.tolist()


@given(st.integers(1, 5000))
def test_bits_tell_apart(n: int) -> None:
    assert 2 ** bits_for(n) >= n
    assert n == 1 or 2 ** (bits_for(n) - 1) < n


def test_what_does_not_fit_is_refused() -> None:
    for numbers in ([4], [-1]):
        with pytest.raises(ConfigError, match="2 bits"):
            pack(np.array(numbers), 2)


@pytest.mark.parametrize("data", [b"", b"\x07abc", b"\x01not deflate"])
def test_corrupt_codes_are_refused(data: bytes) -> None:
    with pytest.raises(ArtifactError):
        inflate(np.frombuffer(data, np.uint8), 4, 10)
    with pytest.raises(ArtifactError):
        unpack(np.zeros(3, np.uint8), 4, 10)
    with pytest.raises(ArtifactError, match="expected"):
        inflate(deflate(np.zeros(900, np.int64), 4), 4, 10)
