"""Codes times steps: the same bits in NumPy and torch, and everything that does not fit is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from weightfold.artifact import STEP_LIMIT, STEPS, CodedTensor, nearest_step, row_bits, step_value
from weightfold.errors import ArtifactError


def test_steps_are_eighth_octaves() -> None:
    k = np.arange(-STEP_LIMIT, STEP_LIMIT + 1)
    exact = 2.0 ** (k / 8)  # float64
    assert (step_value(k) == exact.astype(np.float32)).all()
    assert (step_value(k[8:]) == 2 * step_value(k[:-8])).all()
    assert (nearest_step(step_value(k)) == k).all()
    assert (nearest_step(exact * 2 ** (0.49 / 8)) == k).all()


def test_torch_makes_the_same_bits() -> None:
    generator = np.random.default_rng(0)
    codes = generator.integers(-32767, 32768, (400, 30)).astype(np.int16)
    steps = generator.integers(-STEP_LIMIT + 130, STEP_LIMIT - 130, 400).astype(np.int16)
    table = torch.from_numpy(STEPS.copy())
    made = torch.from_numpy(codes).float() * table[torch.from_numpy(steps).long() + STEP_LIMIT][:, None]
    values = CodedTensor(codes, steps).values()
    assert (made.numpy().view(np.int32) == values.view(np.int32)).all()


def test_bits_are_the_fewest_that_hold_a_row() -> None:
    for largest in (1, 2, 3, 4, 7, 8, 127, 128, 32767):
        (bits,) = row_bits(np.array([[0, -largest, 1]]))
        assert largest <= 2 ** (bits - 1) - 1
        assert bits == 2 or largest > 2 ** (bits - 2) - 1


def test_one_step_may_stand_for_all() -> None:
    tensor = CodedTensor(np.array([3, 0, -4], np.int32), np.array([8], np.int16))
    assert tensor.values().tolist() == [6.0, 0.0, -8.0]
    assert tensor.bits_R.tolist() == [4]


@pytest.mark.parametrize(
    ("codes", "steps", "complaint"),
    [
        (np.zeros((3, 2), np.int16), np.zeros(2, np.int16), "take 3 steps"),
        (np.zeros((3, 2), np.float32), np.zeros(3, np.int16), "signed integers"),
        (np.full((1, 2), -32768, np.int16), np.zeros(1, np.int16), "between -32767 and 32767"),
        (np.full((1, 2), 40000, np.int32), np.zeros(1, np.int16), "Choose a larger step"),
        (np.zeros((1, 2), np.int16), np.full(1, 961, np.int16), "within -960 and 960"),
    ],
)
def test_what_is_no_coded_tensor_is_refused(codes: np.ndarray, steps: np.ndarray, complaint: str) -> None:
    with pytest.raises(ArtifactError, match=complaint):
        CodedTensor(codes, steps)
