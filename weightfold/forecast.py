"""What folding in mid-training will cost the finished network, in points of accuracy, before anything is folded.

The loss right after an event says little of the end: training repairs most of it. What stays is the price of the lost
width, and that grows with what the network still gets wrong and with how little of the width was redundant:

    price = A · p · E · R^B

p is the share of the run that is over, E the error in per cent on the probe at that point, R the mean share of the
readers' output energy that the kept channels cannot express. Early in a run both E and R are larger than they will be;
p takes that back. A network that is over-wide for its task has E and R small. A and B are fitted to finished runs of
four beds, at 4 and 10 % of their steps (docs/LOG.md gives them, with the errors); no theory is claimed.
"""

from __future__ import annotations

SCALE = 35.0
"""A, in points of accuracy per point of error."""

POWER = 0.9
"""B."""


def accuracy_price(error_percent: float, lost_energy: float, progress: float) -> float:
    """Forecast of the final accuracy's loss, in points.

    Args:
        error_percent: share of the probe that is wrong now, 0 to 100.
        lost_energy: mean over readers of the relative error after compensation, 0 to 1.
        progress: share of the run that is over, 0 to 1; meant for the first tenth.
    Example:
        >>> round(accuracy_price(50.0, 0.0025, 0.1), 2)
        0.8
    """
    return SCALE * progress * error_percent * max(lost_energy, 0.0) ** POWER
