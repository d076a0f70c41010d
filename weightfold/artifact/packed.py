"""The packed file: a quantised network in as few bytes as it takes, exact, readable with NumPy alone.

"WFP" | version, 1 byte | header (`packed_header`) | plain arrays | packed tensors | entropy-coded tensors | checksum

All entropy-coded tensors share one range coder, so that none of them pays for an end. The checksum is the first 8
bytes of the SHA-256 of everything before it and is verified before anything is decoded: a file that is cut off or
changed is refused. The same content gives the same bytes.

What a file may hold is tied to its length, so that a small file cannot fill the memory: 2^16 values and 1,024 more for
each of its bytes. A network of zeros would need fewer bytes than that; zeros are added until its length explains it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from weightfold.artifact import packing
from weightfold.artifact.coded import CodedTensor
from weightfold.artifact.files import write_bytes
from weightfold.artifact.format import Structure
from weightfold.artifact.matrix import Coding, coded_bits, read, write
from weightfold.artifact.packed_header import ENTROPY, KINDS, PACKED, Entry, in_order, read_header, write_header
from weightfold.artifact.rangecoder import Decoder, Encoder
from weightfold.errors import ArtifactError

SUFFIX = ".wfp"
VERSION = 1
MAGIC = b"WFP"
_CHECK_BYTES = 8
_FREE_VALUES, _VALUES_A_BYTE = 1 << 16, 1 << 10
_AGAIN = "Copy or write it again."

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class PackedSizes:
    """What a packed file takes.

    Args:
        total_bytes: of the whole file.
        header_bytes: of all that is no tensor: header, version and checksum.
        by_tensor: bytes of each tensor, its share of the common code in fractions.
        codings: "entropy", "packed", or the type of an array, by tensor.
    """

    total_bytes: int
    header_bytes: int
    by_tensor: Mapping[str, float]
    codings: Mapping[str, str]


@dataclass(frozen=True, eq=False)
class Packed:
    """What a packed file holds.

    Args:
        structure: how to build the module.
        coded: tensors of codes and steps, by name.
        plain: the other tensors as they lie in the file.
        total_bytes: of the file.
    """

    structure: Structure
    coded: Mapping[str, CodedTensor]
    plain: Mapping[str, Array]
    total_bytes: int

    def arrays(self) -> dict[str, Array]:
        """Every tensor as it is in the network: codes times steps; arrays of 16-bit floats as float32."""
        return tensors_of(self.coded, self.plain)


def tensors_of(coded: Mapping[str, CodedTensor], plain: Mapping[str, Array]) -> dict[str, Array]:
    """The tensors of a network by name, in order of name; see `Packed.arrays`."""
    arrays = {name: tensor.values() for name, tensor in coded.items()}
    for name, array in plain.items():
        arrays[name] = array.astype(np.float32) if array.dtype == np.float16 else array
    return {name: arrays[name] for name in sorted(arrays)}


def fingerprint_of(arrays: Mapping[str, Array], aliases: Mapping[str, str]) -> str:
    """SHA-256 of named arrays, in hex: what `weightfold.fingerprint.fingerprint` gives for a module that holds them.

    Example:
        >>> fingerprint_of({"a": np.zeros(2, np.float32)}, {})[:8]
        'a1cfa5c6'
    """
    places = dict(arrays) | {alias: arrays[name] for alias, name in aliases.items()}
    sha = hashlib.sha256()
    for name in sorted(places):
        value = places[name]
        sha.update(f"{name}\0torch.{value.dtype.name}\0{value.shape}\0".encode())
        sha.update(np.ascontiguousarray(value).tobytes())
    return sha.hexdigest()


def write_packed(
    path: str | Path,
    structure: Structure,
    coded: Mapping[str, CodedTensor],
    plain: Mapping[str, Array],
    *,
    coding: Coding = "entropy",
) -> PackedSizes:
    """Write a packed file at one stroke.

    Args:
        path: the file, replaced if it exists.
        structure: how to build the module; its fingerprint and versions are not kept.
        coded: tensors of codes and steps, by name.
        plain: tensors that stay as they are: float16, float32, float64, signed integers, uint8 or bool.
        coding: "entropy" takes the smaller of both for each tensor; "packed" packs all end to end.
    Returns:
        sizes: bytes of the file, its header and its tensors.
    Raises:
        ArtifactError: a tensor is given twice, or does not fit the structure, or is of another type, or not finite; the
            file cannot be written.
    Example:
        >>> import tempfile
        >>> from weightfold.artifact.format import Builder
        >>> structure = Structure(builder=Builder(kind="instance", name="Linear"), fingerprint="")
        >>> weight = CodedTensor(np.array([[1, 0, -1], [0, 2, 0]], np.int16), np.array([-16, -8], np.int16))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     sizes = write_packed(f"{folder}/net.wfp", structure, {"weight": weight}, {"bias": np.ones(2)})
        ...     twin = read_packed(f"{folder}/net.wfp")
        >>> twin.arrays()["weight"].tolist()
        [[0.25, 0.0, -0.25], [0.0, 1.0, 0.0]]
    """
    data, sizes = pack(structure, coded, plain, coding=coding)
    write_bytes(Path(path), data)
    return sizes


def pack(
    structure: Structure, coded: Mapping[str, CodedTensor], plain: Mapping[str, Array], *, coding: Coding = "entropy"
) -> tuple[bytes, PackedSizes]:
    """Make the bytes of a packed file; see `write_packed`."""
    entries = _entries(coded, plain, _codings(coded, coding)[0])
    head = MAGIC + bytes([VERSION]) + write_header(structure, entries)
    by_tensor: dict[str, float] = {}
    body, coder = bytearray(), Encoder()
    for entry in sorted(entries, key=lambda entry: entry.kind == PACKED):
        if entry.kind != ENTROPY:
            part = packing.encode(coded[entry.name]) if entry.kind == PACKED else _plain_bytes(plain[entry.name])
            body += part
            by_tensor[entry.name] = len(part)
    for entry in entries:
        if entry.kind == ENTROPY:
            before = coder.bits
            write(coded[entry.name], coder)
            by_tensor[entry.name] = (coder.bits - before) / 8
    data = head + bytes(body) + coder.finish()
    data += bytes(max(0, _least_bytes(entries) - len(data) - _CHECK_BYTES))
    data += hashlib.sha256(data).digest()[:_CHECK_BYTES]
    by_tensor = {entry.name: by_tensor[entry.name] for entry in entries}
    codings = {entry.name: entry.kind for entry in entries}
    return data, PackedSizes(len(data), len(head) + _CHECK_BYTES, by_tensor, codings)


def promised_bytes(
    structure: Structure, coded: Mapping[str, CodedTensor], plain: Mapping[str, Array], *, coding: Coding = "entropy"
) -> float:
    """What the file will take, without coding it; within a byte or two.

    Example:
        >>> from weightfold.artifact.format import Builder
        >>> structure = Structure(builder=Builder(kind="instance", name="Linear"), fingerprint="")
        >>> coded = {"weight": CodedTensor(np.eye(50, dtype=np.int16), np.zeros(50, np.int16))}
        >>> abs(promised_bytes(structure, coded, {}) - len(pack(structure, coded, {})[0])) < 8
        True
    """
    kinds, n_bytes = _codings(coded, coding)
    entries = _entries(coded, plain, kinds)
    head = len(MAGIC) + 1 + len(write_header(structure, entries)) + _CHECK_BYTES
    body = sum(n_bytes.values()) + sum(len(_plain_bytes(array)) for array in plain.values())
    return max(head + body, _least_bytes(entries))


def read_packed(path: str | Path) -> Packed:
    """Read a packed file, without torch.

    Raises:
        ArtifactError: the file is missing, of another kind, of a newer version, cut off, or changed; names it.
    """
    path = Path(path)
    if not path.is_file():
        raise ArtifactError(f"There is no model file '{path}'.", remedy="Check the path.")
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ArtifactError(f"'{path}' cannot be read: {error.strerror or error}.") from None
    try:
        return unpack(data)
    except ArtifactError as error:
        raise ArtifactError(f"'{path}': {error.message}", remedy=error.remedy) from None


def unpack(data: bytes) -> Packed:
    """Read the bytes of a packed file; see `read_packed`."""
    _verify(data)
    structure, entries, at = read_header(data[:-_CHECK_BYTES], len(MAGIC) + 1)
    if _least_bytes(entries) > len(data):
        largest = max(entries, key=_n_values)
        raise ArtifactError(
            f"Its tensors, '{largest.name}' of shape {largest.shape} among them, are larger than {len(data):,} bytes "
            "explain.",
            remedy=_AGAIN,
        )
    content, plain, coded = data[:-_CHECK_BYTES], {}, {}
    for entry in entries:
        if entry.kind not in (ENTROPY, PACKED):
            plain[entry.name], at = _read_plain(content, at, entry)
    for entry in entries:
        if entry.kind == PACKED:
            coded[entry.name], at = packing.decode(content, at, entry.shape)
    decoder = Decoder(content[at:])
    for entry in entries:
        if entry.kind == ENTROPY:
            coded[entry.name] = read(decoder, entry.shape)
    for alias, name in structure.aliases.items():
        if name not in plain and name not in coded:
            raise ArtifactError(f"It ties '{alias}' to '{name}', which it lacks.", remedy=_AGAIN)
    digest = fingerprint_of(tensors_of(coded, plain), structure.aliases)
    return Packed(structure.model_copy(update={"fingerprint": digest}), coded, plain, len(data))


def _n_values(entry: Entry) -> int:
    """Numbers of a tensor; a size of 0 counts as 1, for rows without numbers take memory as well."""
    return prod(max(size, 1) for size in entry.shape)


def _least_bytes(entries: Sequence[Entry]) -> int:
    """How long a file must be that holds such tensors."""
    return -(-max(0, sum(map(_n_values, entries)) - _FREE_VALUES) // _VALUES_A_BYTE)


def _verify(data: bytes) -> None:
    """Refuse what is no packed file, is newer, or was changed."""
    if data[: len(MAGIC)] != MAGIC:
        raise ArtifactError("This is no packed model of weightfold.", remedy="Check the path.")
    if len(data) > len(MAGIC) and data[len(MAGIC)] > VERSION:
        raise ArtifactError(
            f"This packed model has format {data[len(MAGIC)]}; this version of weightfold reads up to {VERSION}. "
            "(Or its first bytes are corrupt.)",
            remedy="Upgrade weightfold.",
        )
    if hashlib.sha256(data[:-_CHECK_BYTES]).digest()[:_CHECK_BYTES] != data[-_CHECK_BYTES:] or data[3] != VERSION:
        raise ArtifactError("This packed model is truncated or was changed: its checksum differs.", remedy=_AGAIN)


def _codings(coded: Mapping[str, CodedTensor], coding: Coding) -> tuple[dict[str, str], dict[str, float]]:
    """How each tensor is to be coded, and what it will take, in bytes."""
    kinds: dict[str, str] = {}
    n_bytes: dict[str, float] = {}
    for name, tensor in coded.items():
        packed_size = packing.packed_bytes(tensor)
        entropy_size = coded_bits(tensor) / 8 if coding == "entropy" else float("inf")
        kinds[name] = ENTROPY if entropy_size < packed_size else PACKED
        n_bytes[name] = min(packed_size, entropy_size)
    return kinds, n_bytes


def _entries(coded: Mapping[str, CodedTensor], plain: Mapping[str, Array], kinds: Mapping[str, str]) -> list[Entry]:
    twice = sorted(set(coded) & set(plain))
    if twice:
        raise ArtifactError(f"'{twice[0]}' is given both as codes and as an array.", remedy="Give it once.")
    shapes = {name: tensor.shape for name, tensor in coded.items()}
    types = {name: array.dtype.name for name, array in plain.items()}
    for name, array in plain.items():
        shapes[name] = array.shape
        if types[name] not in KINDS:
            raise ArtifactError(
                f"'{name}' has the type {types[name]}; a packed file holds {', '.join(KINDS[2:])}.",
                remedy="Convert it first.",
            )
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise ArtifactError(f"'{name}' holds values that are not finite.", remedy="Nothing was written.")
    return [Entry(name, shapes[name], (types | dict(kinds))[name]) for name in in_order(shapes)]


def _plain_bytes(array: Array) -> bytes:
    """An array as bytes, little endian; whole numbers as one byte for their width, then as narrow as they fit."""
    if array.dtype.kind == "i":
        width = _width(array)
        return bytes([width]) + (array.astype(f"<i{width}").tobytes() if width else b"")
    return array.astype(array.dtype.newbyteorder("<"), order="C").tobytes()


def _width(array: Array) -> int:
    """Bytes that hold each number of an array of signed integers; 0 for zeros alone."""
    if not array.any():
        return 0
    lowest, highest = int(array.min()), int(array.max())
    return next(n for n in (1, 2, 4, 8) if -(1 << (8 * n - 1)) <= lowest and highest < 1 << (8 * n - 1))


def _read_plain(data: bytes, at: int, entry: Entry) -> tuple[Array, int]:
    dtype, stored, n = np.dtype(entry.kind), np.dtype(entry.kind).newbyteorder("<"), prod(entry.shape)
    if dtype.kind == "i":
        width = data[at] if at < len(data) else -1
        at += 1
        if width == 0:
            return np.zeros(entry.shape, dtype), at
        if width not in (1, 2, 4, 8):
            raise ArtifactError(f"'{entry.name}' has no width of whole numbers.", remedy=_AGAIN)
        stored = np.dtype(f"<i{width}")
    end = at + n * stored.itemsize
    if end > len(data):
        raise ArtifactError(f"'{entry.name}' is cut off.", remedy=_AGAIN)
    array = np.frombuffer(data[at:end], stored).astype(dtype).reshape(entry.shape)
    if dtype.kind == "f" and not np.isfinite(array).all():
        raise ArtifactError(f"'{entry.name}' holds values that are not finite.", remedy=_AGAIN)
    return array, end
