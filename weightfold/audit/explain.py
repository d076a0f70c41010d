"""What became of one channel: kept or removed, when, why, at what price, into whom, and how to go back.

Channels are counted as in the network before any edit. A removed channel is followed into the kept one that is most
like it, and on from there when that one was removed later.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from weightfold.audit.history import Change, History, number, step_of
from weightfold.audit.maps import Maps
from weightfold.audit.place import find_place
from weightfold.errors import ConfigError

Blob = Callable[[str], bytes]
Facts = dict[str, Any]

N_PARTNERS = 8
"""Coefficients that are listed of each reader, the largest first."""


def explain(history: History, layer: str, channel: int, get_blob: Blob | None = None) -> Facts:
    """Tell what became of a channel.

    Args:
        history: of the run.
        layer: a group, module, tensor or axis; see `find_place`.
        channel: its number in the network before any edit.
        get_blob: gives stored bytes by digest; without it the coefficients of the maps are left out.
    Returns:
        facts: plain data. "state" is "kept", "removed", "frozen", or "lost" where an edit of another group took the
            channel along; "removed" tells of the edit that removed it, "takes" who was folded into it, "way" where what
            it computed went, "events" every edit of its group that it saw.
    Raises:
        ConfigError: the layer is unknown (with the nearest names) or has no such channel.
        LedgerError: a stored map is missing or damaged.
    """
    place = find_place(history, layer)
    if not place.group:
        _check_range(channel, range(place.channels), layer, place.axis)
        return {
            "layer": layer, "axis": place.axis, "channel": channel, "state": "frozen", "reason": place.frozen,
        }  # fmt: skip
    group = place.group
    mine = history.of_group(group)
    known = mine[0].original if mine else tuple(range(history.groups[group].channels))
    _check_range(channel, known, layer, history.numbering(group))
    end = _end(mine, channel)
    now = history.survivors(group)
    facts: Facts = {
        "layer": layer,
        "group": group,
        "numbering": history.numbering(group),
        "axis": place.axis,
        "channel": channel,
        "channels_at_start": len(known),
        "channels_now": history.widths().get(group, len(now)),
        "state": "removed" if end else "kept" if channel in now else "lost",
        "place_now": now.index(channel) if channel in now else None,
        "admits": list(history.groups[group].admits),
        "refused": dict(history.groups[group].refused),
        "events": [_event(history, change, channel) for change in mine if channel in change.original],
        "removed": _removal(history, end, channel, get_blob) if end else None,
        "way": _way(mine, channel, get_blob),
        "takes": [taken for change in mine for taken in _takes(change, channel, get_blob)],
        "attempts_on_group": _refusals(history, group),
    }
    if facts["state"] == "lost":
        facts["lost_before"] = next((c.seq for c in mine if c.undone is None and channel not in c.original), None)
    return facts


def _check_range(channel: int, known: tuple[int, ...] | range, layer: str, numbering: str) -> None:
    if channel in known:
        return
    span = f"0 to {max(known)}" if len(known) == max(known, default=-1) + 1 else f"{min(known)} to {max(known)}"
    raise ConfigError(
        f"'{layer}' has no channel {channel}: its {len(known)} channels are numbered {span} ({numbering}).",
        remedy="Count channels from 0, as in the network before any edit.",
    )


def _end(changes: tuple[Change, ...], channel: int) -> Change | None:
    """The standing edit that removed a channel."""
    return next((c for c in changes if c.undone is None and channel in c.removed), None)


def _event(history: History, change: Change, channel: int) -> Facts:
    return {
        "seq": change.seq,
        "hash": change.entry.hash,
        "step": change.step,
        "epoch": history.epoch(change.step),
        "kind": change.kind,
        "method": change.body.get("method", ""),
        "channels": [len(change.original), len(change.carry)],
        "channel": "removed" if channel in change.removed else "kept",
        "undone_by": change.undone.seq if change.undone else None,
    }


def _removal(history: History, change: Change, channel: int, get_blob: Blob | None) -> Facts:
    """All that the entry says of the channel that it removed."""
    body, at = change.body, change.original.index(channel)
    why = body.get("why", {})
    dropped = [item for item in why.get("dropped", []) if isinstance(item, dict)]
    rank = next((k for k, item in enumerate(dropped, 1) if item.get("channel") == at), None)
    own = dropped[rank - 1] if rank else {}
    return {
        **_event(history, change, channel),
        "time": change.entry.time,
        "learning_rates": change.entry.aside.get("learning_rates", []),
        "rank": rank,
        "of": len(change.removed),
        "cost": number(own.get("cost", own.get("score"))),
        "partner": _partner(change, own),
        "coefficients": _coefficients(change, at, get_blob),
        "why": {key: value for key, value in why.items() if key not in ("dropped", "rejected")},
        "rejected": why.get("rejected", []),
        "plan": _plan(history, change),
        "price": _price(history, body),
        "gain": _gain(history, change),
        "together_with": list(change.together),
        "undo": body.get("proof", {}).get("undo"),
        "proof": body.get("proof", {}),
        "reset": body.get("reset", []),
    }


def _plan(history: History, change: Change) -> Facts | None:
    """The plan that an edit carries out: what was weighed, and why this was chosen."""
    made = [e for e in history.entries if e.kind == "plan" and e.seq < change.seq and step_of(e) == change.step]
    if not made:
        return None
    return {"seq": made[-1].seq, **made[-1].body}


def _partner(change: Change, dropped: Mapping[str, Any]) -> Facts | None:
    """The kept channel that is most like a removed one, in the original numbering."""
    at = dropped.get("partner")
    if type(at) is not int or not 0 <= at < len(change.original):
        return None
    return {
        "channel": change.original[at],
        "correlation": number(dropped.get("correlation")),
        "coefficient": number(dropped.get("coefficient")),
    }


def _maps(change: Change, get_blob: Blob | None) -> Maps | None:
    digest = change.body["what"]["edit"].get("maps")
    if get_blob is None or not digest:
        return None
    return Maps.parse(get_blob(digest), f"The maps of entry {change.seq}")


def _coefficients(change: Change, at: int, get_blob: Blob | None) -> list[Facts]:
    """By which kept channels each reader expresses a removed one, the largest coefficients first."""
    maps, after = _maps(change, get_blob), change.after
    if maps is None:
        return []
    found = []
    for reader, name in maps.readers(len(change.original)).items():
        row = maps.row(name, at)
        order = sorted((k for k, value in enumerate(row) if value), key=lambda k: -abs(row[k]))
        found.append(
            {
                "reader": reader,
                "nonzero": len(order),
                "partners": [{"channel": after[k], "coefficient": row[k]} for k in order[:N_PARTNERS]],
            }
        )
    return found


def _takes(change: Change, channel: int, get_blob: Blob | None) -> list[Facts]:
    """Which removed channels an edit folded into a kept one: first those that are most like it."""
    if change.undone is not None or channel not in change.after:
        return []
    why = change.body.get("why", {})
    nearest = {
        change.original[item["channel"]]: partner
        for item in why.get("dropped", [])
        if isinstance(item, dict) and (partner := _partner(change, item)) and partner["channel"] == channel
    }
    strength = _column(change, channel, get_blob)
    others = sorted((c for c in strength if c not in nearest), key=lambda c: -abs(strength[c]))
    order = [*sorted(nearest, key=lambda c: -abs(nearest[c]["correlation"] or 0)), *others[:N_PARTNERS]]
    return [
        {
            "channel": taken,
            "seq": change.seq,
            "step": change.step,
            "nearest": taken in nearest,
            "correlation": nearest[taken]["correlation"] if taken in nearest else None,
            "coefficient": strength.get(taken, nearest[taken]["coefficient"] if taken in nearest else None),
        }
        for taken in order
    ]


def _column(change: Change, channel: int, get_blob: Blob | None) -> dict[int, float]:
    """With which coefficient a kept channel stands in for each removed one, in the reader where that is largest."""
    maps = _maps(change, get_blob)
    if maps is None:
        return {}
    strongest: dict[int, float] = {}
    gone, k = set(change.removed), change.after.index(channel)
    for name in maps.readers(len(change.original)).values():
        for at, value in enumerate(maps.column(name, k)):
            taken = change.original[at]
            if taken in gone and value and abs(value) > abs(strongest.get(taken, 0.0)):
                strongest[taken] = value
    return strongest


def _way(changes: tuple[Change, ...], channel: int, get_blob: Blob | None) -> list[Facts]:
    """Follow a removed channel into its nearest partner, and on when that one was removed in turn."""
    way: list[Facts] = []
    for change in changes:
        if change.undone is not None or channel not in change.removed:
            continue
        into = _nearest(change, change.original.index(channel), get_blob)
        if into is None:
            break
        way.append({"from": channel, "into": into, "seq": change.seq, "step": change.step})
        channel = into
    return way


def _nearest(change: Change, at: int, get_blob: Blob | None) -> int | None:
    """The partner that the entry names, else the kept channel with the largest coefficient."""
    dropped = change.body.get("why", {}).get("dropped", [])
    own = next((item for item in dropped if isinstance(item, dict) and item.get("channel") == at), {})
    partner = _partner(change, own)
    if partner is not None:
        return partner["channel"]
    shares = [share for item in _coefficients(change, at, get_blob) for share in item["partners"][:1]]
    return max(shares, key=lambda share: abs(share["coefficient"]))["channel"] if shares else None


def _price(history: History, body: Mapping[str, Any]) -> Facts:
    price = body.get("price", {})
    attempts = [_attempt(item) for item in price.get("attempts", []) if isinstance(item, dict)]
    last = attempts[-1] if attempts else {}
    return {
        **{key: value for key, value in price.items() if key != "attempts"},
        "predicted": number(price.get("predicted")),
        "measured": last.get("mean"),
        "interval": last.get("interval"),
        "limit": number(history.start.get("max_increase")),
        "attempts": attempts,
    }


def _attempt(record: Mapping[str, Any]) -> Facts:
    mean, upper = number(record.get("mean")), number(record.get("upper"))
    interval = None if mean is None or upper is None else [2 * mean - upper, upper]
    return {**record, "mean": mean, "upper": upper, "interval": interval}


def _gain(history: History, change: Change) -> Facts:
    """What the edit saved, with those that were made at once with it: each measured quantity before and after."""
    peers = (change.group, *change.together)
    earlier = [
        c
        for c in history.changes
        if c.seq < change.seq
        and (c.undone is None or c.undone.seq > change.seq)
        and not (change.together and c.step == change.step and c.group in peers)
    ]
    before = earlier[-1].body.get("gain", {}) if earlier else history.start
    return {
        key: {"before": number(before.get(key)), "after": value} for key, value in change.body.get("gain", {}).items()
    }


def _refusals(history: History, group: str) -> list[Facts]:
    """Edits of the group that were tried and taken back at once."""
    return [
        {
            "seq": entry.seq,
            "step": entry.body.get("step"),
            "method": entry.body.get("method", ""),
            "attempts": [_attempt(item) for item in entry.body.get("attempts", []) if isinstance(item, dict)],
        }
        for entry in history.entries
        if entry.kind == "rollback" and entry.body.get("group") == group
    ]
