"""Read single rows and columns of the maps that an edit stored, without torch and without numpy."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Self

from weightfold.artifact.header import Header, parse_header
from weightfold.errors import ArtifactError, LedgerError
from weightfold.ledger.entry import RESTORE


@dataclass(frozen=True)
class Maps:
    """Matrices of an edit as they lie in a blob: of shape (C, K), by the name of their reader."""

    data: bytes
    header: Header

    @classmethod
    def parse(cls, data: bytes, where: str) -> Self:
        """Read a blob.

        Raises:
            LedgerError: it holds no tensors; starts with `where`.
        """
        try:
            return cls(data, parse_header(data, where))
        except ArtifactError as error:
            raise LedgerError(error.message, remedy=RESTORE) from None

    def readers(self, channels: int) -> dict[str, str]:
        """Names of what reads the channels through a map of its own -> name of the map; "" for one that all share."""
        found = {}
        for name, stored in self.header.tensors.items():
            if stored.dtype != "F64" or len(stored.shape) != 2 or stored.shape[0] != channels:
                continue
            if name == "read":
                found[""] = name
            elif name.startswith("reads:"):
                tensor, _, dim = name.removeprefix("reads:").rpartition(":")
                found[f"{tensor}[{dim}]"] = name
        return found

    def row(self, name: str, at: int) -> tuple[float, ...]:
        """Coefficients by which one channel is expressed through the new ones, shape (K,)."""
        _, n = self.header.tensors[name].shape
        return struct.unpack_from(f"<{n}d", self.data, self.header.tensors[name].begin + 8 * at * n)

    def column(self, name: str, at: int) -> tuple[float, ...]:
        """Coefficients with which one new channel stands in for each old one, shape (C,)."""
        stored = self.header.tensors[name]
        rows, n = stored.shape
        values = struct.unpack_from(f"<{rows * n}d", self.data, stored.begin)
        return values[at::n]
