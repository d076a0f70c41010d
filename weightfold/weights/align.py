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

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from weightfold.errors import ConfigError
from weightfold.graph.apply import find_tensor
from weightfold.graph.copies import independent_copy
from weightfold.graph.exactness import outputs, relative_error
from weightfold.graph.trace import Example
from weightfold.weights.balance import rows_of
from weightfold.weights.compare import PAIR, alike, cosine, fitting
from weightfold.weights.correlate import correlations
from weightfold.weights.rotate import (
    doubles,
    head_of,
    match_gains,
    rotate_linear,
    rotate_stream_,
    sides_of,
    streams,
)
from weightfold.weights.symmetry import Freedom, Members, Slot, Symmetries, lively_input
from weightfold.weights.work import (
    Work,
    assign,
    graph_slots,
    in_reach,
    multiply_signs_,
    permute_,
    rows_float,
    scores_of,
    signs_of,
    tensors_of,
    touched_twice,
)

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
        >>> import copy
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
    a, b = alike([a, b], PAIR)
    found = fitting(found, a, example)
    work = Work(found, tensors_of(found, a), tensors_of(found, b), least=tolerance)
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


def loaded(model: nn.Module, tensors: Mapping[str, Tensor]) -> nn.Module:
    """A copy of a model with other weights, by name."""
    twin = independent_copy(model)
    with torch.no_grad():
        for name, value in tensors.items():
            find_tensor(twin, name)[2].copy_(value)
    return twin


def align_tensors(
    found: Symmetries, a: Mapping[str, Tensor], b: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Align folded weights (`point`): the second's tensors in the first's basis, and the order of each group."""
    work = Work(found, dict(a), dict(b), folded=True)
    _by_weights(work)
    return work.b, work.orders


def _by_weights(work: Work) -> int:
    """Coordinate descent from what is settled; where layers read themselves, from the order as it is too.

    The first sweep over a recurrent layer sees only its inputs and biases. If these tell little, channels that stood
    right may be moved for good, so the better of both ends counts.
    """
    if not any(touched_twice(work.places(group)) for group in in_reach(work.found)):
        return _descend(work)
    other = Work(work.found, work.a, dict(work.b), dict(work.orders), list(work.notes), work.folded, work.least)
    sweeps = _descend(work) + _descend(other, as_is=True)
    if _inner(other) > _inner(work):
        work.b, work.orders, work.notes = other.b, other.orders, other.notes
    return sweeps


def _inner(work: Work) -> float:
    return sum(float((work.a[name].double() * value.double()).sum()) for name, value in work.b.items())


def _descend(work: Work, *, as_is: bool = False) -> int:
    """Coordinate descent; a group is looked at again only if a neighbour of it has moved."""
    match_gains(work)
    groups = in_reach(work.found)
    touched = {g.name: {s.tensor for s in work.places(g)} for g in groups}
    near = {g: {h for h in touched if h != g and touched[g] & touched[h]} for g in touched}
    open_ = set(touched)
    settled: set[str] = set()
    for group in () if as_is else groups:
        slots = _settled_slots(work, group, settled)
        if _match(work, group, slots):
            open_ |= near[group.name]
        if len(slots) == len(work.places(group)):
            open_.discard(group.name)
        settled.add(group.name)
    sweeps = 1
    while open_ and sweeps < MAX_SWEEPS:
        sweeps += 1
        if match_gains(work):
            open_ = set(touched)
        for group in groups:
            if group.name in open_:
                open_.discard(group.name)
                if _match(work, group, work.places(group)):
                    open_ |= near[group.name]
    return sweeps


def _with_streams(work: Work, b: nn.Module, example: Example) -> tuple[Work, int]:
    """Go on with rotations of residual streams; back to what was, if the outputs do not bear them."""
    turned = Work(work.found, work.a, dict(work.b), dict(work.orders), list(work.notes), least=work.least)
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


def _settled_slots(work: Work, group: Members, settled: set[str]) -> tuple[Slot, ...]:
    """The slots of a group in tensors whose other dimensions are settled; all, if there are none.

    A tensor that the group touches along two dimensions (recurrent weights) is not settled: comparing its rows asks for
    the very order of columns that is sought.
    """
    mine = work.places(group)
    open_ = touched_twice(mine) | {
        s.tensor
        for other in work.found.members
        if other.free and other.n > 1 and other.name not in settled and other.name != group.name
        for s in graph_slots(work.found, other)
    }
    return tuple(s for s in mine if s.tensor not in open_) or mine


def _match(work: Work, group: Members, slots: tuple[Slot, ...]) -> bool:
    """Improve one group with the others held; whether anything moved."""
    linear = [f for f in work.found.freedoms if f.kind == "linear" and f.group == group.name]
    if group.kind == "blocks":
        return _match_blocks(work, group, slots)
    rotated = torch.zeros(group.n, dtype=torch.bool)
    moved = False
    for freedom in linear if group.kind == "channels" else ():
        rotated[freedom.channel] = True
        moved |= rotate_linear(work, freedom)
    if bool(rotated.all()):
        return moved
    scores, parts = _signed_scores(work, group, slots)
    order = assign(scores, group.block, ~rotated)
    place = torch.arange(group.n)
    flips = [(f, part[f.channel, order[f.channel]] < 0) for f, part in parts]
    still = torch.equal(order, place) and not any(bool(flip.any()) for _, flip in flips)
    lost = sum(float((part.abs() - part).diagonal().sum()) for _, part in parts)
    if still or not _gains(scores, order, lost, work.least):
        return moved
    permute_(work.b, work.places(group), order)
    work.orders[group.name] = work.orders.get(group.name, place)[order]
    for freedom, flip in flips:
        if bool(flip.any()):
            multiply_signs_(work.b, freedom, torch.where(flip, -1.0, 1.0).double())
    return True


def _signed_scores(work: Work, group: Members, slots: tuple[Slot, ...]) -> tuple[Tensor, list[tuple[Freedom, Tensor]]]:
    """Scores with every free sign at its best, and the share of each freedom in them, its signs as they are."""
    scores = scores_of(work, slots, group.n)
    seen = {(s.tensor, s.dim) for s in slots}
    parts = []
    for freedom in work.found.freedoms:
        once = torch.unique(freedom.channel).numel() == freedom.channel.numel()
        if freedom.kind != "sign" or freedom.group != group.name or group.kind != "channels" or not once:
            continue
        part = torch.zeros_like(scores)
        for slot in work.slots((*freedom.plus, *freedom.minus)):
            if (slot.tensor, slot.dim) in seen:
                product = rows_float(work.a, slot) @ rows_float(work.b, slot).T
                part[freedom.channel[:, None], freedom.channel] += product.double()
        scores = scores + part.abs() - part
        parts.append((freedom, part))
    return scores, parts


def _gains(scores: Tensor, order: Tensor, lost: float, least: float) -> bool:
    """Whether the new order, and new signs, score more than what is; ``lost``: what the present signs cost."""
    then = scores[torch.arange(len(order)), order].sum()
    now = scores.diagonal().sum() - lost
    return float(then - now) > least * float(scores.abs().amax(1).sum() + 1e-300)


def _match_blocks(work: Work, group: Members, slots: tuple[Slot, ...]) -> bool:
    """Assign heads by what rotations inside them can reach."""
    freedoms = [f for f in work.found.freedoms if f.kind == "linear" and head_of(f, group) is not None]
    scores = torch.zeros(group.n, group.n, dtype=torch.float64)
    for freedom in freedoms:
        head = head_of(freedom, group)
        assert head is not None
        n, mine = freedom.channel.numel(), sides_of(work, freedom)
        one, two = rows_of(doubles(work.a, mine), mine, n), rows_of(doubles(work.b, mine), mine, n)
        for i in range(group.n):
            for j in range(group.n):
                cross = one[head == i] @ two[head == j].T
                scores[i, j] += torch.linalg.svdvals(cross).sum()
    if not freedoms:
        scores = scores_of(work, slots, group.n)
    order = assign(scores, group.block)
    if torch.equal(order, torch.arange(group.n)) or not _gains(scores, order, 0.0, work.least):
        return False
    permute_(work.b, work.places(group), order)
    work.orders[group.name] = work.orders.get(group.name, torch.arange(group.n))[order]
    for freedom in freedoms:
        rotate_linear(work, freedom)
    return True


def _by_activations(work: Work, a: nn.Module, b: nn.Module, found: Symmetries, data: Iterable[Example]) -> int:
    """One assignment a group, on correlations of activations."""
    scores = correlations(a, b, found, data)
    for group in found.members:
        if not group.free or group.n < 2 or group.kind != "channels":
            continue
        if group.name not in scores:
            work.notes.append(f"'{group.name}' was left alone: its channels cannot be observed")
            continue
        score, signed = scores[group.name], signs_of(found, group)
        order = assign(score.abs() if signed is not None else score, group.block)
        permute_(work.b, work.places(group), order)
        work.orders[group.name] = order
        if signed is not None:
            flip = score[torch.arange(group.n), order] < 0
            multiply_signs_(work.b, signed, torch.where(flip[signed.channel], -1.0, 1.0).double())
    return 1


def exact_error(a: nn.Module, b: nn.Module, example: Example) -> float:
    """Largest relative difference of what two models return for an input."""
    return relative_error(outputs(a, example), outputs(b, example))
