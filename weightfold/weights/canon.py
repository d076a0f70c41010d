"""Canonical form and semantic hash: one representative for all weights that are the same function by symmetry.

**Canonical form.** Batch norms fold into their writers, logits are centred, the scales of LayerNorms go into their
readers, weights are balanced (`point`): least norm of the orbit; then signs and the order of channels follow the
numbers that describe each channel by its place (`colours`). Channels that nothing tells apart are told apart one group
at a time. Near-ties at the level of rounding may change places: compare with `same_hash`, or align, not entry by entry.

**Semantic hash.** No string of digits can be equal for all weights that differ by rounding and unequal for all others:
wherever it changes, neighbours lie on both sides. So the hash is a text that holds a digest of the structure and a
*sketch*, 16 numbers that are continuous and invariant; `same_hash` compares two within a tolerance four times the worst
noise of float32 that was seen (2.5e-7, in small networks with rounding noise of their own on top;
`benchmarks/zoo.py`). A step of training that changes the weights by less than about 2e-6 of their norm, a few units in
the last place, cannot be told from rounding.
`hash_keys` gives three keys for an exact index, of which equal models share at least one.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from functools import lru_cache

import torch
from torch import Tensor, nn

from weightfold.errors import ArtifactError
from weightfold.graph import edit as edits
from weightfold.graph.apply import apply, find_tensor, put_tensor
from weightfold.graph.copies import independent_copy
from weightfold.graph.trace import Example
from weightfold.weights.colours import Colours, colours, sketches
from weightfold.weights.compare import fitting, untied_symmetries
from weightfold.weights.nodes import ODD, ROTATED, K, fixed, nodes
from weightfold.weights.point import Point, checked, multiply_, point, points
from weightfold.weights.symmetry import Members, Symmetries

VERSION = "wf1"
N_NUMBERS = 16
STEP = 2.0**-26
"""Step of the sketch's numbers as they are written."""
TOLERANCE = 1e-6
"""Largest difference between the sketches of equal models."""
NUMBERS_TOGETHER, MOST_TOGETHER = 2**20, 64
"""Weights, and models, that are hashed at once: more would leave the cache."""
CELL = 1e-4
"""Size of a cell of the index keys."""
TIE = 1e-6
"""Channels whose numbers differ by less count as tied."""


def canonical(
    model: nn.Module, example: Example, *, found: Symmetries | None = None, centre_logits: bool = True
) -> nn.Module:
    """Bring a model to its canonical form: a new module, in eval mode, of the same class and function.

    Args:
        example: one tensor, a tuple of arguments, or a dict of keyword arguments.
        found: the architecture's symmetries, if they are at hand.
        centre_logits: take away what all classes' logits have in common; the softmax stays as it is.
    Returns:
        A copy; tensors keep their names, shapes and types.
    Raises:
        TraceError: the model cannot be traced.
        GraphError: a weight is not finite; names it.
    Example:
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> twin = canonical(net, torch.zeros(1, 4))
        >>> x = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
        >>> bool(torch.allclose(twin(x).softmax(1), net(x).softmax(1), atol=1e-5))
        True
    """
    found = fitting(found, model, example)
    state = model.state_dict()
    where = point(found, state, centre_logits=centre_logits)
    marks, seen = _marks(found, where)
    flip_signs_(where, seen)
    twin = independent_copy(model).eval()
    _load_(twin, _restored(where, state))
    graph = found.graph
    for group in sorted(found.members, key=lambda m: m.kind == "blocks"):
        order = _order(group, seen, marks.get(group.name))
        if group.free and not torch.equal(order, torch.arange(group.n)):
            graph, _ = apply(twin, graph, edits.permute(graph[group.name], order))
    return twin


def balanced(model: nn.Module, example: Example, *, found: Symmetries | None = None) -> nn.Module:
    """Bring a model to the least norm of its orbit, its channels in their own order: the gauge to average weights in.

    A network with batch norms is left as it is: their statistics set the scales.

    Returns:
        A copy, in eval mode, that computes the same.
    Example:
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> twin = balanced(net, torch.zeros(1, 4))
        >>> inward = torch.cat([twin[0].weight, twin[0].bias[:, None]], 1).norm(dim=1)
        >>> bool(torch.allclose(inward, twin[2].weight.norm(dim=0), rtol=1e-4))
        True
    """
    found = fitting(found, model, example)
    twin = independent_copy(model).eval()
    if not found.norms:
        state = model.state_dict()
        _load_(twin, _restored(point(found, state, centre_logits=False), state))
    return twin


@torch.no_grad()
def _load_(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    for name, value in tensors.items():
        old = find_tensor(model, name)[2]
        put_tensor(old, value.to(old.dtype).to(old.device))


def semantic_hash(
    model: nn.Module, example: Example, *, found: Symmetries | None = None, centre_logits: bool = True
) -> str:
    """Hash what a model computes, whatever the order, scale and sign of its channels.

    Compare two with `same_hash`; equal texts are equal models, but equal models may differ in the last digits. A model
    whose tensors are tied and its untied copy, which compute the same, hash alike.

    Args:
        found: what `untied_symmetries` returns for the architecture, if it is at hand.
    Raises:
        GraphError: a weight is not finite; names it.
    Example:
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> before = semantic_hash(net, torch.zeros(1, 4))
        >>> with torch.no_grad():
        ...     _ = net[0].weight.mul_(4), net[0].bias.mul_(4), net[2].weight.div_(4)
        >>> same_hash(before, semantic_hash(net, torch.zeros(1, 4)))
        True
        >>> with torch.no_grad():
        ...     _ = net[0].weight.mul_(1.01)
        >>> same_hash(before, semantic_hash(net, torch.zeros(1, 4)))
        False
    """
    found = untied_symmetries(model, example, found)
    return hash_of(found, model.state_dict(), centre_logits=centre_logits)


def hash_of(found: Symmetries, state: Mapping[str, Tensor], *, centre_logits: bool = True) -> str:
    """The semantic hash of named weights of a known architecture; see `semantic_hash`.

    Raises:
        GraphError: the weights belong to another architecture, or are not finite; names the tensor.
    """
    return hashes_of(found, [state], centre_logits=centre_logits)[0]


def hashes_of(found: Symmetries, states: Sequence[Mapping[str, Tensor]], *, centre_logits: bool = True) -> list[str]:
    """The semantic hashes of many sets of weights of one architecture; several times as fast for small models.

    Example:
        >>> nets = [nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)) for _ in range(3)]
        >>> found = untied_symmetries(nets[0], torch.zeros(1, 4))
        >>> texts = hashes_of(found, [net.state_dict() for net in nets])
        >>> [same_hash(text, hash_of(found, net.state_dict())) for text, net in zip(texts, nets)]
        [True, True, True]
    """
    size = max(1, sum(math.prod(shape) for shape in found.shapes.values()))
    step = max(1, min(MOST_TOGETHER, NUMBERS_TOGETHER // size))
    out = []
    for first in range(0, len(states), step):
        out += hashes_at(found, points(found, states[first : first + step], centre_logits=centre_logits))
    return out


def hashes_at(found: Symmetries, stack: Mapping[str, Tensor]) -> list[str]:
    """The semantic hashes of balanced weights, tensors of shape (B, ...); see `weightfold.weights.point.points`."""
    features = sketches(found, stack)
    table = features @ _projection(features.shape[1]).T
    numbers = (table / STEP).round().clamp(-(2**31), 2**31 - 1).long()
    start = f"{VERSION}-{structure_digest(found)}-"
    return [start + "".join(f"{n & 0xFFFFFFFF:08x}" for n in row) for row in numbers.tolist()]


def sketch_of(found: Symmetries, state: Mapping[str, Tensor], *, centre_logits: bool = True) -> Tensor:
    """16 numbers of about 1 in size that describe a model whatever the order, scale and sign of its channels."""
    features = colours(point(found, state, centre_logits=centre_logits)).sketch
    return _projection(features.numel()) @ features


@lru_cache(maxsize=64)
def _projection(n: int) -> Tensor:
    return fixed(11, shape=(N_NUMBERS, n)) / max(n, 1) ** 0.5


@lru_cache(maxsize=64)
def structure_digest(found: Symmetries) -> str:
    """16 hex digits of what a model is made of: shapes in order, operators and constants; not its names."""
    graph = found.graph
    facts = [list(found.shapes.values()), list(graph.operators), list(graph.constants)]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]


def same_hash(a: str, b: str) -> bool:
    """Whether two semantic hashes are of models that are the same by symmetry.

    Raises:
        ArtifactError: a text is no semantic hash.
    """
    return hash_distance(a, b) <= TOLERANCE


def hash_distance(a: str, b: str) -> float:
    """Largest difference between two sketches; infinite for different architectures. Float32 noise: up to 2.5e-7."""
    (one, x), (two, y) = _read(a), _read(b)
    return float((x - y).abs().max()) if one == two else float("inf")


def hash_keys(text: str) -> tuple[str, str, str]:
    """Three keys for an index: equal models share at least one, at its place; unequal ones hardly ever.

    Two numbers of the sketch are cut into cells by three grids that stand a third of a cell apart; a difference below
    that crosses the border of at most one grid for each number.
    """
    structure, sketch = _read(text)
    keys = []
    for grid in range(3):
        cells = ((sketch[:2] + grid * CELL / 3) / CELL).floor().long().tolist()
        keys.append(f"{structure}.{grid}.{cells[0]}.{cells[1]}")
    return keys[0], keys[1], keys[2]


def _read(text: str) -> tuple[str, Tensor]:
    version, _, rest = text.partition("-")
    structure, _, digits = rest.partition("-")
    try:
        if version != VERSION or len(structure) != 16 or len(digits) != 8 * N_NUMBERS:
            raise ValueError
        numbers = [int(digits[i : i + 8], 16) for i in range(0, len(digits), 8)]
    except ValueError:
        raise ArtifactError(
            f"'{text[:40]}' is no semantic hash of version {VERSION}.", remedy="Hash the model again."
        ) from None
    signed = [n - 2**32 if n >= 2**31 else n for n in numbers]
    return structure, torch.tensor(signed, dtype=torch.float64) * STEP


# canonical form -------------------------------------------------------------------------------------------------------


def _order(group: Members, seen: Colours, mark: Tensor | None = None) -> Tensor:
    """The canonical order of a group's channels, block by block; channels of rotated blocks stay where they are."""
    number = seen.of(group)
    keys = number @ fixed(12, shape=(number.shape[1], 4)) / number.shape[1] ** 0.5
    if mark is not None:
        keys = torch.cat([keys, mark[:, None]], 1)
    blocks = torch.zeros(group.n, dtype=torch.long) if group.block is None else group.block
    first = seen.nodes.start[group.name]
    rotated = seen.nodes.block[first : first + group.n] >= 0
    order = torch.arange(group.n)
    for block in torch.unique(blocks):
        mine = ((blocks == block) & ~rotated).nonzero().flatten()
        order[mine] = mine[_tolerant_sort(keys[mine])]
    return order


def _tolerant_sort(keys: Tensor) -> Tensor:
    """Sort rows by the first column; runs of near-equal numbers by the next."""
    order = torch.argsort(keys[:, 0], stable=True)
    if keys.shape[1] == 1 or len(order) < 2:
        return order
    gap = keys[order[1:], 0] - keys[order[:-1], 0] > TIE
    run = torch.cat([torch.zeros(1, dtype=torch.long), gap.long().cumsum(0)])
    if int(run[-1]) == len(order) - 1:
        return order
    out = order.clone()
    for r in torch.unique(run[1:][~gap]).tolist():
        mine = (run == r).nonzero().flatten()
        out[mine] = order[mine][_tolerant_sort(keys[order[mine], 1:])]
    return out


def _marks(found: Symmetries, where: Point) -> tuple[dict[str, Tensor], Colours]:
    """Tell tied channels apart, one group after another, where the choice may matter elsewhere."""
    seen = colours(where)
    marks: dict[str, Tensor] = {}
    for group in found.members:
        if not group.free or group.n < 2 or group.kind == "blocks":
            continue
        order = _order(group, seen)
        number = seen.of(group)
        near = (number[order[1:]] - number[order[:-1]]).abs().amax(1) <= TIE
        first = seen.nodes.start[group.name]
        rotated = seen.nodes.block[first : first + group.n] >= 0
        if bool(near.any()) and not bool(rotated.any()):
            rank = torch.zeros(group.n, dtype=torch.float64)
            count = torch.zeros(group.n)
            for i in range(1, group.n):
                count[i] = count[i - 1] + 1 if bool(near[i - 1]) else 0
            rank[order] = count.double() / group.n
            marks[group.name] = rank
            seen = colours(where, mark=marks)
    return marks, seen


def flip_signs_(where: Point, seen: Colours) -> None:
    """Make the first telling number of every channel whose sign is free positive."""
    table = nodes(where.symmetries)
    for group in where.symmetries.members:
        first = table.start[group.name]
        for freedom in where.symmetries.freedoms:
            if freedom.kind == "scale" or freedom.group != group.name or group.kind != "channels":
                continue
            kind = ODD if freedom.kind == "sign" else ROTATED
            mine = ((table.kind == kind) & (table.unit >= first) & (table.unit < first + group.n)).nonzero().flatten()
            by_unit = {int(table.unit[n]) - first: n for n in mine.tolist()}
            factor = torch.ones(len(freedom.channel), dtype=torch.float64)
            for i, channel in enumerate(freedom.channel.tolist()):
                told = seen.odd[by_unit[channel]] if channel in by_unit else torch.zeros(K)
                telling = told.abs() > 1e-3 * told.abs().max()
                if bool(telling.any()) and float(told[telling][0]) < 0:
                    factor[i] = -1.0
            multiply_(where.tensors, freedom, factor)


def _restored(where: Point, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a module at a point: norms become the identity, or a shift; scales of gains become 1."""
    found = where.symmetries
    original = checked(found, state)
    out = {name: value for name, value in where.tensors.items() if "@" not in name}
    for norm in found.norms:
        if norm.writer is None and (norm.weight is None or norm.bias is None):
            out[norm.mean], out[norm.var] = original[norm.mean], original[norm.var]
            continue
        out[norm.mean] = torch.zeros_like(original[norm.mean])
        out[norm.var] = torch.full_like(original[norm.var], 1 - norm.eps)
        if norm.writer is not None:
            if norm.weight is not None:
                out[norm.weight] = torch.ones_like(original[norm.weight])
            if norm.writer_bias is not None and norm.bias is not None:
                out[norm.writer_bias] = torch.zeros_like(original[norm.writer_bias])
    for gain in found.gains:
        scale = original[gain.weight]
        out[gain.weight] = torch.ones_like(scale)
        out[gain.weight][gain.vector_at] = (scale[gain.vector_at] != 0).double()
        if gain.bias is not None:
            out[gain.bias] = torch.where(scale != 0, original[gain.bias] / torch.where(scale != 0, scale, 1.0), 0.0)
    return out
