"""Widths that a target's kernels like, as measured: a table of latencies by channel group and width, kept as JSON.

Kernels work in steps: a convolution of 97 channels can take as long as one of 112. A width is liked if the network is
quicker with it than with every wider one; all others cost channels and give nothing for them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from weightfold.artifact import write_json
from weightfold.errors import ArtifactError

FORMAT = 1
GAIN = 0.01
"""Share of the time by which a narrower width must be quicker than all wider ones."""


@dataclass(frozen=True)
class Tuned:
    """Latencies of a network with one group narrowed at a time.

    Args:
        target: what ran it, such as "onnx-cpu".
        groups: milliseconds by width, by group name; each holds the group's full width.
        shape: of the input.
        threads: of the runtime.
        machine: what it was measured on.

    Example:
        >>> table = Tuned("onnx-cpu", {"a": {32: 4.0, 30: 4.1, 28: 4.0, 24: 3.0, 16: 2.9, 8: 3.2}})
        >>> table.liked("a"), table.liked("a", faster_by=0.05)
        ([32, 24, 16], [32, 24])
    """

    target: str
    groups: Mapping[str, Mapping[int, float]]
    shape: tuple[int, ...] = ()
    threads: int = 1
    machine: Mapping[str, Any] = field(default_factory=dict)

    def liked(self, group: str, faster_by: float = GAIN) -> list[int]:
        """Widths of a group that are worth having, from the full one down.

        Args:
            faster_by: share of the time by which one must be quicker than all wider ones.
        """
        rows = sorted(self.groups[group].items(), reverse=True)
        found, best = [rows[0][0]], rows[0][1]
        for width, ms in rows[1:]:
            if ms <= (1 - faster_by) * best:
                found.append(width)
                best = ms
        return found

    def all_liked(self) -> dict[str, list[int]]:
        """Widths worth having, by group: what the setting `liked` of `fold` and `prune` takes."""
        return {name: self.liked(name) for name in self.groups}

    def save(self, path: str | Path) -> None:
        """Write the table as JSON, at one stroke."""
        groups = {name: {str(width): ms for width, ms in rows.items()} for name, rows in self.groups.items()}
        record = {
            "format": FORMAT,
            "target": self.target,
            "shape": list(self.shape),
            "threads": self.threads,
            "machine": dict(self.machine),
            "groups": groups,
            "liked": self.all_liked(),
        }
        write_json(Path(path), record)

    @classmethod
    def read(cls, path: str | Path) -> Tuned:
        """Read a table.

        Raises:
            ArtifactError: the file is missing or no such table.
        """
        path = Path(path)
        if not path.is_file():
            raise ArtifactError(f"There is no table of widths '{path}'.", remedy="Make one with weightfold tune.")
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            if record["format"] != FORMAT:
                raise ValueError(f"format {record['format']}")
            groups = {
                name: {int(width): float(ms) for width, ms in rows.items()} for name, rows in record["groups"].items()
            }
            if not all(groups.values()):
                raise ValueError("a group without widths")
            return cls(record["target"], groups, tuple(record["shape"]), record["threads"], record["machine"])
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ArtifactError(
                f"'{path}' is no table of widths: {error}.", remedy="Make one with weightfold tune."
            ) from None
