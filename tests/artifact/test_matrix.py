"""Coded tensors come back exactly; their length is foretold; and it is near the entropy of what made them.

Expected lengths: the entropy of the distribution that the codes are drawn from, in closed form.
"""

from __future__ import annotations

import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from weightfold.artifact import CodedTensor, coded_bits, decode, encode, packed_bytes
from weightfold.artifact.zeros import Grid
from weightfold.errors import ArtifactError


@st.composite
def tensors(draw: st.DrawFn) -> CodedTensor:
    shape = tuple(draw(st.lists(st.integers(0, 9), min_size=0, max_size=4)))
    if draw(st.booleans()):
        shape = (draw(st.integers(1, 12)), draw(st.sampled_from([1, 3, 16, 36, 75])))
    generator = np.random.default_rng(draw(st.integers(0, 10**6)))
    largest = draw(st.sampled_from([0, 1, 2, 3, 7, 100, 32767]))
    codes = generator.integers(-largest, largest + 1, shape)
    codes = codes * (generator.random(shape) < draw(st.sampled_from([0.02, 0.3, 1.0])))
    if codes.ndim and draw(st.booleans()):
        codes = codes * (generator.random((shape[0],) + (1,) * (codes.ndim - 1)) < 0.5)
        codes = codes // np.maximum(generator.integers(1, 50, (shape[0],) + (1,) * (codes.ndim - 1)), 1)
    rows = shape[0] if shape and draw(st.booleans()) else 1
    return CodedTensor(codes.astype(np.int32), generator.integers(-300, 200, rows).astype(np.int16))


@given(tensors())
@settings(max_examples=150, deadline=None)
def test_round_trips(tensor: CodedTensor) -> None:
    coded, packed = encode(tensor), encode(tensor, "packed")
    for data in (coded, packed):
        again = decode(data, tensor.shape)
        assert again.same(tensor)
        assert (again.values() == tensor.values()).all()
    assert len(packed) - 1 == packed_bytes(tensor)
    promised = coded_bits(tensor) / 8
    assert len(coded) - 1 <= 1.002 * promised + 4


@given(st.binary(max_size=60), st.sampled_from([(), (3,), (4, 9), (2, 3, 5, 5)]))
@settings(deadline=None)
def test_any_bytes_are_a_tensor_or_refused(data: bytes, shape: tuple[int, ...]) -> None:
    for first in (b"", b"\0", b"\1"):
        try:
            tensor = decode(first + data, shape)
        except ArtifactError:
            continue
        assert tensor.shape == shape


def drawn(
    shape: tuple[int, ...], density: float, uneven: float, magnitude: float = 0.0, seed: int = 0
) -> tuple[CodedTensor, float]:
    """A sparse tensor of uneven rows and columns, geometric magnitudes, random signs; and its entropy in bits."""
    generator = np.random.default_rng(seed)
    n_rows, n_columns = shape[0], int(np.prod(shape[1:]))
    odds = density * np.exp(uneven * generator.normal(size=(n_rows, 1)))
    odds = odds * np.exp(uneven * generator.normal(size=(1, n_columns)))
    chance = odds / (1 + odds)
    flags = generator.random((n_rows, n_columns)) < chance
    sizes = generator.geometric(1 - magnitude, (n_rows, n_columns))
    signs = generator.choice([-1, 1], (n_rows, n_columns))
    entropy = -np.log2(np.where(flags, chance, 1 - chance)).sum() + flags.sum()
    if magnitude:
        entropy -= np.log2((1 - magnitude) * magnitude ** (sizes[flags] - 1)).sum()
    steps = (-24 + generator.integers(-4, 5, n_rows)).astype(np.int16)
    return CodedTensor((flags * sizes * signs).astype(np.int16).reshape(shape), steps), float(entropy)


@pytest.mark.parametrize(
    ("shape", "density", "uneven", "magnitude", "over"),
    [
        ((300, 500), 0.05, 0.0, 0.0, 1.04),
        ((100, 300), 0.5, 0.0, 0.4, 1.04),
        ((64, 32, 3, 3), 0.05, 0.7, 0.2, 1.10),
        ((300, 784), 0.01, 1.0, 0.0, 1.20),
    ],
)
def test_the_length_is_near_the_entropy_and_foretold(
    shape: tuple[int, ...], density: float, uneven: float, magnitude: float, over: float
) -> None:
    tensor, entropy = drawn(shape, density, uneven, magnitude)
    data = encode(tensor)
    side_bits = shape[0] * np.log2(9)  # the steps: one of nine for each row
    assert len(data) < over * (entropy + side_bits) / 8
    assert len(data) < 0.8 * len(zlib.compress(tensor.codes.astype(np.int8).tobytes(), 9))
    assert len(data) < packed_bytes(tensor)
    assert abs(coded_bits(tensor) / 8 + 1 - len(data)) <= 0.002 * len(data) + 1
    assert decode(data, shape).same(tensor)


def test_what_lies_together_is_cheaper() -> None:
    generator = np.random.default_rng(1)
    near = np.zeros((60, 16, 5, 5), np.int16)
    near[:, :, 1:4, 2:4] = generator.choice([-1, 1], (60, 16, 1, 1))
    near *= generator.random((60, 16, 1, 1)) < 0.2
    apart = generator.permuted(near.reshape(60, -1), axis=1).reshape(near.shape)
    steps = np.zeros(60, np.int16)
    assert coded_bits(CodedTensor(near, steps)) < 0.5 * coded_bits(CodedTensor(apart, steps))


def test_dead_columns_and_rows_cost_next_to_nothing() -> None:
    tensor, _ = drawn((40, 60), 0.3, 0.0)
    wide = np.zeros((400, 600), np.int16)
    wide[:40, :60] = tensor.codes
    steps = np.concatenate([tensor.steps, np.zeros(360, np.int16)])
    assert coded_bits(CodedTensor(wide, steps)) < coded_bits(tensor) + 80


def test_grids_are_few_and_divide_the_columns() -> None:
    for shape in ((8, 784), (8, 800), (8, 7), (8, 3, 1, 1), (8, 1, 28, 28), (8, 3072), (8, 2**14)):
        n = int(np.prod(shape[1:]))
        grids = Grid.candidates(shape, n)
        assert 1 <= len(grids) <= 8
        assert all(n % grid.size == 0 and grid.size % grid.width == 0 for grid in grids)
    assert Grid(784, 28) in Grid.candidates((8, 784), 784)
    assert Grid(16, 4) in Grid.candidates((8, 800), 800)


def test_rows_with_codes_and_no_column_for_them_are_refused() -> None:
    """Drawn bytes find them now and then; before, NumPy's error came out."""
    draw = np.random.default_rng(0)
    whole = encode(CodedTensor(draw.integers(-3, 4, (6, 8)).astype(np.int16), np.zeros(6, np.int16)))
    refused = 0
    for _ in range(1500):
        data = bytearray(whole)
        for at in draw.integers(1, len(data), 3):
            data[at] = draw.integers(256)
        try:
            decode(bytes(data), (6, 8))
        except ArtifactError:
            refused += 1
    assert refused > 100
