"""Weights as whole numbers times a step, in the forward pass of a network that goes on training.

    q(w) = s · clamp(round(w / s), -Q, Q),   s = 2**(round(8 e) / 8),   Q = 2**(round(b) - 1) - 1

One exponent e and one bit width b for each row (output channel), both real numbers that are learned; what runs uses
the rounded ones, so the network in training is the network in the file. The grid is symmetric; the narrowest, 2 bits,
is ternary. A row takes 0 bits when all of its codes have come to zero. Steps lie an eighth of an octave apart, which a
small index tells in the file.

Gradients. Rounding passes them straight through to the weight, also where it is clipped or zero, so that nothing is
dead for good. dq/de = ln 2 (q - w) inside the grid and ln 2 q where it clips. dq/db is the secant to the grid that is
one bit narrower: what each weight would lose there, so that all large weights of a row say what a bit is worth, not
the clipped ones alone. Differs from Cséfalvay & Imber (arXiv 2301.13142, eq. 1): symmetric grid, whole bits in the
forward pass, gradients through clipped weights, and widths do not go below 2 by themselves. (There a width that falls
to 0 takes a row with it at once; the gradient of a row's scale vanishes where training has settled, so nothing would
hold it.)
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from weightfold.artifact.coded import MAX_BITS, STEP_LIMIT, STEPS

LN2 = math.log(2)
MIN_BITS = 2
"""Narrowest grid: ternary."""
PER_OCTAVE = 8
"""Steps in an octave."""
_TABLE = torch.from_numpy(STEPS.copy())


def step_index(exponent_R: Tensor) -> Tensor:
    """Whole number of eighths of an octave, shape (R,), int64."""
    return torch.round(exponent_R.detach() * PER_OCTAVE).long().clamp(-STEP_LIMIT, STEP_LIMIT)


def step_of(exponent_R: Tensor) -> Tensor:
    """Steps as they stand in the file, shape (R,), float32."""
    return _TABLE.to(exponent_R.device)[step_index(exponent_R) + STEP_LIMIT]


def limit_of(bits_R: Tensor) -> Tensor:
    """Largest code of each row, shape (R,).

    Example:
        >>> limit_of(torch.tensor([1.6, 2.0, 3.0, 8.2]))
        tensor([  1.,   1.,   3., 127.])
    """
    whole = torch.round(bits_R.detach()).clamp(MIN_BITS, MAX_BITS)
    return torch.exp2(whole - 1) - 1


def matrix(weight: Tensor, n_rows: int) -> Tensor:
    """A tensor as rows that have a step each, shape (R, C)."""
    return weight.reshape(n_rows, -1)


def codes_of(weight: Tensor, exponent_R: Tensor, bits_R: Tensor) -> Tensor:
    """The whole numbers that stand for a tensor, shape (R, C), in the tensor's type.

    Example:
        >>> codes_of(torch.tensor([[0.3, -1.2, 5.0]]), torch.tensor([0.0]), torch.tensor([3.0]))
        tensor([[ 0., -1.,  3.]])
    """
    Q = limit_of(bits_R)[:, None]
    x = matrix(weight.detach(), len(exponent_R)) / step_of(exponent_R)[:, None]
    return torch.clamp(torch.round(x), -Q, Q) + 0.0


def narrower(q: Tensor, Q: Tensor, s: Tensor) -> Tensor:
    """Quantised weights on the grid of one bit less; a ternary grid has no narrower one."""
    bound = torch.where(Q > 1, (Q - 1) / 2, Q) * s
    return torch.clamp(q, -bound, bound)


class _FakeQuantise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, exponent_R: Tensor, bits_R: Tensor, regrowth: bool) -> Tensor:
        s, Q = step_of(exponent_R)[:, None], limit_of(bits_R)[:, None]
        q = (codes_of(weight, exponent_R, bits_R).float() * s).to(weight.dtype)
        ctx.save_for_backward(weight, q, Q, s)
        ctx.regrowth = regrowth
        return q.view_as(weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        weight, q, Q, s = ctx.saved_tensors
        (grad,) = grads
        G = grad.reshape(q.shape)
        W = weight.reshape(q.shape)
        clipped = W.abs() > (Q + 0.5) * s
        whole_R = torch.linalg.vecdot(G, q)
        exponent = LN2 * (whole_R - torch.linalg.vecdot(G.masked_fill(clipped, 0.0), W))
        bits = whole_R - torch.linalg.vecdot(G, narrower(q, Q, s)) if ctx.needs_input_grad[2] else None
        if not ctx.regrowth:
            grad = torch.where((q != 0).any(1)[:, None] & ~clipped, G, 0.0).view_as(grad)
        return grad, exponent, bits, None


def fake_quantise(weight: Tensor, exponent_R: Tensor, bits_R: Tensor, regrowth: bool = True) -> Tensor:
    """Round a tensor to its grid, differentiably.

    Args:
        weight: any shape that R divides.
        exponent_R: log2 of the steps, shape (R,).
        bits_R: bit widths, shape (R,).
        regrowth: whether gradients reach weights that are clipped, or whose row is zero.
    Example:
        >>> w = torch.tensor([[0.3, -1.2, 5.0]], requires_grad=True)
        >>> fake_quantise(w, torch.tensor([0.0]), torch.tensor([3.0])).tolist()
        [[0.0, -1.0, 3.0]]
    """
    return _FakeQuantise.apply(weight, exponent_R, bits_R, regrowth)  # type: ignore[return-value]


def start(weight: Tensor, n_rows: int, resolution: float) -> tuple[Tensor, Tensor]:
    """First exponents and bits: one step for the whole tensor, a share of its standard deviation; nothing is clipped.

    Args:
        resolution: step in standard deviations of the tensor.
    Returns:
        exponent_R, bits_R: shape (R,), float32.
    """
    W = matrix(weight.detach(), n_rows).float()
    scale = W.square().mean().sqrt()
    exponent = torch.log2(resolution * scale) if scale > 0 else torch.zeros(())
    exponent_R = exponent.expand(n_rows).clone()
    largest_R = torch.round(W.abs().amax(1) / step_of(exponent_R))
    bits_R = (torch.ceil(torch.log2(largest_R + 1)) + 1).clamp(2, MAX_BITS)
    return exponent_R, bits_R
