"""Read the header of a safetensors file, and hash its tensors, without torch and without running anything in it.

8 bytes: length N of the header, little endian | N bytes of JSON | the tensors, one after another
"""

from __future__ import annotations

import hashlib
import io
import json
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

from weightfold.artifact.plain import parse_json
from weightfold.errors import ArtifactError

MAX_HEADER_BYTES = 100_000_000
BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32,
    "I64": 64, "U64": 64, "F64": 64, "C64": 64, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
}  # fmt: skip
DTYPES = {
    "BOOL": "bool", "U8": "uint8", "I8": "int8", "U16": "uint16", "I16": "int16", "F16": "float16", "BF16": "bfloat16",
    "U32": "uint32", "I32": "int32", "F32": "float32", "U64": "uint64", "I64": "int64", "F64": "float64",
    "C64": "complex64", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2",
}  # fmt: skip
"""Names of the types in torch."""
_AGAIN = "Copy or write it again."
_CHUNK = 1 << 20


@dataclass(frozen=True)
class Stored:
    """One tensor as it lies in a file.

    Args:
        dtype: its safetensors name, such as "F32".
        shape: sizes of its dimensions.
        begin: first byte, counted from the beginning of the file.
        end: the byte after the last one.
    """

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True)
class Header:
    """What a safetensors file says of itself.

    Args:
        tensors: by name.
        metadata: text by name.
        size_bytes: of the whole file.
    """

    tensors: Mapping[str, Stored]
    metadata: Mapping[str, str]
    size_bytes: int

    @property
    def n_values(self) -> int:
        """Numbers in all tensors together."""
        return sum(prod(tensor.shape) for tensor in self.tensors.values())


def read_header(path: Path) -> Header:
    """Read and check the header of a safetensors file.

    Raises:
        ArtifactError: the file is missing, truncated, corrupt or of another kind; names it and what is wrong.
    """
    with _reading(path) as stream:
        return _header(stream, path.stat().st_size, path)


def parse_header(data: bytes, where: str) -> Header:
    """Read and check the header of a safetensors file that is held in memory.

    Args:
        data: the whole file.
        where: what it is called in an error.
    Raises:
        ArtifactError: it is truncated, corrupt or of another kind; says what is wrong.
    """
    return _header(io.BytesIO(data), len(data), Path(where))


def _header(stream: BinaryIO, size: int, path: Path) -> Header:
    start, content = _content(stream, size, path)
    metadata = content.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _broken(path, "its metadata is no table of texts")
    tensors = {name: _stored(name, value, start, path) for name, value in content.items()}
    _check_layout(tensors, start, size, path)
    return Header(tensors, metadata, size)


def settled(data: bytes) -> bytes:
    """The bytes of a safetensors file with its metadata in the order of their keys: the writer draws another each time.

    Example:
        >>> text = b'{"__metadata__":{"b":"1","a":"2"}}'
        >>> settled(struct.pack("<Q", len(text)) + text)[8:]
        b'{"__metadata__":{"a":"2","b":"1"}}      '
    """
    (length,) = struct.unpack_from("<Q", data)
    header = json.loads(data[8 : 8 + length])
    metadata = header.pop("__metadata__", {})
    whole = ({"__metadata__": dict(sorted(metadata.items()))} if metadata else {}) | header
    text = json.dumps(whole, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + data[8 + length :]


def fingerprint(path: Path, header: Header | None = None, aliases: Mapping[str, str] | None = None) -> str:
    """Hash the names, types, shapes and bytes of a file's tensors, in the order of their names; not the metadata.

    Equals `weightfold.fingerprint.fingerprint` of the module that holds these tensors.

    Args:
        path: a safetensors file.
        header: its header, if it was read already.
        aliases: further names of stored tensors, hashed under these names too.
    Returns:
        digest: SHA-256 in hex.
    """
    header = header or read_header(path)
    digest = hashlib.sha256()
    places = dict(header.tensors) | {alias: header.tensors[name] for alias, name in (aliases or {}).items()}
    with _reading(path) as stream:
        for name in sorted(places):
            stored = places[name]
            dtype = DTYPES.get(stored.dtype, stored.dtype)
            digest.update(f"{name}\0torch.{dtype}\0{stored.shape}\0".encode())
            for chunk in _chunks(stream, stored):
                digest.update(chunk)
    return digest.hexdigest()


def _chunks(stream: BinaryIO, stored: Stored) -> Iterator[bytes]:
    stream.seek(stored.begin)
    left = stored.end - stored.begin
    while left > 0:
        chunk = stream.read(min(left, _CHUNK))
        if not chunk:
            return
        left -= len(chunk)
        yield chunk


def _reading(path: Path) -> BinaryIO:
    if not path.is_file():
        raise ArtifactError(f"There is no model file '{path}'.", remedy="Check the path.")
    try:
        return path.open("rb")
    except OSError as error:
        raise ArtifactError(f"'{path}' cannot be read: {error.strerror or error}.") from None


def _content(stream: BinaryIO, size: int, path: Path) -> tuple[int, dict[str, Any]]:
    head = stream.read(8)
    if len(head) < 8:
        raise _broken(path, f"it has {size} bytes")
    (length,) = struct.unpack("<Q", head)
    if length > min(size - 8, MAX_HEADER_BYTES):
        raise _broken(path, f"its header of {length} bytes is longer than the file")
    try:
        content = parse_json(stream.read(length))
    except ValueError as error:
        raise _broken(path, f"its header is no JSON: {error}") from None
    if not isinstance(content, dict):
        raise _broken(path, "its header is no table")
    return 8 + length, content


def _stored(name: str, value: Any, start: int, path: Path) -> Stored:
    try:
        dtype, shape, (begin, end) = value["dtype"], value["shape"], value["data_offsets"]
        numbers = [*shape, begin, end]
    except (TypeError, KeyError, ValueError):
        raise _broken(path, f"its entry of '{name}' is incomplete") from None
    known = type(dtype) is str and dtype in BITS and type(shape) is list
    if not known or not all(type(n) is int and 0 <= n < 1 << 63 for n in numbers):
        raise _broken(path, f"its entry of '{name}' is no tensor")
    wanted = -(-prod(shape) * BITS[dtype] // 8)
    if end - begin != wanted:
        raise _broken(path, f"'{name}' of shape {tuple(shape)} needs {wanted} bytes and has {end - begin}")
    return Stored(dtype, tuple(shape), start + begin, start + end)


def _check_layout(tensors: Mapping[str, Stored], start: int, size: int, path: Path) -> None:
    at = start
    for name, stored in sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].end)):
        if stored.begin != at:
            raise _broken(path, f"'{name}' does not begin where the tensor before it ends")
        at = stored.end
    if at != size:
        raise _broken(path, f"its header describes {at} bytes and it has {size}")


def _broken(path: Path, reason: str) -> ArtifactError:
    return ArtifactError(f"'{path}' is truncated, corrupt or no safetensors file: {reason}.", remedy=_AGAIN)
