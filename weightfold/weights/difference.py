"""What really moved between two sets of weights, once their symmetries are taken away: by layer, by unit.

Both are folded, centred and balanced (`point`), so that scales, norms and what logits have in common drop out; then the
second is aligned to the first by permutations, signs and rotations. What is left of their difference is the change.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from weightfold.graph.trace import Example
from weightfold.weights.align import align_tensors
from weightfold.weights.compare import PAIR, alike, fitting, weights_of
from weightfold.weights.point import point
from weightfold.weights.symmetry import Members, Symmetries
from weightfold.weights.work import rows_float


@dataclass(frozen=True)
class Layer:
    """How one tensor changed.

    Args:
        name: of the tensor; ``reader@shift`` for what a norm's shift does to its reader.
        moved: ‖a - b‖ / ‖a‖ once symmetries are taken away.
        plain: the same of the tensors as they are stored; None where folding left no counterpart.
        cosine: of the tensor before and after.
    """

    name: str
    moved: float
    plain: float | None
    cosine: float


@dataclass(frozen=True)
class Unit:
    """How one channel changed: all that writes and reads it.

    Args:
        unit: number in the first model.
        was: number in the second.
        moved: change of its weights over the group's mean size of a channel.
    """

    group: str
    unit: int
    was: int
    moved: float


@dataclass(frozen=True)
class Difference:
    """What moved between two models.

    Args:
        moved: ‖a - b‖ / ‖a‖ over all weights once symmetries are taken away.
        plain: the same as they are stored.
        layers: by tensor, in the model's order.
        units: by channel, the most moved first.
        reordered: channels that stand at another place, of how many.
    """

    moved: float
    plain: float
    layers: tuple[Layer, ...]
    units: tuple[Unit, ...]
    reordered: tuple[int, int]


def difference(
    a: nn.Module, b: nn.Module, example: Example, *, found: Symmetries | None = None, centre_logits: bool = True
) -> Difference:
    """Compare two models of one architecture, symmetries apart.

    Raises:
        GraphError: the architectures differ, or weights are not finite; says where.
    Example:
        >>> a = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> b = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> with torch.no_grad():
        ...     _ = b[0].weight.copy_(3 * a[0].weight.flip(0)), b[0].bias.copy_(3 * a[0].bias.flip(0))
        ...     _ = b[2].weight.copy_(a[2].weight.flip(1) / 3), b[2].bias.copy_(a[2].bias)
        >>> found = difference(a, b, torch.zeros(1, 4))
        >>> found.moved < 1e-6, found.plain > 1, found.reordered
        (True, True, (8, 8))
    """
    a, b = alike([a, b], PAIR)
    raw_a, raw_b = weights_of(a), weights_of(b)
    found = fitting(found, a, example)
    one = point(found, a.state_dict(), centre_logits=centre_logits).tensors
    two = point(found, b.state_dict(), centre_logits=centre_logits).tensors
    two, orders = align_tensors(found, one, two)
    layers = tuple(
        Layer(name, _moved(one[name], two[name]), _plain(raw_a, raw_b, name), _cosine(one[name], two[name]))
        for name in one
    )
    units = [u for g in found.members if g.kind == "channels" for u in _units(g, one, two, orders.get(g.name))]
    changed = sum(int((o != torch.arange(len(o))).sum()) for o in orders.values())
    total = sum(g.n for g in found.members if g.free)
    named = [n for n in found.shapes if n in raw_a]
    return Difference(
        _overall(one, two, list(one)),
        _overall(raw_a, raw_b, named),
        layers,
        tuple(sorted(units, key=lambda u: -u.moved)),
        (changed, total),
    )


def _units(group: Members, one: dict[str, Tensor], two: dict[str, Tensor], order: Tensor | None) -> list[Unit]:
    slots = [s for s in group.slots if s.tensor in one]
    if not slots:
        return []
    rows = [torch.cat([rows_float(side, s) for s in slots], 1) for side in (one, two)]
    size = float(rows[0].norm(dim=1).mean())
    moved = (rows[0] - rows[1]).norm(dim=1) / max(size, 1e-300)
    was = torch.arange(group.n) if order is None else order
    return [Unit(group.name, i, int(was[i]), float(moved[i])) for i in range(group.n)]


def _moved(a: Tensor, b: Tensor) -> float:
    size = float(a.norm())
    change = float((a - b).norm())
    return change / size if size > 0 else (0.0 if change == 0 else float("inf"))


def _plain(a: dict[str, Tensor], b: dict[str, Tensor], name: str) -> float | None:
    return _moved(a[name].double(), b[name].double()) if name in a else None


def _cosine(a: Tensor, b: Tensor) -> float:
    size = float(a.norm() * b.norm())
    return float((a * b).sum()) / size if size > 0 else 1.0


def _overall(a: dict[str, Tensor], b: dict[str, Tensor], names: list[str]) -> float:
    change = sum(float((a[n].double() - b[n].double()).square().sum()) for n in names)
    size = sum(float(a[n].double().square().sum()) for n in names)
    return (change / size) ** 0.5 if size > 0 else 0.0
