"""Nested state (dicts, lists, tuples, numbers, tensors) as one table of tensors and one JSON text, and back.

Optimisers and methods keep their state as such nests. Nothing in them is code, and nothing is pickled.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from weightfold.errors import ArtifactError

_TENSOR, _PAIRS, _TUPLE, _BYTES = "$tensor", "$pairs", "$tuple", "$bytes"


def split(value: Any) -> tuple[Any, dict[str, Tensor]]:
    """Take the tensors out of a nest.

    Returns:
        plain: what JSON can hold, with the name of each tensor in its place.
        tensors: by name, detached, on the CPU; a tensor that stands in two places is stored in each.
    Example:
        >>> plain, tensors = split({0: {"step": 3, "avg": torch.zeros(2)}})
        >>> plain
        {'$pairs': [[0, {'step': 3, 'avg': {'$tensor': 't0'}}]]}
        >>> join(plain, tensors)
        {0: {'step': 3, 'avg': tensor([0., 0.])}}
    """
    tensors: dict[str, Tensor] = {}
    return _split(value, tensors, "state"), tensors


def join(plain: Any, tensors: dict[str, Tensor]) -> Any:
    """Put the tensors back into a nest that `split` took apart."""
    if isinstance(plain, list):
        return [join(item, tensors) for item in plain]
    if not isinstance(plain, dict):
        return plain
    if _TENSOR in plain:
        return tensors[plain[_TENSOR]]
    if _TUPLE in plain:
        return tuple(join(plain[_TUPLE], tensors))
    if _BYTES in plain:
        return bytes.fromhex(plain[_BYTES])
    if _PAIRS in plain:
        return {join(key, tensors): join(item, tensors) for key, item in plain[_PAIRS]}
    return {key: join(item, tensors) for key, item in plain.items()}


def _split(value: Any, tensors: dict[str, Tensor], where: str) -> Any:
    if isinstance(value, Tensor):
        name = f"t{len(tensors)}"
        tensors[name] = value.detach().to("cpu", copy=True).contiguous()
        return {_TENSOR: name}
    if isinstance(value, dict):
        return _split_dict(value, tensors, where)
    if isinstance(value, list):
        return [_split(item, tensors, f"{where}[{at}]") for at, item in enumerate(value)]
    if isinstance(value, tuple):
        return {_TUPLE: [_split(item, tensors, f"{where}[{at}]") for at, item in enumerate(value)]}
    if isinstance(value, bytes):
        return {_BYTES: value.hex()}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise ArtifactError(f"'{where}' cannot be kept in a checkpoint: it is {type(value).__qualname__}.")


def _split_dict(value: dict[Any, Any], tensors: dict[str, Tensor], where: str) -> Any:
    if all(isinstance(key, str) and not key.startswith("$") for key in value):
        return {key: _split(item, tensors, f"{where}.{key}") for key, item in value.items()}
    pairs = [[_split(key, tensors, where), _split(item, tensors, f"{where}.{key}")] for key, item in value.items()]
    return {_PAIRS: pairs}


def to_device(value: Any, device: torch.device) -> Any:
    """Move every tensor of a nest."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {key: to_device(item, device) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(to_device(item, device) for item in value)
    return value
