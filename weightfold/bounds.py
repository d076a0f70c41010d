"""A guaranteed bound on how far two networks of one structure lie apart, for all inputs in a box.

Intervals run through the traced operators: for every value its range in the first network, [lo, hi], and a bound e on
the distance of the second network's value. With weights W in the first and W̃ in the second,

    |W x - W̃ x̃| <= |W - W̃| |x| + |W̃| e,    |act(z) - act(z̃)| <= Lip e    (never more than the two ranges allow),

and sums, pools, reshapes and batch norms as they are. Ranges widen with depth, so the bound of a deep network is valid
and loose. Rounding of the float64 arithmetic is not enclosed.

Reference: Gowal et al., arXiv 1810.12715 (interval propagation); Prabhakar, arXiv 2110.03726 (the deviation of a lumped
network); differs in: the two networks' difference is followed, not their two ranges.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx.node import map_arg
from torch.utils._pytree import tree_leaves

from weightfold.errors import ConfigError
from weightfold.graph.apply import apply, find_tensor
from weightfold.graph.edit import Edit
from weightfold.graph.group import ChannelGraph, ChannelGroup
from weightfold.graph.layout import from_front, to_front
from weightfold.graph.trace import Example, arguments


@dataclass(frozen=True, eq=False)
class Range:
    """Ranges of a value in the first network, and how far the second's may lie away."""

    lo: Tensor
    hi: Tensor
    e: Tensor

    @property
    def size(self) -> Tensor:
        """The largest magnitude."""
        return torch.maximum(self.lo.abs(), self.hi.abs())

    def each(self, function: Callable[[Tensor], Tensor]) -> Range:
        """The same rearrangement of all three."""
        return Range(function(self.lo), function(self.hi), function(self.e))


@dataclass(frozen=True, eq=False)
class Pair:
    """A parameter or buffer of the first network and of the second."""

    first: Tensor
    second: Tensor


MONOTONE: dict[str, tuple[Callable[[Tensor], Tensor], float]] = {
    "relu": (torch.relu, 1.0),
    "relu_": (torch.relu, 1.0),
    "tanh": (torch.tanh, 1.0),
    "sigmoid": (torch.sigmoid, 0.25),
    "softplus": (F.softplus, 1.0),
    "elu": (F.elu, 1.0),
    "selu": (F.selu, 1.7581),
    "leaky_relu": (F.leaky_relu, 1.0),
    "leaky_relu_": (F.leaky_relu, 1.0),
    "hardtanh": (F.hardtanh, 1.0),
    "relu6": (F.relu6, 1.0),
}
"""Activations that never fall, with the largest slope."""
DIPPING: dict[str, tuple[Callable[[Tensor], Tensor], float, float, float]] = {
    "gelu": (F.gelu, 1.13, -0.752, -0.170),
    "silu": (F.silu, 1.1, -1.279, -0.279),
    "silu_": (F.silu, 1.1, -1.279, -0.279),
    "hardswish": (F.hardswish, 1.5, -1.5, -0.375),
}
"""Activations that fall to one dip and rise from there: largest slope, place and depth of the dip, rounded outwards."""
PASSED = ("dropout", "dropout_", "contiguous", "clone", "alias", "detach", "to", "feature_dropout")
RESHAPES = (
    "view",
    "reshape",
    "flatten",
    "permute",
    "transpose",
    "squeeze",
    "unsqueeze",
    "t",
    "expand",
    "slice",
    "select",
)


def output_bound(first: nn.Module, second: nn.Module, example: Example, box: tuple[float, float]) -> float:
    """Bound |first(x) - second(x)| over all outputs and all inputs with every number in a box.

    Args:
        first: in evaluation mode.
        second: of the same structure and shapes, other weights.
        example: an input; only its shape counts, one sample is enough.
        box: smallest and largest number of the input.
    Raises:
        ConfigError: an operator has no rule; names it. Or the box is empty.
    Example:
        >>> a, b = nn.Linear(2, 1), nn.Linear(2, 1)
        >>> with torch.no_grad():
        ...     b.load_state_dict(a.state_dict()); b.weight[0, 0] += 0.25
        <All keys matched successfully>
        >>> round(output_bound(a, b, torch.zeros(1, 2), (-2.0, 1.0)), 6)
        0.5
    """
    if not box[0] <= box[1]:
        raise ConfigError(f"The box {box} is empty.", remedy="Give the smallest number first.")
    args, kwargs = arguments(example)
    was = first.training
    first.eval()
    try:
        exported = torch.export.export(first, tuple(args), dict(kwargs), strict=False)
    except Exception as error:
        raise ConfigError(f"No bound: the network cannot be exported ({type(error).__name__}).") from error
    finally:
        first.train(was)
    values: dict[str, Any] = {}
    signature = exported.graph_signature
    held = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    mine, other = _tensors(first), _tensors(second)
    worst = 0.0
    for node in exported.graph.nodes:
        if node.op == "placeholder":
            if node.name in held:
                values[node.name] = Pair(mine[held[node.name]], other[held[node.name]])
            else:
                values[node.name] = _input(node, box)
        elif node.op == "call_function":
            values[node.name] = _run(node, values)
        elif node.op == "output":
            for leaf in tree_leaves(node.args[0]):
                found = values.get(getattr(leaf, "name", ""))
                if isinstance(found, Range):
                    worst = max(worst, float(found.e.detach().max()))
    return worst


def lumped_bound(
    model: nn.Module, graph: ChannelGraph, edits: Iterable[Edit], example: Example, box: tuple[float, float]
) -> float:
    """Bound what edits that lump channels change of a network's outputs, for all inputs in a box.

    The lumped network is written as one of the old size: every channel is given its block's row times its ratio, or
    the readers take what stands in for a channel from the channels that stay.

    Args:
        model: as it is before the edits.
        graph: its channel graph.
        edits: of kinds "lump" and "remove" behind one, each group at most once.
    Raises:
        ConfigError: an operator has no rule.
    """
    twin = copy.deepcopy(model).eval()
    for edit in edits:
        if edit.kind == "lump":
            _at_full_size(twin, graph, edit)
    return output_bound(model, twin, example, box)


def _at_full_size(twin: nn.Module, graph: ChannelGraph, edit: Edit) -> None:
    group, n = graph[edit.group], edit.n_channels
    every = torch.arange(n)
    if edit.read is None:
        if edit.write is not None:
            raise ConfigError("No bound: readers were solved on data for rows that are means.")
        chosen = torch.eye(n, dtype=torch.float64)[edit.carry]
        reads = {key: matrix @ chosen for key, matrix in edit.reads.items()}
        apply(twin, graph, Edit(group.name, "same", n, every, reads=reads, shift=edit.shift))
        return
    block = edit.read.abs().argmax(1)
    ratio = edit.read[every, block]
    write = edit.A[block]
    gone = ratio == 0
    write[gone] = torch.eye(n, dtype=torch.float64)[gone]
    ratio = torch.where(gone, 1.0, ratio)
    mixed = edit.write is not None
    apply(twin, graph, Edit(group.name, "same", n, every, write=write * ratio[:, None] if mixed else write))
    if not mixed and bool((ratio != 1).any()):
        _scale_writers(twin, group, ratio)


def _scale_writers(twin: nn.Module, group: ChannelGroup, ratio: Tensor) -> None:
    """Multiply what a gauge with one freedom per channel scales, and leave the readers."""
    gauge = next(g for g in group.gauges if torch.equal(g.channel, torch.arange(group.n_channels)))
    reads = {axis.key for axis in group.role("read")}
    for name, dim, slabs, _, index in gauge.axes:
        if (name, dim) not in reads:
            tensor = find_tensor(twin, name)[2]
            front = to_front(tensor.detach(), dim, slabs).clone()
            for m in range(index.shape[1]):
                have = index[:, m] >= 0
                rows = index[have, m]
                front[rows] *= ratio[have].to(front).reshape(-1, *(1,) * (front.ndim - 1))
            with torch.no_grad():
                tensor.copy_(from_front(front, dim, slabs))


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return {name: value.detach().double() if value.is_floating_point() else value for name, value in named}


def _input(node: Any, box: tuple[float, float]) -> Any:
    value = node.meta.get("val")
    if not isinstance(value, Tensor):
        return value
    if not value.is_floating_point():
        raise ConfigError(f"No bound: the input '{node.name}' holds whole numbers, and has no box.")
    like = torch.zeros(tuple(value.shape), dtype=torch.float64)
    return Range(like + box[0], like + box[1], like)


def _run(node: Any, values: Mapping[str, Any]) -> Any:
    name = str(getattr(node.target, "__name__", node.target)).partition(".")[0]
    args = map_arg(node.args, lambda n: values[n.name])
    kwargs = map_arg(dict(node.kwargs), lambda n: values[n.name])
    if name == "getitem":
        return args[0] if isinstance(args[0], Range) else args[0][args[1]]
    if not any(isinstance(a, (Range, Pair)) for a in tree_leaves((args, kwargs))):
        return node.target(*args, **kwargs)
    rule = RULES.get(name)
    if rule is None or not isinstance(args[0], (Range, list, tuple)):
        raise ConfigError(f"No bound: there is no interval rule for the operator '{name}' ('{node.name}').")
    return rule(node.target, *args, **kwargs)


def _affine(
    x: Range, weight: Pair, bias: Pair | None, push: Callable[[Tensor, Tensor, Tensor | None], Tensor]
) -> Range:
    """Any operator that is linear in its input and in its weight."""
    centre, radius = (x.lo + x.hi) / 2, (x.hi - x.lo) / 2
    middle = push(centre, weight.first, None if bias is None else bias.first)
    spread = push(radius, weight.first.abs(), None)
    apart = push(x.size, (weight.first - weight.second).abs(), None) + push(x.e, weight.second.abs(), None)
    if bias is not None:
        apart = apart + push(torch.zeros_like(x.e), weight.second, (bias.first - bias.second).abs())
    return Range(middle - spread, middle + spread, apart)


def _linear(_: Any, x: Range, weight: Pair, bias: Pair | None = None) -> Range:
    return _affine(x, weight, bias, F.linear)


def _convolution(target: Any, x: Range, weight: Pair, bias: Pair | None = None, *rest: Any, **more: Any) -> Range:
    return _affine(x, weight, bias, lambda x, w, b: target(x, w, b, *rest, **more))


def _batch_norm(
    _: Any, x: Range, weight: Pair | None, bias: Pair | None, mean: Pair, var: Pair, *rest: Any, **__: Any
) -> Range:
    eps = float(rest[2])
    ones = Pair(torch.ones_like(mean.first), torch.ones_like(mean.first))
    weight = weight or ones
    shape = (1, -1, *(1,) * (x.lo.ndim - 2))
    scale = [(w / (v + eps).sqrt()) for w, v in ((weight.first, var.first), (weight.second, var.second))]
    bias = bias or Pair(torch.zeros_like(mean.first), torch.zeros_like(mean.first))
    moved = [bias.first - mean.first * scale[0], bias.second - mean.second * scale[1]]
    first, second = (s.reshape(shape) for s in scale)
    low, high = x.lo * first, x.hi * first
    shift, other = (m.reshape(shape) for m in moved)
    apart = (first - second).abs() * x.size + second.abs() * x.e + (shift - other).abs()
    return Range(torch.minimum(low, high) + shift, torch.maximum(low, high) + shift, apart)


def _monotone(name: str) -> Callable[..., Range]:
    function, slope = MONOTONE[name]

    def run(_: Any, x: Range, *rest: Any, **more: Any) -> Range:
        steep = max(slope, float(rest[0])) if name.startswith("leaky") and rest else slope
        own = function if not rest else (lambda t: function(t, *rest, **more))  # type: ignore[call-arg]
        return Range(own(x.lo), own(x.hi), _capped(own, x, steep))

    return run


def _capped(function: Callable[[Tensor], Tensor], x: Range, slope: float) -> Tensor:
    """Lip e, or what the widened range allows if that is less."""
    whole = function(x.hi + x.e) - function(x.lo - x.e)
    return torch.minimum(slope * x.e, whole)


def _dipping(name: str) -> Callable[..., Range]:
    function, slope, place, depth = DIPPING[name]

    def run(_: Any, x: Range, *__: Any, **___: Any) -> Range:
        low, high = function(x.lo), function(x.hi)
        inside = (x.lo <= place + 0.01) & (x.hi >= place - 0.01)
        least = torch.where(inside, torch.full_like(low, depth), torch.minimum(low, high))
        return Range(torch.minimum(least, torch.minimum(low, high)), torch.maximum(low, high), slope * x.e)

    return run


def _add(_: Any, a: Any, b: Any, *__: Any, alpha: float = 1.0, **___: Any) -> Range:
    a, b = _as_range(a), _as_range(b)
    low, high = (alpha * b.lo, alpha * b.hi) if alpha >= 0 else (alpha * b.hi, alpha * b.lo)
    return Range(a.lo + low, a.hi + high, a.e + abs(alpha) * b.e)


def _subtract(target: Any, a: Any, b: Any, **more: Any) -> Range:
    return _add(target, a, b, alpha=-float(more.get("alpha", 1.0)))


def _multiply(_: Any, a: Any, b: Any) -> Range:
    a, b = _as_range(a), _as_range(b)
    corners = torch.stack(torch.broadcast_tensors(a.lo * b.lo, a.lo * b.hi, a.hi * b.lo, a.hi * b.hi))
    return Range(corners.amin(0), corners.amax(0), a.size * b.e + b.size * a.e + a.e * b.e)


def _divide(target: Any, a: Range, b: Any) -> Range:
    if not isinstance(b, (int, float)):
        raise ConfigError("No bound: there is no interval rule for a division by a value of the network.")
    return _multiply(target, a, 1.0 / b)


def _as_range(value: Any) -> Range:
    if isinstance(value, Range):
        return value
    if isinstance(value, Pair):
        return Range(value.first, value.first, (value.first - value.second).abs())
    fixed = torch.as_tensor(value, dtype=torch.float64)
    return Range(fixed, fixed, torch.zeros_like(fixed))


def _mean(target: Any, x: Range, *rest: Any, **more: Any) -> Range:
    return x.each(lambda t: target(t, *rest, **more))


def _max_pool(target: Any, x: Range, *rest: Any, **more: Any) -> Range:
    return x.each(lambda t: target(t, *rest, **more))


def _padded(target: Any, x: Range, pad: Any, mode: str = "constant", value: float | None = None) -> Range:
    fill = 0.0 if value is None else value
    return Range(*(target(t, pad, mode, 0.0 if t is x.e else fill) for t in (x.lo, x.hi, x.e)))


def _joined(target: Any, parts: Any, dim: int = 0) -> Range:
    ranges = [_as_range(part) for part in parts]
    return Range(*(target([getattr(r, k) for r in ranges], dim) for k in ("lo", "hi", "e")))


def _same(_: Any, x: Range, *__: Any, **___: Any) -> Range:
    return x


RULES: dict[str, Callable[..., Any]] = {
    "linear": _linear,
    "batch_norm": _batch_norm,
    "add": _add,
    "add_": _add,
    "sub": _subtract,
    "mul": _multiply,
    "div": _divide,
    "cat": _joined,
    "pad": _padded,
    **{f"conv{d}d": _convolution for d in (1, 2, 3)},
    **{f"max_pool{d}d": _max_pool for d in (1, 2, 3)},
    **{f"{kind}_pool{d}d": _mean for kind in ("avg", "adaptive_avg", "adaptive_max") for d in (1, 2, 3)},
    **dict.fromkeys(("mean", "sum", "amax", *RESHAPES), _mean),
    **dict.fromkeys(PASSED, _same),
    **{name: _monotone(name) for name in MONOTONE},
    **{name: _dipping(name) for name in DIPPING},
}
