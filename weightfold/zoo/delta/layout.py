"""Which tensors a model holds, as the difference to those of its parent; and what types there are."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

import numpy as np
import torch
from torch import Tensor

from weightfold.artifact.coded import corrupt
from weightfold.errors import ArtifactError
from weightfold.zoo.delta.numbers import Array, Kind

DTYPES = (
    torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.int32, torch.int16, torch.int8,
    torch.uint8, torch.bool, torch.float8_e4m3fn, torch.float8_e5m2, torch.complex64, torch.complex128, torch.uint16,
    torch.uint32, torch.uint64,
)  # fmt: skip
"""Types by number; a format, so only added to."""
_MANTISSAS = {
    torch.float32: 23,
    torch.float16: 10,
    torch.bfloat16: 7,
    torch.float64: 52,
    torch.float8_e4m3fn: 3,
    torch.float8_e5m2: 2,
    torch.complex64: 23,
    torch.complex128: 52,
}
LARGEST_LAYOUT, MOST_TENSORS = 1 << 24, 1 << 18
MAX_DIMS, LARGEST_SPAN = 64, 1 << 56
"""Dimensions of a tensor, and the product of those that are not 0: strides must be numbers of 63 bits."""


def kind_of(dtype: torch.dtype) -> Kind:
    """How numbers of a type lie in memory; complex ones are two floats."""
    n_bits = 8 * dtype.itemsize // (2 if dtype.is_complex else 1)
    if dtype in _MANTISSAS:
        return Kind(n_bits, _MANTISSAS[dtype], floating=True)
    return Kind(n_bits, signed=dtype.is_signed)


@dataclass(frozen=True)
class Entry:
    """One tensor: its name, type and shape, and the number of the parent's tensor of this name and shape, or None."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    source: int | None

    @property
    def numel(self) -> int:
        """Numbers in the tensor."""
        return prod(self.shape)

    @property
    def n_units(self) -> int:
        """Numbers as they are coded: two for a complex one."""
        return self.numel * (2 if self.dtype.is_complex else 1)

    @property
    def size_bytes(self) -> int:
        """Bytes of the tensor."""
        return self.numel * self.dtype.itemsize


def entries_of(child: Mapping[str, Tensor], parent: Mapping[str, Tensor]) -> list[Entry]:
    """The layout of a child beside a parent.

    Raises:
        ArtifactError: a tensor has a type, or lies in a layout, that cannot be stored; names it.
    """
    number = {name: i for i, name in enumerate(parent)}
    out = []
    if len(child) > MOST_TENSORS:
        raise ArtifactError(f"A difference holds {MOST_TENSORS:,} tensors at most; there are {len(child):,}.")
    for name, value in child.items():
        if value.dtype not in DTYPES or value.layout != torch.strided or value.is_quantized:
            kinds = f"{value.dtype}, {value.layout}"
            raise ArtifactError(f"'{name}' cannot be stored as a difference: it is {kinds}.", remedy="Keep it whole.")
        other = parent.get(name)
        fits = other is not None and other.shape == value.shape and _alike(other.dtype, value.dtype)
        out.append(Entry(name, value.dtype, tuple(value.shape), number[name] if fits else None))
    return out


def _alike(one: torch.dtype, two: torch.dtype) -> bool:
    """Whether numbers of one type predict those of another."""
    wide = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
    return one == two or (one in wide and two in wide)


def same_layout(entries: Sequence[Entry], parent: Mapping[str, Tensor]) -> bool:
    """Whether a child holds the same tensors as its parent, in the same order."""
    mine = [(e.name, e.dtype, e.source) for e in entries]
    return mine == [(name, value.dtype, i) for i, (name, value) in enumerate(parent.items())]


def write_layout(entries: Sequence[Entry]) -> bytes:
    """Write a layout as bytes."""
    out = bytearray(varint(len(entries)))
    for entry in entries:
        out += varint(0 if entry.source is None else entry.source + 1)
        out += varint(DTYPES.index(entry.dtype))
        if entry.source is None:
            name = entry.name.encode("utf-8", "surrogatepass")
            out += varint(len(name)) + name + varint(len(entry.shape))
            for size in entry.shape:
                out += varint(size)
    return zlib.compress(bytes(out), 9)


def read_layout(data: bytes, parent: Mapping[str, Tensor]) -> list[Entry]:
    """Read a layout back.

    Raises:
        ArtifactError: it names tensors that the parent does not have, a name twice, or an unknown type.
    """
    inflate = zlib.decompressobj()
    try:
        plain = inflate.decompress(data, LARGEST_LAYOUT)
    except zlib.error:
        raise corrupt("its list of tensors is damaged") from None
    if not inflate.eof or inflate.unused_data:
        raise corrupt("its list of tensors is damaged")
    reader = Reader(plain)
    owned = list(parent.items())
    entries = [_read_entry(reader, owned) for _ in range(reader.count(MOST_TENSORS))]
    if not reader.done or len({e.name for e in entries}) != len(entries):
        raise corrupt("its list of tensors is damaged")
    return entries


def _read_entry(reader: Reader, owned: list[tuple[str, Tensor]]) -> Entry:
    source, kind = reader.varint(), reader.varint()
    if source > len(owned) or kind >= len(DTYPES):
        raise corrupt(f"it names tensor {source} of {len(owned)}, or an unknown type")
    if source:
        name, value = owned[source - 1]
        return Entry(name, DTYPES[kind], tuple(value.shape), source - 1)
    try:
        name = reader.take(reader.count(LARGEST_LAYOUT)).decode("utf-8", "surrogatepass")
    except UnicodeDecodeError:
        raise corrupt("a name is no text") from None
    shape = tuple(reader.varint() for _ in range(reader.count(MAX_DIMS)))
    if prod(max(size, 1) for size in shape) > LARGEST_SPAN:
        raise corrupt(f"'{name}' has the shape {shape}")
    return Entry(name, DTYPES[kind], shape, None)


# bytes ----------------------------------------------------------------------------------------------------------------


def varint(value: int) -> bytes:
    """A whole number >= 0, seven bits to a byte.

    Example:
        >>> varint(5), varint(300)
        (b'\\x05', b'\\xac\\x02')
    """
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


class Reader:
    """Takes bytes one part after the other."""

    def __init__(self, data: bytes) -> None:
        self._data, self._at = data, 0

    @property
    def done(self) -> bool:
        """Whether nothing is left."""
        return self._at == len(self._data)

    @property
    def n_left(self) -> int:
        """How many bytes are left."""
        return len(self._data) - self._at

    def take(self, n: int) -> bytes:
        """The next n bytes."""
        if n < 0 or self._at + n > len(self._data):
            raise corrupt("it ends too soon")
        self._at += n
        return self._data[self._at - n : self._at]

    def varint(self) -> int:
        """The next number, below 2^63."""
        value = 0
        for shift in range(0, 63, 7):
            byte = self.take(1)[0]
            value |= (byte & 127) << shift
            if byte < 128:
                return value
        raise corrupt("a number is too long")

    def count(self, most: int) -> int:
        """The next number, which may be so large at most."""
        value = self.varint()
        if value > most:
            raise corrupt(f"{value} where at most {most} is possible")
        return value


# tensors and arrays ---------------------------------------------------------------------------------------------------


def bits_of(value: Tensor) -> Array:
    """The bit patterns of a tensor as unsigned numbers in a line."""
    kind = kind_of(value.dtype)
    flat = value.detach().cpu().resolve_conj().resolve_neg().contiguous().reshape(-1)
    if flat.numel() == 0:
        return np.empty(0, kind.unsigned)
    return flat.view(torch.uint8).numpy().view(kind.unsigned)


def tensor_of(bits: Array, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    """A tensor from bit patterns."""
    if prod(shape) == 0:
        return torch.empty(shape, dtype=dtype)
    octets = torch.from_numpy(np.ascontiguousarray(bits).view(np.uint8))
    return octets.view(dtype).reshape(shape)


def values_of(bits: Array, dtype: torch.dtype) -> Array:
    """Numbers of a real type as an array that calculates: float32 or float64, exact; whole numbers as they are."""
    if dtype == torch.bfloat16:
        return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)
    if dtype == torch.float16:
        return bits.view(np.float16).astype(np.float32)
    if dtype in (torch.float32, torch.float64):
        return bits.view(np.float32 if dtype == torch.float32 else np.float64)
    return bits.view(kind_of(dtype).whole if dtype.is_signed else kind_of(dtype).unsigned)


def rounded_bits(values: Array, dtype: torch.dtype) -> Array:
    """Bit patterns of numbers rounded to a floating type, ties to even; NaN and subnormal ones are 0."""
    with np.errstate(over="ignore", invalid="ignore", under="ignore"):
        narrow = values.astype({torch.float64: np.float64, torch.float16: np.float16}.get(dtype, np.float32))
        if dtype == torch.bfloat16:
            wide = narrow.view(np.uint32)
            bits = ((wide + np.uint32(0x7FFF) + ((wide >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)).astype("u2")
        else:
            bits = narrow.view(kind_of(dtype).unsigned)
    least = float(torch.finfo(dtype).smallest_normal)
    fine = np.abs(narrow) >= least
    return np.where(fine, bits, bits.dtype.type(0))
