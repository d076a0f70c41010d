"""Bits by layer over a run of self-compression, read from the metrics that every look left in the ledger.

"bits/LAYER" is the mean over the channels that live, "rows/LAYER" their number, "weights/LAYER" what is not zero,
"bytes/LAYER" what the coder takes for it; "bytes" is the file and "price" λ. Step 0 holds the float network.
"""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from weightfold.audit.history import history_of, ledger_file
from weightfold.errors import ConfigError
from weightfold.ledger import Ledger

Points = tuple[tuple[float, float], ...]
KINDS = ("bits", "rows", "weights", "bytes")


@dataclass(frozen=True)
class Layer:
    """One layer.

    Args:
        rows: output channels at the start.
        weights: at the start.
        points: one for each look: step, mean bits of living rows, living rows, living weights, bytes.
    """

    name: str
    rows: int
    weights: int
    points: tuple[tuple[float, float, float, float, float], ...]

    def series(self, kind: str) -> Points:
        """One of the `KINDS` over the steps."""
        at = 1 + KINDS.index(kind)
        return tuple((point[0], point[at]) for point in self.points)


@dataclass(frozen=True)
class Bits:
    """All that a picture of bits shows.

    Args:
        layers: in the order of the network.
        total: the last step.
        sizes: bytes of the file at each look.
        float_bytes: of the float file.
        target: bytes asked for; None where another dial was turned.
    """

    title: str
    layers: tuple[Layer, ...]
    total: float
    sizes: Points
    float_bytes: float
    target: float | None

    def to_dict(self) -> dict[str, Any]:
        """Give it as plain data."""
        return asdict(self)

    def summary(self) -> str:
        """Say in one sentence what the picture shows."""
        end = self.sizes[-1][1]
        live, all_weights = (sum(int(n) for n in found) for found in zip(*map(_ends, self.layers), strict=True))
        aim = "" if self.target is None else f" of {self.target:,.0f} asked for"
        return (
            f"{len(self.layers)} layers over {self.total:,.0f} steps: the file goes from {self.float_bytes:,.0f} bytes "
            f"as floats to {end:,.0f}{aim}; {live:,} of {all_weights:,} weights live at the end."
        )


def _ends(layer: Layer) -> tuple[float, int]:
    return layer.points[-1][3], layer.weights


def read_bits(source: str | Path) -> Bits:
    """Read the bits of a run.

    Args:
        source: folder of a run, or a ledger file.
    Raises:
        LedgerError: the ledger is missing or damaged.
        ConfigError: the run learned no bits, or has not begun to.
    """
    with Ledger.open(ledger_file(Path(source)), readonly=True) as ledger:
        found = bits_of(ledger)
    if found is None:
        raise ConfigError(
            f"'{source}' holds no bits by layer: its network was not compressed so, or has not begun to be.",
            remedy="Such a run is made by: weightfold train DATA --method self-compress --target SIZE",
        )
    return found


def bits_of(ledger: Ledger) -> Bits | None:
    """Read the bits from an open ledger; None if no look was taken."""
    names = [name.removeprefix("bits/") for name in ledger.metric_names() if name.startswith("bits/")]
    sizes = _points(ledger, "bytes")
    if not names or len(sizes) < 2:
        return None
    entries = tuple(ledger.entries())
    history = history_of(entries, ledger.path, ledger.head)
    result = next((entry.body for entry in reversed(entries) if entry.kind == "result"), {})
    config, data = history.run.get("config", {}), history.run.get("data", {})
    target = _points(ledger, "target")
    return Bits(
        f"{Path(str(config.get('model', '')) or ledger.path.parent.name).name} on {data.get('name', 'its data')}",
        tuple(_layer(ledger, name) for name in _ordered(names, result)),
        float(history.total_steps or sizes[-1][0]),
        sizes[1:],
        sizes[0][1],
        target[0][1] if target else None,
    )


def _points(ledger: Ledger, name: str) -> Points:
    """Values by step; of those of one step the last."""
    return tuple((float(step), value) for step, value in sorted(dict(ledger.metrics(name)).items()))


def _ordered(names: list[str], result: dict[str, Any]) -> list[str]:
    """Layers in the order of the network where the result tells it."""
    layers = result.get("arms", {}).get("folded", {}).get("layers", [])
    known = [layer["name"] for layer in layers if layer["name"] in names]
    return [*known, *sorted(set(names) - set(known), key=_natural)]


def _natural(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


def _layer(ledger: Ledger, name: str) -> Layer:
    bits, rows, weights, n_bytes = (dict(_points(ledger, f"{kind}/{name}")) for kind in KINDS)
    first, *steps = sorted(bits)
    points = tuple((step, bits[step], rows[step], weights[step], n_bytes[step]) for step in steps)
    return Layer(name, int(rows[first]), int(weights[first]), points)
