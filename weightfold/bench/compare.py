"""Compare two networks in every runtime that is installed: latency, throughput, memory, bytes of the files.

Both networks are written for each runtime, loaded there, and timed in turns, warm, one process, threads stated. Engines
follow one another, so that only one runtime's threads are awake at a time.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from weightfold.bench.compiled import time_compiled
from weightfold.bench.engines import ENGINES, Ready, ready
from weightfold.bench.memory import measure_bytes
from weightfold.bench.timing import Times, interleaved, ratio, this_machine
from weightfold.config import nearest
from weightfold.errors import ConfigError, ExportError, WeightfoldError
from weightfold.export.example import draw
from weightfold.export.source import Source

SLOWER = 1.05
"""From how many times the original's median a network counts as slower: less than that is noise."""

Told = Callable[[str], None]
"""Told what is measured next."""


@dataclass(frozen=True)
class Row:
    """One network in one runtime at one batch size.

    Args:
        engine: of `ENGINES`.
        network: "original" or "compressed".
        batch: inputs a call.
        p50_ms: median latency of a call.
        p95_ms: what 95 of 100 calls stay below.
        throughput: inputs a second, by the median.
        speedup: how many times as fast as the original in the same runtime, paired; None for the original itself.
        memory_bytes: growth of a fresh process that loads and runs the file; None where it was not measured.
        file_bytes: of the file, packed for torch where the network has codes.
        rounds: calls that were timed.
    """

    engine: str
    network: str
    batch: int
    p50_ms: float
    p95_ms: float
    throughput: float
    speedup: float | None
    memory_bytes: int | None
    file_bytes: int
    rounds: int


@dataclass(frozen=True)
class Bench:
    """What was measured.

    Args:
        rows: by engine, batch and network.
        skipped: why an engine is missing, by engine.
        threads: of each runtime.
        machine: what it was measured on.
    """

    rows: tuple[Row, ...]
    skipped: Mapping[str, str]
    threads: int
    machine: Mapping[str, Any] = field(default_factory=dict)

    @property
    def slower(self) -> list[str]:
        """Where the compressed network is slower than its original, with the figures."""
        return [
            f"{row.engine}, batch {row.batch}: {row.p50_ms:.3f} ms, {1 / row.speedup:.2f} times the original's"
            for row in self.rows
            if row.speedup is not None and row.speedup < 1 / SLOWER
        ]

    def to_record(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "machine": dict(self.machine),
            "threads": self.threads,
            "rows": [asdict(row) for row in self.rows],
            "skipped": dict(self.skipped),
            "slower": self.slower,
        }


def bench(
    compressed: Source,
    original: Source | None = None,
    *,
    engines: Sequence[str] = ENGINES,
    batches: Sequence[int] = (1, 64),
    threads: int = 1,
    seconds: float = 2.0,
    memory: bool = True,
    told: Told = lambda _: None,
) -> Bench:
    """Measure a network, paired with its original where there is one.

    Args:
        compressed: the network.
        original: what it was made from; takes the same inputs.
        engines: runtimes, of `ENGINES`; one that is not installed is skipped, with the reason.
        batches: inputs a call.
        threads: of each runtime.
        seconds: of timing for each engine and batch size.
        memory: whether to measure memory, in a process of its own for each file.
        told: told what is measured next.
    Raises:
        ConfigError: an engine is unknown, the networks take no single input, or different ones.
    """
    for engine in engines:
        if engine not in ENGINES:
            raise ConfigError(f"There is no engine '{engine}'.", remedy=nearest(engine, ENGINES))
    sources = {"compressed": compressed} if original is None else {"original": original, "compressed": compressed}
    _check_inputs(sources)
    rows: list[Row] = []
    skipped: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as name, _threads(threads):
        folder = Path(name)
        for engine in engines:
            told(engine)
            try:
                made = {who: ready(source, engine, folder, who, threads=threads) for who, source in sources.items()}
                for batch in batches:
                    rows += _measured(engine, made, compressed, batch, folder, threads, seconds, memory=memory)
            except WeightfoldError as error:
                skipped[engine] = error.message if error.remedy is None else f"{error.message} -> {error.remedy}"
    return Bench(tuple(rows), skipped, threads, this_machine())


def _check_inputs(sources: Mapping[str, Source]) -> None:
    shapes = {name: [(i.shape[1:], i.dtype) for i in source.inputs] for name, source in sources.items()}
    for name, found in shapes.items():
        if len(found) != 1:
            raise ConfigError(
                f"The {name} network takes {len(found)} example inputs; one is needed to time it.",
                remedy="Pass one --example, such as 1x3x32x32.",
            )
    if len({str(found) for found in shapes.values()}) > 1:
        raise ConfigError(f"The networks take different inputs: {shapes}.", remedy="Compare networks of one task.")


def _measured(
    engine: str,
    made: Mapping[str, Ready],
    source: Source,
    batch: int,
    folder: Path,
    threads: int,
    seconds: float,
    *,
    memory: bool,
) -> list[Row]:
    (x,), _ = draw([source.inputs[0].model_copy(update={"name": None})], batch=batch)
    inputs = folder / f"batch{batch}.npy"
    np.save(inputs, x.numpy())
    if engine == "torch.compile":
        files = {who: one.path for who, one in made.items()}
        times = time_compiled(files, inputs, folder, threads=threads, seconds=seconds)
    else:
        value = x if engine == "torch" else x.numpy()
        times = interleaved({who: (lambda run=one.run: run(value)) for who, one in made.items()}, seconds=seconds)
    rows = []
    for who, one in made.items():
        taken = measure_bytes(one.path, inputs, threads=threads) if memory and engine != "torch" else None
        rows.append(_row(engine, who, batch, times, taken, one.file_bytes))
    return rows


def _row(engine: str, who: str, batch: int, times: Mapping[str, Times], memory: int | None, file_bytes: int) -> Row:
    mine = times[who]
    speedup = ratio(times["original"], mine) if who == "compressed" and "original" in times else None
    rate = 1000 * batch / mine.p50
    return Row(engine, who, batch, mine.p50, mine.p95, rate, speedup, memory, file_bytes, len(mine.ms))


@contextmanager
def _threads(n: int) -> Any:
    """Have torch take so many threads for a while."""
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def refuse_slower(found: Bench) -> None:
    """Refuse a network that is slower than its original anywhere.

    Raises:
        ExportError: it is; gives engine, batch and figures.
    """
    if found.slower:
        raise ExportError(
            f"The compressed network is slower than its original: {'; '.join(found.slower)}.",
            remedy="Choose widths that the kernels like: weightfold tune, then fold --tuned FILE.",
        )
