"""Stop a network from being built that is larger than the file explains which asks for it.

A file of a hundred bytes may ask for layers of 2^40 units, or for 2^40 layers. Each tensor is counted before it is
made: 2^24 numbers and 256 more for each byte of the file (a network may have been folded to a hundredth), a thousand
tensors and sixteen more for each byte.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from weightfold.errors import ArtifactError

FREE_VALUES, VALUES_A_BYTE = 1 << 24, 1 << 8
FREE_TENSORS, TENSORS_A_BYTE, MOST_TENSORS = 1000, 16, 100_000
_FACTORIES = frozenset(
    {
        torch.empty, torch.zeros, torch.ones, torch.full, torch.rand, torch.randn, torch.randint, torch.arange,
        torch.linspace, torch.eye, torch.randperm,
    }
)  # fmt: skip


class Bounded(TorchFunctionMode):
    """Counts the tensors that are made within it, and stops before one too many.

    Args:
        size_bytes: of the file.
    Raises:
        ArtifactError: a tensor would be one too many, or too large.
    Example:
        >>> with Bounded(0):
        ...     torch.zeros(2).tolist()
        [0.0, 0.0]
        >>> with Bounded(0):
        ...     torch.zeros(1 << 40)
        Traceback (most recent call last):
        weightfold.errors.ArtifactError: it is larger than the file's length explains
    """

    def __init__(self, size_bytes: int) -> None:
        super().__init__()
        self._values = FREE_VALUES + VALUES_A_BYTE * size_bytes
        self._tensors = min(FREE_TENSORS + TENSORS_A_BYTE * size_bytes, MOST_TENSORS)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        named = kwargs or {}
        if func in _FACTORIES:
            plain = {key: value for key, value in named.items() if key not in ("generator", "out")}
            self._values -= func(*args, **plain | {"device": "meta"}).numel()
            self._tensors -= 1
            if self._values < 0 or self._tensors < 0:
                raise ArtifactError("it is larger than the file's length explains")
        return func(*args, **named)
