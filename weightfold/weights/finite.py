"""Weights that hold NaN or infinity: found in one place, for merging, alignment, hashes and packing alike."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def holes(state: Mapping[str, Tensor]) -> list[str]:
    """Names of floating tensors that hold NaN or infinite numbers.

    Example:
        >>> holes({"w": torch.ones(2), "v": torch.tensor([1.0, float("nan")])})
        ['v']
    """
    return [name for name, value in state.items() if value.is_floating_point() and not is_finite(value)]


def remedy_for(value: Tensor) -> str:
    """What to do about a tensor that is not finite."""
    if bool((value.isfinite() | (value == -torch.inf)).all()):
        return "If it is a mask, register it as a buffer with persistent=False: then it is no weight."
    return "Leave that model out, or load it from a checkpoint written before its weights broke."


def is_finite(value: Tensor) -> bool:
    """Whether all numbers are finite; one sum tells it for almost all tensors."""
    total = value.detach().sum(dtype=torch.float64)
    return bool(total.isfinite()) or bool(value.detach().isfinite().all())
