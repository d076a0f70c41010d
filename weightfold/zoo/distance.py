"""How far models lie apart, weight by weight; which embeddings are nearest."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
from torch import Tensor


def relative_distance(one: Mapping[str, Tensor], two: Mapping[str, Tensor]) -> float:
    """Norm of the difference of two models over the first's norm, in the order their weights are in.

    Floating tensors of one name and shape count; NaN and infinite numbers count as 0.

    Example:
        >>> import torch
        >>> relative_distance({"w": torch.tensor([3.0, 4.0])}, {"w": torch.tensor([3.0, 3.0])})
        0.2
    """
    apart = size = 0.0
    for name, value in one.items():
        other = two.get(name)
        if other is not None and other.shape == value.shape and value.is_floating_point():
            own = value.double().nan_to_num(0.0, 0.0, 0.0)
            apart += float((own - other.double().nan_to_num(0.0, 0.0, 0.0)).square().sum())
            size += float(own.square().sum())
    return (apart / size) ** 0.5 if size > 0 else (0.0 if apart == 0 else float("inf"))


def neighbours(vectors: npt.NDArray[np.float32], k: int) -> list[list[int]]:
    """The k nearest other rows of each, nearest first, shape (N, D) in; exact, in parts.

    Example:
        >>> neighbours(np.array([[0.0], [1.0], [1.5]], np.float32), 1)
        [[1], [2], [1]]
    """
    n, k = len(vectors), min(k, len(vectors) - 1)
    if k < 1:
        return [[] for _ in range(n)]
    own = np.einsum("nd,nd->n", vectors, vectors)
    out: list[list[int]] = []
    for first in range(0, n, 1024):
        part = vectors[first : first + 1024]
        far = own[None] - 2 * part @ vectors.T
        far[np.arange(len(part)), np.arange(first, first + len(part))] = np.inf
        near = np.argpartition(far, k - 1, 1)[:, :k]
        order = np.take_along_axis(far, near, 1).argsort(1, kind="stable")
        out += np.take_along_axis(near, order, 1).tolist()
    return out
