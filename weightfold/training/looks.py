"""What a run of self-compression shows and keeps: bits by layer at every look, the packed file, its sizes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from torch import nn

from weightfold.artifact import Builder
from weightfold.artifact.packed import PackedSizes
from weightfold.export.packed import promised_packed_bytes
from weightfold.export.source import Source
from weightfold.quant.budget import target_bytes
from weightfold.quant.codes import CodedModel, quantisable
from weightfold.size import file_bytes, unique_state

FLOAT_BITS = 32
PLAIN = ("bytes", "price")
"""Numbers of a look that belong to the file as a whole."""
BY_LAYER = ("bits", "rows", "weights", "bytes")
"""Numbers of a look that belong to a layer; kept in the ledger as "bits/LAYER"."""


@dataclass(frozen=True)
class Start:
    """The network before it was compressed.

    Args:
        shapes: of the tensors whose bits are learned, by name.
        n_weights: of the whole network.
        float_bytes: of its file.
        target: bytes that the file may take; None where another dial is turned.
    """

    shapes: Mapping[str, tuple[int, ...]]
    n_weights: int
    float_bytes: int
    target: int | None = None

    @classmethod
    def of(cls, model: nn.Module, target: str | int | None = None) -> Start:
        """Take a network down as it is.

        Example:
            >>> Start.of(nn.Linear(4, 2), "10%")
            Start(shapes={'weight': (2, 4)}, n_weights=10, float_bytes=168, target=17)
        """
        named = dict(model.named_parameters())
        full = file_bytes(unique_state(model))
        shapes = {name: tuple(named[name].shape) for name in quantisable(model)[0]}
        aim = None if target is None else target_bytes(target, full)
        return cls(shapes, sum(p.numel() for p in named.values()), full, aim)

    def values(self) -> dict[str, float]:
        """The metrics of step 0: every weight, as a float."""
        found: dict[str, float] = {"bytes": self.float_bytes}
        if self.target is not None:
            found["target"] = self.target
        for name, shape in self.shapes.items():
            n = int(np.prod(shape))
            found |= {f"bits/{name}": FLOAT_BITS, f"rows/{name}": shape[0], f"weights/{name}": n}
            found[f"bytes/{name}"] = n * FLOAT_BITS / 8
        return found


@dataclass(frozen=True)
class Look:
    """Where a run stands, for whoever watches it.

    Args:
        step: optimiser steps done, of `total_steps`.
        scores: of the latest validation, by network.
        start: the network before; None where no bits are learned.
        record: what the latest look found, as in `SelfCompress.history`; None before the first.
    """

    epoch: int
    epochs: int
    step: int
    total_steps: int
    scores: Mapping[str, Any] = field(default_factory=dict)
    start: Start | None = None
    record: Mapping[str, Any] | None = None


Watch = Callable[[Look], None]


def header_more(source: Source) -> int:
    """Bytes by which the header of a run's file is longer than that of the same network made by hand."""
    by_hand = Builder(kind="instance", name=type(source.model).__name__)
    plain = replace(source, builder=by_hand, inputs=())
    return round(promised_packed_bytes(source, {}) - promised_packed_bytes(plain, {}))


def look_values(record: Mapping[str, Any]) -> dict[str, float]:
    """One look as metrics.

    Example:
        >>> layer = {"bits": 2.0, "rows": 3, "weights": 5, "of": 12, "bytes": 4.0}
        >>> look_values({"step": 7, "bytes": 90.0, "price": 1e-6, "tensors": {"fc": layer}})
        {'bytes': 90.0, 'price': 1e-06, 'bits/fc': 2.0, 'rows/fc': 3, 'weights/fc': 5, 'bytes/fc': 4.0}
    """
    found = {key: record[key] for key in PLAIN}
    layers = record["tensors"].items()
    return found | {f"{key}/{name}": layer[key] for name, layer in layers for key in BY_LAYER}


def layers_of(result: CodedModel, start: Start) -> list[dict[str, Any]]:
    """What is left of each layer, the same whenever the run is done again."""
    found = []
    for name, shape in start.shapes.items():
        tensor = result.coded[name]
        live = tensor.bits_R[tensor.bits_R > 0]
        found.append(
            {
                "name": name,
                "rows": [shape[0], len(live)],
                "weights": [int(np.prod(shape)), int(np.count_nonzero(tensor.codes))],
                "bits": float(live.mean()) if live.size else 0.0,
                "bits_by_row": {str(b): int(n) for b, n in zip(*np.unique(live, return_counts=True), strict=True)},
            }
        )
    return found


def coded_facts(result: CodedModel, start: Start) -> dict[str, Any]:
    """Weights kept and bits, for the results of a run."""
    n_live = result.n_weights()[0]
    return {
        "weights_kept": n_live / start.n_weights,
        "weights": [start.n_weights, n_live],
        "layers": layers_of(result, start),
    }


def packed_facts(source: Source, result: CodedModel, sizes: PackedSizes, start: Start) -> dict[str, Any]:
    """Sizes of the file, in bytes."""
    return {
        "coded_bytes": sizes.total_bytes,
        "packed_bytes": round(promised_packed_bytes(source, result.coded, coding="packed")),
        "fp32_bytes": start.float_bytes,
        "share": sizes.total_bytes / start.float_bytes,
        "target_bytes": start.target,
        "header_bytes": sizes.header_bytes,
        "by_tensor": dict(sizes.by_tensor),
        "codings": dict(sizes.codings),
    }


def final_values(facts: Mapping[str, Any]) -> dict[str, float]:
    """The metrics of the file as written.

    Args:
        facts: of the network in the results.
    """
    found: dict[str, float] = {"bytes": facts["packed"]["coded_bytes"]}
    for layer in facts["layers"]:
        name = layer["name"]
        found |= {f"bits/{name}": layer["bits"], f"rows/{name}": layer["rows"][1]}
        found |= {f"weights/{name}": layer["weights"][1], f"bytes/{name}": facts["packed"]["by_tensor"][name]}
    return found
