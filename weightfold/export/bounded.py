"""Build what a file names, a built-in network, in no more memory and time than the file's length explains.

A file of a hundred bytes may ask for layers of 2^40 units, or for 2^40 layers. Each tensor that the network makes is
counted before it is made: 2^24 numbers and 256 more for each byte of the file (a network may have been folded to a
hundredth), a thousand tensors and sixteen more for each byte.
"""

from __future__ import annotations

from typing import Any

import torch
from pydantic import ValidationError
from torch import nn
from torch.overrides import TorchFunctionMode

from weightfold.artifact import Builder
from weightfold.errors import ArtifactError, WeightfoldError
from weightfold.models import TaskSpec, build

_FREE_VALUES, _VALUES_A_BYTE = 1 << 24, 1 << 8
_FREE_TENSORS, _TENSORS_A_BYTE, _MOST_TENSORS = 1000, 16, 100_000
_FACTORIES = frozenset(
    {
        torch.empty, torch.zeros, torch.ones, torch.full, torch.rand, torch.randn, torch.randint, torch.arange,
        torch.linspace, torch.eye, torch.randperm,
    }
)  # fmt: skip


def build_named(builder: Builder, where: str, size_bytes: int) -> nn.Module:
    """Build the built-in network that a file names, before any edit.

    Args:
        builder: of kind "built-in".
        where: the file, for errors.
        size_bytes: of the file.
    Raises:
        ArtifactError: there is no such network, its settings do not fit, or it is larger than the file explains.
    """
    try:
        with _Bounded(size_bytes):
            return build(builder.name, TaskSpec(**(builder.task or {})), **builder.overrides)
    except WeightfoldError as error:
        reason = error.message
    except ValidationError as error:
        reason = error.errors()[0]["msg"]
    except (TypeError, ValueError, RuntimeError, ArithmeticError, MemoryError, AttributeError) as error:
        reason = str(error).partition("\n")[0][:300] or type(error).__name__
    raise ArtifactError(
        f"'{where}' names a network '{builder.name[:80]}' that cannot be built: {reason.rstrip('.')}.",
        remedy="Copy or write the file again, or pass the model that it belongs to.",
    ) from None


class _Bounded(TorchFunctionMode):
    """Counts the tensors that are made, and stops before one too many."""

    def __init__(self, size_bytes: int) -> None:
        super().__init__()
        self._values = _FREE_VALUES + _VALUES_A_BYTE * size_bytes
        self._tensors = min(_FREE_TENSORS + _TENSORS_A_BYTE * size_bytes, _MOST_TENSORS)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        named = kwargs or {}
        if func in _FACTORIES:
            plain = {key: value for key, value in named.items() if key != "generator"} | {"device": "meta"}
            self._values -= func(*args, **plain).numel()
            self._tensors -= 1
            if self._values < 0 or self._tensors < 0:
                raise ArtifactError("it is larger than the file's length explains")
        return func(*args, **named)
