"""Write an architecture's symmetries as bytes, and read them back without running anything: plain data and tensors.

8 bytes: length N of the text, little endian | N bytes of JSON | a safetensors file of all tables; both compressed

With them a zoo hashes, embeds and aligns models of an architecture that was traced once, without the model's class.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from fractions import Fraction
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from weightfold.artifact.plain import parse_json
from weightfold.errors import ArtifactError
from weightfold.graph.group import Axis, ChannelGraph, ChannelGroup, Frozen, Gauge
from weightfold.weights.symmetry import Freedom, Gain, Members, Norm, Slot, Symmetries

_CLASSES = {
    made.__name__: made
    for made in (Axis, ChannelGraph, ChannelGroup, Freedom, Frozen, Gain, Gauge, Members, Norm, Slot, Symmetries)
}
_LEAST, _MOST = 1 << 20, 256
"""Bytes that may be unpacked, and for each that is packed."""


def to_bytes(found: Symmetries) -> bytes:
    """Write symmetries; the same ones give the same bytes.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from weightfold.weights.symmetry import symmetries
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> found = symmetries(net, torch.zeros(1, 4))
        >>> twin = from_bytes(to_bytes(found))
        >>> twin.heads == found.heads, to_bytes(twin) == to_bytes(found)
        (True, True)
    """
    tables: list[Tensor] = []
    text = json.dumps(_plain(found, tables, {}), separators=(",", ":")).encode()
    file = save({str(at): table.contiguous().clone() for at, table in enumerate(tables)})
    return len(text).to_bytes(8, "little") + zlib.compress(text + file, 6)


def from_bytes(data: bytes) -> Symmetries:
    """Read symmetries back.

    Raises:
        ArtifactError: the bytes are damaged.
    """
    try:
        unpacker = zlib.decompressobj()
        whole = unpacker.decompress(data[8:], _LEAST + _MOST * len(data))
        if not unpacker.eof:
            raise ValueError("they are cut off")
        n_text = int.from_bytes(data[:8], "little")
        tables = load(whole[n_text:])
        found = _made(parse_json(whole[:n_text]), tables)
    except (ValueError, TypeError, KeyError, AttributeError, ArithmeticError, RecursionError, zlib.error,
            SafetensorError, RuntimeError) as error:  # fmt: skip
        raise ArtifactError(f"The stored symmetries are damaged: {error}.", remedy="Add the model again.") from None
    if not isinstance(found, Symmetries):
        raise ArtifactError("The stored symmetries are damaged: they are something else.")
    return found


def _plain(value: Any, tables: list[Tensor], seen: dict[int, int]) -> Any:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Tensor):
        if id(value) not in seen:
            seen[id(value)] = len(tables)
            tables.append(value)
        return {"t": seen[id(value)]}
    if is_dataclass(value):
        inner = {field.name: _plain(getattr(value, field.name), tables, seen) for field in fields(value)}
        return {"c": type(value).__name__, "v": inner}
    if isinstance(value, Fraction):
        return {"f": [value.numerator, value.denominator]}
    if isinstance(value, Mapping):
        return {"m": [[_plain(k, tables, seen), _plain(v, tables, seen)] for k, v in value.items()]}
    if isinstance(value, frozenset):
        return {"s": sorted(value)}
    return {"l": [_plain(item, tables, seen) for item in value]}


def _made(value: Any, tables: Mapping[str, Tensor]) -> Any:
    if not isinstance(value, dict):
        return value
    if "t" in value:
        return tables[str(value["t"])]
    if "c" in value:
        return _CLASSES[value["c"]](**{name: _made(item, tables) for name, item in value["v"].items()})
    if "f" in value:
        return Fraction(*value["f"])
    if "m" in value:
        return {_made(k, tables): _made(v, tables) for k, v in value["m"]}
    if "s" in value:
        if not all(isinstance(item, str) for item in value["s"]):
            raise TypeError("a set holds more than names")
        return frozenset(value["s"])
    return tuple(_made(item, tables) for item in value["l"])
