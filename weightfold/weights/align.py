"""Alignment: bring one model into another's basis by symmetries of its own, so that weights can be compared and mixed.

**Weight matching.** Maximise Σ_t <A_t, P B_t> over the permutations of every channel group by coordinate descent: with
the other groups held, one group's best permutation is a linear assignment between the rows of all tensors that it
touches (writers, norms and readers, whatever the architecture: the channel graph says which). The first sweep goes
from the groups whose neighbours are settled to the others and looks only at what is settled. Where signs are free, a
signed assignment; where a block may be rotated (W_Q W_Kᵀ, W_V W_Oᵀ), the rotation of Procrustes' problem; heads are
assigned by what such a rotation can reach (the nuclear norm); the residual stream of a transformer whose norms' scales
fold into their readers is rotated about the direction that its LayerNorms take away.

**Activation matching.** One assignment a group, on the correlations of what both models compute on the same inputs.

**Soft matching**, for other widths: see `soft`.

References: Ainsworth et al. 2022, arXiv 2209.04836 (weight and activation matching); Zhang et al. 2025, arXiv
2502.00264 (rotations of transformers); differ in: groups are inferred, first sweep, signs, heads.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from weightfold.errors import ConfigError, DataError
from weightfold.graph.apply import find_tensor
from weightfold.graph.exactness import outputs, relative_error
from weightfold.graph.layout import from_front, to_front
from weightfold.graph.observe import rows_of as samples_of
from weightfold.graph.trace import Example, arguments
from weightfold.weights.compare import cosine, require_alike, weights_of
from weightfold.weights.point import put_rows_, rows_of
from weightfold.weights.symmetry import Freedom, Gain, Members, Slot, Symmetries, lively_input, symmetries

Method = Literal["weights", "activations"]
MAX_SWEEPS = 50
EXACT = 1e-3
"""Largest relative change of outputs that counts as rounding."""


@dataclass(frozen=True, eq=False)
class Aligned:
    """A model in another's basis.

    Args:
        model: a copy of the second model that computes the same, as near to the first as symmetries bring it.
        orders: for each permuted group, the channel of the second model that stands at each place, shape (C,).
        cosine_before, cosine_after: of all weights with the first model's.
        sweeps: rounds over all groups.
        notes: what was not done, and why.
    """

    model: nn.Module
    orders: Mapping[str, Tensor]
    cosine_before: float
    cosine_after: float
    sweeps: int
    notes: tuple[str, ...] = ()


def align(
    a: nn.Module,
    b: nn.Module,
    example: Example,
    *,
    method: Method = "weights",
    data: Iterable[Example] = (),
    rotate: bool = False,
    tolerance: float = 1e-9,
    found: Symmetries | None = None,
) -> Aligned:
    """Align model b to model a, both of the same architecture.

    Args:
        example: an input of both.
        method: "weights" (without data) or "activations".
        data: inputs for activation matching; a few hundred samples are enough.
        rotate: also rotate residual streams; taken back, with a note, where that would change the outputs.
        tolerance: share of a group's score below which a better order is not worth taking; 1e-3 saves wide groups a
            third of the time.
        found: the architecture's symmetries, if they are at hand.
    Raises:
        GraphError: the architectures differ; says where.
        DataError: activation matching without data.
    Example:
        >>> a = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> b = copy.deepcopy(a)
        >>> with torch.no_grad():
        ...     _ = b[0].weight.copy_(a[0].weight.flip(0)), b[0].bias.copy_(a[0].bias.flip(0))
        ...     _ = b[2].weight.copy_(a[2].weight.flip(1))
        >>> round(align(a, b, torch.zeros(1, 4)).cosine_after, 6)
        1.0
    """
    if method not in ("weights", "activations"):
        raise ConfigError(f"The method must be 'weights' or 'activations'. Got '{method}' instead.")
    require_alike(weights_of(a), weights_of(b))
    found = symmetries(a, example) if found is None else found
    work = _Work(found, _tensors(found, a), _tensors(found, b), least=tolerance)
    before = cosine(work.a, work.b, found)
    if method == "activations":
        sweeps = _by_activations(work, a, b, found, data)
    else:
        sweeps = _by_weights(work)
        if rotate:
            work, more = _with_streams(work, b, example)
            sweeps += more
    after = cosine(work.a, work.b, found)
    return Aligned(loaded(b, work.b), work.orders, before, after, sweeps, tuple(work.notes))


def _tensors(found: Symmetries, model: nn.Module) -> dict[str, Tensor]:
    names = [name for name in found.shapes if "@" not in name]
    return {name: find_tensor(model, name)[2].detach().cpu().clone() for name in names}


def loaded(model: nn.Module, tensors: Mapping[str, Tensor]) -> nn.Module:
    """A copy of a model with other weights, by name."""
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for name, value in tensors.items():
            find_tensor(twin, name)[2].copy_(value)
    return twin


@dataclass(eq=False)
class _Work:
    """Both models' tensors, and what has been done to the second's."""

    found: Symmetries
    a: dict[str, Tensor]
    b: dict[str, Tensor]
    orders: dict[str, Tensor] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    folded: bool = False
    least: float = 1e-9

    def places(self, group: Members) -> tuple[Slot, ...]:
        """All that a group touches."""
        return self.slots(group.slots if self.folded else graph_slots(self.found, group))

    def slots(self, slots: tuple[Slot, ...]) -> tuple[Slot, ...]:
        return tuple(s for s in slots if s.tensor in self.a)


def align_tensors(
    found: Symmetries, a: Mapping[str, Tensor], b: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Align folded weights (`point`): the second's tensors in the first's basis, and the order of each group."""
    work = _Work(found, dict(a), dict(b), folded=True)
    _by_weights(work)
    return work.b, work.orders


# weight matching ------------------------------------------------------------------------------------------------------


def _by_weights(work: _Work) -> int:
    """Coordinate descent; a group is looked at again only if a neighbour of it has moved."""
    _match_gains(work)
    groups = in_reach(work.found)
    touched = {g.name: {s.tensor for s in work.places(g)} for g in groups}
    near = {g: {h for h in touched if h != g and touched[g] & touched[h]} for g in touched}
    open_ = set(touched)
    settled: set[str] = set()
    for group in groups:
        slots = _settled_slots(work, group, settled)
        if _match(work, group, slots):
            open_ |= near[group.name]
        if len(slots) == len(work.places(group)):
            open_.discard(group.name)
        settled.add(group.name)
    sweeps = 1
    while open_ and sweeps < MAX_SWEEPS:
        sweeps += 1
        if _match_gains(work):
            open_ = set(touched)
        for group in groups:
            if group.name in open_:
                open_.discard(group.name)
                if _match(work, group, work.places(group)):
                    open_ |= near[group.name]
    return sweeps


def _with_streams(work: _Work, b: nn.Module, example: Example) -> tuple[_Work, int]:
    """Go on with rotations of residual streams; back to what was, if the outputs do not bear them."""
    turned = _Work(work.found, work.a, dict(work.b), dict(work.orders), list(work.notes), least=work.least)
    groups = streams(work.found)
    if not groups:
        work.notes.append("no residual stream can be rotated: none is read through the scales of norms alone")
        return work, 0
    others = [g for g in in_reach(work.found) if g.name not in {s.name for s in groups}]
    sweeps, again = 0, True
    while again and sweeps < MAX_SWEEPS:
        sweeps += 1
        moved = [rotate_stream_(turned, group) for group in groups]
        moved += [_match(turned, g, turned.places(g)) for g in others]
        again = any(moved)
    if exact_error(b, loaded(b, turned.b), _lively_example(example)) <= EXACT:
        return turned, sweeps
    work.notes.append(
        "the residual stream was not rotated: it is read other than through the scales of norms (a tied head, say)"
    )
    return work, 0


def _lively_example(example: Example) -> Example:
    return pytree.tree_map_only(Tensor, lively_input, example)


def graph_slots(found: Symmetries, group: Members) -> tuple[Slot, ...]:
    """All places that a group touches in the model's own tensors, norms' statistics among them."""
    axes = found.graph[group.name].axes
    return tuple(Slot(axis.tensor, axis.dim, axis.slabs, axis.index) for axis in axes)


def in_reach(found: Symmetries) -> list[Members]:
    """Free groups, each as soon as most of what it touches is settled."""
    left = [g for g in found.members if g.free and g.n > 1]
    numbers = dict.fromkeys(found.shapes, 1)
    for name, shape in found.shapes.items():
        for size in shape:
            numbers[name] *= size
    grouped: dict[str, set[str]] = {}
    for group in left:
        for slot in graph_slots(found, group):
            grouped.setdefault(slot.tensor, set()).add(group.name)
    order: list[Members] = []
    done: set[str] = set()
    while left:

        def share(group: Members) -> float:
            names = {s.tensor for s in graph_slots(found, group)}
            known = sum(numbers[t] for t in names if grouped[t] <= done | {group.name})
            return known / max(1, sum(numbers[t] for t in names))

        best = max(left, key=share)
        left.remove(best)
        done.add(best.name)
        order.append(best)
    return order


def _settled_slots(work: _Work, group: Members, settled: set[str]) -> tuple[Slot, ...]:
    """The slots of a group in tensors whose other dimensions are settled; all, if there are none."""
    mine = work.places(group)
    open_ = {
        s.tensor
        for other in work.found.members
        if other.free and other.n > 1 and other.name not in settled and other.name != group.name
        for s in graph_slots(work.found, other)
    }
    return tuple(s for s in mine if s.tensor not in open_) or mine


def _match(work: _Work, group: Members, slots: tuple[Slot, ...]) -> bool:
    """Improve one group with the others held; whether anything moved."""
    linear = [f for f in work.found.freedoms if f.kind == "linear" and f.group == group.name]
    if group.kind == "blocks":
        return _match_blocks(work, group, slots)
    rotated = torch.zeros(group.n, dtype=torch.bool)
    moved = False
    for freedom in linear if group.kind == "channels" else ():
        rotated[freedom.channel] = True
        moved |= _rotate_linear(work, freedom)
    if bool(rotated.all()):
        return moved
    signed = _signs(work.found, group)
    scores = _scores(work, slots, group.n)
    order, flip = assign(scores.abs() if signed is not None else scores, group.block, ~rotated), None
    if signed is not None:
        flip = scores[torch.arange(group.n), order] < 0
    still = torch.equal(order, torch.arange(group.n)) and (flip is None or not bool(flip.any()))
    if still or not _gains(scores, order, signed is not None, flip, work.least):
        return moved
    permute_(work.b, work.places(group), order)
    so_far = work.orders.get(group.name, torch.arange(group.n))
    work.orders[group.name] = so_far[order]
    if signed is not None and flip is not None and bool(flip.any()):
        factor = torch.where(flip[signed.channel], -1.0, 1.0).double()
        _multiply_signs_(work.b, signed, factor)
    return True


def _scores(work: _Work, slots: tuple[Slot, ...], n: int) -> Tensor:
    """Inner products of the rows of both models, shape (C of a, C of b)."""
    total = torch.zeros(n, n, dtype=torch.float64)
    for slot in slots:
        one, two = rows_float(work.a, slot), rows_float(work.b, slot)
        total += (one @ two.T).double()
    return total


def rows_float(tensors: Mapping[str, Tensor], slot: Slot) -> Tensor:
    """The numbers at one slot, one row a member, shape (C, F), in the tensors' own type."""
    front = to_front(tensors[slot.tensor], slot.dim, slot.slabs)
    flat = front.reshape(front.shape[0], -1)
    have = (slot.index >= 0).to(flat.dtype)
    rows = flat[slot.index.clamp_min(0).reshape(-1)].reshape(*slot.index.shape, -1) * have[:, :, None]
    return rows.reshape(slot.index.shape[0], -1)


def _gains(scores: Tensor, order: Tensor, signed: bool, flip: Tensor | None, least: float) -> bool:
    """Whether the new order scores more than the present one, rounding apart."""
    n = len(order)
    now = scores.diagonal()
    then = scores[torch.arange(n), order]
    if signed and flip is not None:
        then = then.abs()
    return float(then.sum() - now.sum()) > least * float(scores.abs().amax(1).sum() + 1e-300)


def assign(scores: Tensor, block: Tensor | None = None, movable: Tensor | None = None) -> Tensor:
    """The order that maximises Σ_i scores[i, order[i]], block by block.

    Example:
        >>> assign(torch.tensor([[0.0, 1.0], [1.0, 0.0]]))
        tensor([1, 0])
    """
    n = len(scores)
    order = torch.arange(n)
    movable = torch.ones(n, dtype=torch.bool) if movable is None else movable
    blocks = torch.zeros(n, dtype=torch.long) if block is None else block
    for b in torch.unique(blocks):
        mine = ((blocks == b) & movable).nonzero().flatten()
        if len(mine) > 1:
            _, best = linear_sum_assignment(scores[mine][:, mine].numpy(), maximize=True)
            order[mine] = mine[torch.from_numpy(best)]
    return order


def permute_(tensors: dict[str, Tensor], slots: tuple[Slot, ...], order: Tensor) -> None:
    """Put member ``order[k]`` in place k, wherever the slots reach."""
    for slot in slots:
        front = to_front(tensors[slot.tensor], slot.dim, slot.slabs)
        new = front.clone()
        both = (slot.index >= 0) & (slot.index[order] >= 0)
        new[slot.index[both]] = front[slot.index[order][both]]
        tensors[slot.tensor] = from_front(new, slot.dim, slot.slabs)


def _signs(found: Symmetries, group: Members) -> Freedom | None:
    """The sign that every channel of a group is free to take as a whole, if it is."""
    places = sum(int((s.index >= 0).sum()) for s in graph_slots(found, group))
    for gauge in found.graph[group.name].gauges:
        reached = sum(int((index >= 0).sum()) for *_, index in gauge.axes)
        if gauge.kind == "sign" and reached == places and len(gauge) == group.n:
            return next(
                (f for f in found.freedoms if f.kind == "sign" and f.group == group.name and len(f.channel) == group.n),
                None,
            )
    return None


def _multiply_signs_(tensors: dict[str, Tensor], freedom: Freedom, factor: Tensor) -> None:
    for slot in (*freedom.plus, *freedom.minus):
        if slot.tensor not in tensors:
            continue
        front = to_front(tensors[slot.tensor], slot.dim, slot.slabs).clone()
        for m in range(slot.index.shape[1]):
            have = slot.index[:, m] >= 0
            rows = slot.index[have, m]
            front[rows] = front[rows] * factor[have].to(front.dtype).reshape(-1, *[1] * (front.ndim - 1))
        tensors[slot.tensor] = from_front(front, slot.dim, slot.slabs)


# rotations ------------------------------------------------------------------------------------------------------------


def polar(matrix: Tensor) -> Tensor:
    """The orthogonal O that maximises tr(Oᵀ M): U Vᵀ of the singular value decomposition."""
    u, _, vh = torch.linalg.svd(matrix)
    return u @ vh


def _sides(work: _Work, freedom: Freedom) -> tuple[Slot, ...]:
    return work.slots((*freedom.plus, *freedom.minus))


def _rotate_linear(work: _Work, freedom: Freedom) -> bool:
    """Rotate every block of the second model to the first's; whether that brought anything."""
    n, slots = freedom.channel.numel(), _sides(work, freedom)
    one, two = rows_of(_doubles(work.a, slots), slots, n), rows_of(_doubles(work.b, slots), slots, n)
    gained = 0.0
    new = two.clone()
    for block in torch.unique(freedom.block).tolist():
        mine = (freedom.block == block).nonzero().flatten()
        cross = one[mine] @ two[mine].T
        turn = polar(cross)
        gained += float((turn * cross).sum() - cross.trace())
        new[mine] = turn @ two[mine]
    if gained <= 1e-9 * float(one.norm() * two.norm()):
        return False
    held = _doubles(work.b, slots)
    put_rows_(held, slots, new)
    work.b.update({name: value.to(work.b[name].dtype) for name, value in held.items()})
    return True


def _doubles(tensors: Mapping[str, Tensor], slots: tuple[Slot, ...]) -> dict[str, Tensor]:
    return {name: tensors[name].double() for name in dict.fromkeys(s.tensor for s in slots)}


def _match_blocks(work: _Work, group: Members, slots: tuple[Slot, ...]) -> bool:
    """Assign heads by what rotations inside them can reach."""
    freedoms = [f for f in work.found.freedoms if f.kind == "linear" and _head_of(f, group) is not None]
    scores = torch.zeros(group.n, group.n, dtype=torch.float64)
    for freedom in freedoms:
        head = _head_of(freedom, group)
        assert head is not None
        n, mine = freedom.channel.numel(), _sides(work, freedom)
        one, two = rows_of(_doubles(work.a, mine), mine, n), rows_of(_doubles(work.b, mine), mine, n)
        for i in range(group.n):
            for j in range(group.n):
                cross = one[head == i] @ two[head == j].T
                scores[i, j] += torch.linalg.svdvals(cross).sum()
    if not freedoms:
        scores = _scores(work, slots, group.n)
    order = assign(scores, group.block)
    if torch.equal(order, torch.arange(group.n)) or not _gains(scores, order, False, None, work.least):
        return False
    permute_(work.b, work.places(group), order)
    work.orders[group.name] = work.orders.get(group.name, torch.arange(group.n))[order]
    for freedom in freedoms:
        _rotate_linear(work, freedom)
    return True


def _head_of(freedom: Freedom, group: Members) -> Tensor | None:
    """The block of a group that each member of a freedom stands in, shape (N,)."""
    for slot in freedom.plus:
        for other in group.slots:
            if (slot.tensor, slot.dim, slot.slabs) == (other.tensor, other.dim, other.slabs):
                size = int(max(slot.index.max(), other.index.max())) + 1
                head = torch.full((size,), -1)
                for h in range(group.n):
                    head[other.index[h][other.index[h] >= 0]] = h
                found = head[slot.index[:, 0].clamp_min(0)]
                if bool((found >= 0).all()):
                    return found
    return None


# activation matching --------------------------------------------------------------------------------------------------


def _by_activations(work: _Work, a: nn.Module, b: nn.Module, found: Symmetries, data: Iterable[Example]) -> int:
    """One assignment a group, on correlations of activations."""
    scores = correlations(a, b, found, data)
    for group in found.members:
        if not group.free or group.n < 2 or group.kind != "channels":
            continue
        if group.name not in scores:
            work.notes.append(f"'{group.name}' was left alone: its channels cannot be observed")
            continue
        score, signed = scores[group.name], _signs(found, group)
        order = assign(score.abs() if signed is not None else score, group.block)
        permute_(work.b, work.places(group), order)
        work.orders[group.name] = order
        if signed is not None:
            flip = score[torch.arange(group.n), order] < 0
            _multiply_signs_(work.b, signed, torch.where(flip[signed.channel], -1.0, 1.0).double())
    return 1


@torch.no_grad()
def correlations(a: nn.Module, b: nn.Module, found: Symmetries, data: Iterable[Example]) -> dict[str, Tensor]:
    """Correlation of each channel of a with each of b on the same inputs, summed over readers, shape (C, C').

    The groups are those of the first model; the second's channels stand at the same places.

    Raises:
        DataError: there are no data.
    """
    sums: dict[tuple[str, str], list[Tensor]] = {}
    taps = [
        (group.name, axis)
        for group in found.graph
        if group.kind == "channels"
        for axis in group.role("read")
        if axis.tap is not None
    ]
    held: dict[tuple[str, str], Tensor] = {}

    def watch(model: nn.Module, seen: dict[tuple[str, str], Tensor]) -> list[Any]:
        handles = []
        for name, axis in taps:
            assert axis.tap is not None

            def hook(_: nn.Module, args: tuple[Any, ...], key: Any = (name, axis.tensor), axis: Any = axis) -> None:
                seen[key] = samples_of(args[0].detach(), axis.tap[1], axis.index, 4096).double()

            handles.append(model.get_submodule(axis.tap[0]).register_forward_pre_hook(hook))
        return handles

    modes = (a.training, b.training)
    a.eval()
    b.eval()
    others: dict[tuple[str, str], Tensor] = {}
    handles = [*watch(a, held), *watch(b, others)]
    try:
        for batch in data:
            args, kwargs = arguments(batch)
            a(*args, **kwargs)
            b(*args, **kwargs)
            for key, x in held.items():
                y = others[key]
                now = [x.T @ y, x.sum(0), y.sum(0), x.square().sum(0), y.square().sum(0), torch.tensor(float(len(x)))]
                sums[key] = [p + q for p, q in zip(sums[key], now, strict=True)] if key in sums else now
    finally:
        for handle in handles:
            handle.remove()
        a.train(modes[0])
        b.train(modes[1])
    if not sums:
        raise DataError("Activation matching needs data.", remedy="Pass some inputs, or match weights.")
    out: dict[str, Tensor] = {}
    for (name, _), (xy, x, y, xx, yy, n) in sums.items():
        covariance = xy / n - torch.outer(x / n, y / n)
        spread = torch.outer((xx / n - (x / n) ** 2).clamp_min(0).sqrt(), (yy / n - (y / n) ** 2).clamp_min(0).sqrt())
        found_now = torch.where(spread > 1e-12, covariance / spread.clamp_min(1e-12), 0.0)
        out[name] = out[name] + found_now if name in out else found_now
    return out


# residual streams -----------------------------------------------------------------------------------------------------


def _match_gains(work: _Work) -> bool:
    """Give the scales of the second model's norms the signs of the first's, where readers can take the sign."""
    done: set[str] = set()
    moved = False
    for gain in work.found.gains:
        if gain.weight in done or gain.weight not in work.a:
            continue
        done.add(gain.weight)
        flip = torch.where(work.a[gain.weight] * work.b[gain.weight] < 0, -1.0, 1.0)
        if bool((flip < 0).any()):
            moved = True
            for name in filter(None, (gain.weight, gain.bias)):
                work.b[name] = work.b[name] * flip.to(work.b[name])
            for other in (g for g in work.found.gains if g.weight == gain.weight):
                _scale_reader_(work.b, other, flip)
    return moved


def _scale_reader_(tensors: dict[str, Tensor], gain: Gain, factor: Tensor) -> None:
    """Multiply what reads through a gain by a factor for each of its positions."""
    reader = tensors[gain.reader]
    spread = torch.ones(reader.shape[gain.dim], dtype=reader.dtype)
    spread[gain.reader_at] = factor[gain.vector_at].to(reader.dtype)
    tensors[gain.reader] = (reader.movedim(gain.dim, -1) * spread).movedim(-1, gain.dim).contiguous()


def _rescaled(tensors: Mapping[str, Tensor], gains: list[Gain], factors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Divide the scales of norms by factors, and let the readers take them."""
    out = dict(tensors)
    for gain in gains:
        _scale_reader_(out, gain, factors[gain.weight])
    for name, bias in dict.fromkeys((g.weight, g.bias) for g in gains):
        for each in filter(None, (name, bias)):
            out[each] = out[each] / factors[name].to(out[each].dtype)
    return out


def rotate_stream_(work: _Work, group: Members) -> bool:
    """Rotate a residual stream of the second model to the first's; whether that brought anything.

    With the norms' scales in the readers, x -> O x leaves a LayerNorm's part in the stream alone where O is orthogonal
    and keeps the direction of equal numbers, which the norm takes away.
    """
    slots = graph_slots(work.found, group)
    gains = [g for g in work.found.gains if any(s.tensor == g.weight for s in slots)]
    scales = {g.weight: (work.a[g.weight].double(), work.b[g.weight].double()) for g in gains}
    if not gains or any(bool((x == 0).any()) for pair in scales.values() for x in pair):
        return False
    used = tuple(s for s in slots if s.tensor not in scales)
    one = _rescaled({n: t.double() for n, t in work.a.items()}, gains, {n: x for n, (x, _) in scales.items()})
    two = _rescaled({n: t.double() for n, t in work.b.items()}, gains, {n: y for n, (_, y) in scales.items()})
    rows_a, rows_b = rows_of(one, used, group.n), rows_of(two, used, group.n)
    ones = torch.ones(group.n, 1, dtype=torch.float64)
    basis = torch.linalg.qr(torch.cat([ones, torch.eye(group.n, dtype=torch.float64)[:, 1:]], 1))[0]
    rest, cross = basis[:, 1:], rows_a @ rows_b.T
    turn = ones @ ones.T / group.n + rest @ polar(rest.T @ cross @ rest) @ rest.T
    if float((turn * cross).sum() - cross.trace()) <= 1e-7 * float(rows_a.norm() * rows_b.norm()):
        return False
    put_rows_(two, used, turn @ rows_b)
    back = _rescaled(two, gains, {n: 1 / x for n, (x, _) in scales.items()})
    work.b = {name: value.to(work.b[name].dtype) for name, value in back.items()}
    return True


def streams(found: Symmetries) -> list[Members]:
    """Groups that are normalised as a whole and read through the scales of norms."""
    return [
        g
        for g in found.members
        if g.free
        and g.kind == "channels"
        and "normalised" in found.graph[g.name].reasons.get("merge", "")
        and any(s.tensor == gain.weight for s in graph_slots(found, g) for gain in found.gains)
    ]


def exact_error(a: nn.Module, b: nn.Module, example: Example) -> float:
    """Largest relative difference of what two models return for an input."""
    return relative_error(outputs(a, example), outputs(b, example))
