"""The symmetries of a network's weights, as plain tables: who may be permuted, rescaled, flipped or mixed with whom.

They are read off the channel graph once for an architecture and hold for every set of weights of it. Beside the
graph's own gauges four things are found here:

- **norms**: a batch norm right behind a convolution or a linear layer; the two fold into one affine map.
- **gains**: a scale and a shift per channel that only readers see (a LayerNorm's); they fold into the readers.
- **linear blocks**: where a channel may be scaled by any positive number *and* flipped, alone, and channels may change
  places, what lies between is a multiple of the identity; then any invertible matrix G may come in as G here and
  G⁻¹ there: W_Q, W_K become G W_Q, G⁻ᵀ W_K, and W_V, W_O likewise.
- **heads**: layers whose outputs are logits, to which one number may be added for all classes alike.

Reference: Zhao et al. 2025, arXiv 2506.13018 (survey of parameter symmetries).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from weightfold.graph import ChannelGraph, ChannelGroup, Gauge
from weightfold.graph.proof import with_symmetries_proved
from weightfold.graph.trace import Example, arguments, canonical_names, export_program, structural_copy

LOGITS = "reaches the model's output"
"""Beginning of the reason for which the rows of a head are frozen."""


@dataclass(frozen=True, eq=False)
class Slot:
    """Positions of one dimension that belong together: row i of ``index`` (N, M) holds those of member i, -1 for none.

    With ``slabs`` > 1 positions count through (slab of dimension 0, position), as in `weightfold.graph.Axis`.
    """

    tensor: str
    dim: int
    slabs: int
    index: Tensor


@dataclass(frozen=True, eq=False)
class Freedom:
    """Members that are multiplied here and divided there.

    Args:
        kind: "scale" (by a positive number), "sign" (by -1) or "linear" (blocks of members, by an invertible matrix).
        channel: channel of the group that each member stands for, shape (N,).
        plus: where the factor goes.
        minus: where its inverse goes.
        block: block of each member for "linear", shape (N,).
    """

    kind: str
    group: str
    channel: Tensor
    plus: tuple[Slot, ...]
    minus: tuple[Slot, ...]
    block: Tensor


@dataclass(frozen=True)
class Norm:
    """A batch norm. ``writer`` and ``writer_bias`` name the layer before it, if nothing else reads that."""

    weight: str | None
    bias: str | None
    mean: str
    var: str
    eps: float
    writer: str | None = None
    writer_bias: str | None = None


@dataclass(frozen=True, eq=False)
class Gain:
    """A scale and perhaps a shift per channel, and a layer that reads the channels along ``dim``.

    ``vector_at`` and ``reader_at`` are the positions of each channel in both, shape (N,).
    """

    weight: str
    bias: str | None
    reader: str
    dim: int
    vector_at: Tensor
    reader_at: Tensor

    @property
    def shift(self) -> str:
        """Name of the tensor that stands for what the shift does to the reader."""
        return f"{self.reader}@{self.bias}"


@dataclass(frozen=True, eq=False)
class Members:
    """Interchangeable things: the channels of a group (``kind`` "channels") or its blocks ("blocks")."""

    name: str
    kind: str
    n: int
    slots: tuple[Slot, ...]
    block: Tensor | None
    free: bool


@dataclass(frozen=True, eq=False)
class Symmetries:
    """Everything that may be done to the weights of one architecture without changing what it computes.

    Args:
        graph: the channel graph.
        shapes: of parameters and buffers, in the model's order.
        members: what may be permuted.
        freedoms: what may be rescaled, flipped or mixed, after norms and gains were folded.
        norms, gains: what folds away.
        heads: (weight, bias or None) of layers that write logits.
    """

    graph: ChannelGraph
    shapes: Mapping[str, tuple[int, ...]]
    members: tuple[Members, ...]
    freedoms: tuple[Freedom, ...]
    norms: tuple[Norm, ...]
    gains: tuple[Gain, ...]
    heads: tuple[tuple[str, str | None], ...]


def symmetries(model: nn.Module, example: Example, *, graph: ChannelGraph | None = None) -> Symmetries:
    """Find the symmetries of a model; they hold for all weights of the same architecture.

    Args:
        example: one tensor, a tuple of arguments, or a dict of keyword arguments.
        graph: the model's channel graph, if it is at hand.
    Raises:
        TraceError: the forward fails on the example, or branches on data.
    Example:
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> found = symmetries(net, torch.zeros(1, 4))
        >>> [(f.kind, f.channel.numel()) for f in found.freedoms], found.heads
        ([('scale', 8)], (('2.weight', '2.bias'),))
    """
    graph = with_symmetries_proved(structural_copy(model).eval(), example) if graph is None else graph
    _, tensors = canonical_names(model)
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    norms = _norms(model, example, shapes)
    freedoms, gains = _freedoms(graph, shapes)
    members = tuple(
        Members(
            g.name,
            g.kind,
            g.n_channels,
            tuple(Slot(a.tensor, a.dim, a.slabs, a.index) for a in g.axes if a.tensor in shapes),
            g.block,
            g.free,
        )
        for g in graph
    )
    found = Symmetries(graph, shapes, members, freedoms, norms, gains, _heads(model, example, graph, shapes))
    return _with_shifts(_behind_norms(found))


# batch norms ----------------------------------------------------------------------------------------------------------


def _norms(model: nn.Module, example: Example, shapes: Mapping[str, tuple[int, ...]]) -> tuple[Norm, ...]:
    """Batch norms, each with the layer that it follows if it is that layer's only reader."""
    by_module = any(isinstance(m, nn.modules.batchnorm._NormBase) for m in model.modules())
    if not by_module and not any(name.endswith("running_mean") for name in shapes):  # a graph has no such modules
        return ()
    twin = structural_copy(model).eval()
    program = export_program(twin, example)
    signature = program.graph_signature
    aliases, _ = canonical_names(twin)
    names = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    uses: dict[str, int] = {}
    for node in program.graph.nodes:
        for source in node.all_input_nodes:
            if source.name in names:
                uses[names[source.name]] = uses.get(names[source.name], 0) + 1

    def named(node: object) -> str | None:
        name = names.get(getattr(node, "name", ""))
        return None if name is None else aliases.get(name, name)

    found = []
    for node in program.graph.nodes:
        if node.op != "call_function" or "batch_norm" not in str(node.target):
            continue
        before, weight, bias, mean, var = node.args[:5]
        eps = float(next(a for a in reversed(node.args) if isinstance(a, float)))
        if named(mean) is None or named(var) is None or uses.get(names[mean.name], 0) > 1:
            continue
        norm = Norm(named(weight), named(bias), str(named(mean)), str(named(var)), eps)
        operator = str(getattr(before, "target", ""))
        folds = any(f"aten.{kind}.default" in operator for kind in ("linear", "conv1d", "conv2d", "conv3d"))
        if folds and len(before.users) == 1:
            writer = named(before.args[1])
            writer_bias = named(before.args[2]) if len(before.args) > 2 else None
            own = writer in shapes and uses.get(names[before.args[1].name], 0) == 1
            shifts = norm.bias is not None or writer_bias is not None
            if own and shifts:
                norm = replace(norm, writer=writer, writer_bias=writer_bias)
        found.append(norm)
    return tuple(found)


def _behind_norms(found: Symmetries) -> Symmetries:
    """Where a norm folds into its writer, the norm's scale is the writer's: tables follow."""
    moved = {n.weight: n.writer for n in found.norms if n.writer is not None and n.weight is not None}
    gone = {
        name for n in found.norms for name in (n.mean, n.var, n.writer and n.writer_bias and n.bias and n.writer_bias)
    }
    gone |= {n.weight for n in found.norms if n.writer is not None}
    freedoms = []
    for freedom in found.freedoms:
        plus = tuple(replace(s, tensor=moved.get(s.tensor, s.tensor)) for s in freedom.plus)
        minus = tuple(replace(s, tensor=moved.get(s.tensor, s.tensor)) for s in freedom.minus)
        freedoms.append(replace(freedom, plus=plus, minus=minus))
    members = tuple(replace(m, slots=tuple(s for s in m.slots if s.tensor not in gone)) for m in found.members)
    return replace(found, freedoms=tuple(freedoms), members=members)


# gauges ---------------------------------------------------------------------------------------------------------------


def _freedoms(
    graph: ChannelGraph, shapes: Mapping[str, tuple[int, ...]]
) -> tuple[tuple[Freedom, ...], tuple[Gain, ...]]:
    freedoms: list[Freedom] = []
    gains: list[Gain] = []
    for group in graph:
        linear = [i for i, g in enumerate(group.gauges) if g.kind == "positive" and _is_linear(group, g, shapes)]
        taken = {tuple(group.gauges[i].channel.tolist()) for i in linear}
        for i, gauge in enumerate(group.gauges):
            key = tuple(gauge.channel.tolist())
            if i in linear:
                block = torch.zeros_like(gauge.channel) if group.block is None else group.block[gauge.channel]
                freedoms.append(_freedom("linear", group, gauge, block))
            elif key in taken:
                continue
            elif made := _gains(group, gauge, shapes):
                gains += made if gauge.kind == "positive" else []
            else:
                kind = "scale" if gauge.kind == "positive" else "sign"
                freedoms.append(_freedom(kind, group, gauge, torch.arange(len(gauge))))
    return tuple(freedoms), tuple(gains)


def _freedom(kind: str, group: ChannelGroup, gauge: Gauge, block: Tensor) -> Freedom:
    plus = tuple(Slot(t, d, s, index) for t, d, s, e, index in gauge.axes if e > 0)
    minus = tuple(Slot(t, d, s, index) for t, d, s, e, index in gauge.axes if e < 0)
    return Freedom(kind, group.name, gauge.channel, plus, minus, block)


def _is_linear(group: ChannelGroup, gauge: Gauge, shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether the channels of a gauge may be mixed by any invertible matrix (block by block).

    What commutes with permutations, positive scales and signs of single channels, and is neither a table of its own per
    channel nor a product of two channels, is a multiple of the identity.
    """
    if group.kind != "channels" or not group.free or torch.unique(gauge.channel).numel() != len(gauge):
        return False
    same = [g for g in group.gauges if g.kind == "sign" and torch.equal(g.channel, gauge.channel)]
    mine = sum(int((index >= 0).sum()) for *_, index in gauge.axes)
    every = sum(int((a.index[gauge.channel] >= 0).sum()) for a in group.axes)
    signed = any(sum(int((index >= 0).sum()) for *_, index in g.axes) == mine for g in same)
    sides = [{t for t, _, _, e, _ in gauge.axes if e * side > 0} for side in (1, -1)]
    matrices = all(any(len(shapes[t]) > 1 for t in side) for side in sides)
    vectors = {t for t, *_ in gauge.axes if len(shapes[t]) == 1}
    whole = bool(all(s == 1 for _, _, s, _, _ in gauge.axes))
    named = {t for t, *_ in gauge.axes}
    paired = all("bias" in v and v.replace("bias", "weight") in named for v in vectors)
    return signed and mine == every and matrices and whole and paired


def _gains(group: ChannelGroup, gauge: Gauge, shapes: Mapping[str, tuple[int, ...]]) -> list[Gain]:
    """The gauge of a LayerNorm's scale and shift against its readers, if it is one; both signs must be allowed."""
    both = sum(torch.equal(g.channel, gauge.channel) and _names(g) == _names(gauge) for g in group.gauges) > 1
    first = next(g for g in group.gauges if _names(g) == _names(gauge) and torch.equal(g.channel, gauge.channel))
    positive = first if first.kind == "positive" else gauge
    plus = [a for a in positive.axes if len(shapes[a[0]]) == 1]
    minus = [a for a in positive.axes if len(shapes[a[0]]) > 1]
    scales = [a for a in plus if not a[0].endswith("bias")]
    shifts = [a for a in plus if a[0].endswith("bias")]
    simple = all(a[2] == 1 and a[4].shape[1] == 1 and bool((a[4] >= 0).all()) for a in positive.axes)
    if not both or not simple or len(scales) != 1 or len(shifts) > 1 or not minus:
        return []
    if positive.kind == "positive" and (any(a[3] < 0 for a in plus) or any(a[3] > 0 for a in minus)):
        return []
    bias = shifts[0][0] if shifts else None
    return [Gain(scales[0][0], bias, t, d, scales[0][4][:, 0], index[:, 0]) for t, d, _, _, index in minus]


def _names(gauge: Gauge) -> set[tuple[str, int]]:
    return {(t, d) for t, d, *_ in gauge.axes}


def _with_shifts(found: Symmetries) -> Symmetries:
    """Enter what gains' shifts do to their readers as tensors of their own, with the other dimensions of the reader."""
    shapes = dict(found.shapes)
    added: dict[str, list[tuple[str, int]]] = {}
    for gain in found.gains:
        if gain.bias is not None:
            shapes[gain.shift] = tuple(n for d, n in enumerate(shapes[gain.reader]) if d != gain.dim)
            added.setdefault(gain.reader, []).append((gain.shift, gain.dim))
    gone = {name for gain in found.gains for name in (gain.weight, gain.bias)}

    def follow(slots: tuple[Slot, ...]) -> tuple[Slot, ...]:
        out = [s for s in slots if s.tensor not in gone]
        for s in slots:
            for name, dim in added.get(s.tensor, []):
                if s.dim != dim:
                    out.append(replace(s, tensor=name, dim=s.dim - (s.dim > dim)))
        return tuple(out)

    members = tuple(replace(m, slots=follow(m.slots)) for m in found.members)
    freedoms = tuple(replace(f, plus=follow(f.plus), minus=follow(f.minus)) for f in found.freedoms)
    return replace(found, shapes=shapes, members=members, freedoms=freedoms)


# heads ----------------------------------------------------------------------------------------------------------------


def _heads(
    model: nn.Module, example: Example, graph: ChannelGraph, shapes: Mapping[str, tuple[int, ...]]
) -> tuple[tuple[str, str | None], ...]:
    """Layers that write the output: a common change of their rows changes all outputs alike. Each is tried."""
    rows = {f.tensor for f in graph.frozen if f.dim == 0 and f.reason.startswith(LOGITS) and f.n == shapes[f.tensor][0]}
    found = []
    for weight in (t for t in shapes if t in rows and len(shapes[t]) == 2 and shapes[t][0] > 1):
        bias = weight.removesuffix("weight") + "bias"
        if _adds_alike(model, example, weight):
            found.append((weight, bias if bias in rows and bias != weight else None))
    return tuple(found)


@torch.no_grad()
def _adds_alike(model: nn.Module, example: Example, weight: str) -> bool:
    """Whether the same vector added to every row of a weight adds the same number to every output of a sample."""
    twin = structural_copy(model, lambda t: _copied(t)).eval()
    args, kwargs = pytree.tree_map_only(Tensor, lively_input, arguments(example))
    try:
        before = twin(*args, **kwargs)
        tensor = dict(twin.named_parameters(remove_duplicate=False))[weight]
        tensor += torch.linspace(0.5, 1.0, tensor.shape[1], dtype=tensor.dtype, device=tensor.device)
        after = twin(*args, **kwargs)
    except Exception:
        return False
    if not isinstance(before, Tensor) or not isinstance(after, Tensor):
        return False
    moved = (after - before).double()
    for dim in range(1, moved.ndim):
        if moved.shape[dim] == tensor.shape[0]:
            rest = float((moved - moved.mean(dim, keepdim=True)).abs().max())
            return rest <= 1e-4 * max(float(moved.abs().max()), 1e-3)
    return False


def lively_input(x: Tensor) -> Tensor:
    """Numbers that are not all alike, in place of an example of zeros."""
    return torch.arange(x.numel(), device=x.device).sin().to(x.dtype).reshape(x.shape) if x.is_floating_point() else x


def _copied(tensor: Tensor) -> Tensor:
    copy = tensor.detach().clone()
    return nn.Parameter(copy, requires_grad=False) if isinstance(tensor, nn.Parameter) else copy
