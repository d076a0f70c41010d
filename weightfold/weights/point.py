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

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from weightfold.errors import GraphError
from weightfold.graph.layout import from_front, to_front
from weightfold.weights.symmetry import Freedom, Gain, Norm, Slot, Symmetries

SWEEPS, NEWTON_STEPS = 3, 60
LEAST = 1e-13
"""Share of the squared norm that counts as no slope."""


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
    balance_(tensors, found.freedoms)
    return Point(found, tensors)


def checked(found: Symmetries, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state's floating tensors in float64, as the symmetries expect them.

    Raises:
        GraphError: names the tensor and both shapes.
    """
    aliases = found.graph.aliases
    held = {aliases.get(name, name): value for name, value in state.items()}
    out = {}
    for name, shape in found.shapes.items():
        if "@" in name:
            continue
        if name not in held:
            raise GraphError(f"The weights lack '{name}' {shape}.", remedy="They belong to another architecture.")
        value = held[name]
        if tuple(value.shape) != shape:
            raise GraphError(
                f"'{name}' has shape {tuple(value.shape)}; the model's is {shape}.",
                remedy="The weights belong to another architecture.",
            )
        value = value.detach().cpu().double()
        if not bool(torch.isfinite(value).all()):
            raise GraphError(f"'{name}' holds NaN or infinite numbers.", remedy="The model is broken; train it anew.")
        out[name] = value.clone()
    return out


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


# balance --------------------------------------------------------------------------------------------------------------


def balance_(tensors: dict[str, Tensor], freedoms: tuple[Freedom, ...]) -> None:
    """Bring weights to the least norm that scales and linear blocks allow."""
    scales = [f for f in freedoms if f.kind == "scale"]
    linear = [f for f in freedoms if f.kind == "linear"]
    silence_dead_(tensors, [f for f in freedoms if f.kind == "scale"])
    before = None
    for _ in range(100 if linear and scales else 1):
        for freedom in linear:
            balance_linear_(tensors, freedom)
        if scales:
            balance_scales_(tensors, scales)
        now = sum(float(t.square().sum()) for t in tensors.values())
        if before is not None and abs(before - now) <= 1e-15 * now:
            break
        before = now


def rows_of(tensors: Mapping[str, Tensor], slots: tuple[Slot, ...], n: int) -> Tensor:
    """All numbers at some slots, one row a member, shape (n, F)."""
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


def balance_linear_(tensors: dict[str, Tensor], freedom: Freedom) -> None:
    """Give both sides of each linear block the roots of the product's singular values, largest first."""
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


def silence_dead_(tensors: dict[str, Tensor], scales: list[Freedom]) -> None:
    """Zero both sides of channels that nothing writes or nothing reads, until no more turn up."""
    again = True
    while again:
        again = False
        for freedom in scales:
            n = freedom.channel.numel()
            plus, minus = rows_of(tensors, freedom.plus, n), rows_of(tensors, freedom.minus, n)
            loud, read = (plus != 0).any(1), (minus != 0).any(1)
            dead = loud != read
            if bool(dead.any()):
                plus[dead], minus[dead] = 0.0, 0.0
                put_rows_(tensors, freedom.plus, plus)
                put_rows_(tensors, freedom.minus, minus)
                again = True


@dataclass(eq=False)
class _Table:
    """Squares of one tensor, summed over dimensions that no scale touches, and which scales touch what.

    ``sides`` holds (dim, spread, sign, variable, position): factor exp(sign λ[variable]) at the position.
    """

    squares: Tensor
    sides: list[tuple[int, int, Tensor, Tensor, Tensor]]

    def logs(self, values: Tensor) -> Tensor:
        """The log factor of every entry, broadcast to the table's shape."""
        total = torch.zeros_like(self.squares)
        for dim, slabs, sign, variable, position in self.sides:
            size = self.squares.shape[dim]
            flat = torch.zeros(size * slabs, dtype=torch.float64)
            flat.index_add_(0, position, sign * values[variable])
            total = total + self._spread(flat, dim, slabs)
        return total

    def _spread(self, flat: Tensor, dim: int, slabs: int) -> Tensor:
        shape = [1] * self.squares.ndim
        if slabs == 1:
            shape[dim] = -1
            return flat.reshape(shape)
        grid = flat.reshape(slabs, -1)
        rows = self.squares.shape[0] // slabs
        if dim == 0:
            shape[0] = -1
            return flat.reshape(shape)
        shape[0], shape[dim] = slabs * rows, grid.shape[1]
        return grid.repeat_interleave(rows, 0).reshape(shape)

    def slopes(self, entries: Tensor, out: Tensor) -> None:
        """Add the derivative by each variable, for entries that each stand for one exponential."""
        for dim, slabs, sign, variable, position in self.sides:
            if slabs == 1 or dim == 0:
                flat = entries.movedim(dim, 0).reshape(entries.shape[dim], -1).sum(1)
            else:
                grid = entries.reshape(slabs, -1, *entries.shape[1:]).movedim(dim + 1, 1)
                flat = grid.reshape(slabs * grid.shape[1], -1).sum(1)
            out.index_add_(0, variable, sign * flat[position])


def balance_scales_(tensors: dict[str, Tensor], scales: list[Freedom]) -> None:
    """Newton's method for the log factors of every scale together; then multiply."""
    tables, alive, n = _tables(tensors, scales)
    values = torch.zeros(n, dtype=torch.float64)
    sizes = [(len(f.channel), i) for i, f in enumerate(scales)]
    starts = [0]
    for size, _ in sizes:
        starts.append(starts[-1] + size)
    for _ in range(SWEEPS):
        for i in range(len(scales)):
            _sweep_(tables, values, alive, slice(starts[i], starts[i + 1]))
    for _ in range(NEWTON_STEPS):
        if not _newton_(tables, values, alive):
            break
    factors = torch.exp(values)
    for i, freedom in enumerate(scales):
        mine = factors[starts[i] : starts[i + 1]]
        multiply_(tensors, freedom, mine)


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


def _tables(tensors: Mapping[str, Tensor], scales: list[Freedom]) -> tuple[list[_Table], Tensor, int]:
    touched: dict[str, list[tuple[int, int, Tensor, Tensor, Tensor]]] = {}
    start = 0
    alive = []
    for freedom in scales:
        n = freedom.channel.numel()
        for slots, power in ((freedom.plus, 1.0), (freedom.minus, -1.0)):
            for slot in slots:
                valid = slot.index >= 0
                variable = torch.arange(start, start + n)[:, None].expand_as(slot.index)[valid]
                sign = torch.full(variable.shape, power, dtype=torch.float64)
                touched.setdefault(slot.tensor, []).append((slot.dim, slot.slabs, sign, variable, slot.index[valid]))
        alive.append((rows_of(tensors, freedom.plus, n) != 0).any(1))
        start += n
    tables = []
    for name, sides in touched.items():
        squares = tensors[name].square()
        keep = {dim for dim, *_ in sides} | ({0} if any(s[1] > 1 for s in sides) else set())
        summed = [d for d in range(squares.ndim) if d not in keep]
        tables.append(_Table(squares.sum(summed, keepdim=True) if summed else squares, sides))
    return tables, torch.cat(alive), start


def _sweep_(tables: list[_Table], values: Tensor, alive: Tensor, part: slice) -> None:
    """Balance one freedom exactly while the others hold still."""
    plus, minus = torch.zeros_like(values), torch.zeros_like(values)
    for table in tables:
        if not any(bool(((v >= part.start) & (v < part.stop)).any()) for _, _, _, v, _ in table.sides):
            continue
        entries = table.squares * torch.exp(2 * table.logs(values))
        for side in table.sides:
            out = plus if float(side[2][0]) > 0 else minus
            _Table(table.squares, [(side[0], side[1], side[2].abs(), side[3], side[4])]).slopes(entries, out)
    step = torch.where(alive, 0.25 * (minus.clamp_min(1e-300).log() - plus.clamp_min(1e-300).log()), 0.0)
    values[part] += step[part]


def _newton_(tables: list[_Table], values: Tensor, alive: Tensor) -> bool:
    """One damped Newton step by conjugate gradients; False where no slope is left."""
    entries = [t.squares * torch.exp(2 * t.logs(values)) for t in tables]
    gradient, weight = torch.zeros_like(values), torch.zeros_like(values)
    for table, e in zip(tables, entries, strict=True):
        table.slopes(2 * e, gradient)
        _Table(table.squares, [(d, s, sign.abs(), v, p) for d, s, sign, v, p in table.sides]).slopes(4 * e, weight)
    gradient = torch.where(alive, gradient, 0.0)
    if bool((gradient.abs() <= LEAST * weight).all()):
        return False
    scale = weight.clamp_min(1e-300)

    def times(v: Tensor) -> Tensor:
        out = torch.zeros_like(v)
        for table, e in zip(tables, entries, strict=True):
            table.slopes(4 * e * table.logs(v), out)
        return torch.where(alive, out, 0.0)

    step = _conjugate(times, -gradient, scale)
    step = step * min(1.0, 3.0 / max(float(step.abs().max()), 1e-300))
    value = sum(float(e.sum()) for e in entries)
    for _ in range(30):
        if sum(float((t.squares * torch.exp(2 * t.logs(values + step))).sum()) for t in tables) <= value * (1 + 1e-14):
            values += step
            return True
        step = step / 2
    return False


def _conjugate(times: Callable[[Tensor], Tensor], right: Tensor, scale: Tensor) -> Tensor:
    """Solve the Newton system by conjugate gradients, preconditioned by the diagonal."""
    x = torch.zeros_like(right)
    r = right.clone()
    z = r / scale
    p, rz = z.clone(), float(r @ z)
    first = rz
    for _ in range(300):
        if rz <= 1e-10 * first or rz == 0:
            break
        hp = times(p)
        curve = float(p @ hp)
        if curve <= 0:
            break
        x += rz / curve * p
        r -= rz / curve * hp
        z = r / scale
        rz, old = float(r @ z), rz
        p = z + rz / old * p
    return x
