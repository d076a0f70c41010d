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
from functools import cache
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from weightfold.artifact.plain import parse_json
from weightfold.errors import ArtifactError
from weightfold.graph.group import Axis, ChannelGraph, ChannelGroup, Frozen, Gauge, Proof
from weightfold.weights.symmetry import Freedom, Gain, Members, Norm, Slot, Symmetries

_CLASSES = {
    made.__name__: made
    for made in (Axis, ChannelGraph, ChannelGroup, Freedom, Frozen, Gain, Gauge, Members, Norm, Proof, Slot, Symmetries)
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


def _checked(made: Any) -> Any:
    """An object whose fields hold what they are said to hold."""
    for name, hint in _hints(type(made)).items():
        if not _fits(getattr(made, name), hint):
            raise TypeError(f"'{name}' of a {type(made).__name__} is no {hint}")
    return made


@cache
def _hints(kind: type) -> dict[str, Any]:
    return get_type_hints(kind)


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value is of a type as it is annotated."""
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return any(_fits(value, one) for one in args)
    if origin is tuple:
        each = [args[0]] * len(value) if args[-1] is Ellipsis and isinstance(value, tuple) else list(args)
        return isinstance(value, tuple) and len(value) == len(each) and all(map(_fits, value, each))
    if origin is Mapping:
        return isinstance(value, dict) and all(_fits(k, args[0]) and _fits(v, args[1]) for k, v in value.items())
    if origin is frozenset:
        return isinstance(value, frozenset) and all(_fits(item, args[0]) for item in value)
    if hint in (int, bool):
        return type(value) is hint
    return type(value) in (int, float) if hint is float else isinstance(value, hint)


def _made(value: Any, tables: Mapping[str, Tensor]) -> Any:
    if not isinstance(value, dict):
        return value
    if "t" in value:
        return tables[str(value["t"])]
    if "c" in value:
        made = {name: _made(item, tables) for name, item in value["v"].items()}
        return _checked(_CLASSES[value["c"]](**made))
    if "f" in value:
        return Fraction(*value["f"])
    if "m" in value:
        return {_made(k, tables): _made(v, tables) for k, v in value["m"]}
    if "s" in value:
        return frozenset(value["s"])
    return tuple(_made(item, tables) for item in value["l"])
