"""Which channels of a trained network do the same up to a factor, and the edit that lumps them.

A channel i is like channel j with ratio α when what writes it is α times what writes j:

    any activation           α = 1           (backward differential equivalence: equal rows and biases)
    positively homogeneous   α > 0           act(α z) = α act(z): ReLU, leaky ReLU
    odd                      α = 1 or -1     act(-z) = -act(z): tanh

Then the readers of j take over α times those of i, which is exact. With a batch norm behind a single writer the
rows are those that the norm makes of the weights, γ w / σ and β + γ (b - μ) / σ, as in evaluation. A channel without
incoming weights is constant: its value moves into the biases of its readers, or it is like another constant one. A
channel that nothing reads is dropped. For ε > 0 channels are clustered by |r_i - r_j| / (median norm), r the rows
scaled to length 1 where a ratio is free; with complete linkage no two of a block lie further apart than ε. A block's
row is then the mean of its members over their ratios, weighted by the squares of what reads them: it minimises
Σ |v_i|² |w_i - α_i w|².

Which ratios are free, and what reads a channel, is read off the channel graph, so this knows no layer types.
Reference: conditions of arXiv 2606.01402 as derived in `weightfold.ode.network`; Sussmann, Neural Networks 1992 (the
reducible units of tanh networks); Srinivas & Babu, arXiv 1507.06149 (the weights of a merge).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
import torch
from scipy.cluster.hierarchy import fcluster, linkage
from torch import Tensor, nn

from weightfold.errors import DataError
from weightfold.graph.apply import find_tensor
from weightfold.graph.edit import Edit
from weightfold.graph.group import Axis, ChannelGroup, Gauge
from weightfold.graph.layout import to_front
from weightfold.graph.observe import axis_rows
from weightfold.redundancy import takes_mean

Linkage = Literal["single", "complete"]
Key = tuple[str, int]

MAX_CHANNELS = 20_000
"""Widest group whose channels are compared pair by pair (ε > 0)."""
ROUNDING = 64
"""Relative differences of rows up to this many units of rounding count as none."""
FINE = 2e11
"""Products up to which distances are taken in float64; in float32 above, exact to 1e-3 of a row's length."""
MIXED = 1 << 26
"""Entries of a map of means up to which one is made; above, a block takes the row of its representative."""
TILE = 1 << 22
"""Distances that are computed at once."""


@dataclass(frozen=True, eq=False)
class Rows:
    """What writes each channel of a group, up to the ratios that are free.

    Args:
        rows_CF: features; equal rows mean like channels, shape (C, F), float64.
        ratio_C: the factor that each row was divided by, shape (C,).
        reads_C: norm of what reads each channel, times |ratio|, shape (C,).
        mixable: whether a mean of rows (over their ratios) can be written back to the group's writers.
        constant_C: channels without incoming weights, bool, shape (C,).
        unread_C: channels that nothing reads, bool, shape (C,).
        rounding: relative difference that counts as none.
    """

    rows_CF: Tensor
    ratio_C: Tensor
    reads_C: Tensor
    mixable: bool
    constant_C: Tensor
    unread_C: Tensor
    rounding: float


def rows_of(model: nn.Module, group: ChannelGroup) -> Rows:
    """Gather what writes the channels of a group, and take out the free ratios.

    Example:
        >>> import weightfold as wf
        >>> net = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
        >>> with torch.no_grad():
        ...     net[0].weight[2], net[0].bias[2] = 3 * net[0].weight[0], 3 * net[0].bias[0]
        >>> found = rows_of(net, wf.trace(net, torch.zeros(1, 4))["0"])
        >>> bool(torch.allclose(found.rows_CF[0], found.rows_CF[2])), round(float(found.ratio_C[2] / found.ratio_C[0]))
        (True, 3)
    """
    written = [a for a in group.axes if a.role in ("write", "pointwise", "both")]
    effective = _normed_rows(model, group)
    free, fixed, signed = _parts(model, group, written) if effective is None else (effective, None, False)
    scaled = effective is None or _gauge(group, "positive") is not None
    ratio_C = torch.ones(group.n_channels, dtype=torch.float64)
    if free is not None and scaled:
        norm_C = free.norm(dim=1)
        ratio_C = torch.where(norm_C > 0, norm_C, 1.0) if not signed else _signs(free)
        free = free / ratio_C[:, None]
    rows = torch.cat([part for part in (free, fixed) if part is not None], 1)
    reads = [r for a in group.role("read") for r in axis_rows(model, a)]
    norm_C = torch.cat(reads, 1).norm(dim=1) if reads else torch.zeros(group.n_channels, dtype=torch.float64)
    tied = bool(group.role("both"))
    precision = max(torch.finfo(find_tensor(model, a.tensor)[2].dtype).eps for a in written)
    return Rows(
        rows,
        ratio_C,
        norm_C * ratio_C.abs(),
        effective is None and fixed is None,
        _constant(model, group, written),
        (norm_C == 0) & torch.tensor(bool(reads) and not (tied or group.read_elsewhere) and "remove" in group.admits),
        ROUNDING * precision,
    )


def _gauge(group: ChannelGroup, kind: str) -> Gauge | None:
    """A gauge with one freedom per channel that every reader undoes, and nothing else."""
    for gauge in group.gauges:
        each = len(gauge) == group.n_channels and torch.equal(gauge.channel, torch.arange(len(gauge)))
        reads = {a.key: a.index for a in group.role("read")}
        up = {(t, d) for t, d, _, e, _ in gauge.axes if (e > 0 if kind == "positive" else (t, d) not in reads)}
        down = {(t, d): i for t, d, _, e, i in gauge.axes if (t, d) not in up}
        undone = down.keys() == reads.keys() and all((down[k] >= 0).sum() == (reads[k] >= 0).sum() for k in reads)
        written = {a.key for a in group.axes if a.role in ("write", "pointwise")}
        if gauge.kind == kind and each and undone and up and up <= written and not group.role("both"):
            return gauge
    return None


def _parts(model: nn.Module, group: ChannelGroup, written: Sequence[Axis]) -> tuple[Tensor | None, Tensor | None, bool]:
    """Rows that a free ratio scales, rows that it does not, and whether the ratio is a sign."""
    positive, signs = _gauge(group, "positive"), _gauge(group, "sign")
    gauge = positive or signs
    scaled: dict[Key, set[int]] = {}
    reads = {a.key for a in group.role("read")}
    for t, d, _, _, index in gauge.axes if gauge is not None else ():
        if (t, d) not in reads:
            scaled.setdefault((t, d), set()).update(index[index >= 0].tolist())
    free: list[Tensor] = []
    fixed: list[Tensor] = []
    for axis in written:
        reached = scaled.get(axis.key, set())
        for m, rows in enumerate(axis_rows(model, axis)):
            mine = axis.index[:, m]
            (free if {int(i) for i in mine[mine >= 0]} <= reached else fixed).append(rows)
    join = lambda parts: torch.cat(parts, 1) if parts else None  # noqa: E731
    return join(free), join(fixed), positive is None and signs is not None


def _signs(rows_CF: Tensor) -> Tensor:
    """A sign for each row that turns round with it: that of its product with fixed pseudo-random numbers."""
    steps = torch.arange(rows_CF.shape[1], dtype=torch.float64)
    return torch.where(rows_CF @ (1 + torch.frac(steps * 0.6180339887498949)) < 0, -1.0, 1.0).double()


def _normed_rows(model: nn.Module, group: ChannelGroup) -> Tensor | None:
    """γ w / σ and β + γ (b - μ) / σ, where one batch norm stands behind one writer; None elsewhere."""
    norms = {a.tensor.rpartition(".")[0] for a in group.role("pointwise")}
    writers = {a.tensor.rpartition(".")[0] for a in group.role("write")}
    if len(norms) != 1 or len(writers) != 1 or any(a.index.shape[1] != 1 for a in group.axes if a.role != "read"):
        return None
    norm = model.get_submodule(next(iter(norms)))
    if not isinstance(norm, nn.modules.batchnorm._BatchNorm) or norm.running_var is None or group.role("both"):
        return None
    part = {}
    for axis in (*group.role("write"), *group.role("pointwise")):
        path, _, leaf = axis.tensor.rpartition(".")
        part["norm" if path in norms else "own", leaf] = axis_rows(model, axis)[0]
    if ("own", "weight") not in part or ("norm", "running_mean") not in part or ("norm", "running_var") not in part:
        return None
    scale = 1 / (part["norm", "running_var"] + norm.eps).sqrt()
    scale = scale * part["norm", "weight"] if ("norm", "weight") in part else scale
    shift = part.get(("norm", "bias"), 0.0) + scale * (part.get(("own", "bias"), 0.0) - part["norm", "running_mean"])
    return torch.cat([part["own", "weight"] * scale, shift], 1)


def _constant(model: nn.Module, group: ChannelGroup, written: Sequence[Axis]) -> Tensor:
    """Channels whose writing matrices hold zeros alone; none where something else than a matrix and a norm writes."""
    incoming = torch.zeros(group.n_channels, dtype=torch.float64)
    n_matrices = 0
    for axis in written:
        if axis.role == "both" or (axis.role == "write" and axis.dim != 0):
            return torch.zeros(group.n_channels, dtype=torch.bool)
        if axis.role == "write" and find_tensor(model, axis.tensor)[2].ndim > 1:
            n_matrices += 1
            incoming += sum((rows.abs().sum(1) for rows in axis_rows(model, axis)), torch.zeros(()))
    return (incoming == 0) & (n_matrices > 0)


# blocks ---------------------------------------------------------------------------------------------------------------


def cluster(found: Rows, block: Tensor | None, eps: float, how: Linkage = "complete") -> Tensor:
    """Label like channels alike.

    Args:
        block: blocks of the group, in which as many channels must stay; None for one.
        eps: largest distance inside a block (complete linkage), relative to the median norm of the rows; 0: equal ones.
    Returns:
        labels_C: numbered in order of first use, shape (C,), int64.
    Raises:
        DataError: ε > 0 and more than `MAX_CHANNELS` channels.
    """
    n = len(found.rows_CF)
    labels = equal_rows(found.rows_CF, found.rounding)
    if block is not None:
        labels = _numbered(labels * (int(block.max()) + 1) + block)
    if eps > 0:
        first = _first(labels)
        if len(first) > MAX_CHANNELS:
            raise DataError(
                f"A group of {n:,} channels is too wide for distances of all pairs (at most {MAX_CHANNELS:,}).",
                remedy="Lump with eps 0, or by --target.",
            )
        rows = found.rows_CF[first]
        norms = found.rows_CF.norm(dim=1)
        scale = float(norms[norms > 0].median()) if bool((norms > 0).any()) else 1.0
        blocks = torch.zeros(len(first), dtype=torch.long) if block is None else block[first]
        merged = torch.zeros(len(first), dtype=torch.long)
        for b in torch.unique(blocks).tolist():
            mine = (blocks == b).nonzero().flatten()
            if len(mine) > 1:
                tree = linkage(condensed(rows[mine]), how)
                merged[mine] = torch.from_numpy(fcluster(tree, eps * scale, "distance").astype(np.int64))
        labels = _numbered((merged * (int(blocks.max()) + 1) + blocks)[labels])
    return labels if block is None else _levelled(labels, block)


def equal_rows(rows_CF: Tensor, rounding: float) -> Tensor:
    """Label rows that are equal up to rounding, in order of first use; O(C F + C log C).

    Rows are sorted by a random projection; neighbours in it are compared whole.
    """
    n, width = rows_CF.shape
    direction = torch.rand(width, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 0.5
    along, size = rows_CF @ direction, rows_CF.norm(dim=1)
    reach = 4 * rounding * float(direction.norm()) * size.clamp_min(1e-300)
    order = torch.argsort(along, stable=True).tolist()
    position, spread = along.tolist(), reach.tolist()
    label = torch.full((n,), -1, dtype=torch.long)
    leaders: list[int] = []
    for i in order:
        leaders = [j for j in leaders if position[i] - position[j] <= spread[i] + spread[j]]
        for j in leaders:
            if float((rows_CF[i] - rows_CF[j]).norm()) <= rounding * float(torch.maximum(size[i], size[j])):
                label[i] = j
                break
        else:
            label[i] = i
            leaders.append(i)
    return _numbered(label)


def condensed(rows_CF: Tensor) -> np.ndarray:
    """Euclidean distances of all pairs of rows, condensed, float64, by matrix products of tiles.

    Example:
        >>> condensed(torch.tensor([[0.0, 0.0], [3.0, 4.0], [0.0, 1.0]]))
        array([5.        , 1.        , 4.24264069])
    """
    n = len(rows_CF)
    rows = rows_CF.double() - rows_CF.double().mean(0)
    rows = rows.float() if n * n * rows.shape[1] > FINE else rows
    square = rows.square().sum(1)
    out = np.empty(n * (n - 1) // 2)
    step = max(1, TILE // n)
    at = 0
    for start in range(0, n, step):
        stop = min(n, start + step)
        tile = square[start:stop, None] + square[start:] - 2 * rows[start:stop] @ rows[start:].T
        tile = tile.clamp_min_(0).sqrt_().numpy()
        for i in range(stop - start):
            length = n - start - i - 1
            out[at : at + length] = tile[i, i + 1 :]
            at += length
    return out


def _numbered(labels: Tensor) -> Tensor:
    _, first, inverse = np.unique(labels.numpy(), return_index=True, return_inverse=True)
    rank = np.empty(len(first), np.int64)
    rank[np.argsort(first)] = np.arange(len(first))
    return torch.from_numpy(rank[inverse])


def _first(labels: Tensor) -> Tensor:
    """The first channel of every label."""
    return torch.from_numpy(np.unique(labels.numpy(), return_index=True)[1])


def _levelled(labels: Tensor, block: Tensor) -> Tensor:
    """Take members out of their clusters where a block would keep fewer channels than another."""
    labels = labels.clone()
    members = [(block == b).nonzero().flatten() for b in range(int(block.max()) + 1)]
    wanted = max(len(torch.unique(labels[mine])) for mine in members)
    fresh = int(labels.max()) + 1
    for mine in members:
        lead = set(_first_in(labels, mine))
        spare = [i for i in mine.tolist() if i not in lead]
        for i in spare[: wanted - len(lead)]:
            labels[i] = fresh
            fresh += 1
    return _numbered(labels)


def _first_in(labels: Tensor, mine: Tensor) -> list[int]:
    seen: dict[int, int] = {}
    for i in mine.tolist():
        seen.setdefault(int(labels[i]), i)
    return list(seen.values())


# the edit -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Lumping:
    """What becomes of one group: blocks, ratios, and what is dropped.

    Args:
        labels_C: block of each channel.
        keep_K: representative of each block that stays, ascending.
        coefficient_C: ratio of each channel to its representative; 0 where it is dropped.
        values: constants that move into readers' biases, by reader, shape (C,).
        mean: whether a block's row is the weighted mean of its members.
        kinds: how many channels went as equal, rescaled, flipped, constant, unread or near.
    """

    labels_C: Tensor
    keep_K: Tensor
    coefficient_C: Tensor
    values: Mapping[Key, Tensor]
    mean: bool
    kinds: Mapping[str, int]
    weight_C: Tensor = field(default_factory=lambda: torch.zeros(0))

    def edit(self, group: ChannelGroup) -> Edit:
        """The edit on the group."""
        n, k = group.n_channels, len(self.keep_K)
        place = torch.full((int(self.labels_C.max()) + 1,), -1, dtype=torch.long)
        place[self.labels_C[self.keep_K]] = torch.arange(k)
        at = place[self.labels_C]
        read = torch.zeros(n, k, dtype=torch.float64)
        alive = ((at >= 0) & (self.coefficient_C != 0)).nonzero().flatten()
        read[alive, at[alive]] = self.coefficient_C[alive]
        write = None
        if self.mean:
            share = torch.zeros(n, k, dtype=torch.float64)
            share[alive, at[alive]] = self.weight_C[alive].clamp_min(1e-300)
            share = share / share.sum(0)
            share[alive, at[alive]] /= self.coefficient_C[alive]
            write = share.T.contiguous()
        return Edit(group.name, "lump", n, self.keep_K, write=write, read=read, shift=dict(self.values))


def lumped(
    model: nn.Module,
    group: ChannelGroup,
    eps: float,
    how: Linkage = "complete",
    constants: Mapping[Key, Tensor] | None = None,
) -> Lumping | None:
    """Find what a group's channels can be lumped to; None where every channel stays.

    Args:
        eps: 0 for exact equivalences.
        constants: value of each channel as its readers see it, for those that are constant, by reader, shape (C,).
    """
    found = rows_of(model, group)
    labels = cluster(found, group.block, eps, how)
    dropped, values = _dropped(model, group, found, constants or {})
    found, labels = _constants_together(group, found, labels, dropped, constants or {})
    rank = found.reads_C.masked_fill(dropped, -1.0)
    keep, labels = _representatives(labels, rank, dropped, group.block)
    if len(keep) == group.n_channels:
        return None
    rep = torch.full((int(labels.max()) + 1,), -1, dtype=torch.long)
    rep[labels[keep]] = keep
    mine = rep[labels]
    coefficient = torch.where(mine >= 0, found.ratio_C / found.ratio_C[mine.clamp_min(0)], 0.0)
    coefficient = torch.where(dropped & ~torch.isin(torch.arange(len(mine)), keep), 0.0, coefficient)
    values = {key: value.masked_fill(torch.isin(torch.arange(len(mine)), keep), 0.0) for key, value in values.items()}
    gone = torch.ones(group.n_channels, dtype=torch.bool)
    gone[keep] = False
    distance = (found.rows_CF - found.rows_CF[mine.clamp_min(0)]).norm(dim=1)
    equal = distance <= 8 * found.rounding * found.rows_CF.norm(dim=1).clamp_min(1e-300)
    kinds = {
        "unread": int((gone & dropped & found.unread_C).sum()),
        "constant": int((gone & dropped & ~found.unread_C).sum()),
        "near": int((gone & ~dropped & ~equal).sum()),
        "equal": int((gone & ~dropped & equal & (coefficient == 1)).sum()),
        "flipped": int((gone & ~dropped & equal & (coefficient < 0)).sum()),
        "rescaled": int((gone & ~dropped & equal & (coefficient > 0) & (coefficient != 1)).sum()),
    }
    mean = found.mixable and kinds["near"] > 0 and group.n_channels * len(keep) <= MIXED
    return Lumping(labels, keep, coefficient, values, mean, kinds, found.reads_C.square())


def _dropped(
    model: nn.Module, group: ChannelGroup, found: Rows, constants: Mapping[Key, Tensor]
) -> tuple[Tensor, dict[Key, Tensor]]:
    """Channels that go without a representative, and the constants that they leave."""
    reads = group.role("read")
    known = bool(reads) and all(axis.key in constants for axis in reads)
    if not known or "remove" not in group.admits or group.read_elsewhere:
        return found.unread_C.clone(), {}
    silent = torch.stack([constants[axis.key] == 0 for axis in reads]).all(0)
    movable = all(takes_mean(model, axis) for axis in reads)
    dropped = found.unread_C | (found.constant_C & (silent | movable))
    moved = found.constant_C & ~found.unread_C & ~silent
    values = {a.key: torch.where(moved, constants[a.key], 0.0) for a in reads} if movable and bool(moved.any()) else {}
    return dropped, values


def _constants_together(
    group: ChannelGroup, found: Rows, labels: Tensor, dropped: Tensor, constants: Mapping[Key, Tensor]
) -> tuple[Rows, Tensor]:
    """Constant channels whose values cannot go into biases are like each other, in the ratio of their values."""
    reads = group.role("read")
    left = found.constant_C & ~dropped
    if int(left.sum()) < 2 or group.block is not None or not all(axis.key in constants for axis in reads):
        return found, labels
    value = constants[reads[0].key]
    left &= torch.stack([constants[axis.key] == value for axis in reads]).all(0) & (value != 0)
    if int(left.sum()) < 2:
        return found, labels
    first = int(left.nonzero()[0])
    labels = torch.where(left, int(labels.max()) + 1, labels)
    rows = torch.where(left[:, None], found.rows_CF[first], found.rows_CF)
    return replace(found, rows_CF=rows, ratio_C=torch.where(left, value, found.ratio_C), mixable=False), labels


def _representatives(labels: Tensor, rank: Tensor, dropped: Tensor, block: Tensor | None) -> tuple[Tensor, Tensor]:
    """The channel of each label that is read most; equally many in every block of the group.

    Returns:
        The channels that stay, and labels with new numbers for those that stay to fill up a block.
    """
    labels = labels.clone()
    order = torch.argsort(-rank, stable=True)
    seen: dict[int, int] = {}
    for i in order.tolist():
        if not bool(dropped[i]):
            seen.setdefault(int(labels[i]), i)
    keep = sorted(seen.values())
    blocks = torch.zeros(len(labels), dtype=torch.long) if block is None else block
    counts = torch.bincount(blocks[torch.tensor(keep, dtype=torch.long)], minlength=int(blocks.max()) + 1)
    wanted = max(1, int(counts.max()))
    for b in range(len(counts)):
        staying = set(keep)
        spare = [i for i in (blocks == b).nonzero().flatten().tolist() if i not in staying]
        for i in spare[: wanted - int(counts[b])]:
            labels[i] = int(labels.max()) + 1
            keep.append(i)
    return torch.tensor(sorted(keep), dtype=torch.long), labels


def head_rows(model: nn.Module, group: ChannelGroup) -> Tensor:
    """What writes each head, flattened, shape (H, F), float64; heads of equal rows give the same."""
    parts = []
    for axis in group.axes:
        if axis.role == "read":
            continue
        front = to_front(find_tensor(model, axis.tensor)[2].detach(), axis.dim, axis.slabs).double().cpu()
        flat = front.reshape(len(front), -1)
        parts.append(flat[axis.index.clamp_min(0)].reshape(group.n_channels, -1))
    return torch.cat(parts, 1)
