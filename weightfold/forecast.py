"""What folding in mid-training will cost the finished network, in points of accuracy, before anything is folded.

The loss right after an event says little of the end: training repairs most of it. What stays is the price of the lost
width, and that grows with what the network still gets wrong and with how little of the width was redundant:

    price = A · m · E · R^B

E is the error in per cent on the probe at that point, R the mean share of the readers' output energy that the kept
channels cannot express, m how ripe the network is. Early in a run from scratch both E and R are larger than they will
be, and m, the share of the run that is over, takes that back. A network that was trained before has nothing of the kind
to grow out of: it counts as one at the end of the range that the fit was made on, a tenth of a run. That it was trained
before is seen in its first weights: independent entries have no singular value above the edge s (√O + √I) of their
spectrum (Marchenko & Pastur, 1967), and what training has written lies above it.

A and B are fitted to finished runs from scratch at 4 and 10 % of their steps; no theory is claimed.
`benchmarks/fold_forecast.py` makes such runs, docs/LOG.md gives forecasts against measured prices.
"""

from __future__ import annotations

from statistics import median

import torch
from torch import Tensor, nn

SCALE = 35.0
"""A, in points of accuracy per point of error."""

POWER = 0.9
"""B."""

RIPE = 0.1
"""m of a network that was trained before, at least."""

BEYOND_NOISE = 1.15
"""Median ratio of largest singular values to the edge of noise from which weights count as trained."""

_ITERATIONS = 12


def accuracy_price(error_percent: float, lost_energy: float, ripe: float) -> float:
    """Forecast of the final accuracy's loss, in points.

    Args:
        error_percent: share of the probe that is wrong now, 0 to 100.
        lost_energy: mean over readers of the relative error after compensation, 0 to 1.
        ripe: m, from `ripeness`, 0 to 1.
    Example:
        >>> round(accuracy_price(50.0, 0.0025, 0.1), 2)
        0.8
    """
    return SCALE * ripe * error_percent * max(lost_energy, 0.0) ** POWER


def ripeness(progress: float, trained_before: bool) -> float:
    """How ripe a network is.

    Args:
        progress: share of the run that is over, 0 to 1; meant for the first tenth.
    Example:
        >>> ripeness(0.06, False), ripeness(0.06, True)
        (0.06, 0.1)
    """
    return max(progress, RIPE) if trained_before else progress


def was_trained(model: nn.Module) -> bool:
    """Whether a network's weights are no random start, by the singular values of most of its matrices.

    Matrices with a side below 8 say nothing and are left out. Cost: two dozen products of each weight with a vector.

    Example:
        >>> was_trained(nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 10)))
        False
    """
    found = [ratio for p in model.parameters() if p.ndim > 1 and (ratio := _beyond_noise(p.detach())) is not None]
    return bool(found) and median(found) > BEYOND_NOISE


@torch.no_grad()
def _beyond_noise(weight: Tensor) -> float | None:
    """The largest singular value of a matrix, by power iteration, over s (√O + √I); None where it says nothing."""
    matrix_OI = weight.flatten(1).float()
    size = float(matrix_OI.square().mean().sqrt())
    if min(matrix_OI.shape) < 8 or not size > 0:
        return None
    vector_I = torch.ones(matrix_OI.shape[1], device=matrix_OI.device)
    vector_I += torch.randn(len(vector_I), generator=torch.Generator().manual_seed(0)).to(matrix_OI.device)
    for _ in range(_ITERATIONS):
        vector_I = matrix_OI.T @ (matrix_OI @ (vector_I / vector_I.norm()))
    return float(vector_I.norm().sqrt()) / (size * sum(n**0.5 for n in matrix_OI.shape))
