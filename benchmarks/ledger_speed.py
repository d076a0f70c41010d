"""How long the ledger keeps a training loop waiting: one entry (on the disk when it returns), one number.

    python benchmarks/ledger_speed.py [FOLDER]

FOLDER is where the ledger is written (default: a temporary folder; its disk decides the time of an entry). The time of
each call is measured by itself, after a warm-up; that of a bare write and sync of one page of 4 KiB stands beside it.
The last line is one JSON object.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import sqlite3
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from io import FileIO
from pathlib import Path

from weightfold import __version__
from weightfold.ledger import Ledger

N_WARMUP = 50
N_ENTRIES = 1000
N_METRICS = 10_000
BODY = {"group": "blocks.3.fc1", "kept": list(range(64)), "cost": {"predicted": 0.0123, "measured": 0.0119}}


def main(folder: str | None = None) -> None:
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        with Ledger.create(Path(scratch) / "run.ledger", run={"seed": 0}) as log:
            append_ms = times_ms(lambda step: log.append("edit", BODY | {"step": step}), N_ENTRIES)
            metric_ms = times_ms(lambda step: log.log_metrics(step, {"loss": 1 / (step + 1)}), N_METRICS)
            with (Path(scratch) / "plain").open("wb", buffering=0) as plain:
                sync_ms = times_ms(lambda _: write_page(plain), N_ENTRIES)
            start = time.perf_counter()
            log.verify()
            verify_s = time.perf_counter() - start
        size_bytes = (Path(scratch) / "run.ledger").stat().st_size
    report = {
        "append_ms_p50": median(append_ms),
        "append_ms_p95": percentile(append_ms, 95),
        "metric_ms_p50": median(metric_ms),
        "metric_ms_p95": percentile(metric_ms, 95),
        "plain_sync_ms_p50": median(sync_ms),
        "verify_s": round(verify_s, 4),
        "n_entries": N_ENTRIES,
        "n_metrics": N_METRICS,
        "size_bytes": size_bytes,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "n_cores": os.cpu_count(),
        "versions": {
            "weightfold": __version__,
            "python": platform.python_version(),
            "sqlite": sqlite3.sqlite_version,
            "system": platform.system(),
        },
    }
    for name, times in (("entry", append_ms), ("number", metric_ms), ("bare sync", sync_ms)):
        print(f"one {name}: {median(times)} ms (median), {percentile(times, 95)} ms (p95), {max(times):.2f} ms (most)")
    print(json.dumps(report))


def write_page(file: FileIO) -> None:
    """Do the least that any durable append must do, to compare with: write one page and sync it."""
    file.write(bytes(4096))
    os.fsync(file.fileno())


def times_ms(call: Callable[[int], object], n_calls: int) -> list[float]:
    """Time each call by itself, leaving out the first ones."""
    times = []
    for step in range(N_WARMUP + n_calls):
        start = time.perf_counter()
        call(step)
        times.append((time.perf_counter() - start) * 1e3)
    return times[N_WARMUP:]


def median(times_ms: list[float]) -> float:
    return round(statistics.median(times_ms), 4)


def percentile(times_ms: list[float], percent: int) -> float:
    return round(statistics.quantiles(times_ms, n=100)[percent - 1], 4)


if __name__ == "__main__":
    main(*sys.argv[1:])
