"""The gate of an edit: the same probe batches before and after, the loss difference with its interval."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from scipy import stats
from torch import Tensor, nn

from weightfold.errors import DataError, WeightfoldError
from weightfold.stats.running import call, n_samples, probing

Batch = tuple[Any, Any]
Loss = Callable[[Any, Any], Tensor]


@dataclass(frozen=True)
class Reading:
    """Paired loss differences on the probe: mean and a one-sided 95 % bound above it.

    Example:
        >>> reading = compare([1.0, 2.0, 3.0], [1.1, 2.1, 3.1])
        >>> round(reading.mean, 6), round(reading.upper, 6)
        (0.1, 0.1)
    """

    mean: float
    lower: float
    upper: float
    n_batches: int
    before: float
    after: float


def compare(before: Sequence[float], after: Sequence[float]) -> Reading:
    """Student's t on the paired differences d_b of B probe batches: mean +- t_{0.95, B-1} sd / sqrt(B)."""
    d = torch.tensor(after, dtype=torch.float64) - torch.tensor(before, dtype=torch.float64)
    mean = float(d.mean())
    half = float(stats.t.ppf(0.95, len(d) - 1) * d.std() / len(d) ** 0.5) if len(d) > 1 else 0.0
    return Reading(
        mean, mean - half, mean + half, len(d), float(torch.tensor(before).mean()), float(torch.tensor(after).mean())
    )


def losses(
    model: nn.Module,
    probe: Sequence[Batch],
    loss: Loss,
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> list[float]:
    """The loss on every probe batch."""
    with probing(model), autocast():
        return [float(loss(call(model, inputs), targets)) for inputs, targets in probe]


def check_enough(probe: Sequence[Batch], batch_size: int) -> None:
    """Refuse a probe that sees less than one training step.

    Raises:
        DataError: it has fewer samples than a batch.
    """
    n_probe = sum(n_samples(inputs) for inputs, _ in probe)
    if probe and n_probe < batch_size:
        raise DataError(
            f"The probe has {n_probe} samples, fewer than one training batch of {batch_size}.",
            remedy="Pass a larger probe.",
        )


def first_line(error: BaseException) -> str:
    """What an exception says first; some say nothing."""
    return next(iter(str(error).splitlines()), "")


def check_probe(model: nn.Module, probe: Sequence[Batch], loss: Loss) -> None:
    """Find out before the first batch whether a probe can judge.

    Raises:
        DataError: the model or the loss fails on it, its loss is not finite, or all its targets are of one class.
    """
    try:
        values = losses(model, probe, loss)
    except WeightfoldError:
        raise
    except Exception as error:
        raise DataError(
            f"The model or the loss fails on the probe: {type(error).__name__}: {first_line(error)[:200]}",
            remedy="Pass probe=[(inputs, targets), ...] with batches from the training split.",
        ) from error
    if not all(map(math.isfinite, values)):
        raise DataError("The loss on the probe is not finite.", remedy="Check the probe's inputs and targets.")
    classes = [t.reshape(-1) for _, t in probe if isinstance(t, Tensor) and not t.is_floating_point()]
    if len(classes) == len(probe) and sum(map(len, classes)) > 1 and len(torch.unique(torch.cat(classes))) == 1:
        raise DataError(
            "All targets of the probe are of one class: it cannot tell good edits from bad ones.",
            remedy="Draw the probe at random from the training split.",
        )
