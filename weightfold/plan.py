"""How far to fold: candidate widths with what each saves and what it will cost, and the choice by one dial."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from weightfold.folding import Job
from weightfold.forecast import accuracy_price
from weightfold.heads import HeadJob
from weightfold.latency import Latency
from weightfold.price import Trails, predict
from weightfold.size import MacModel
from weightfold.widths import Grid

T = TypeVar("T")

AnyJob = Job | HeadJob

SHARES = (0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125)
"""Shares of the channels that are considered."""

IDLE = 1e-4
"""Predicted change of the loss, in its unit, up to which a whole branch counts as idle."""

LEAST_SAVING = 0.1
"""Share of a training step's time that an event must save at least."""

REPAY = 3.0
"""How many times its own cost an event must save."""


@dataclass(frozen=True)
class Candidate:
    """Widths for every group, and what they mean.

    Args:
        share: of the channels, on average.
        macs: multiply-accumulates left, as a share.
        predicted: predicted change of the probe loss right after the event; None where it cannot be predicted.
        lost_energy: mean over groups of the relative error that remains after compensation.
        price: forecast loss of final accuracy, in points; None where the task has no accuracy.
    """

    share: float
    widths: Mapping[str, int]
    macs: float
    predicted: float | None
    lost_energy: float
    price: float | None

    def to_record(self) -> dict[str, Any]:
        """Plain data, rounded to what is meant."""
        return {
            "share": round(self.share, 4),
            "widths": dict(self.widths),
            "macs": round(self.macs, 4),
            "predicted": None if self.predicted is None else round(self.predicted, 6),
            "lost_energy": round(self.lost_energy, 6),
            "forecast_points": None if self.price is None else round(self.price, 3),
        }


def ladder(jobs: Sequence[AnyJob], grid: Grid) -> list[dict[str, int]]:
    """Widths from mild to strong: the same share of every group, on the grid; without those that change nothing."""
    found: list[dict[str, int]] = []
    whole = {job.group.name: job.group.n_channels for job in jobs}
    for share in SHARES:
        widths = {job.group.name: grid.nearest(job.group, share * job.group.n_channels) for job in jobs}
        if widths not in (whole, *found[-1:]):
            found.append(widths)
    return found


def candidate(
    jobs: Sequence[AnyJob], trails: Trails, macs: MacModel, widths: Mapping[str, int], ripe: float
) -> Candidate:
    """Price one set of widths.

    Args:
        ripe: how ripe the network is, from `forecast.ripeness`.
    """
    cut = [job for job in jobs if widths[job.group.name] < job.group.n_channels]
    energies = [job.lost_energy(job.kept(widths[job.group.name])) for job in cut]
    lost = float(np.sum(energies)) / len(jobs)
    kept = sum(widths[job.group.name] for job in jobs) / sum(job.group.n_channels for job in jobs)
    parts = [job.residual(trails, widths[job.group.name]) for job in cut]
    whole = [part for part in parts if part is not None]
    predicted = predict(sum(whole[1:], whole[0])) if whole and len(whole) == len(cut) else None
    error = None if trails.error_percent is None else _floored(trails)
    price = None if error is None else accuracy_price(error, lost, ripe)
    return Candidate(kept, dict(widths), macs.at(widths) / macs.total, predicted, lost, price)


def _floored(trails: Trails) -> float:
    """The error in per cent, no less than one more wrong answer would make it: a solved probe is no solved task."""
    return max(trails.error_percent or 0.0, 100 / (trails.n_judged + 2))


def knapsack(jobs: Sequence[AnyJob], macs: MacModel, like: Candidate, grid: Grid) -> dict[str, int]:
    """The widths of fewest multiply-accumulates that lose about as much energy as a candidate.

    Greedy: again and again the step down the shares that saves most for the energy it loses; no group falls below half
    the candidate's width. Between exact values the energy follows the cost of the order in which channels go.
    """
    ladders = {job.group.name: _rungs(job, like.widths[job.group.name] / 2, grid) for job in jobs}
    energy = {job.group.name: _energies(job, like.widths[job.group.name], ladders[job.group.name]) for job in jobs}
    rung = dict.fromkeys(ladders, 0)
    left = sum(job.lost_energy(job.kept(like.widths[job.group.name])) for job in jobs)
    while True:
        widths = {name: ladders[name][at] for name, at in rung.items()}
        steps = []
        for name, at in rung.items():
            if at + 1 < len(ladders[name]):
                costs = max(energy[name][at + 1] - energy[name][at], 0.0)
                saves = macs.at(widths) - macs.at({**widths, name: ladders[name][at + 1]})
                if costs <= left:
                    steps.append((round(saves / max(costs, 1e-12), 6), name, costs))
        if not steps:
            return widths
        _, name, costs = max(steps, key=lambda step: (step[0], step[1]))
        rung[name] += 1
        left -= costs


def _rungs(job: AnyJob, least: float, grid: Grid) -> list[int]:
    n = job.group.n_channels
    widths = {n, *(grid.nearest(job.group, share * n) for share in SHARES)}
    return sorted((w for w in widths if w >= least), reverse=True)


def _energies(job: AnyJob, known: int, widths: Sequence[int]) -> list[float]:
    """Lost energy at some widths, from the exact value at one."""
    scale = job.lost_energy(job.kept(known)) / max(job.cost(known), 1e-300) if known < job.group.n_channels else 1.0
    return [scale * job.cost(width) for width in widths]


def without_idle(jobs: Sequence[AnyJob], trails: Trails, like: Candidate, grid: Grid) -> dict[str, int]:
    """Narrow groups that the loss does not need to the end: branches that add next to nothing to their stream.

    A group is idle if cutting it to its narrowest width is predicted to cost the loss no more than cutting it to the
    candidate's, or than `IDLE`.
    """
    widths = dict(like.widths)
    for job in jobs:
        name, least = job.group.name, grid.nearest(job.group, SHARES[-1] * job.group.n_channels)
        there, here = job.residual(trails, least), job.residual(trails, widths[name])
        if least < widths[name] and there is not None and here is not None:
            costs = abs(predict(there)) + float(there.std()) / len(there) ** 0.5
            if costs <= max(IDLE, predict(here)):
                widths[name] = least
    return widths


@dataclass(frozen=True)
class Decision:
    """What was chosen, or why nothing was.

    Args:
        reached: whether the goal is met.
        ratio: a training step's time over that of the network as it was; None where it was not measured.
    """

    chosen: Candidate | None
    reason: str
    reached: bool = True
    ratio: float | None = None


def within_loss(steps: Sequence[T], priced: Callable[[T], Candidate], most: float) -> Decision:
    """The narrowest candidate whose forecast price is within ``most`` points, by bisection: prices rise with the cut.

    Args:
        steps: what can be priced, from mild to strong.

    Example:
        >>> mild, strong = (Candidate(s, {}, s, None, 0.0, p) for s, p in ((0.5, 0.1), (0.25, 0.9)))
        >>> within_loss([mild, strong], lambda c: c, 0.2).chosen.share
        0.5
        >>> print(within_loss([strong], lambda c: c, 0.2).reason)
        this network is not over-wide: folding to 0.25 would cost about 0.9 points, more than 0.2
    """
    found: list[Candidate] = []
    low, high = -1, len(steps)
    while high - low > 1:
        middle = (low + high) // 2
        found.append(priced(steps[middle]))
        low, high = (middle, high) if _good(found[-1], most) else (low, middle)
    good = [c for c in found if _good(c, most)]
    if good:
        return by_loss(min(good, key=lambda c: c.macs), most)
    if not found:
        return Decision(None, "no group can be made narrower on the grid of widths", reached=False)
    mild = found[-1]
    reason = (
        f"this network is not over-wide: folding to {mild.share:.2g} would cost about {mild.price:.1f} points, "
        f"more than {most:g}"
    )
    return Decision(None, reason, reached=False)


def by_loss(chosen: Candidate, most: float) -> Decision:
    """The decision for a candidate within ``most`` points, in words."""
    return Decision(
        chosen, f"the narrowest widths whose forecast price of {chosen.price:.2g} points is within {most:g}"
    )


def _good(candidate: Candidate, most: float) -> bool:
    return candidate.price is not None and candidate.price <= most


def for_time(
    steps: Sequence[T],
    macs: Sequence[float],
    priced: Callable[[T], Candidate],
    latency: Latency,
    done: float,
    goal: float,
) -> Decision:
    """The widest candidate with which the rest of the run still meets the goal.

    Args:
        steps: what can be priced, from mild to strong, with the MACs that each leaves.
        done: share of the run that is over.
        goal: share of the dense run's time to save: done + (1 - done) ratio <= 1 - goal.
    """
    if not steps:
        return Decision(None, "no group can be made narrower on the grid of widths", reached=False)
    ratios = [round(latency.ratio(n), 2) for n in macs]
    at = next((i for i, ratio in enumerate(ratios) if ratio <= _most(done, goal)), len(steps) - 1)
    return by_time(priced(steps[at]), ratios[at], done, goal)


def by_time(chosen: Candidate, ratio: float, done: float, goal: float) -> Decision:
    """The decision for a candidate whose step takes ``ratio`` of the time, in words: enough, or as near as it gets."""
    most = _most(done, goal)
    if ratio <= most:
        return Decision(chosen, f"a step takes {ratio:g} of the time, {most:.2f} being enough", True, ratio)
    saved = (1 - done) * (1 - ratio)
    reason = f"even the narrowest widths save {saved:.0%} of the time, less than {goal:.0%}"
    return Decision(chosen, reason, reached=False, ratio=ratio)


def _most(done: float, goal: float) -> float:
    """The share of a step's time with which the rest of the run just meets the goal."""
    return (1 - goal - done) / (1 - done)
