"""Read what `torch.save` wrote without running anything of it: tables, lists, numbers, texts and tensors.

A pickle names functions and classes and has them called. Here none of them is looked up: a handful stand for tensors
and their storages, and every other name gives an empty object that remembers its name, so that settings, metrics and
optimisers beside the tensors are passed over. Tensors are read from the archive when they are asked for.
"""

from __future__ import annotations

import io
import pickle
import pickletools
import warnings
import zipfile
from collections import OrderedDict
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

_STORAGES = {
    "FloatStorage": torch.float32, "DoubleStorage": torch.float64, "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16, "LongStorage": torch.int64, "IntStorage": torch.int32,
    "ShortStorage": torch.int16, "CharStorage": torch.int8, "ByteStorage": torch.uint8, "BoolStorage": torch.bool,
    "ComplexFloatStorage": torch.complex64, "ComplexDoubleStorage": torch.complex128, "UntypedStorage": torch.uint8,
}  # fmt: skip
_TABLES = ("defaultdict", "Counter")
_FREE_VALUES, _VALUES_A_BYTE = 1 << 18, 64
"""Values of a tensor that repeats those of its storage."""


class DamagedError(ValueError):
    """An archive is no such file; says why."""


class Named:
    """What a name in a pickle stands for here: an object without content.

    Its class has the name as `path`.
    """

    path = ""

    def __new__(cls, *_: Any, **__: Any) -> Named:
        return object.__new__(cls)

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __call__(self, *_: Any, **__: Any) -> Named:
        return self

    def __setstate__(self, state: Any) -> None:
        pass

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def append(self, item: Any) -> None:
        """Pass an item over."""

    def extend(self, items: Any) -> None:
        """Pass items over."""


@dataclass(frozen=True, eq=False)
class Storage:
    """The numbers behind tensors, by their place in the archive."""

    archive: Archive
    key: str
    dtype: torch.dtype


@dataclass(frozen=True, eq=False)
class Stored:
    """A tensor that lies in an archive."""

    storage: Storage
    dtype: torch.dtype
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    def tensor(self) -> Tensor:
        """Read it.

        Raises:
            DamagedError: its numbers lie outside its storage, or are repeated beyond reason.
        """
        line = self.storage.archive.storage(self.storage.key)
        if line.numel() % self.dtype.itemsize:
            raise DamagedError(f"storage '{self.storage.key}' is cut off")
        if prod(self.shape) > _FREE_VALUES + _VALUES_A_BYTE * line.numel():
            raise DamagedError(f"a tensor of shape {self.shape} in {line.numel()} bytes")
        if line.numel() == 0:
            return torch.empty(self.shape, dtype=self.dtype) if 0 in self.shape else _outside(self.shape)
        try:
            return line.view(self.dtype).as_strided(self.shape, self.stride, self.offset)
        except RuntimeError:
            return _outside(self.shape)


def _outside(shape: tuple[int, ...]) -> Tensor:
    raise DamagedError(f"a tensor of shape {shape} lies outside its storage")


class Archive:
    """A file that `torch.save` wrote: a zip of one pickle and one file for each storage.

    Raises:
        DamagedError: it is no such file.
    """

    def __init__(self, data: bytes) -> None:
        try:
            self._zip = zipfile.ZipFile(io.BytesIO(data))
        except (zipfile.BadZipFile, ValueError, OSError, NotImplementedError) as error:
            raise DamagedError(str(error)) from None
        self.names = self._zip.namelist()
        roots = [name.removesuffix("data.pkl") for name in self.names if name.endswith("data.pkl")]
        self._root = roots[0] if roots else ""
        self._storages: dict[str, Tensor] = {}
        self._size = len(data)

    @property
    def is_script(self) -> bool:
        """Whether it is a TorchScript program."""
        return any(name.endswith("constants.pkl") or "/code/" in name for name in self.names)

    def content(self) -> Any:
        """What was saved: plain data with `Stored` for tensors and `Named` for anything else."""
        infos = self._zip.infolist()
        if any(info.compress_type != zipfile.ZIP_STORED for info in infos):
            raise DamagedError("it is compressed, which torch.save does not do")
        if sum(info.file_size for info in infos) > self._size:
            raise DamagedError("its files are larger than it is itself")
        if self._root + "data.pkl" not in self.names:
            raise DamagedError("it holds no 'data.pkl'")
        if self._read("byteorder", b"little") != b"little":
            raise DamagedError("it was written on a machine of another byte order")
        data = self._read("data.pkl")
        _check_opcodes(data)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return _Unpickler(data, self).load()
        except DamagedError:
            raise
        except Exception as error:  # a damaged pickle fails in any way that its commands can
            raise DamagedError(f"{type(error).__name__}: {str(error)[:200]}") from None

    def storage(self, key: str) -> Tensor:
        """The bytes of a storage, uint8."""
        if key not in self._storages:
            data = self._read(f"data/{key}")
            self._storages[key] = torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0)
        return self._storages[key]

    def _read(self, name: str, default: bytes | None = None) -> bytes:
        if self._root + name not in self.names:
            if default is not None:
                return default
            raise DamagedError(f"it lacks '{name}'")
        try:
            return self._zip.read(self._root + name)
        except (zipfile.BadZipFile, ValueError, OSError, NotImplementedError, RuntimeError) as error:
            raise DamagedError(str(error)) from None


def _check_opcodes(data: bytes) -> None:
    """Refuse a pickle whose list of remembered objects would be longer than itself."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # remarks on texts with odd escapes
        try:
            for opcode, value, _ in pickletools.genops(data):
                if opcode.name in ("PUT", "LONG_BINPUT") and not 0 <= int(value or 0) <= len(data):
                    raise DamagedError(f"it remembers an object as number {value}")
        except (ValueError, UnicodeError, OverflowError) as error:
            raise DamagedError(str(error)[:200]) from None


class _Unpickler(pickle.Unpickler):
    def __init__(self, data: bytes, archive: Archive) -> None:
        super().__init__(io.BytesIO(data))
        self._archive = archive

    def find_class(self, module: str, name: str, /) -> Any:
        match module, name:
            case "collections", "OrderedDict":
                return OrderedDict
            case "collections", word if word in _TABLES:
                return type(word, (dict,), {"__init__": lambda *_, **__: None})
            case "torch", "Size":
                return tuple
            case "torch._utils", "_rebuild_tensor_v2" | "_rebuild_tensor_v3":
                return _stored
            case "torch._utils", "_rebuild_parameter" | "_rebuild_parameter_with_state":
                return _parameter
            case "torch._tensor", "_rebuild_from_type_v2":
                return _of_type
        found: dict[str, Any] = {"path": f"{module}.{name}", "__module__": module}
        if module in ("torch", "torch.storage") and name in _STORAGES:
            found["dtype"] = _STORAGES[name]
        return type(name, (Named,), found)

    def persistent_load(self, pid: Any, /) -> Any:
        match pid:
            case ("storage", kind, str(key), _, _) if hasattr(kind, "dtype"):
                return Storage(self._archive, key, kind.dtype)
        raise DamagedError("it names a storage of an unknown kind")


def _stored(storage: Any, offset: Any, size: Any, stride: Any, *rest: Any) -> Stored:
    shape, steps = tuple(size), tuple(stride)
    whole = all(type(n) is int and 0 <= n < 1 << 48 for n in (offset, *shape, *steps))
    if not isinstance(storage, Storage) or len(shape) != len(steps) or not whole:
        raise DamagedError("it holds a tensor of an unknown form")
    kind = getattr(rest[2], "path", "") if len(rest) > 2 else ""
    named = getattr(torch, kind.removeprefix("torch."), None) if kind.startswith("torch.") else None
    return Stored(storage, named if isinstance(named, torch.dtype) else storage.dtype, offset, shape, steps)


def _parameter(value: Any, *_: Any) -> Any:
    return value


def _of_type(rebuild: Any, _: Any, args: Any, *__: Any) -> Any:
    if rebuild is not _stored:
        raise DamagedError("it holds a tensor of an unknown form")
    return _stored(*args)
