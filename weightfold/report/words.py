"""Numbers in words, for a page."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

MINUS = "−"

ROWS = (
    ("parameters", "Parameters", "count"),
    ("macs", "MACs an inference", "count"),
    ("size_bytes", "Bytes on disk", "count"),
    ("seconds", "Training time", "seconds"),
    ("latency_ms_1", "Inference, batch 1", "ms"),
    ("latency_ms_64", "Inference, batch 64", "ms"),
)
"""Key in the results, name, unit."""


def quantity(value: float | None, unit: str) -> str:
    """Write a number with its unit.

    Example:
        >>> quantity(1147722, "count"), quantity(17.66, "seconds"), quantity(0.605, "ms"), quantity(0.9916, "share")
        ('1,147,722', '17.7 s', '0.605 ms', '99.16 %')
    """
    if value is None:
        return "–"
    if unit == "count":
        return f"{value:,.0f}"
    if unit == "seconds":
        return f"{value:.1f} s"
    if unit == "ms":
        return f"{value:.3f} ms" if value < 10 else f"{value:.1f} ms"
    return f"{100 * value:.2f} %" if unit == "share" else f"{value:.4f}"


def signed(value: float, form: str = "+.1f", unit: str = " %") -> str:
    """Write a number with its sign and unit.

    Example:
        >>> signed(-74.93), signed(0.28, "+.2f", " pp")
        ('−74.9 %', '+0.28 pp')
    """
    return f"{value:{form}}{unit}".replace("-", MINUS)


def fewer(percent: float, less: str, more: str) -> str:
    """Say a difference in words.

    Example:
        >>> fewer(-74.93, "fewer", "more"), fewer(3, "less", "more")
        ('74.9 % fewer', '3.0 % more')
    """
    return f"{abs(percent):.1f} % {less if percent <= 0 else more}"


def change(before: float | None, after: float | None) -> float | None:
    """By how many percent a number has grown."""
    return None if not before or after is None else 100 * (after - before) / before


def score_unit(results: Mapping[str, Any]) -> str:
    """The unit of the run's score."""
    return "share" if results["score"] == "accuracy" else "number"


def small(value: float | None) -> str:
    """Write a small number.

    Example:
        >>> small(0.02674), small(-0.0051), small(None)
        ('0.027', '−0.0051', '–')
    """
    return "–" if value is None else f"{value:.2g}".replace("-", MINUS)
