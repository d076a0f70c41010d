"""One small immutable edit, and its constructors.

An edit on a group of C channels makes K of them: what writes a channel becomes ``A @ W`` with A of shape (K, C), what
reads it ``W @ B`` with B of shape (C, K). Every reader may have its own B. Permute, rescale, sign, remove, fold, merge
and split are choices of A and B; edits on one group compose by matrix product.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor

from weightfold.errors import EditError
from weightfold.graph.group import ChannelGroup

Key = tuple[str, int]


@dataclass(frozen=True, eq=False)
class Edit:
    """What becomes of one group's channels.

    Args:
        group: name of the group.
        kind: the constructor's name, for people.
        n_channels: C, the channels before.
        carry: the old channel whose place, norm statistics and optimiser state each new channel takes over, shape (K,).
        write: A of shape (K, C) where writers are mixed; None where each new channel is its ``carry``.
        read: B of shape (C, K); None where nothing but ``carry`` is read.
        reads: B of single readers, by (tensor, dim), in place of ``read``.
        shift: what each reader adds to its output per old channel, shape (C,), by (tensor, dim): folded constants.
        scale: factor of each new channel, shape (K,), spread over the axes by the exponents of gauge ``gauge``.
    """

    group: str
    kind: str
    n_channels: int
    carry: Tensor
    write: Tensor | None = None
    read: Tensor | None = None
    reads: Mapping[Key, Tensor] = field(default_factory=dict)
    shift: Mapping[Key, Tensor] = field(default_factory=dict)
    scale: Tensor | None = None
    gauge: int = 0

    @property
    def n_after(self) -> int:
        """K, the channels after the edit."""
        return self.carry.numel()

    @property
    def A(self) -> Tensor:
        """The writers' map, shape (K, C), float64."""
        if self.write is not None:
            return self.write
        return torch.eye(self.n_channels, dtype=torch.float64)[self.carry]

    @property
    def B(self) -> Tensor:
        """The readers' map, shape (C, K), float64."""
        return self.B_of(None)

    def B_of(self, key: Key | None) -> Tensor:
        """The map of one reader."""
        own = self.reads.get(key) if key is not None else None
        if own is not None:
            return own
        if self.read is not None:
            return self.read
        return torch.eye(self.n_channels, dtype=torch.float64)[self.carry].T

    @property
    def resizes(self) -> bool:
        return self.n_after != self.n_channels

    def then(self, later: Edit) -> Edit:
        """The edit that does this and then another on the same group.

        Raises:
            EditError: the sizes or groups differ, or a rescale lies before a mixing of writers.
        """
        if later.group != self.group or later.n_channels != self.n_after:
            raise EditError(
                f"An edit on {later.n_channels} channels of '{later.group}' cannot follow one that leaves "
                f"{self.n_after} channels of '{self.group}'."
            )
        if self.scale is not None and (later.write is not None or later.read is not None or later.reads):
            raise EditError("A rescale cannot come before an edit that mixes channels.", remedy="Rescale afterwards.")
        if self.scale is not None and later.scale is not None and self.gauge != later.gauge:
            raise EditError("Two rescales of different gauges do not compose.", remedy="Apply them one by one.")
        mixes_write = self.write is not None or later.write is not None
        mixes_read = self.read is not None or later.read is not None
        keys = {*self.reads, *later.reads}
        scale = None if self.scale is None else self.scale[later.carry]
        if later.scale is not None:
            scale = later.scale if scale is None else scale * later.scale
        shift = dict(self.shift)
        for key, vector in later.shift.items():
            carried = self.B_of(key) @ vector.double()
            shift[key] = shift[key] + carried if key in shift else carried
        return Edit(
            group=self.group,
            kind=self.kind if self.kind == later.kind else f"{self.kind}+{later.kind}",
            n_channels=self.n_channels,
            carry=self.carry[later.carry],
            write=later.A @ self.A if mixes_write else None,
            read=self.B @ later.B if mixes_read else None,
            reads={key: self.B_of(key) @ later.B_of(key) for key in keys},
            shift=shift,
            scale=scale,
            gauge=later.gauge if later.scale is not None else self.gauge,
        )

    def tensors(self) -> dict[str, Tensor]:
        """The maps of the edit by name, for storage; selections are not among them."""
        out = {name: value for name in ("write", "read", "scale") if (value := getattr(self, name)) is not None}
        for kind in ("reads", "shift"):
            out |= {f"{kind}:{tensor}:{dim}": value for (tensor, dim), value in sorted(getattr(self, kind).items())}
        return out

    def to_record(self, put: Callable[[bytes], str]) -> dict[str, Any]:
        """Plain data for the ledger, exact to the bit; ``put`` stores the maps and returns their digest.

        Example:
            >>> blobs: dict[str, bytes] = {}
            >>> record = Edit("g", "permute", 2, torch.tensor([1, 0])).to_record(lambda data: "digest")
            >>> Edit.from_record(record, blobs.__getitem__).carry
            tensor([1, 0])
        """
        tensors = {name: value.contiguous() for name, value in self.tensors().items()}
        return {
            "group": self.group,
            "kind": self.kind,
            "channels": self.n_channels,
            "carry": self.carry.tolist(),
            "gauge": self.gauge,
            "maps": put(save(tensors)) if tensors else None,
        }

    @classmethod
    def from_record(cls, record: Mapping[str, Any], get: Callable[[str], bytes]) -> Edit:
        """Read an edit back from the ledger; ``get`` returns stored maps by digest."""
        tensors = load(get(record["maps"])) if record["maps"] else {}
        tables: dict[str, dict[Key, Tensor]] = {"reads": {}, "shift": {}}
        for name, value in tensors.items():
            if ":" in name:
                kind, tensor, dim = name.split(":")
                tables[kind][tensor, int(dim)] = value
        carry = torch.tensor(record["carry"], dtype=torch.long)
        return cls(
            record["group"],
            record["kind"],
            record["channels"],
            carry,
            tensors.get("write"),
            tensors.get("read"),
            tables["reads"],
            tables["shift"],
            tensors.get("scale"),
            record["gauge"],
        )


def _require(group: ChannelGroup, kind: str) -> None:
    if kind not in group.admits:
        why = group.reasons.get(kind, "no gauge of that kind")
        raise EditError(
            f"Group '{group.name}' does not admit '{kind}': {why}.",
            remedy=f"Admitted: {', '.join(sorted(group.admits)) or 'nothing'}.",
        )


def _index(group: ChannelGroup, index: Tensor, *, what: str) -> Tensor:
    index = torch.as_tensor(index, dtype=torch.long).cpu()
    if index.numel() and (int(index.min()) < 0 or int(index.max()) >= group.n_channels):
        raise EditError(f"{what} names channel {int(index.max())}; group '{group.name}' has {group.n_channels}.")
    return index


def permute(group: ChannelGroup, order: Tensor) -> Edit:
    """Put channel ``order[k]`` in place k. Exact. ``order``: a permutation within blocks, shape (C,)."""
    _require(group, "permute")
    order = _index(group, order, what="The order")
    if order.numel() != group.n_channels or torch.unique(order).numel() != group.n_channels:
        raise EditError(f"The order must be a permutation of the {group.n_channels} channels of '{group.name}'.")
    if group.block is not None and bool((group.block[order] != group.block).any()):
        raise EditError(f"Channels of '{group.name}' may only be permuted within their blocks.")
    return Edit(group.name, "permute", group.n_channels, order)


def rescale(group: ChannelGroup, scale: Tensor, gauge: int | None = None) -> Edit:
    """Multiply each freedom of a gauge by a positive factor and undo it where it is read. Exact.

    Args:
        scale: factors > 0, one per freedom of the gauge, shape (G,); G = C for the usual gauge.
        gauge: which of the group's gauges; the first positive one by default.
    """
    _require(group, "rescale")
    number = _gauge(group, "positive") if gauge is None else gauge
    scale = torch.as_tensor(scale, dtype=torch.float64).cpu()
    _check_scale(group, number, scale)
    if not bool((scale > 0).all() & torch.isfinite(scale).all()):
        raise EditError(f"Scales of '{group.name}' must be positive and finite.")
    return Edit(group.name, "rescale", group.n_channels, torch.arange(group.n_channels), scale=scale, gauge=number)


def sign(group: ChannelGroup, flip: Tensor, gauge: int | None = None) -> Edit:
    """Change the sign of some freedoms of a gauge (``flip``: bool, shape (G,)) and undo it where it is read. Exact."""
    _require(group, "sign")
    number = _gauge(group, "sign") if gauge is None else gauge
    scale = torch.where(torch.as_tensor(flip, dtype=torch.bool).cpu(), -1.0, 1.0).double()
    _check_scale(group, number, scale)
    return Edit(group.name, "sign", group.n_channels, torch.arange(group.n_channels), scale=scale, gauge=number)


def _gauge(group: ChannelGroup, kind: str) -> int:
    return next(i for i, g in enumerate(group.gauges) if g.kind == kind)


def _check_scale(group: ChannelGroup, number: int, scale: Tensor) -> None:
    n = len(group.gauges[number])
    if scale.shape != (n,):
        raise EditError(f"Gauge {number} of '{group.name}' has {n} freedoms; got scales of shape {tuple(scale.shape)}.")


def keep_indices(group: ChannelGroup, keep: Tensor) -> Tensor:
    """Check a kept set: sorted, unique, not empty, equally many in every block.

    Raises:
        EditError: names the group, and the counts that differ.
    """
    keep = torch.unique(_index(group, keep, what="The kept set"))
    if keep.numel() == 0:
        raise EditError(f"Nothing would be left of group '{group.name}'.", remedy="Keep at least one channel.")
    if group.block is not None:
        counts = torch.bincount(group.block[keep], minlength=int(group.block.max()) + 1)
        if torch.unique(counts).numel() > 1:
            raise EditError(
                f"Every block of '{group.name}' must keep the same number of channels; got {counts.tolist()}."
            )
    return keep


def remove(group: ChannelGroup, keep: Tensor) -> Edit:
    """Keep some channels and drop the others. Exact where those are silent or unread. ``keep``: shape (K,)."""
    _require(group, "remove")
    return Edit(group.name, "remove", group.n_channels, keep_indices(group, keep))


def fold(
    group: ChannelGroup,
    keep: Tensor,
    maps: Mapping[Key, Tensor],
    shift: Mapping[Key, Tensor] | None = None,
) -> Edit:
    """Keep some channels and express the others through them, reader by reader.

    Args:
        keep: kept channels, shape (K,).
        maps: for each reading axis the coefficients M of shape (C - K, K) with dropped ~ kept @ M.T, dropped
            channels in ascending order: the reader becomes W_kept + W_dropped @ M. Coefficients of channels that the
            axis does not have (another layer's units) count as zero.
        shift: for each reading axis what is left over per old channel, shape (C,); folded into the reader's bias.
    """
    _require(group, "merge")
    keep = keep_indices(group, keep)
    dropped = torch.ones(group.n_channels, dtype=torch.bool)
    dropped[keep] = False
    reads = {}
    for key, coefficients in maps.items():
        coefficients = torch.as_tensor(coefficients, dtype=torch.float64).cpu()
        if coefficients.shape != (group.n_channels - keep.numel(), keep.numel()):
            raise EditError(
                f"The map of '{key[0]}' must have shape ({group.n_channels - keep.numel()}, {keep.numel()}); "
                f"got {tuple(coefficients.shape)}."
            )
        full = torch.zeros(group.n_channels, keep.numel(), dtype=torch.float64)
        full[keep, torch.arange(keep.numel())] = 1
        full[dropped] = coefficients
        have = (group.axis(*key).index >= 0).any(1)
        reads[key] = full.masked_fill(~(have[:, None] & have[keep]), 0.0)
    vectors = {key: torch.as_tensor(v, dtype=torch.float64).cpu() for key, v in (shift or {}).items()}
    return Edit(group.name, "fold", group.n_channels, keep, reads=reads, shift=vectors)


def merge(group: ChannelGroup, labels: Tensor) -> Edit:
    """Average the writers of each block of channels and add up their readers. Exact for duplicates.

    Args:
        labels: block of each channel, shape (C,); blocks are numbered anew in order of first use.
    """
    _require(group, "merge")
    labels = torch.as_tensor(labels, dtype=torch.long).cpu()
    if labels.shape != (group.n_channels,):
        raise EditError(f"Labels of '{group.name}' must have shape ({group.n_channels},); got {tuple(labels.shape)}.")
    order: dict[int, int] = {}
    number = torch.tensor([order.setdefault(int(v), len(order)) for v in labels.tolist()])
    first = torch.tensor([int((number == k).nonzero()[0]) for k in range(len(order))])
    keep_indices(group, first)
    if group.block is not None and any(torch.unique(group.block[number == k]).numel() > 1 for k in range(len(order))):
        raise EditError(f"Channels of different blocks of '{group.name}' cannot be merged.")
    B = torch.zeros(group.n_channels, len(order), dtype=torch.float64)
    B[torch.arange(group.n_channels), number] = 1
    A = (B / B.sum(0)).T.contiguous()
    return Edit(group.name, "merge", group.n_channels, first, write=A, read=B)


def split(group: ChannelGroup, copies: Tensor, shares: Tensor | None = None) -> Edit:
    """Make several channels of one: the inverse of `merge`. Exact.

    Args:
        copies: how many channels each becomes, >= 1, shape (C,).
        shares: what each new channel is read with, summing to 1 over the copies, shape (K,); equal by default.
    """
    _require(group, "merge")
    copies = torch.as_tensor(copies, dtype=torch.long).cpu()
    if copies.shape != (group.n_channels,) or bool((copies < 1).any()):
        raise EditError(f"Copies of '{group.name}' must be {group.n_channels} numbers >= 1.")
    carry = torch.repeat_interleave(torch.arange(group.n_channels), copies)
    if group.block is not None:
        counts = torch.bincount(group.block[carry])
        if torch.unique(counts).numel() > 1:
            raise EditError(f"Every block of '{group.name}' must grow alike; got {counts.tolist()}.")
    share = 1.0 / copies[carry].double() if shares is None else torch.as_tensor(shares, dtype=torch.float64).cpu()
    B = torch.zeros(group.n_channels, carry.numel(), dtype=torch.float64)
    B[carry, torch.arange(carry.numel())] = share
    if not torch.allclose(B.sum(1), torch.ones(group.n_channels, dtype=torch.float64)):
        raise EditError(f"Shares of '{group.name}' must sum to 1 over the copies of each channel.")
    return Edit(group.name, "split", group.n_channels, carry, read=B)


def renamed(edit: Edit, group: str) -> Edit:
    """The same edit under another group's name."""
    return replace(edit, group=group)
