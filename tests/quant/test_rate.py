"""The price of codes. References: finite differences of the surrogate, and the file's own coder."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from weightfold.artifact.coded import CodedTensor
from weightfold.artifact.matrix import coded_bits
from weightfold.quant.fake import codes_of, limit_of
from weightfold.quant.rate import Prices, prices, rate


def trained_like(seed: int, density: float, rows: int = 60, columns: int = 90) -> Tensor:
    """Codes with busy and idle rows and columns, as training leaves them."""
    g = torch.Generator().manual_seed(seed)
    busy = torch.randn(rows, 1, generator=g) + torch.randn(1, columns, generator=g)
    chance = torch.sigmoid(1.5 * busy + np.log(density / (1 - density)))
    live = torch.rand(rows, columns, generator=g) < chance
    size = 1 + torch.floor(-torch.log(torch.rand(rows, columns, generator=g)) * 0.8).clamp_max(6)
    sign = torch.where(torch.rand(rows, columns, generator=g) < 0.5, -1.0, 1.0)
    codes = torch.where(live, size * sign, 0.0)
    codes[:3], codes[:, :4] = 0, 0
    return codes


def found(codes: Tensor) -> Prices:
    return prices(codes, torch.full((len(codes),), 7.0))


def real(codes: Tensor) -> float:
    return coded_bits(CodedTensor(codes.numpy().astype(np.int16), np.zeros(len(codes), np.int16)))


@pytest.mark.parametrize("density", [0.005, 0.02, 0.08, 0.3, 0.6])
def test_the_total_is_near_what_the_coder_takes(density: float) -> None:
    for seed in range(2):
        codes = trained_like(seed, density)
        assert found(codes).total == pytest.approx(real(codes), rel=0.2), (density, seed)


def test_the_total_orders_tensors_as_the_coder_does() -> None:
    all_codes = [trained_like(seed, density) for seed in range(3) for density in (0.01, 0.03, 0.06, 0.12, 0.25, 0.5)]
    rank = stats.spearmanr([found(c).total for c in all_codes], [real(c) for c in all_codes]).statistic
    assert rank > 0.98


def test_the_price_of_a_code_follows_what_the_coder_takes_more_for_it() -> None:
    """Weights are set from 0 to 1, fifty at once from one band of prices: the coder charges the dear ones more."""
    codes = trained_like(5, 0.05)
    first_RC = found(codes).first_RC
    zeros = (codes == 0).nonzero()
    order = first_RC[zeros[:, 0], zeros[:, 1]].argsort()
    before, predicted, measured = real(codes), [], []
    for band in order.chunk(8):
        some = zeros[band[:: max(1, len(band) // 50)][:50]]
        more = codes.clone()
        more[some[:, 0], some[:, 1]] = 1
        predicted.append(float(first_RC[some[:, 0], some[:, 1]].mean()))
        measured.append((real(more) - before) / len(some))
    assert stats.spearmanr(predicted, measured).statistic > 0.9
    assert predicted[-1] > predicted[0] + 2
    assert np.mean(predicted) == pytest.approx(np.mean(measured), rel=0.35)


def test_gradients_are_those_of_the_value() -> None:
    """Central differences in float64, where no weight lies on a kink and the rounded step stands still."""
    g = torch.Generator().manual_seed(0)
    weight = torch.randn(4, 6, generator=g, dtype=torch.float64)
    exponent_R = torch.tensor([-1.0, 0.0, 1.0, -2.0])
    price = prices(codes_of(weight.float(), exponent_R, torch.full((4,), 4.0)), torch.full((4,), 7.0))
    W, e = weight.float().requires_grad_(), exponent_R.clone().requires_grad_()
    b = torch.full((4,), 4.0, requires_grad=True)
    (3 * rate(W, e, b, price)).backward()
    assert W.grad is not None
    assert e.grad is not None
    assert b.grad is not None

    def value(x: Tensor, at: Tensor) -> float:
        size = x.abs() / 2.0 ** at.double()[:, None]
        return 3 * float((price.first_RC * size.clamp_max(1) + price.slope * (size - 1).clamp_min(0)).sum())

    h = 1e-5
    for i in range(4):
        shift = torch.zeros(4, dtype=torch.float64)
        shift[i] = h
        slope = (value(weight, exponent_R + shift) - value(weight, exponent_R - shift)) / (2 * h)
        assert float(e.grad[i]) == pytest.approx(slope, rel=1e-4)
        for j in range(6):
            nudge = torch.zeros_like(weight)
            nudge[i, j] = h
            slope = (value(weight + nudge, exponent_R) - value(weight - nudge, exponent_R)) / (2 * h)
            assert float(W.grad[i, j]) == pytest.approx(slope, rel=1e-4)
    torch.testing.assert_close(b.grad.double(), 3 * price.width_R.double())


def test_a_bit_of_width_costs_what_the_narrower_grid_saves() -> None:
    codes = torch.tensor([[7.0, 0, 0, 0], [1, 1, 0, 0], [3, 3, -3, 0]])
    price = prices(codes, limit_of(torch.tensor([4.0, 2.0, 3.0])))
    narrow = torch.tensor([[3.0, 0, 0, 0], [1, 1, 0, 0], [1, 1, -1, 0]])
    expected = price.slope * (codes.abs() - narrow.abs()).sum(1) + 0.5
    torch.testing.assert_close(price.width_R, expected)


@pytest.mark.parametrize("codes", [torch.zeros(4, 6), torch.ones(4, 6), torch.full((1, 1), 3.0), torch.eye(9) * 40])
def test_extreme_codes_have_finite_prices(codes: Tensor) -> None:
    price = found(codes)
    for part in (price.first_RC, price.bits_R, price.width_R, torch.tensor(price.slope)):
        assert bool(torch.isfinite(part).all())
    assert price.total >= 0
