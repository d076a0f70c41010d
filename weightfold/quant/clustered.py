"""One tensor as a codebook and the numbers of its entries, and the file of a model that holds such tensors.

The file is a safetensors file: for a clustered tensor NAME, `NAME:codebook` (codebooks, entries, values of an entry)
and `NAME:index` (bytes of the packed or coded numbers); every other tensor as it is. Its metadata tells the rest.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
from pydantic import Field
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from weightfold.artifact import read_header, write_bytes
from weightfold.artifact.plain import parse_json
from weightfold.config import Config
from weightfold.errors import ArtifactError, ConfigError, DataError
from weightfold.quant.codebook import kmeans, kmeans_vectors, nearest
from weightfold.quant.pack import bits_for, deflate, inflate, pack, unpack

KEY = "weightfold.clustered"
MOST_ENTRIES = 1 << 16
FREE_VALUES, VALUES_A_BYTE = 1 << 18, 1 << 10
"""Values that a file may hold, and that it may hold for each of its bytes; `_explained` sees to it."""
_RECORD_BYTES = 100
"""What the header says of one tensor takes more."""
Coding = Literal["packed", "deflated"]


@dataclass(frozen=True)
class Layout:
    """How the numbers of a tensor share codebooks.

    Args:
        k: entries of a codebook.
        rows: rows (dimension 0) behind one codebook; None for all.
        vector: consecutive values of a row that make one entry.
    """

    k: int
    rows: int | None = None
    vector: int = 1

    def refusal(self, shape: tuple[int, ...]) -> str | None:
        """Why a tensor of this shape cannot be laid out so, or None."""
        row = math.prod(shape[1:])
        if row % self.vector:
            return f"its rows of {row} values do not divide into vectors of {self.vector}"
        return None

    def split(self, weight: Tensor) -> list[Tensor]:
        """The points behind each codebook, shape (N, vector) each.

        Example:
            >>> [tuple(p.shape) for p in Layout(4, rows=2, vector=3).split(torch.zeros(5, 2, 3))]
            [(4, 3), (4, 3), (2, 3)]
        """
        rows_OF = weight.reshape(weight.shape[0], -1)
        return [part.reshape(-1, self.vector) for part in rows_OF.split(self.rows or max(len(rows_OF), 1))]


@dataclass(frozen=True, eq=False)
class Clustered:
    """A tensor of few values.

    Args:
        book_GKV: codebooks in the type in which they are stored.
        labels: the entry of each point, one tensor for each codebook, int64.
        shape: of the tensor.
        dtype: of the tensor.
    """

    layout: Layout
    book_GKV: Tensor
    labels: tuple[Tensor, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bits(self) -> int:
        """Bits of one entry's number."""
        return bits_for(self.book_GKV.shape[1])

    @property
    def n_labels(self) -> int:
        return sum(len(part) for part in self.labels)

    def values(self) -> Tensor:
        """The tensor that this stands for.

        Example:
            >>> clustered = cluster(torch.tensor([[0.0, 1.0], [0.2, 1.0]]), Layout(2), torch.float32)
            >>> clustered.values()
            tensor([[0.1000, 1.0000],
                    [0.1000, 1.0000]])
        """
        books = self.book_GKV.to(self.dtype)
        parts = [book[labels.to(book.device)].flatten() for book, labels in zip(books, self.labels, strict=True)]
        return torch.cat(parts).reshape(self.shape)

    def unique_values(self) -> int:
        """Numbers of the codebooks that are in use, each codebook's distinct ones."""
        used = (book[labels.unique()] for book, labels in zip(self.book_GKV, self.labels, strict=True))
        return sum(len(part.flatten().unique()) for part in used)

    def index_bytes(self, coding: Coding) -> bytes:
        """The entries' numbers as they stand in a file."""
        numbers = torch.cat(self.labels).numpy()
        data = pack(numbers, self.bits) if coding == "packed" else deflate(numbers, self.bits)
        return data.tobytes()

    def size_bytes(self, coding: Coding = "packed") -> int:
        """Bytes of codebooks and numbers in a file, without the file's header."""
        return self.book_GKV.numel() * self.book_GKV.element_size() + len(self.index_bytes(coding))


def cluster(
    weight: Tensor,
    layout: Layout,
    book_dtype: torch.dtype,
    *,
    importance: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Clustered:
    """Cluster a tensor by k-means: exactly on a line, from a generator for vectors.

    Args:
        weight: any float tensor of at least one dimension.
        book_dtype: type in which the codebooks are stored; what it cannot hold is rounded.
        importance: how much each value counts, of the tensor's shape, >= 0.
        generator: for vectors only; a fresh one of seed 0 by default.
    Raises:
        ConfigError: the shape does not divide, or importance has another shape.
        DataError: values are not finite, or too large for the codebook's type.
    """
    reason = layout.refusal(tuple(weight.shape))
    if reason is not None:
        raise ConfigError(f"The tensor cannot be clustered: {reason}.")
    if importance is not None and importance.shape != weight.shape:
        raise ConfigError(f"Importance of shape {tuple(importance.shape)} for a tensor of {tuple(weight.shape)}.")
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    parts = layout.split(weight.detach().cpu())
    counts = [None] * len(parts) if importance is None else [p.sum(1) for p in layout.split(importance.cpu())]
    books = [_book(p, layout, generator, c) for p, c in zip(parts, counts, strict=True)]
    return assign(weight, layout, padded(books), book_dtype)


def _book(points_NV: Tensor, layout: Layout, generator: torch.Generator, weight_N: Tensor | None) -> Tensor:
    k = min(layout.k, len(points_NV))
    if layout.vector == 1:
        return kmeans(points_NV[:, 0], k, weight_N)[0][:, None]
    return kmeans_vectors(points_NV, k, generator, weight_N)[0]


def padded(books: list[Tensor]) -> Tensor:
    """Codebooks one above the other, the shorter ones with their last entry repeated."""
    k = max(len(book) for book in books)
    return torch.stack([torch.cat([book, book[-1:].expand(k - len(book), -1)]) for book in books])


def assign(weight: Tensor, layout: Layout, book_GKV: Tensor, book_dtype: torch.dtype) -> Clustered:
    """Put each point to its nearest entry, after the entries are rounded to the type in which they are stored.

    Raises:
        DataError: an entry is too large for that type.
    """
    stored = book_GKV.detach().cpu().to(book_dtype)
    if not bool(torch.isfinite(stored).all()):
        raise DataError(
            f"Values up to {float(book_GKV.abs().max()):.3g} do not fit into {_name(book_dtype)}.",
            remedy="Store the codebooks as float32.",
        )
    parts = layout.split(weight.detach().cpu())
    labels = tuple(nearest(p, book.to(p.dtype)) for p, book in zip(parts, stored, strict=True))
    return Clustered(layout, stored, labels, tuple(weight.shape), weight.dtype)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# the file -------------------------------------------------------------------------------------------------------------


def write_clustered(
    path: Path,
    clustered: Mapping[str, Clustered],
    others: Mapping[str, Tensor],
    *,
    aliases: Mapping[str, str] | None = None,
    coding: Coding = "packed",
) -> int:
    """Write a model's tensors to one file, whole or not at all.

    Args:
        clustered: tensors of few values, by name.
        others: all other tensors, by name.
        aliases: further names of tensors that are stored once.
        coding: of the numbers: bits end to end, or entropy-coded.
    Returns:
        size_bytes: of the file.
    Raises:
        ArtifactError: the path cannot be written.
    Example:
        >>> import tempfile
        >>> weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
        >>> clustered = cluster(weight, Layout(16), torch.float16)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     size = write_clustered(Path(folder, "m.safetensors"), {"w": clustered}, {"b": torch.zeros(3)})
        ...     back = read_clustered(Path(folder, "m.safetensors"))
        >>> torch.equal(back["w"], clustered.values()), size < 4 * 64 * 64 / 5
        (True, True)
    """
    tensors = {name: value.detach().cpu().contiguous() for name, value in others.items()}
    records = {}
    for name, item in clustered.items():
        stored, index, how = _explained(item, coding)
        tensors[f"{name}:codebook"] = stored.book_GKV.contiguous()
        tensors[f"{name}:index"] = torch.from_numpy(np.frombuffer(index, np.uint8).copy())
        records[name] = {
            "shape": item.shape, "dtype": _name(item.dtype), "rows": item.layout.rows, "vector": item.layout.vector,
            "coding": how,
        }  # fmt: skip
    about = {"tensors": records, "aliases": dict(aliases or {})}
    data = save(tensors, metadata={KEY: json.dumps(about, separators=(",", ":"))})
    write_bytes(path, data)
    return len(data)


def _explained(item: Clustered, coding: Coding) -> tuple[Clustered, bytes, Coding]:
    """A tensor, its numbers as bytes and their coding: such that the bytes explain the tensor's size to a reader.

    Numbers that are all alike take next to nothing; they are packed, by one bit each at least, where a reader could not
    tell them from a file that is made to fill the memory.
    """
    index = item.index_bytes(coding)
    if math.prod(item.shape) <= VALUES_A_BYTE * (len(index) + _RECORD_BYTES):
        return item, index, coding
    if item.book_GKV.shape[1] == 1:
        item = replace(item, book_GKV=item.book_GKV.repeat(1, 2, 1))
    return item, item.index_bytes("packed"), "packed"


class ClusterRecord(Config):
    """What the metadata says of one clustered tensor."""

    shape: Annotated[tuple[Annotated[int, Field(ge=1, lt=1 << 48)], ...], Field(min_length=1, max_length=64)]
    dtype: Literal["float16", "bfloat16", "float32", "float64"]
    rows: Annotated[int, Field(ge=1, lt=1 << 48)] | None
    vector: Annotated[int, Field(ge=1, lt=1 << 48)]
    coding: Coding


class ClusterTable(Config):
    """What the metadata says of all of them."""

    tensors: dict[str, ClusterRecord]
    aliases: dict[str, str]


def read_clustered(path: Path) -> dict[str, Tensor]:
    """Read back all tensors of a file that `write_clustered` wrote, as a state dict.

    Raises:
        ArtifactError: the file is missing, corrupt or of another kind; names the tensor.
    """
    path = Path(path)
    header = read_header(path)
    if KEY not in header.metadata:
        raise ArtifactError(f"'{path}' holds no clustered tensors.", remedy="Load it as an ordinary file.")
    about = _read_about(header.metadata[KEY], path)
    n_values = sum(math.prod(record.shape) for record in about.tensors.values())
    if n_values > FREE_VALUES + VALUES_A_BYTE * header.size_bytes:
        raise _corrupt(path, f"{n_values:,} values are more than its {header.size_bytes:,} bytes explain")
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise _corrupt(path, str(error)) from None
    parts = {f"{name}:{part}" for name in about.tensors for part in ("codebook", "index")}
    out = {name: value for name, value in tensors.items() if name not in parts}
    for name, record in about.tensors.items():
        if name in out:
            raise _corrupt(path, f"'{name}' stands in it twice")
        out[name] = _expand(name, record, tensors, path)
    for alias, name in about.aliases.items():
        if alias in out or name not in out:
            raise _corrupt(path, f"it ties '{alias}' to '{name}'")
    return out | {alias: out[name] for alias, name in about.aliases.items()}


def _read_about(text: str, path: Path) -> ClusterTable:
    try:
        return ClusterTable(**parse_json(text))
    except (ValueError, TypeError) as error:
        raise _corrupt(path, str(error)) from None
    except ConfigError as error:
        raise _corrupt(path, error.message.rstrip(".")) from None


def _corrupt(path: Path, reason: str) -> ArtifactError:
    return ArtifactError(f"'{path}' is truncated, corrupt or no file of clusters: {reason}.", remedy="Write it again.")


def _expand(name: str, record: ClusterRecord, tensors: Mapping[str, Tensor], path: Path) -> Tensor:
    book_GKV, data = tensors.get(f"{name}:codebook"), tensors.get(f"{name}:index")
    if book_GKV is None or data is None:
        raise _corrupt(path, f"it lacks the codebook or the index of '{name}'")
    if book_GKV.ndim != 3 or not book_GKV.is_floating_point() or data.ndim != 1 or data.dtype != torch.uint8:
        raise _corrupt(path, f"the codebook or the index of '{name}' is none")
    n_books, k, vector = book_GKV.shape
    row, rows = math.prod(record.shape[1:]), record.rows or record.shape[0]
    if vector != record.vector or row % vector or n_books != -(-record.shape[0] // rows) or not 1 <= k <= MOST_ENTRIES:
        raise _corrupt(path, f"codebooks of shape {tuple(book_GKV.shape)} do not fit '{name}' of {record.shape}")
    n_points = record.shape[0] * row // vector
    read = unpack if record.coding == "packed" else inflate
    try:
        numbers = torch.from_numpy(np.array(read(data.numpy(), bits_for(k), n_points)))
    except ArtifactError as error:
        raise _corrupt(path, f"'{name}': {error.message.rstrip('.')}") from None
    if int(numbers.max()) >= k:
        raise _corrupt(path, f"'{name}' names entry {int(numbers.max())} of {k}")
    layout = Layout(k, record.rows, vector)
    labels = numbers.split(min(rows, record.shape[0]) * row // vector)
    return Clustered(layout, book_GKV, labels, record.shape, getattr(torch, record.dtype)).values()
