"""The account of a run: what each network reached and cost, and how the two compare."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

ARMS = ("dense", "folded")


@dataclass(frozen=True)
class Row:
    """One line of the comparison.

    Args:
        name: what was measured.
        key: its key in the results.
        unit: how to print it.
        better: "less" or "more".
    """

    name: str
    key: str
    unit: str
    better: str


ROWS = (
    Row("parameters", "parameters", "count", "less"),
    Row("MACs an inference", "macs", "count", "less"),
    Row("bytes on disk", "size_bytes", "count", "less"),
    Row("training seconds", "seconds", "seconds", "less"),
    Row("ms an inference, batch 1", "latency_ms_1", "ms", "less"),
    Row("ms an inference, batch 64", "latency_ms_64", "ms", "less"),
)


def change_percent(before: float | None, after: float | None) -> float | None:
    """By how many percent a number has grown; None where that has no meaning.

    Example:
        >>> change_percent(200, 50)
        -75.0
    """
    if before is None or after is None or not before:
        return None
    return 100 * (after - before) / before


def comparison(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Lay out the results of a run row by row.

    Returns:
        rows: name, value of each network (None if it was not trained), difference in percent (percentage points for an
            accuracy).
    """
    arms = results["arms"]
    dense, folded = arms.get("dense"), arms.get("folded")
    low, high = (results.get("paired") or {}).get("interval", (1.0, 1.0))
    score = {
        "name": f"test {results['score']}",
        "key": "score",
        "unit": "share" if results["score"] == "accuracy" else "number",
        "better": "more",
        "dense": dense and dense["score"],
        "folded": folded and folded["score"],
        "change": 100 * (folded["score"] - dense["score"]) if dense and folded else None,
        "beyond_chance": not low <= 0 <= high,
        "change_unit": "points" if results["score"] == "accuracy" else "hundredths",
    }
    rows = [score, *(_row(row, dense, folded) for row in ROWS)]
    if folded is None or "packed" not in folded:
        return rows
    full, left = folded["weights"]
    weights = {"name": "weights that are not zero", "key": "weights", "unit": "count", "better": "less"}
    weights |= {"dense": full, "folded": left, "change": change_percent(full, left), "change_unit": "percent"}
    return [score, *(row for row in rows if row["key"] == "size_bytes"), weights, *_others(rows)]


def _others(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [row for row in rows if row["key"] not in ("score", "size_bytes")]


def _row(row: Row, dense: Mapping[str, Any] | None, folded: Mapping[str, Any] | None) -> dict[str, Any]:
    before = None if dense is None else dense.get(row.key)
    after = None if folded is None else folded.get(row.key)
    return {
        "name": row.name,
        "key": row.key,
        "unit": row.unit,
        "better": row.better,
        "dense": before,
        "folded": after,
        "change": change_percent(before, after),
        "change_unit": "percent",
    }
