"""What folding in mid-training will cost the finished network, in points of accuracy, before anything is folded.

The loss right after an event says little of the end: training repairs most of it. What stays is the price of the lost
width, and that grows with what the network still gets wrong and with how little of the width was redundant:

    price = A · m · E · R^B

E is the error in per cent on the probe at that point, R the mean share of the readers' output energy that the kept
channels cannot express, m how ripe the network is. Early in a run from scratch both E and R are larger than they will
be, and m, the share of the run that is over, takes that back. A network that answers well before its first step has
nothing of the kind to grow out of: it counts as one at the end of the range that the fit was made on, a tenth of a run.
A trained body under a new head does not: early on, its errors are the head's.

A and B are fitted to finished runs from scratch at 4 and 10 % of their steps; no theory is claimed.
`benchmarks/fold_forecast.py` makes such runs, docs/LOG.md gives forecasts against measured prices.
"""

from __future__ import annotations

SCALE = 35.0
"""A, in points of accuracy per point of error."""

POWER = 0.9
"""B."""

RIPE = 0.1
"""m of a network that was trained for its task before, at least."""


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


def knows_its_task(error_percent: float | None, chance_percent: float | None) -> bool:
    """Whether a network answered well before the first step: not half as often wrong as by always the same answer.

    Args:
        error_percent: share of the probe that was wrong then, 0 to 100; None where there are no classes.
        chance_percent: share that the most frequent answer gets wrong.
    Example:
        >>> knows_its_task(20.0, 90.0), knows_its_task(88.0, 90.0)
        (True, False)
    """
    return error_percent is not None and chance_percent is not None and error_percent < chance_percent / 2
