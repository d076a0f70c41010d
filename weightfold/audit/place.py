"""Find the channel group that a user means by the name of a layer, a tensor, one of its axes, or the group itself."""

from __future__ import annotations

import re
from dataclasses import dataclass

from weightfold.audit.history import History
from weightfold.config import nearest
from weightfold.errors import ConfigError

_AXIS = re.compile(r"(.+)\[(\d+)\]")
_WRITES = ("write", "pointwise", "both")


@dataclass(frozen=True)
class Place:
    """What a name stands for.

    Args:
        group: name of the channel group; "" if the axis is frozen.
        axis: the axis that was meant, as "tensor[dimension]"; "" if the group itself was named.
        frozen: why no edit may touch it; "" if there is a group.
        channels: length of a frozen axis; 0 otherwise.
    """

    group: str
    axis: str = ""
    frozen: str = ""
    channels: int = 0


def find_place(history: History, layer: str) -> Place:
    """Find a group.

    Args:
        layer: a group, a module, a tensor (its rows are meant), or an axis as "tensor[dimension]".
    Raises:
        ConfigError: there is none, with the nearest names; or several, with their names.
    """
    if layer in history.groups:
        return Place(layer)
    found = _members(history, layer)
    if len(found) == 1:
        ((group, axis),) = found.items()
        return Place(group, axis)
    if found:
        raise ConfigError(
            f"'{layer}' belongs to {len(found)} channel groups.",
            remedy=f"Name the one that you mean: {', '.join(found)}.",
        )
    for tensor, dim, n, reason in history.frozen:
        if layer in (tensor, f"{tensor}[{dim}]") or layer == tensor.rpartition(".")[0]:
            return Place("", f"{tensor}[{dim}]", reason, n)
    raise ConfigError(
        f"The ledger '{history.path}' knows no layer '{layer}'.", remedy=_hint(layer, history) or _no_groups(history)
    )


def _members(history: History, layer: str) -> dict[str, str]:
    """Groups of an axis, or those that a tensor or a module writes -> the axis that belongs to each."""
    match = _AXIS.fullmatch(layer)
    found: dict[str, str] = {}
    for change in history.changes:
        for tensor, dim, role in change.members:
            named = layer in (tensor, tensor.rpartition(".")[0]) and dim == 0 and role in _WRITES
            if named or (match and (tensor, dim) == (match[1], int(match[2]))):
                found.setdefault(change.group, f"{tensor}[{dim}]")
    return found


def _hint(layer: str, history: History) -> str:
    modules = {t.rpartition(".")[0] for c in history.changes for t, dim, _ in c.members if dim == 0}
    names = {*history.groups, *modules, *(tensor.rpartition(".")[0] for tensor, *_ in history.frozen)} - {""}
    return nearest(layer.removesuffix(".weight").removesuffix(".bias"), names) if names else ""


def _no_groups(history: History) -> str:
    return "It names no group at all." if history.start else "The run was not prepared: it holds no channel groups."
