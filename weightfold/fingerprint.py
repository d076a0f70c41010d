"""The only hash of weights: names, types, shapes and bytes, in order of name."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor, nn


def digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of named tensors, the same on every device and machine.

    Example:
        >>> digest({"a": torch.zeros(2)}) == digest({"a": torch.zeros(2)})
        True
        >>> digest({"a": torch.zeros(2)}) == digest({"b": torch.zeros(2)})
        False
    """
    sha = hashlib.sha256()
    for name in sorted(tensors):
        value = tensors[name].detach().cpu().contiguous()
        sha.update(f"{name}\0{value.dtype}\0{tuple(value.shape)}\0".encode())
        sha.update(value.reshape(-1).view(torch.uint8).numpy().tobytes() if value.numel() else b"")
    return sha.hexdigest()


def fingerprint(model: nn.Module) -> str:
    """SHA-256 of a model's whole state: parameters and persistent buffers."""
    return digest({name: value for name, value in model.state_dict().items() if isinstance(value, Tensor)})
