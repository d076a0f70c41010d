"""Nearest vectors among many: exact up to 10^5, an inverted file beyond.

Up to `EXACT` vectors every one is looked at: one product of a matrix and a vector. Beyond that they are divided into
cells by k-means, each cell's vectors side by side, and a query looks at the cells whose centres are nearest: at as many
as were needed to find `RECALL` of the ten nearest of a sample of the vectors themselves, and at most a tenth of them.
New vectors wait in a tail that every query looks at, until it is worth dividing anew; removed ones are marked.

Memory: 4 D bytes a vector, 1.02 GB for 10^6 of 256 numbers, and 4 n_cells D for the centres; ids beside that.

Reference: Sivic & Zisserman 2003 (inverted files); Jégou, Douze & Schmid 2011 (IVF).
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from weightfold.artifact.files import write_bytes
from weightfold.errors import ArtifactError, ConfigError

EXACT = 100_000
"""Vectors up to which every one is looked at."""
PER_CELL = 700
"""Vectors a cell, on average."""
LEAST_PROBES, MOST_SHARE, RECALL, TRIED = 4, 0.1, 0.998, 64
ITERATIONS, SAMPLE = 8, 64
"""Rounds of k-means, on so many vectors a cell."""
WORTH = 0.05
"""Share of vectors in the tail, or removed, from which on dividing anew is worth it."""
FORMAT = 1
Vectors = npt.NDArray[np.float32]


class Index:
    """Vectors under names, and the nearest of them to another.

    Args:
        dim: numbers a vector.
        exact: number of vectors up to which search is exact.
    Example:
        >>> index = Index(2)
        >>> index.add(["a", "b", "c"], np.array([[0, 0], [1, 0], [5, 5]], np.float32))
        >>> [(name, round(distance, 3)) for name, distance in index.search(np.array([0.9, 0.0], np.float32), 2)]
        [('b', 0.1), ('a', 0.9)]
        >>> index.remove(["b"])
        >>> len(index), index.search(np.zeros(2, np.float32), 1)
        (2, [('a', 0.0)])
    """

    def __init__(self, dim: int = 256, *, exact: int = EXACT) -> None:
        self.dim, self.exact = dim, exact
        self._ids: list[str] = []
        self._vectors = np.zeros((0, dim), np.float32)
        self._n = 0
        self._squares = np.zeros(0, np.float32)
        self._gone = np.zeros(0, bool)
        self._places: dict[str, int] = {}
        self._centres = np.zeros((0, dim), np.float32)
        self._starts = np.zeros(1, np.int64)
        self.n_probes = LEAST_PROBES

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, name: str) -> bool:
        return name in self._places

    def names(self) -> list[str]:
        """All ids."""
        return list(self._places)

    def vector(self, name: str) -> Vectors:
        """The vector of an id, shape (D,)."""
        return self._vectors[self._places[name]]

    @property
    def n_cells(self) -> int:
        """Cells of the inverted file; 0 where search is exact."""
        return len(self._centres)

    @property
    def size_bytes(self) -> int:
        """Of all arrays, ids apart."""
        arrays = (self._vectors, self._squares, self._gone, self._centres, self._starts)
        return sum(array.nbytes for array in arrays)

    def add(self, ids: Sequence[str], vectors: Vectors) -> None:
        """Add vectors, shape (N, D); an id that is there is replaced.

        Raises:
            ConfigError: shapes do not fit, numbers are not finite, or an id comes twice.
        """
        vectors = np.ascontiguousarray(vectors, np.float32)
        if vectors.shape != (len(ids), self.dim) or len(set(ids)) != len(ids):
            raise ConfigError(f"{len(ids)} ids, all different, need vectors ({len(ids)}, {self.dim}): {vectors.shape}.")
        if not np.isfinite(vectors).all():
            raise ConfigError("A vector holds NaN or infinite numbers.")
        self.remove([name for name in ids if name in self._places])
        need = self._n + len(ids)
        if need > len(self._vectors):
            self._grow(need if not self._n else max(need, self._n + self._n // 4))
        self._vectors[self._n : need] = vectors
        self._squares[self._n : need] = np.einsum("nd,nd->n", vectors, vectors)
        self._gone[self._n : need] = False
        self._places.update((name, self._n + i) for i, name in enumerate(ids))
        self._ids += ids
        self._n = need
        self._tidy()

    def _grow(self, size: int) -> None:
        for name in ("_vectors", "_squares", "_gone"):
            old = getattr(self, name)
            new = np.zeros((size, *old.shape[1:]), old.dtype)
            new[: self._n] = old[: self._n]
            setattr(self, name, new)

    def remove(self, ids: Sequence[str]) -> None:
        """Remove vectors; ids that are not there are ignored."""
        for name in ids:
            at = self._places.pop(name, None)
            if at is not None:
                self._gone[at] = True

    def search(self, vector: Vectors, k: int = 10) -> list[tuple[str, float]]:
        """The k nearest, nearest first, with their Euclidean distances; fewer if there are fewer.

        Raises:
            ConfigError: the vector has another shape, or k is below 1.
        """
        vector = np.asarray(vector, np.float32)
        if vector.shape != (self.dim,) or k < 1:
            raise ConfigError(f"A query is a vector of {self.dim} numbers and k at least 1: {vector.shape}, {k}.")
        place, far = self._probe(vector, k) if self.n_cells else self._scan(vector, 0, self._n, k)
        order = np.argsort(far, kind="stable")[:k]
        place = place[order]
        exact = np.linalg.norm(self._vectors[place].astype(np.float64) - vector, axis=1)
        found = sorted((float(d), int(p)) for d, p in zip(exact, place, strict=True))
        return [(self._ids[p], d) for d, p in found]

    def _scan(self, vector: Vectors, first: int, stop: int, k: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[Any]]:
        """Nearest vectors of one stretch: places, and squared distances less the query's own square."""
        far = self._squares[first:stop] - self._vectors[first:stop] @ (vector + vector)
        if len(self._places) != self._n:
            far[self._gone[first:stop]] = np.inf
        if len(far) > k:
            near = np.argpartition(far, k - 1)[:k]
            near = near[np.isfinite(far[near])]
        else:
            near = np.flatnonzero(np.isfinite(far))
        return near + first, far[near]

    def _probe(self, vector: Vectors, k: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[Any]]:
        """Look at the tail, then at cells from the nearest on, as many as are looked at."""
        to_centre = ((self._centres - vector) ** 2).sum(1)
        cells = np.argsort(to_centre)[: self.n_probes]
        place, far = self._scan(vector, int(self._starts[-1]), self._n, k)
        for cell in cells:
            first, stop = int(self._starts[cell]), int(self._starts[cell + 1])
            if first == stop:
                continue
            more, distance = self._scan(vector, first, stop, k)
            place, far = np.concatenate([place, more]), np.concatenate([far, distance])
            if len(far) > k:
                near = np.argpartition(far, k - 1)[:k]
                place, far = place[near], far[near]
        return place, far

    # cells ------------------------------------------------------------------------------------------------------------

    def _tidy(self) -> None:
        """Divide into cells, anew where the tail or the gaps have grown."""
        loose = self._n - int(self._starts[-1]) + (self._n - len(self))
        if self._n > self.exact and (not self.n_cells or loose > max(WORTH * self._n, PER_CELL)):
            self.divide()

    def divide(self, n_cells: int | None = None) -> None:
        """Divide all vectors into cells by k-means, and put the vectors of a cell side by side."""
        keep = np.flatnonzero(~self._gone[: self._n])
        n_cells = max(1, len(keep) // PER_CELL) if n_cells is None else n_cells
        self._centres = _centres(self._vectors, keep, n_cells)
        cell = _nearest(self._vectors, keep, self._centres)
        order = keep[np.argsort(cell, kind="stable")]
        self._starts = np.concatenate([[0], np.cumsum(np.bincount(cell, minlength=n_cells))])
        self._ids = [self._ids[i] for i in order]
        self._places = {name: at for at, name in enumerate(self._ids)}
        self._vectors, self._squares = self._vectors[order], self._squares[order]
        self._gone, self._n = np.zeros(len(order), bool), len(order)
        self.n_probes = self._needed()

    def _needed(self) -> int:
        """Cells that a query has to look at to find `RECALL` of the ten nearest; tried on vectors of the index."""
        most = max(LEAST_PROBES, int(MOST_SHARE * self.n_cells))
        tried = np.sort(np.random.default_rng(1).choice(self._n, min(TRIED, self._n), replace=False))
        queries = self._vectors[tried]
        near = (self._centres**2).sum(1) - 2 * queries @ self._centres.T
        rank = np.argsort(np.argsort(near, 1), 1)
        needed = []
        for at, query in enumerate(queries):
            place, _ = self._scan(query, 0, self._n, 11)
            cells = np.searchsorted(self._starts, place, side="right") - 1
            needed += rank[at, cells].tolist()
        return int(np.clip(np.quantile(needed, RECALL) + 1, LEAST_PROBES, most))

    # files ------------------------------------------------------------------------------------------------------------

    def save(self, path: str | Path) -> None:
        """Write the index to one file, at one stroke.

        Raises:
            OSError: it cannot be written; nothing half-written is left.
        """
        ids = np.frombuffer("\0".join(self._ids).encode(), np.uint8)
        facts = np.array([FORMAT, self.dim, self.exact, self._n, self.n_probes])
        buffer = io.BytesIO()
        np.savez(
            buffer,
            facts=facts,
            ids=ids,
            vectors=self._vectors[: self._n],
            gone=self._gone[: self._n],
            centres=self._centres,
            starts=self._starts,
        )
        write_bytes(Path(path), buffer.getvalue())

    @classmethod
    def load(cls, path: str | Path) -> Index:
        """Read an index.

        Raises:
            ArtifactError: the file is none, or damaged.
        """
        try:
            _check_stored(Path(path))
            with Path(path).open("rb") as file, np.load(file, allow_pickle=False) as held:
                version, dim, exact, n, probes = (int(v) for v in held["facts"])
                index = cls(dim, exact=exact)
                index.n_probes = max(1, probes)
                text = held["ids"].tobytes().decode()
                index._ids = text.split("\0") if n else []
                index._vectors, index._gone = held["vectors"].astype(np.float32), held["gone"].astype(bool)
                index._centres, index._starts = held["centres"].astype(np.float32), held["starts"].astype(np.int64)
            sound = version == FORMAT and index._vectors.shape == (n, dim) and len(index._ids) == n == len(index._gone)
            sound = sound and index._centres.shape[1:] == (dim,) and len(index._starts) == len(index._centres) + 1
            sound = sound and int(index._starts[0]) == 0 and int(index._starts[-1]) <= n
            if not sound or (np.diff(index._starts) < 0).any() or not np.isfinite(index._vectors).all():
                raise ValueError
        except FileNotFoundError:
            raise
        except Exception as error:
            raise ArtifactError(
                f"'{path}' is no index of vectors, or it is damaged.", remedy="Delete it; it is built anew."
            ) from error
        index._n = n
        index._squares = np.einsum("nd,nd->n", index._vectors, index._vectors)
        index._places = {name: i for i, name in enumerate(index._ids) if not index._gone[i]}
        return index


def _check_stored(path: Path) -> None:
    """Refuse an archive that is larger unpacked than it is: `np.savez` packs nothing."""
    with zipfile.ZipFile(path) as archive:
        if sum(info.file_size for info in archive.infolist()) > path.stat().st_size:
            raise ValueError


def _centres(vectors: Vectors, keep: npt.NDArray[np.int64], n_cells: int) -> Vectors:
    """k-means on a sample; the same for the same vectors."""
    generator = np.random.default_rng(0)
    sample = vectors[np.sort(generator.choice(keep, min(len(keep), SAMPLE * n_cells), replace=False))]
    centres = sample[np.sort(generator.choice(len(sample), n_cells, replace=False))].copy()
    everyone = np.arange(len(sample))
    for _ in range(ITERATIONS):
        cell = _nearest(sample, everyone, centres)
        order = np.argsort(cell, kind="stable")
        count = np.bincount(cell, minlength=n_cells)
        full = count > 0
        sums = np.add.reduceat(sample[order].astype(np.float64), np.concatenate([[0], np.cumsum(count)[:-1]])[full])
        centres[full] = (sums / count[full, None]).astype(np.float32)
        centres[~full] = sample[generator.choice(len(sample), int((~full).sum()))]
    return centres


def _nearest(vectors: Vectors, keep: npt.NDArray[np.int64], centres: Vectors) -> npt.NDArray[np.int64]:
    squares = np.einsum("nd,nd->n", centres, centres)
    out = np.zeros(len(keep), np.int64)
    for first in range(0, len(keep), 8192):
        part = keep[first : first + 8192]
        out[first : first + 8192] = (squares - 2 * (vectors[part] @ centres.T)).argmin(1)
    return out
