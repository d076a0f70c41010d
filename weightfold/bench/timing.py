"""Time several calls in turns, so that whatever else the machine does falls on all of them."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

WARM = 3
LEAST, MOST = 10, 2000
"""Rounds at least and at most."""


@dataclass(frozen=True)
class Times:
    """How long one call took.

    Args:
        ms: of each round, in milliseconds, shape (R,), in order of time.
    """

    ms: npt.NDArray[np.float64]

    @property
    def p50(self) -> float:
        """The median, in milliseconds."""
        return float(np.percentile(self.ms, 50))

    @property
    def p95(self) -> float:
        """What 95 of 100 calls stay below, in milliseconds."""
        return float(np.percentile(self.ms, 95))

    @property
    def best(self) -> float:
        """The quickest: what the work takes where nothing else runs, in milliseconds."""
        return float(self.ms.min())


def interleaved(
    calls: Mapping[str, Callable[[], Any]], *, seconds: float = 2.0, rounds: int | None = None
) -> dict[str, Times]:
    """Time calls in turns, warm, forwards and backwards.

    Args:
        calls: by name.
        seconds: about how long to go on, all calls together; at least 10 rounds are done.
        rounds: instead: exactly so many.
    Returns:
        times: by name, equally many for each.
    Example:
        >>> found = interleaved({"a": lambda: sum(range(100)), "b": lambda: None}, rounds=20)
        >>> len(found["a"].ms), found["b"].best < found["a"].best
        (20, True)
    """
    for call in calls.values():
        for _ in range(WARM):
            call()
    taken: dict[str, list[float]] = {name: [] for name in calls}
    names = list(calls)
    end = time.perf_counter() + seconds
    for at in range(rounds or MOST):
        if rounds is None and at >= LEAST and time.perf_counter() > end:
            break
        for name in names if at % 2 == 0 else reversed(names):
            start = time.perf_counter()
            calls[name]()
            taken[name].append(1000 * (time.perf_counter() - start))
    return {name: Times(np.array(values)) for name, values in taken.items()}


def ratio(first: Times, second: Times) -> float:
    """How many times as long the first took as the second: the median over rounds of neighbours in time.

    Example:
        >>> ratio(Times(np.array([2.0, 4.0, 9.0])), Times(np.array([1.0, 2.0, 3.0])))
        2.0
    """
    return float(np.median(first.ms / second.ms))


def this_machine() -> dict[str, Any]:
    """Name what times are measured on."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    name, info = platform.processor() or platform.machine(), Path("/proc/cpuinfo")
    if info.is_file():
        lines = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        name = lines[0].partition(":")[2].strip() if lines else name
    return {"cpu": name, "cores": cores, "system": f"{platform.system()} {platform.machine()}"}
