"""Least norm of an orbit: balance the scales and linear blocks of many sets of weights of one architecture at once.

Every tensor carries a first dimension that counts the models, size B. Models do not see each other: each has its own
steps and stops by its own slopes, so that a batch gives what its members give alone, up to rounding.
See `weightfold.weights.point` for the problem that is solved.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from weightfold.graph.layout import from_front, to_front
from weightfold.weights.symmetry import Freedom, Slot

SWEEPS, NEWTON_STEPS = 3, 60
LEAST = 1e-13
"""Share of the squared norm that counts as no slope."""


def balance_(tensors: dict[str, Tensor], freedoms: tuple[Freedom, ...]) -> None:
    """Bring weights to the least norm that scales and linear blocks allow; tensors of shape (B, ...)."""
    scales = tuple(f for f in freedoms if f.kind == "scale")
    linear = [f for f in freedoms if f.kind == "linear"]
    if scales and linear:
        _silence_dead_(tensors, scales)
    before = None
    for _ in range(100 if linear and scales else 1):
        for freedom in linear:
            _balance_linear_(tensors, freedom)
        if scales:
            _balance_scales_(tensors, scales)
        if not linear or not scales:
            break
        now = torch.stack([t.square().flatten(1).sum(1) for t in tensors.values()]).sum(0)
        if before is not None and bool(((before - now).abs() <= 1e-15 * now).all()):
            break
        before = now


# linear blocks --------------------------------------------------------------------------------------------------------


def rows_of(tensors: dict[str, Tensor], slots: tuple[Slot, ...], n: int) -> Tensor:
    """All numbers of one model at some slots, one row a member, shape (n, F)."""
    parts = []
    for slot in slots:
        front = to_front(tensors[slot.tensor], slot.dim, slot.slabs)
        flat = front.reshape(front.shape[0], -1)
        have = (slot.index >= 0).double()
        for m in range(slot.index.shape[1]):
            parts.append(flat[slot.index[:, m].clamp_min(0)] * have[:, m : m + 1])
    return torch.cat(parts, 1) if parts else torch.zeros(n, 0, dtype=torch.float64)


def put_rows_(tensors: dict[str, Tensor], slots: tuple[Slot, ...], rows: Tensor) -> None:
    """Write back what `rows_of` gave."""
    at = 0
    for slot in slots:
        front = to_front(tensors[slot.tensor], slot.dim, slot.slabs).clone()
        flat = front.reshape(front.shape[0], -1)
        for m in range(slot.index.shape[1]):
            have = slot.index[:, m] >= 0
            flat[slot.index[have, m]] = rows[have, at : at + flat.shape[1]]
            at += flat.shape[1]
        tensors[slot.tensor] = from_front(flat.reshape(front.shape), slot.dim, slot.slabs)


def _balance_linear_(tensors: dict[str, Tensor], freedom: Freedom) -> None:
    names = {s.tensor for s in (*freedom.plus, *freedom.minus)}
    for m in range(len(tensors[next(iter(names))])):
        one = {name: tensors[name][m] for name in names}
        balance_linear_(one, freedom)
        for name, value in one.items():
            tensors[name][m] = value


def balance_linear_(tensors: dict[str, Tensor], freedom: Freedom) -> None:
    """Give both sides of each linear block of one model the roots of the product's singular values, largest first."""
    n = freedom.channel.numel()
    plus, minus = rows_of(tensors, freedom.plus, n), rows_of(tensors, freedom.minus, n)
    for block in torch.unique(freedom.block).tolist():
        mine = (freedom.block == block).nonzero().flatten()
        q_plus, r_plus = torch.linalg.qr(plus[mine].T)
        q_minus, r_minus = torch.linalg.qr(minus[mine].T)
        u, s, vh = torch.linalg.svd(r_plus @ r_minus.T, full_matrices=False)
        root = s.sqrt()
        k = root.numel()
        plus[mine], minus[mine] = 0.0, 0.0
        plus[mine[:k]] = root[:, None] * (q_plus @ u).T
        minus[mine[:k]] = root[:, None] * (q_minus @ vh.T).T
    put_rows_(tensors, freedom.plus, plus)
    put_rows_(tensors, freedom.minus, minus)


# scales ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Side:
    """Where the scales of one slot touch a tensor: factor exp(power λ[variable]) at each position."""

    dim: int
    slabs: int
    power: float
    variable: Tensor
    position: Tensor


@dataclass(frozen=True, eq=False)
class _Plan:
    """Which scales touch which tensor, and the first variable of each freedom."""

    sides: dict[str, tuple[_Side, ...]]
    starts: tuple[int, ...]


@lru_cache(maxsize=64)
def _plan(scales: tuple[Freedom, ...]) -> _Plan:
    sides: dict[str, list[_Side]] = {}
    starts = [0]
    for freedom in scales:
        n = freedom.channel.numel()
        for slots, power in ((freedom.plus, 1.0), (freedom.minus, -1.0)):
            for slot in slots:
                valid = slot.index >= 0
                variable = torch.arange(starts[-1], starts[-1] + n)[:, None].expand_as(slot.index)[valid]
                side = _Side(slot.dim, slot.slabs, power, variable, slot.index[valid])
                sides.setdefault(slot.tensor, []).append(side)
        starts.append(starts[-1] + n)
    return _Plan({name: tuple(of) for name, of in sides.items()}, tuple(starts))


@dataclass(frozen=True, eq=False)
class _Table:
    """Squares of one tensor, summed over dimensions that no scale touches, shape (B, ...), and which scales touch."""

    squares: Tensor
    sides: tuple[_Side, ...]

    def factors(self, values: Tensor, power: float) -> Tensor:
        """Σ over sides of the log factors, exponentiated: exp(power Σ λ), broadcast to the table's shape."""
        out = self.squares.new_ones(())
        for side in self.sides:
            out = out * self._spread(self._flat(side, values).mul_(power).exp_(), side)
        return out

    def sums(self, values: Tensor) -> Tensor:
        """Σ over sides of the log factors, broadcast to the table's shape."""
        out = self.squares.new_zeros(())
        for side in self.sides:
            out = out + self._spread(self._flat(side, values), side)
        return out

    def _flat(self, side: _Side, values: Tensor) -> Tensor:
        size = self.squares.shape[side.dim + 1] * side.slabs if side.dim else self.squares.shape[1]
        flat = values.new_zeros(len(values), size)
        return flat.index_add_(1, side.position, side.power * values[:, side.variable])

    def _spread(self, flat: Tensor, side: _Side) -> Tensor:
        shape = [len(flat)] + [1] * (self.squares.ndim - 1)
        if side.slabs == 1 or side.dim == 0:
            shape[side.dim + 1] = -1
            return flat.reshape(shape)
        grid = flat.reshape(len(flat), side.slabs, -1)
        shape[1], shape[side.dim + 1] = self.squares.shape[1], grid.shape[2]
        return grid.repeat_interleave(self.squares.shape[1] // side.slabs, 1).reshape(shape)

    def add_(self, entries: Tensor, out: Tensor, *, signed: bool = True, power: float | None = None) -> None:
        """Add up the entries that each variable touches, with the sign of its power; or of one power only."""
        for side in self.sides:
            if power is not None and side.power != power:
                continue
            if side.slabs == 1 or side.dim == 0:
                flat = entries.movedim(side.dim + 1, 1).reshape(len(entries), entries.shape[side.dim + 1], -1).sum(2)
            else:
                grid = entries.reshape(len(entries), side.slabs, -1, *entries.shape[2:]).movedim(side.dim + 2, 2)
                flat = grid.reshape(len(entries), side.slabs * grid.shape[2], -1).sum(2)
            taken = flat[:, side.position]
            out.index_add_(1, side.variable, side.power * taken if signed else taken)


def _tables(tensors: dict[str, Tensor], plan: _Plan) -> dict[str, _Table]:
    tables = {}
    for name, sides in plan.sides.items():
        squares = tensors[name].square()
        keep = {side.dim for side in sides} | ({0} if any(side.slabs > 1 for side in sides) else set())
        summed = [d + 1 for d in range(squares.ndim - 1) if d not in keep]
        tables[name] = _Table(squares.sum(summed, keepdim=True) if summed else squares, sides)
    return tables


def _masked(tables: dict[str, _Table], keep: Tensor) -> dict[str, _Table]:
    """Tables without the entries that a dead channel touches."""
    if bool(keep.all()):
        return tables
    gone = (~keep).double()
    out = {}
    for name, table in tables.items():
        held = replace(table, sides=tuple(replace(side, power=1.0) for side in table.sides)).sums(gone) == 0
        out[name] = replace(table, squares=table.squares * held)
    return out


def _living(tables: dict[str, _Table], n: int) -> tuple[Tensor, Tensor]:
    """Which channels something writes and something reads, and which are left alone or zeroed, shapes (B, n).

    A channel that nothing writes, or nothing reads, takes its other side with it, and that may silence others.
    """
    first = next(iter(tables.values())).squares
    keep = torch.ones(len(first), n, dtype=torch.bool)
    while True:
        held = _masked(tables, keep)
        plus, minus = torch.zeros(len(first), n, dtype=torch.float64), torch.zeros(len(first), n, dtype=torch.float64)
        for table in held.values():
            table.add_(table.squares, plus, signed=False, power=1.0)
            table.add_(table.squares, minus, signed=False, power=-1.0)
        dead = (plus > 0) != (minus > 0)
        if not bool(dead.any()):
            return plus > 0, keep
        keep &= ~dead


def _silence_dead_(tensors: dict[str, Tensor], scales: tuple[Freedom, ...]) -> None:
    plan = _plan(scales)
    tables = _tables(tensors, plan)
    _, keep = _living(tables, plan.starts[-1])
    _multiply_(tensors, tables, torch.zeros(keep.shape, dtype=torch.float64), keep)


def _multiply_(tensors: dict[str, Tensor], tables: dict[str, _Table], values: Tensor, keep: Tensor) -> None:
    whole = bool(keep.all())
    gone = (~keep).double()
    for name, table in tables.items():
        factor = table.factors(values, 1.0)
        if not whole:
            ones = replace(table, sides=tuple(replace(side, power=1.0) for side in table.sides))
            factor = factor * (ones.sums(gone) == 0)
        tensors[name] = tensors[name] * factor


def _balance_scales_(tensors: dict[str, Tensor], scales: tuple[Freedom, ...]) -> None:
    """Newton's method for the log factors of every scale together; then multiply."""
    plan = _plan(scales)
    tables = _tables(tensors, plan)
    alive, keep = _living(tables, plan.starts[-1])
    held = list(_masked(tables, keep).values())
    values = torch.zeros(alive.shape, dtype=torch.float64)
    for _ in range(SWEEPS):
        for start, stop in zip(plan.starts, plan.starts[1:], strict=False):
            _sweep_(held, values, alive, start, stop)
    open_ = torch.ones(len(values), dtype=torch.bool)
    for _ in range(NEWTON_STEPS):
        open_ = _newton_(held, values, alive, open_)
        if not bool(open_.any()):
            break
    _multiply_(tensors, tables, values, keep)


def _sweep_(tables: list[_Table], values: Tensor, alive: Tensor, start: int, stop: int) -> None:
    """Balance one freedom exactly while the others hold still."""
    plus, minus = torch.zeros_like(values), torch.zeros_like(values)
    for table in tables:
        if any(start <= int(side.variable[0]) < stop for side in table.sides if len(side.variable)):
            entries = table.squares * table.factors(values, 2.0)
            table.add_(entries, plus, signed=False, power=1.0)
            table.add_(entries, minus, signed=False, power=-1.0)
    ratio = minus[:, start:stop].clamp_min(1e-300).log() - plus[:, start:stop].clamp_min(1e-300).log()
    values[:, start:stop] += torch.where(alive[:, start:stop], 0.25 * ratio, 0.0)


def _newton_(tables: list[_Table], values: Tensor, alive: Tensor, open_: Tensor) -> Tensor:
    """One damped Newton step by conjugate gradients; which models have a slope left, shape (B,)."""
    entries = [table.squares * table.factors(values, 2.0) for table in tables]
    gradient, weight = torch.zeros_like(values), torch.zeros_like(values)
    for table, e in zip(tables, entries, strict=True):
        table.add_(2 * e, gradient)
        table.add_(4 * e, weight, signed=False)
    open_ = open_ & ((gradient.abs() > LEAST * weight) & alive).any(1)
    if not bool(open_.any()):
        return open_
    gradient = torch.where(alive & open_[:, None], gradient, 0.0)

    def times(v: Tensor) -> Tensor:
        out = torch.zeros_like(v)
        for table, e in zip(tables, entries, strict=True):
            table.add_(4 * e * table.sums(v), out)
        return torch.where(alive, out, 0.0)

    step = _conjugate(times, -gradient, weight.clamp_min(1e-300))
    step = step * (3.0 / step.abs().amax(1).clamp_min(1e-300)).clamp_max(1.0)[:, None]
    value = _total(entries)
    left = open_.clone()
    for _ in range(30):
        tried = _total([table.squares * table.factors(values + step, 2.0) for table in tables])
        good = left & (tried <= value * (1 + 1e-14))
        values += torch.where(good[:, None], step, 0.0)
        left &= ~good
        if not bool(left.any()):
            break
        step = step / 2
    return open_ & ~left


def _total(entries: list[Tensor]) -> Tensor:
    return torch.stack([e.flatten(1).sum(1) for e in entries]).sum(0)


def _conjugate(times: Callable[[Tensor], Tensor], right: Tensor, scale: Tensor) -> Tensor:
    """Solve each model's Newton system by conjugate gradients, preconditioned by the diagonal; shapes (B, n)."""
    x = torch.zeros_like(right)
    r = right.clone()
    z = r / scale
    p, rz = z.clone(), (r * z).sum(1)
    first = rz
    going = torch.ones(len(rz), dtype=torch.bool)
    for _ in range(300):
        going = going & (rz > 1e-10 * first) & (rz != 0)
        if not bool(going.any()):
            break
        hp = times(p)
        curve = (p * hp).sum(1)
        going = going & (curve > 0)
        length = torch.where(going, rz / curve, 0.0)[:, None]
        x += length * p
        r -= length * hp
        z = r / scale
        rz, old = torch.where(going, (r * z).sum(1), rz), rz
        p = torch.where(going[:, None], z + (rz / old)[:, None] * p, p)
    return x
