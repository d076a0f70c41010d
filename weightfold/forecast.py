"""What folding in mid-training will cost the finished network, in points of accuracy, before anything is folded.

The loss right after an event says little of the end: training repairs most of it. What stays is the price of the lost
width, and that grows with what the network still gets wrong and with how little of the width was redundant:

    price = A · E · R^B

E is the error in per cent on the probe at the event, R the mean share of the readers' output energy that the kept
channels cannot express. A network that is over-wide for its task has both small. A and B are fitted to finished runs
(`benchmarks/fold_forecast.py`, which also gives the error on beds that were left out); no theory is claimed.
"""

from __future__ import annotations

SCALE = 2.0
"""A, in points of accuracy per point of error."""

POWER = 0.75
"""B."""


def accuracy_price(error_percent: float, lost_energy: float) -> float:
    """Forecast of the final accuracy's loss, in points.

    Args:
        error_percent: share of the probe that is wrong now, 0 to 100.
        lost_energy: mean over readers of the relative error after compensation, 0 to 1.
    Example:
        >>> accuracy_price(50.0, 0.0)
        0.0
    """
    return SCALE * error_percent * max(lost_energy, 0.0) ** POWER
