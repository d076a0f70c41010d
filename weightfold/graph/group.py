"""Channel groups: sets of axes that must change together, and the edits that each of them admits."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

from weightfold.config import nearest
from weightfold.errors import GraphError

EDITS = ("permute", "rescale", "sign", "remove", "merge")
"""Kinds of edit a group may admit; ``merge`` covers fold and split as well."""


@dataclass(frozen=True, eq=False)
class Axis:
    """One dimension of one tensor that belongs to a group.

    Args:
        tensor: name in the model's state (parameters and persistent buffers).
        dim: the dimension.
        role: "write" (rows, bias), "pointwise" (norm scale, running mean), "read" (columns), "both" (tied weights).
        index: positions of each channel along ``dim``, shape (C, M), -1 where a channel has no such position.
        slabs: number of equal slabs of dimension 0 in which positions have their own meaning (grouped convolution);
            then positions count through (slab, position).
        size: length of the dimension (times slabs).
        tap: (module path, dimension of its first input) where all that this axis reads can be observed; None where it
            reads anything else as well.
    """

    tensor: str
    dim: int
    role: str
    index: Tensor
    size: int
    slabs: int = 1
    tap: tuple[str, int] | None = None

    @property
    def key(self) -> tuple[str, int]:
        return self.tensor, self.dim


@dataclass(frozen=True, eq=False)
class Gauge:
    """A freedom that leaves the function alone: scale by s here (exponent +1) and by 1/s there (exponent -1).

    ``kind`` is "positive" (any s > 0) or "sign" (s = -1 as well). ``channel`` names the channel of each freedom,
    shape (G,); axes hold (tensor, dim, slabs, exponent, positions (G, M)).
    """

    kind: str
    channel: Tensor
    axes: tuple[tuple[str, int, int, int, Tensor], ...]

    def __len__(self) -> int:
        return self.channel.numel()


@dataclass(frozen=True, eq=False)
class ChannelGroup:
    """Channels of one kind.

    Args:
        name: where the first writer lives; unique in the graph.
        kind: "channels", or "blocks" (attention heads, groups of a grouped convolution).
        axes: everything that must change together.
        block: block of each channel, shape (C,), or None. Permutations stay within blocks; every block must keep
            the same number of channels.
        admits: edits that are exact on this group.
        reasons: why an edit is not admitted, with the source line.
        written: lines that name a size or a position of these channels in numbers, as " (file:line: code)".
        attributes: integer attributes of modules that must follow the group's size: (module path, attribute, factor).
        read_elsewhere: whether more than the axes of role "read" reads the channels: a sum, another output, a weight
            that is not zero where its parameter is. Then a channel whose reading weights are zero is not unread.
    """

    name: str
    kind: str
    n_channels: int
    axes: tuple[Axis, ...]
    block: Tensor | None
    admits: frozenset[str]
    reasons: Mapping[str, str]
    gauges: tuple[Gauge, ...] = ()
    attributes: tuple[tuple[str, str, Fraction], ...] = ()
    zero_at_zero: bool = True
    written: tuple[str, ...] = ()
    read_elsewhere: bool = False

    @property
    def free(self) -> bool:
        return "permute" in self.admits

    def role(self, role: str) -> tuple[Axis, ...]:
        return tuple(axis for axis in self.axes if axis.role == role)

    def axis(self, tensor: str, dim: int) -> Axis:
        return next(axis for axis in self.axes if axis.key == (tensor, dim))

    def without(self, kinds: set[str], reason: str) -> ChannelGroup:
        """The same group with some edits revoked."""
        lost = dict.fromkeys(kinds & self.admits, reason)
        return replace(self, admits=self.admits - kinds, reasons={**self.reasons, **lost})

    def __repr__(self) -> str:
        axes = ", ".join(f"{a.tensor}[{a.dim}]:{a.role}" for a in self.axes[:6])
        more = f", +{len(self.axes) - 6}" if len(self.axes) > 6 else ""
        return f"ChannelGroup({self.name!r}, {self.n_channels} {self.kind}, admits={sorted(self.admits)}, {axes}{more})"


@dataclass(frozen=True)
class Frozen:
    """A dimension, or a part of one, that no edit may touch."""

    tensor: str
    dim: int
    n: int
    reason: str


@dataclass(frozen=True)
class Proof:
    """Whether the admitted edits of a graph were run on the model, and what that showed; true if they were.

    Args:
        modes: "evaluation", "training": those whose outputs were compared.
        groups: names of the groups that were tried.
        withdrawn: (group, kind of trial, reason) of what the rules had admitted and the model refuted.
        left_out: why there was no proof, or which part of it is missing; empty where nothing is.
    """

    modes: tuple[str, ...] = ()
    groups: tuple[str, ...] = ()
    withdrawn: tuple[tuple[str, str, str], ...] = ()
    left_out: str = ""

    def __bool__(self) -> bool:
        return bool(self.modes)

    @property
    def flags(self) -> tuple[bool, ...]:
        """The modes as modules have them: True for training."""
        return tuple(mode == "training" for mode in self.modes)

    def __str__(self) -> str:
        if not self:
            return f"not proved: {self.left_out}"
        also = f" (without {self.left_out})" if self.left_out else ""
        n = len(self.withdrawn)
        lost = f"; {n} kinds of edit withdrawn" if n else ""
        return f"{len(self.groups)} groups proved on this model in {' and '.join(self.modes)}{also}{lost}"


@dataclass(frozen=True, eq=False)
class ChannelGraph:
    """What of a model is a channel: its groups, what is frozen and why.

    ``proved`` says whether the admitted edits were run on the model (`weightfold.graph.proof`).
    ``followers`` names tensors that methods hold beside the weights and that every edit reaches; averaged copies and
    files do not hold them.

    Example:
        >>> import torch, weightfold as wf
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> graph = wf.trace(net, torch.zeros(1, 4))
        >>> [(g.name, g.n_channels, sorted(g.admits)) for g in graph]
        [('0', 8, ['merge', 'permute', 'remove', 'rescale'])]
    """

    groups: tuple[ChannelGroup, ...]
    frozen: tuple[Frozen, ...]
    shapes: Mapping[str, tuple[int, ...]]
    aliases: Mapping[str, str] = field(default_factory=dict)
    operators: tuple[str, ...] = ()
    constants: tuple[float, ...] = ()
    followers: frozenset[str] = frozenset()
    proved: Proof = Proof(left_out="the admitted edits are those of the rules; none was run")

    def __iter__(self) -> Iterator[ChannelGroup]:
        return iter(self.groups)

    def __len__(self) -> int:
        return len(self.groups)

    def __getitem__(self, name: str) -> ChannelGroup:
        for group in self.groups:
            if group.name == name:
                return group
        raise GraphError(f"The graph has no group '{name}'.", remedy=nearest(name, [g.name for g in self.groups]))

    def with_groups(self, groups: tuple[ChannelGroup, ...]) -> ChannelGraph:
        return replace(self, groups=groups)

    def containing(self, tensor: str, dim: int, kind: str = "channels") -> ChannelGroup | None:
        """The group that dimension ``dim`` of a tensor belongs to, if it belongs to one."""
        return next((g for g in self.groups if g.kind == kind and any(a.key == (tensor, dim) for a in g.axes)), None)

    def validate(self) -> None:
        """Check every group against the shapes of the tensors that it names.

        Raises:
            GraphError: an axis lies outside its tensor, or two channels claim one position.
        """
        for group in self.groups:
            for axis in group.axes:
                _validate_axis(group, axis, self.shapes)

    def summary(self) -> list[dict[str, Any]]:
        """One plain record per group, for tables and JSON."""
        return [
            {
                "name": g.name,
                "kind": g.kind,
                "channels": g.n_channels,
                "blocks": 1 if g.block is None else int(g.block.max()) + 1,
                "admits": sorted(g.admits),
                "axes": [{"tensor": a.tensor, "dim": a.dim, "role": a.role, "tap": a.tap and a.tap[0]} for a in g.axes],
                "reasons": dict(g.reasons),
            }
            for g in self.groups
        ]


def _validate_axis(group: ChannelGroup, axis: Axis, shapes: Mapping[str, tuple[int, ...]]) -> None:
    shape = shapes.get(axis.tensor)
    if shape is None:
        raise GraphError(f"Group '{group.name}' names the tensor '{axis.tensor}', which the model does not have.")
    used = axis.index[axis.index >= 0]
    size = shape[axis.dim] * axis.slabs
    if used.numel() and int(used.max()) >= size:
        raise GraphError(
            f"Group '{group.name}' reaches position {int(used.max())} of '{axis.tensor}' dimension {axis.dim}, "
            f"which has {size}.",
            remedy="The model changed after it was traced: trace it again.",
        )
    if torch.unique(used).numel() != used.numel():
        raise GraphError(
            f"Two channels of group '{group.name}' claim one position of '{axis.tensor}' dimension {axis.dim}."
        )
