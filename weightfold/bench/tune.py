"""Measure what each width of each channel group takes in a runtime on this machine.

Each point is the whole network with one group narrowed, written as ONNX and run in turns with the network as it is.
Groups of the same shapes, as in repeated blocks, are measured once. Values do not matter to the time, so channels are
cut without regard to them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from weightfold.bench.timing import Times, interleaved, ratio, this_machine
from weightfold.config import nearest
from weightfold.errors import ConfigError, ExportError
from weightfold.export.example import draw, zeros
from weightfold.export.onnx_graph import to_onnx
from weightfold.export.source import Source
from weightfold.graph import ChannelGraph, ChannelGroup, trace
from weightfold.kernels import Tuned
from weightfold.latency import cut
from weightfold.runtime import Loaded
from weightfold.runtime.onnx_runtime import session
from weightfold.runtime.require import require

TARGETS = ("onnx-cpu",)
POINTS = 12
"""Widths of a group that are measured, about."""
NARROWEST = 0.2
"""Share of a group's channels that the narrowest one has."""
NOISE = 1.03
"""From how many times the dense network's time a plan counts as slower."""
SLOWER = "the narrowed network takes"
"""Stands in the reason of every refusal of a plan that is slower."""

Progress = Callable[[int, int, str], None]
"""Told points done, all points, and what is measured."""


def tune(
    source: Source,
    target: str = "onnx-cpu",
    *,
    batch: int = 1,
    threads: int = 1,
    seconds: float = 0.4,
    groups: Sequence[str] | None = None,
    progress: Progress = lambda *_: None,
) -> Tuned:
    """Measure latencies by group and width.

    Args:
        source: the network, before it is made smaller.
        target: of `TARGETS`.
        batch: inputs a call.
        threads: of the runtime.
        seconds: of timing for each point.
        groups: names of the groups to measure; by default all whose channels can be removed.
        progress: told after each point.
    Returns:
        tuned: milliseconds, scaled to the dense network's quickest call.
    Raises:
        ConfigError: the target or a group is unknown, or no group can be narrowed.
        ExportError: the runtime is not installed, or cannot express the network.
    """
    _check_target(target)
    graph = trace(source.model, zeros(source.inputs))
    found = _groups(graph, groups)
    kinds: dict[Any, list[ChannelGroup]] = {}
    for group in found:
        kinds.setdefault(_kind(graph, group), []).append(group)
    dense = _session(source, threads)
    inputs = _inputs(source, batch)
    points = [(members[0], width) for members in kinds.values() for width in ladder(members[0])]
    scale = interleaved({"dense": lambda: dense.run(inputs)}, seconds=seconds)["dense"].best
    measured: dict[str, dict[int, float]] = {m[0].name: {m[0].n_channels: scale} for m in kinds.values()}
    for at, (group, width) in enumerate(points):
        narrow = _session(replace(source, model=cut(source.model, graph, {group.name: width})), threads)
        measured[group.name][width] = scale * _relative(dense, narrow, inputs, seconds)
        progress(at + 1, len(points), f"{group.name} {width}")
    table = {g.name: measured[members[0].name] for members in kinds.values() for g in members}
    shape = (batch, *source.inputs[0].shape[1:])
    return Tuned(target, {g.name: table[g.name] for g in found}, shape, threads, this_machine())


def _relative(dense: Loaded, narrow: Loaded, inputs: list[Any], seconds: float) -> float:
    """Time of a narrowed network over the dense one's: the quickest calls of both, taken in turns."""
    times = interleaved({"dense": lambda: dense.run(inputs), "narrow": lambda: narrow.run(inputs)}, seconds=seconds)
    return times["narrow"].best / times["dense"].best


def ladder(group: ChannelGroup) -> list[int]:
    """The widths of a group that are measured, from wide to narrow, without the full one.

    Example:
        >>> from types import SimpleNamespace
        >>> ladder(SimpleNamespace(n_channels=64, block=None))[:4]
        [60, 56, 52, 48]
        >>> ladder(SimpleNamespace(n_channels=6, block=None))
        [5, 4, 3, 2]
    """
    blocks = 1 if group.block is None else int(group.block.max()) + 1
    step = group.n_channels * (1 - NARROWEST) / POINTS
    nice = 1 << max(math.floor(math.log2(step)), 0) if step >= 1 else 1
    unit = math.lcm(blocks, nice)
    least = max(unit, math.ceil(NARROWEST * group.n_channels))
    return list(range((group.n_channels - 1) // unit * unit, least - 1, -unit))


def _groups(graph: ChannelGraph, names: Sequence[str] | None) -> list[ChannelGroup]:
    usable = {g.name: g for g in graph if g.kind == "channels" and "remove" in g.admits and g.role("write")}
    for name in names or ():
        if name not in usable:
            raise ConfigError(f"No group '{name}' can be narrowed.", remedy=nearest(name, usable))
    if not usable:
        raise ConfigError("No group of this network can be narrowed: none admits 'remove' for single channels.")
    return [usable[name] for name in (names or usable)]


def _kind(graph: ChannelGraph, group: ChannelGroup) -> Any:
    """What groups must share to take the same time: the shapes that they cut, and how."""
    axes = sorted((axis.role, graph.shapes[axis.tensor], axis.dim, axis.size) for axis in group.axes)
    return group.n_channels, None if group.block is None else tuple(group.block.tolist()), tuple(axes)


def _session(source: Source, threads: int) -> Loaded:
    return session(to_onnx(source).SerializeToString(), Path("network.onnx"), threads=threads)


def _inputs(source: Source, batch: int) -> list[Any]:
    args, named = draw(source.inputs, batch=batch)
    return [value.numpy() for value in (*args, *named.values())]


def _check_target(target: str) -> None:
    if target not in TARGETS:
        raise ConfigError(f"There is no target '{target}' to tune for.", remedy=nearest(target, TARGETS))
    require("onnxruntime")


# whole plans ----------------------------------------------------------------------------------------------------------


def race(dense: Source, narrow: Source, *, batch: int = 1, threads: int = 1, seconds: float = 2.0) -> dict[str, Times]:
    """Time two networks in ONNX Runtime, in turns.

    Returns:
        times: of "dense" and "narrow".
    """
    inputs = _inputs(dense, batch)
    runs = {"dense": _session(dense, threads), "narrow": _session(narrow, threads)}
    return interleaved({name: (lambda one=one: one.run(inputs)) for name, one in runs.items()}, seconds=seconds)


def refuse_slower_plan(
    source: Source, widths: Mapping[str, int], target: str = "onnx-cpu", *, batch: int = 1, threads: int = 1
) -> tuple[float, float]:
    """Measure a plan of widths on copies before anything is changed, and refuse it where it would be slower.

    Args:
        source: the network as it is.
        widths: channels left, by group name.
    Returns:
        dense_ms, narrow_ms: medians.
    Raises:
        ExportError: the narrowed network takes longer; gives both times.
    """
    _check_target(target)
    graph = trace(source.model, zeros(source.inputs))
    narrow = replace(source, model=cut(source.model, graph, dict(widths)))
    return check_not_slower(source, narrow, target, batch=batch, threads=threads)


def check_runs(source: Source, target: str = "onnx-cpu") -> None:
    """Find out before anything is trained whether a network can be timed.

    Raises:
        ConfigError: the target is unknown.
        ExportError: the runtime is not installed, or cannot express the network.
    """
    _check_target(target)
    _session(source, 1)


def check_not_slower(
    dense: Source, narrow: Source, target: str = "onnx-cpu", *, batch: int = 1, threads: int = 1
) -> tuple[float, float]:
    """Measure two networks and refuse the second where it is slower; see `refuse_slower_plan`."""
    times = race(dense, narrow, batch=batch, threads=threads)
    slow = ratio(times["narrow"], times["dense"])
    if slow > NOISE:
        raise ExportError(
            f"On {target} {SLOWER} {times['narrow'].p50:.3f} ms, {slow:.2f} times the "
            f"{times['dense'].p50:.3f} ms of the dense one (batch {batch}, {threads} thread(s)).",
            remedy="Choose other widths: weightfold tune finds those that the kernels like; give them with --tuned.",
        )
    return times["dense"].p50, times["narrow"].p50


def pairs(table: Tuned) -> Iterator[tuple[str, int, float, bool]]:
    """Every measured point: group, width, milliseconds, whether it is liked."""
    for name, rows in table.groups.items():
        liked = table.liked(name)
        for width, ms in sorted(rows.items(), reverse=True):
            yield name, width, ms, width in liked
