"""Fake quantisation. References: the file's own values in NumPy, finite differences, the definitions in plain loops."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from weightfold.artifact.coded import CodedTensor
from weightfold.quant.codes import coded_tensor
from weightfold.quant.fake import codes_of, fake_quantise, limit_of, narrower, start, step_index, step_of

SEEDS = st.integers(0, 2**31)


def drawn(seed: int, shape: tuple[int, ...] = (5, 7)) -> tuple[Tensor, Tensor, Tensor]:
    """Weights, exponents and bits of rows."""
    g = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=g) * 10 ** (4 * torch.rand(shape[0], generator=g) - 3).reshape(
        -1, *(1,) * (len(shape) - 1)
    )
    exponent_R = torch.rand(shape[0], generator=g) * 16 - 12
    return weight, exponent_R, torch.rand(shape[0], generator=g) * 14 + 1.6


@settings(max_examples=60, deadline=None)
@given(SEEDS, st.sampled_from([(5, 7), (4, 3, 2, 2), (3, 1), (1, 9)]))
def test_what_runs_is_bit_for_bit_what_the_file_holds(seed: int, shape: tuple[int, ...]) -> None:
    weight, exponent_R, bits_R = drawn(seed, shape)
    stored: CodedTensor = coded_tensor(weight, exponent_R, bits_R)
    for runs in (fake_quantise(weight, exponent_R, bits_R), fake_quantise(weight.double(), exponent_R, bits_R)):
        assert np.array_equal(runs.float().numpy() + 0.0, stored.values() + 0.0)
        assert np.array_equal(runs.double().numpy(), stored.values().astype(np.float64))


@settings(max_examples=40, deadline=None)
@given(SEEDS)
def test_the_grid_is_symmetric_and_nearest(seed: int) -> None:
    weight, exponent_R, bits_R = drawn(seed)
    codes = codes_of(weight, exponent_R, bits_R)
    assert torch.equal(codes_of(-weight, exponent_R, bits_R), -codes)
    s = step_of(exponent_R).double()[:, None]
    for row, limit in enumerate(limit_of(bits_R).tolist()):
        assert limit == 2 ** (round(float(bits_R[row])) - 1) - 1
        levels = torch.arange(-min(limit, 300), min(limit, 300) + 1).double()
        inside = weight[row].double().abs() <= levels[-1] * s[row]
        nearest = ((weight[row].double()[:, None] / s[row]) - levels).abs().amin(1)
        mine = (weight[row].double() / s[row] - codes[row].double()).abs()
        assert bool((mine <= nearest + 1e-5)[inside].all())
        assert float(codes[row].abs().max()) <= limit
    once = fake_quantise(weight, exponent_R, bits_R)
    assert torch.equal(fake_quantise(once, exponent_R, bits_R), once)


def test_steps_are_eighths_of_an_octave() -> None:
    exponents = torch.linspace(-20, 20, 400)
    assert torch.equal(step_index(exponents), torch.round(exponents * 8).long())
    torch.testing.assert_close(step_of(exponents), 2 ** (torch.round(exponents * 8) / 8), rtol=1e-6, atol=0)
    assert bool(torch.isfinite(step_of(torch.tensor([-1e9, 1e9]))).all())


def test_gradients_are_what_the_docstring_defines() -> None:
    weight, exponent_R, bits_R = drawn(3)
    leaves = [t.requires_grad_() for t in (weight, exponent_R, bits_R)]
    G = torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
    (fake_quantise(*leaves) * G).sum().backward()  # pyright: ignore
    assert torch.equal(weight.grad, G)  # pyright: ignore
    s, Q = step_of(exponent_R).tolist(), limit_of(bits_R).tolist()
    for row in range(len(s)):
        by_exponent = by_bits = 0.0
        for w, g in zip(weight[row].tolist(), G[row].tolist(), strict=True):
            q = max(-Q[row], min(Q[row], float(np.rint(np.float32(w) / np.float32(s[row]))))) * s[row]
            clipped = abs(w) > (Q[row] + 0.5) * s[row]
            by_exponent += math.log(2) * g * (q if clipped else q - w)
            bound = (Q[row] - 1) / 2 * s[row] if Q[row] > 1 else s[row]
            by_bits += g * (q - max(-bound, min(bound, q)))
        assert float(exponent_R.grad[row]) == pytest.approx(by_exponent, rel=2e-4, abs=1e-5)  # pyright: ignore
        assert float(bits_R.grad[row]) == pytest.approx(by_bits, rel=2e-4, abs=1e-5)  # pyright: ignore


def test_the_gradient_of_a_step_agrees_with_differences_over_many_weights() -> None:
    """dq/de is an average: over weights spread evenly the rounding itself contributes what straight-through says.

    Reference: central differences of E[(q - t)^2] over 400,000 weights, two neighbouring steps apart.
    """
    weight = torch.linspace(-3, 3, 400_001)[None]
    bits_R, e = torch.tensor([4.0]), -1.0
    exponent_R = torch.tensor([e], requires_grad=True)
    target = 0.5 * weight
    (fake_quantise(weight, exponent_R, bits_R) - target).square().mean().backward()

    def value(at: float) -> float:
        return float((fake_quantise(weight, torch.tensor([at]), bits_R) - target).square().mean())

    slope = (value(e + 1 / 8) - value(e - 1 / 8)) / (2 / 8)
    assert exponent_R.grad is not None
    assert float(exponent_R.grad) * slope > 0 or abs(slope) < 5e-2
    clipped_R = torch.tensor([-3.0], requires_grad=True)
    (fake_quantise(weight, clipped_R, bits_R) - weight).square().mean().backward()

    def error(at: float) -> float:
        return float((fake_quantise(weight, torch.tensor([at]), bits_R) - weight).square().mean())

    slope = (error(-3 + 1 / 8) - error(-3 - 1 / 8)) / (2 / 8)
    assert clipped_R.grad is not None
    assert float(clipped_R.grad) == pytest.approx(slope, rel=0.05)


def test_without_regrowth_zero_rows_and_clipped_weights_stand_still() -> None:
    weight = torch.tensor([[0.1, -0.2, 0.3], [5.0, 1.0, 0.1]], requires_grad=True)
    fake_quantise(weight, torch.zeros(2), torch.full((2,), 3.0), False).sum().backward()
    assert weight.grad is not None
    assert weight.grad.tolist() == [[0, 0, 0], [0, 1, 1]]


@settings(max_examples=40, deadline=None)
@given(SEEDS, st.floats(0.05, 4))
def test_a_start_clips_nothing_and_has_one_step(seed: int, resolution: float) -> None:
    weight = torch.randn(6, 20, generator=torch.Generator().manual_seed(seed)) * 0.03
    weight[2] = 0
    exponent_R, bits_R = start(weight, 6, resolution)
    assert len(exponent_R.unique()) == 1
    s = step_of(exponent_R)[:, None]
    assert float((fake_quantise(weight, exponent_R, bits_R) - weight).abs().max()) <= float(s.max()) / 2 * (1 + 1e-5)
    widest = narrower(fake_quantise(weight, exponent_R, bits_R), limit_of(bits_R - 1)[:, None], s)
    assert widest.shape == weight.shape
    assert bool(torch.isfinite(torch.cat([exponent_R, bits_R])).all())
    assert bool(torch.isfinite(torch.cat(start(torch.zeros(3, 4), 3, resolution))).all())
