"""How two runs differ: the first entry where their chains part, settings, structure, decisions, results, seconds."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from itertools import zip_longest
from pathlib import Path
from typing import Any

from weightfold.audit.history import Change, History, number, read_history
from weightfold.ledger import Entry

Facts = dict[str, Any]
N_PATHS = 5
"""Differing facts that are named of the first entries that differ."""
SCORES = ("score", "loss", "parameters", "macs", "fingerprint")


def compare(first: str | Path, second: str | Path) -> Facts:
    """Compare the ledgers of two runs.

    Args:
        first: folder of a run, or a ledger file.
        second: another one.
    Returns:
        facts: "equal" (the same head); "parting", the first entries that differ and in what; "settings", "structure",
            "decisions", "results" and "seconds" of both.
    Raises:
        LedgerError: one is missing or damaged.
    """
    a, b = read_history(first), read_history(second)
    return {
        "equal": a.head == b.head,
        "heads": [a.head, b.head],
        "entries": [len(a.entries), len(b.entries)],
        "parting": _parting(a, b),
        "settings": [list(item) for item in differing(_settings(a), _settings(b))],
        "same_structure": a.widths() == b.widths() and _same_survivors(a, b),
        "structure": _structure(a, b),
        "decisions": _decisions(a, b),
        "results": _results(a, b),
        "seconds": _seconds(a, b),
    }


def _parting(a: History, b: History) -> Facts | None:
    """The first entries that differ; None if the chains are the same."""
    for seq, (mine, other) in enumerate(zip_longest(a.entries, b.entries)):
        if mine is None or other is None or mine.hash != other.hash:
            return {
                "seq": seq,
                "kinds": [_kind(mine), _kind(other)],
                "hashes": [mine and mine.hash, other and other.hash],
                "steps": [_step(mine), _step(other)],
                "differs": _first_paths(mine, other),
            }
    return None


def _kind(entry: Entry | None) -> str | None:
    return None if entry is None else entry.kind


def _step(entry: Entry | None) -> Any:
    return None if entry is None else entry.body.get("step")


def _first_paths(mine: Entry | None, other: Entry | None) -> list[list[Any]]:
    if mine is None or other is None or mine.kind != other.kind:
        return []
    return [list(item) for item, _ in zip(differing(mine.body, other.body), range(N_PATHS), strict=False)]


def differing(a: Any, b: Any, path: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Yield (path, value, other value) of every leaf in which two plain values differ.

    Example:
        >>> list(differing({"seed": 0, "lr": {"first": 1}}, {"seed": 1, "lr": {}}))
        [('lr.first', 1, None), ('seed', 0, 1)]
    """
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        for key in sorted(a.keys() | b.keys()):
            yield from differing(a.get(key), b.get(key), f"{path}.{key}" if path else str(key))
    elif isinstance(a, list) and isinstance(b, list) and len(a) == len(b) and any(_is_nest(x) for x in (*a, *b)):
        for at, (mine, other) in enumerate(zip(a, b, strict=True)):
            yield from differing(mine, other, f"{path}[{at}]")
    elif a != b or type(a) is not type(b):
        yield path, a, b


def _is_nest(value: Any) -> bool:
    return isinstance(value, Mapping | list)


def _settings(history: History) -> Facts:
    """What was set, and what the result depends on besides."""
    start = history.start
    methods = {str(item.get("name")): item.get("config") for item in start.get("methods", [])}
    own = {key: start[key] for key in ("max_increase", "optimizers", "probe_batches", "total_steps") if key in start}
    return {**history.run, "methods": methods, **own}


def _same_survivors(a: History, b: History) -> bool:
    return all(name in b.groups and a.survivors(name) == b.survivors(name) for name in a.groups)


def _structure(a: History, b: History) -> list[Facts]:
    """Widths and kept sets of every group of either run."""
    names = dict.fromkeys([*a.groups, *b.groups])
    return [_compared(name, a, b) for name in names]


def _width_and_kept(history: History, name: str) -> tuple[int | None, set[int]]:
    if name not in history.groups:
        return None, set()
    return history.widths().get(name), set(history.survivors(name))


def _compared(name: str, a: History, b: History) -> Facts:
    (width, kept), (other_width, other_kept) = _width_and_kept(a, name), _width_and_kept(b, name)
    either = kept | other_kept
    return {
        "group": name,
        "start": [h.groups[name].channels if name in h.groups else None for h in (a, b)],
        "widths": [width, other_width],
        "common": len(kept & other_kept),
        "jaccard": len(kept & other_kept) / len(either) if either else None,
        "only": [sorted(kept - other_kept), sorted(other_kept - kept)],
        "same": (width, kept) == (other_width, other_kept),
    }


def _decisions(a: History, b: History) -> Facts:
    rows_a, rows_b = _made(a), _made(b)
    first = next(
        (
            {"number": at, "runs": [mine, other]}
            for at, (mine, other) in enumerate(zip_longest(rows_a, rows_b))
            if mine is None or other is None or _judged(mine) != _judged(other)
        ),
        None,
    )
    return {"counts": [_counts(a), _counts(b)], "first_difference": first}


def _judged(row: Facts) -> tuple[Any, ...]:
    return tuple(row[key] for key in ("kind", "step", "group", "channels", "kept", "maps"))


def _made(history: History) -> list[Facts]:
    """Decisions in order: accepted edits and refused ones."""
    changes = {change.seq: change for change in history.changes}
    rows = []
    for entry in history.entries:
        if entry.kind in ("edit", "rollback", "refusal", "undo"):
            rows.append(_decision(entry, changes.get(entry.seq)))
    return rows


def _decision(entry: Entry, change: Change | None) -> Facts:
    return {
        "seq": entry.seq,
        "kind": entry.kind,
        "step": entry.body.get("step"),
        "group": change.group if change else str(entry.body.get("group", "")),
        "channels": [len(change.original), len(change.carry)] if change else None,
        "kept": list(change.after) if change else None,
        "maps": change.body["what"]["edit"].get("maps") if change else None,
    }


def _counts(history: History) -> Facts:
    kinds = [entry.kind for entry in history.entries]
    reduced = sum(len(c.body.get("price", {}).get("attempts", [])) > 1 for c in history.changes)
    return {
        "accepted": len(history.changes),
        "reduced": reduced,
        "rolled_back": kinds.count("rollback"),
        "refused": kinds.count("refusal"),
        "undone": sum(change.undone is not None for change in history.changes),
    }


def _results(a: History, b: History) -> Facts:
    """Final measurements of each network of both runs."""
    results = [_last_result(history) for history in (a, b)]
    arms = dict.fromkeys(name for result in results for name in result)
    return {
        arm: {
            key: [result.get(arm, {}).get(key) for result in results]
            for key in SCORES
            if any(key in result.get(arm, {}) for result in results)
        }
        for arm in arms
    }


def _last_result(history: History) -> Mapping[str, Any]:
    found = next((e.body.get("arms", {}) for e in reversed(history.entries) if e.kind == "result"), {})
    return found if isinstance(found, Mapping) else {}


def _seconds(a: History, b: History) -> Facts:
    """Wall clock of training by network, which no hash covers."""
    asides = [next((e.aside for e in reversed(h.entries) if e.kind == "result"), {}) for h in (a, b)]
    arms = dict.fromkeys(key for aside in asides for key in aside)
    return {arm: [number(aside.get(arm)) for aside in asides] for arm in arms}


def shown(value: Any, width: int = 48) -> str:
    """Write a plain value shortly.

    Example:
        >>> shown({"keep": 0.5}), shown(None)
        ('{"keep": 0.5}', '–')
    """
    text = "–" if value is None else value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= width else text[: width - 1] + "…"
