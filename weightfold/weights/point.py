"""One set of weights as a point of its orbit: folded, centred, and brought to the point of least norm.

Every positive rescaling multiplies some entries by exp(c) and others by exp(-c), so the squared norm of all weights is
a sum of exponentials of linear functions of the log factors: convex, with one least point an orbit. There what writes
a channel weighs as much as what reads it. Newton's method finds it to rounding. Blocks that may be mixed by any
invertible matrix (M = A₊ᵀ A₋ is all that counts) take the factors √s u and √s v of the singular value decomposition
M = Σ s u vᵀ, which is the least point there. A channel that nothing writes, or nothing reads, shrinks to zero on both
sides: its other side has no influence.

Reference: Kempf & Ness 1979 (least vectors of an orbit); Neyshabur et al. 2015, arXiv 1506.02617 (path norms).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from weightfold.errors import GraphError
from weightfold.graph.layout import from_front, to_front
from weightfold.weights.balance import balance_
from weightfold.weights.finite import is_finite, remedy_for
from weightfold.weights.symmetry import Freedom, Gain, Norm, Symmetries


@dataclass(frozen=True, eq=False)
class Point:
    """Weights of a model without what has no influence: float64 tensors by name.

    ``tensors`` leaves out what was folded away and names what a gain's shift does to its reader ``reader@shift``.
    """

    symmetries: Symmetries
    tensors: dict[str, Tensor]


def point(found: Symmetries, state: Mapping[str, Tensor], *, centre_logits: bool = True) -> Point:
    """Fold, centre and balance a set of weights.

    Args:
        state: tensors by name, as `nn.Module.state_dict` gives them.
        centre_logits: count models as equal whose logits differ by one number for all classes.
    Returns:
        The point of least norm of the weights' orbit, up to permutations, signs and rotations within linear blocks.
    Raises:
        GraphError: a tensor is missing or has another shape, or is not finite; names it.
    """
    return Point(found, {name: t[0] for name, t in points(found, [state], centre_logits=centre_logits).items()})


def points(
    found: Symmetries, states: Sequence[Mapping[str, Tensor]], *, centre_logits: bool = True
) -> dict[str, Tensor]:
    """Fold, centre and balance many sets of weights of one architecture: the tensors of `point`, shapes (B, ...).

    Several times as fast as one by one where layers are small: the cost there is of operations, not of numbers.
    """
    each = [_folded(found, state, centre_logits) for state in states]
    names = list(each[0])
    stack = {name: torch.stack([one[name] for one in each]) if len(each) > 1 else each[0][name][None] for name in names}
    balance_(stack, found.freedoms)
    return stack


def _folded(found: Symmetries, state: Mapping[str, Tensor], centre_logits: bool) -> dict[str, Tensor]:
    tensors = checked(found, state)
    for norm in found.norms:
        fold_norm_(tensors, norm)
    for weight, bias in found.heads if centre_logits else ():
        for name in filter(None, (weight, bias)):
            tensors[name] = tensors[name] - tensors[name].mean(0, keepdim=True)
    for gain in found.gains:
        fold_gain_(tensors, gain)
    for gain in found.gains:
        tensors.pop(gain.weight, None)
        tensors.pop(gain.bias or "", None)
    return tensors


def checked(found: Symmetries, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state's floating tensors in float64, as the symmetries expect them.

    Raises:
        GraphError: names the tensor and both shapes.
    """
    together: dict[str, list[str]] = {}
    for name in dict.fromkeys((*found.graph.aliases.values(), *found.graph.aliases)):
        together.setdefault(found.graph.aliases.get(name, name), []).append(name)
    out = {}
    for name, shape in found.shapes.items():
        if "@" in name:
            continue
        same = together.get(found.graph.aliases.get(name, name), [])
        there = [n for n in (name, *same) if n in state]
        if not there:
            raise GraphError(
                f"The weights lack '{name}' {shape}.", remedy="Pass weights of the model that the symmetries are of."
            )
        value = state[there[0]]
        for other in there[1:]:
            if other not in found.shapes and not _equal(state[other], value):
                raise GraphError(
                    f"'{other}' is tied to '{name}' in the symmetries; these weights hold two tensors there.",
                    remedy="Pass symmetries of the untied model: untied_symmetries(model, example).",
                )
        if tuple(value.shape) != shape:
            raise GraphError(
                f"'{name}' has shape {tuple(value.shape)}; the model's is {shape}.",
                remedy="Pass weights of the model that the symmetries are of.",
            )
        value = value.detach().cpu().to(torch.float64, copy=True)
        if not is_finite(value):
            raise GraphError(f"'{name}' holds NaN or infinite numbers.", remedy=remedy_for(value))
        out[name] = value
    return out


def _equal(a: Tensor, b: Tensor) -> bool:
    return a is b or (a.shape == b.shape and bool(((a == b) | ((a != a) & (b != b))).all()))


def fold_norm_(tensors: dict[str, Tensor], norm: Norm) -> None:
    """Make a batch norm a scale and a shift, and hand the scale to its writer if it has one."""
    mean, var = tensors.pop(norm.mean), tensors.pop(norm.var)
    scale = (var + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * tensors[norm.weight]
    shift = -mean * scale
    if norm.bias is not None:
        shift = shift + tensors[norm.bias]
    if norm.writer is None:
        if norm.weight is not None and norm.bias is not None:
            tensors[norm.weight], tensors[norm.bias] = scale, shift
        else:
            tensors[norm.mean], tensors[norm.var] = shift, scale
        return
    weight = tensors[norm.writer]
    tensors[norm.writer] = weight * scale.reshape(-1, *[1] * (weight.ndim - 1))
    if norm.writer_bias is not None:
        shift = shift + tensors[norm.writer_bias] * scale
    if norm.weight is not None:
        tensors.pop(norm.weight)
    if norm.bias is not None:
        tensors[norm.bias] = shift
        if norm.writer_bias is not None:
            tensors.pop(norm.writer_bias)
    elif norm.writer_bias is not None:
        tensors[norm.writer_bias] = shift


def fold_gain_(tensors: dict[str, Tensor], gain: Gain) -> None:
    """Multiply a reader by the scale of the norm before it, and keep apart what the shift does to it."""
    reader = tensors[gain.reader].movedim(gain.dim, -1)
    scale = torch.ones(reader.shape[-1], dtype=torch.float64)
    scale[gain.reader_at] = tensors[gain.weight][gain.vector_at]
    if gain.bias is not None:
        shift = torch.zeros_like(scale)
        shift[gain.reader_at] = tensors[gain.bias][gain.vector_at]
        tensors[gain.shift] = reader @ shift
    tensors[gain.reader] = (reader * scale).movedim(-1, gain.dim).contiguous()


def multiply_(tensors: dict[str, Tensor], freedom: Freedom, factors: Tensor) -> None:
    """Multiply each member by a factor here and divide there."""
    for slots, power in ((freedom.plus, 1), (freedom.minus, -1)):
        for slot in slots:
            front = to_front(tensors[slot.tensor], slot.dim, slot.slabs)
            spread = torch.ones(front.shape[0], dtype=torch.float64)
            valid = slot.index >= 0
            spread[slot.index[valid]] = (factors**power)[:, None].expand_as(slot.index)[valid]
            scaled = front * spread.reshape(-1, *[1] * (front.ndim - 1))
            tensors[slot.tensor] = from_front(scaled, slot.dim, slot.slabs)
