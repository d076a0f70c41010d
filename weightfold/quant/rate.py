"""What the weights cost in the file, as a function that a network can learn by.

The file's coder (`weightfold.artifact.matrix`) spends on a weight what its row and its column let expect. Here the same
model is taken with the counts as they stand now:

    odds_ij = k_i / (C - k_i) · f_j,     f_j = m_j / Σ_i (k_i / C)

k_i codes of row i and m_j of column j are not zero. A weight that becomes non-zero costs

    price_ij = log2(1 / odds_ij) + 1 for its sign + what magnitudes take on average

so a lone weight in a sparse row and column is dear, one among many cheap: pressure goes to whole channels, pixels and
units by itself. Between the codes the cost is made linear, price_ij · min(|x|, 1) + slope · max(|x| - 1, 0) with
x = w / s, which pulls on weights and, through s, on steps. Prices are constants while they stand.

The pull on weights is that of reweighted L1 norms (Candès, Wakin & Boyd, J. Fourier Anal. Appl. 2008), with the weights
taken from the code that is really used; the idea to train against an entropy model is Oktay et al., ICLR 2020,
arXiv 1906.06624. Differs in: no learned transform, no noise, an adaptive model of rows and columns.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from weightfold.quant.fake import LN2, matrix, step_of

LEAST, MOST = 0.5, 12.0
"""Bits that a weight's first code costs, at least and at most."""
SIDE_BITS = 8.0
"""Bits that a living row takes besides its codes: width, step and density."""
WIDTH_BITS = 0.5
"""Of these, what a bit of width takes."""


@dataclass(frozen=True, eq=False)
class Prices:
    """What codes cost at the present counts.

    Args:
        first_RC: bits of the first code of each weight.
        slope: bits of each further one.
        bits_R: bits that each row takes now, side information included, shape (R,).
        width_R: bits that each row would save with a grid of one bit less.
    """

    first_RC: Tensor
    slope: float
    bits_R: Tensor
    width_R: Tensor

    @property
    def total(self) -> float:
        """Bits of the whole tensor."""
        return float(self.bits_R.sum())


@torch.no_grad()
def prices(codes_RC: Tensor, limit_R: Tensor) -> Prices:
    """Measure what a matrix of codes costs.

    Args:
        codes_RC: whole numbers.
        limit_R: largest code of each row's grid.
    Example:
        >>> codes = torch.zeros(8, 16)
        >>> codes[0, :8] = 1
        >>> found = prices(codes, torch.ones(8))
        >>> bool(found.first_RC[0, 0] < found.first_RC[5, 0] < found.first_RC[5, 12])
        True
    """
    live_RC = (codes_RC != 0).float()
    C = live_RC.shape[1]
    n_R, n_C = live_RC.sum(1), live_RC.sum(0)
    share_R = (n_R + 0.5) / (C + 1)
    factor_C = (n_C + 1) / (share_R.sum() + 1)
    odds_RC = (share_R / (1 - share_R).clamp_min(0.5 / (C + 1)))[:, None] * factor_C
    log_odds_RC = torch.log2(odds_RC.clamp(2.0**-14, 2.0**14))
    more_R, slope = _magnitudes(codes_RC, n_R)
    zero_RC = torch.log2(1 + odds_RC)
    flags_R = torch.where(n_C > 0, zero_RC - live_RC * log_odds_RC, 0.0).sum(1)
    bits_R = torch.where(n_R > 0, flags_R + n_R + more_R + SIDE_BITS, 1.0)
    first = 1 - log_odds_RC + float(more_R.sum() / n_R.sum().clamp_min(1)) / 2
    below_R = torch.where(limit_R > 1, (limit_R - 1) / 2, limit_R)
    width_R = slope * (codes_RC.abs() - below_R[:, None]).clamp_min(0).sum(1) + WIDTH_BITS
    return Prices(first.clamp(LEAST, MOST), slope, bits_R, width_R)


def _magnitudes(codes_RC: Tensor, n_R: Tensor) -> tuple[Tensor, float]:
    """Bits that magnitudes beyond 1 take in each row, and on average for each further step."""
    size_RC = codes_RC.abs()
    total_R, n_steps = torch.zeros_like(n_R), 0.0
    for least in range(1, 8):
        here_R = (size_RC >= least).sum(1).float()
        n_here, n_more = float(here_R.sum()), float((size_RC > least).sum())
        if n_here == 0 or n_more == 0:
            break
        q = min(max(n_more / n_here, 1e-6), 1 - 1e-6)
        entropy = -(q * torch.log2(torch.tensor(q)) + (1 - q) * torch.log2(torch.tensor(1 - q)))
        total_R, n_steps = total_R + here_R * float(entropy), n_steps + n_more
    total = float(total_R.sum())
    return total_R, min(max(total / n_steps, 0.5), 3.0) if n_steps else 2.0


class _Rate(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, exponent_R: Tensor, _bits_R: Tensor, first_RC: Tensor, slope: float, width_R: Tensor
    ) -> Tensor:
        W, s = matrix(weight, len(exponent_R)), step_of(exponent_R)[:, None]
        pull = first_RC.masked_fill(W.abs() >= s, slope).mul_(W.sign()).div_(s)
        ctx.shape = weight.shape
        ctx.save_for_backward(pull, torch.linalg.vecdot(pull, W).mul_(-LN2), width_R)
        return weight.new_zeros(())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        by_weight, by_exponent, by_bits = ctx.saved_tensors
        return (by_weight * grad).reshape(ctx.shape), by_exponent * grad, by_bits * grad, None, None, None


def rate(weight: Tensor, exponent_R: Tensor, bits_R: Tensor, price: Prices) -> Tensor:
    """The gradient of the bits that a tensor takes, linear between its codes, in all three.

    A row's bit width is charged what a bit of it costs now: what a grid of one bit less would save.

    Args:
        weight: any shape; exponent_R, bits_R: shape (R,).
    Returns:
        zero: a scalar without value but with that gradient: how many bits it is, the coder counts.
    """
    return _Rate.apply(weight, exponent_R, bits_R, price.first_RC, price.slope, price.width_R)  # type: ignore[return-value]
