"""A guaranteed bound on how far two networks of one structure lie apart, for all inputs in a box.

Intervals run through the traced operators: for every value its range in the first network, [lo, hi], and a bound e on
the distance of the second network's value. With weights W in the first and W̃ in the second,

    |W x - W̃ x̃| <= |W - W̃| |x| + |W̃| e,    |act(z) - act(z̃)| <= Lip e + jumps    (never more than the ranges allow),

and sums, pools, reshapes and batch norms as they are. An activation is what its operator computes with its own
parameters; known of it besides are the points between which it is monotone, its steepest slope, and its jumps. Ranges
widen with depth, so the bound of a deep network is valid and loose. Rounding of the float64 arithmetic is not enclosed
(at a jump it may decide the side).

Reference: Gowal et al., arXiv 1810.12715 (interval propagation); Prabhakar, arXiv 2110.03726 (the deviation of a lumped
network); differs in: the two networks' difference is followed, not their two ranges.
"""

from __future__ import annotations

import math
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
from weightfold.graph.copies import independent_copy
from weightfold.graph.edit import Edit
from weightfold.graph.group import ChannelGraph, ChannelGroup
from weightfold.graph.layout import from_front, to_front
from weightfold.graph.trace import Example, arguments, quiet
from weightfold.stats.running import evaluating


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


@dataclass(frozen=True)
class Curve:
    """What is known of an activation besides its values.

    Args:
        slope: the steepest, by magnitude; infinite where there is none.
        turns: where it may turn from rising to falling or back. Between two of them it is monotone.
        jumps: where it is not continuous, and by how much.
    """

    slope: float
    turns: tuple[float, ...] = (0.0,)
    jumps: tuple[tuple[float, float], ...] = ()


def _elu(alpha: float, scale: float, input_scale: float) -> Curve:
    left = abs(alpha * scale * input_scale) if input_scale >= 0 else math.inf
    return Curve(max(abs(scale), left))


def _softplus(beta: float, threshold: float) -> Curve:
    """It is the identity where beta x exceeds the threshold, with a jump there."""
    if beta == 0:
        raise ConfigError("No bound: a softplus with a beta of 0 divides by it.")
    jump = math.log1p(math.exp(-threshold)) if threshold > -700 else -threshold
    return Curve(1.0, (), ((threshold / beta, jump / abs(beta)),))


def _gelu(approximate: str) -> Curve:
    return (
        Curve(1.128904146, (-0.7517915246935645,))
        if approximate == "none"
        else Curve(1.12899307, (-0.752461422071016,))
    )


def _rrelu(lower: float, upper: float, training: bool, **_: Any) -> Curve:
    if training:
        raise ConfigError("No bound: an rrelu that draws its slopes has none.")
    return Curve(max(1.0, abs(lower + upper) / 2))


def _clamp(**ends: Any) -> Curve:
    if any(isinstance(end, Tensor | Range | Pair) for end in ends.values()):
        raise ConfigError("No bound: there is no interval rule for a clamp whose ends are tensors.")
    return Curve(1.0, ())


CURVES: dict[str, Callable[..., Curve]] = {
    "relu": lambda: Curve(1.0),
    "relu6": lambda: Curve(1.0),
    "tanh": lambda: Curve(1.0),
    "sigmoid": lambda: Curve(0.25),
    "log_sigmoid": lambda: Curve(1.0),
    "hardsigmoid": lambda: Curve(1 / 6),
    "hardswish": lambda: Curve(1.5, (-3.0, -1.5, 3.0)),
    "silu": lambda: Curve(1.099839321, (-1.2784645427610737,)),
    "mish": lambda: Curve(1.088498162, (-1.1924312145154954,)),
    "gelu": _gelu,
    "selu": lambda: Curve(1.758099341),
    "elu": _elu,
    "celu": lambda alpha: Curve(1.0 if alpha > 0 else math.inf),
    "softplus": _softplus,
    "leaky_relu": lambda negative_slope: Curve(max(1.0, abs(negative_slope))),
    "rrelu": _rrelu,
    "hardtanh": _clamp,
    "clamp": _clamp,
    "clamp_min": _clamp,
    "clamp_max": _clamp,
    "threshold": lambda threshold, value: Curve(1.0, (), ((threshold, abs(threshold - value)),)),
    "softshrink": lambda lambd: Curve(1.0, (-lambd, lambd)),
    "hardshrink": lambda lambd: Curve(1.0, (0.0,), ((-lambd, abs(lambd)), (lambd, abs(lambd)))),
    "abs": lambda: Curve(1.0),
    "neg": lambda: Curve(1.0),
}
"""Activations, called with the operator's own arguments. One that turns nowhere may name any turns."""
DROPOUTS = ("dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout")
PASSED = ("contiguous", "clone", "alias", "detach", "to", "_to_copy", *DROPOUTS)
RESHAPES = (
    "view",
    "_unsafe_view",
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
    program = _program(first, example)
    signature = program.graph_signature
    held = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    lifted = signature.inputs_to_lifted_tensor_constants
    mine, other = _tensors(first), _tensors(second)
    values: dict[str, Any] = {}
    worst = 0.0
    for node in program.graph.nodes:
        if node.op == "placeholder" and node.name in held:
            values[node.name] = Pair(mine[held[node.name]], other[held[node.name]])
        elif node.op == "placeholder":
            constant = program.constants.get(lifted.get(node.name, ""))
            values[node.name] = _input(node, box) if constant is None else constant
        elif node.op == "call_function":
            values[node.name] = _run(node, values)
        elif node.op == "output":
            for leaf in tree_leaves(node.args[0]):
                found = values.get(getattr(leaf, "name", ""))
                if isinstance(found, Range | Pair):
                    worst = max(worst, float(_as_range(found).e.detach().max()))
    return worst


def _program(model: nn.Module, example: Example) -> torch.export.ExportedProgram:
    """A network's operators, none of which writes into what another one reads."""
    args, kwargs = arguments(example)
    try:
        with evaluating(model), quiet():
            program = torch.export.export(model, tuple(args), dict(kwargs), strict=False)
            return program.run_decompositions({}) if _writes(program) else program
    except Exception as error:
        text = str(error).strip().partition("\n")[0][:200]
        raise ConfigError(f"No bound: the network cannot be exported ({type(error).__name__}: {text}).") from error


def _writes(program: torch.export.ExportedProgram) -> bool:
    schemas = (getattr(node.target, "_schema", None) for node in program.graph.nodes)
    return any(schema is not None and schema.is_mutable for schema in schemas)


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
    twin = independent_copy(model).eval()
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
    name = str(getattr(node.target, "__name__", node.target)).partition(".")[0].removesuffix("_")
    args = map_arg(node.args, lambda n: values[n.name])
    kwargs = map_arg(dict(node.kwargs), lambda n: values[n.name])
    if name == "getitem":
        return args[0][args[1]]
    if not any(isinstance(a, Range | Pair) for a in tree_leaves((args, kwargs))):
        return node.target(*args, **kwargs)
    rule = RULES.get(name)
    if rule is None or not (name in ARITHMETIC or isinstance(args[0], Range | list | tuple)):
        raise ConfigError(f"No bound: there is no interval rule for the operator '{name}' ('{node.name}').")
    found = rule(node.target, *args, **kwargs)
    for one in (found,) if isinstance(found, Range) else found:
        if not all(bool(part.isfinite().all()) for part in (one.lo, one.hi, one.e)):
            raise ConfigError(f"No bound: what '{node.name}' gives is not bounded on this box.")
    return found


def _affine(x: Range, weight: Any, bias: Any, push: Callable[[Tensor, Tensor, Tensor | None], Tensor]) -> Range:
    """Any operator that is linear in its input and in its weight."""
    weight, bias = _as_pair(weight), None if bias is None else _as_pair(bias)
    centre, radius = (x.lo + x.hi) / 2, (x.hi - x.lo) / 2
    middle = push(centre, weight.first, None if bias is None else bias.first)
    spread = push(radius, weight.first.abs(), None)
    apart = push(x.size, (weight.first - weight.second).abs(), None) + push(x.e, weight.second.abs(), None)
    if bias is not None:
        apart = apart + push(torch.zeros_like(x.e), weight.second, (bias.first - bias.second).abs())
    return Range(middle - spread, middle + spread, apart)


def _linear(_: Any, x: Range, weight: Any, bias: Any = None) -> Range:
    return _affine(x, weight, bias, F.linear)


def _convolution(target: Any, x: Range, weight: Any, bias: Any = None, *rest: Any, **more: Any) -> Range:
    return _affine(x, weight, bias, lambda x, w, b: target(x, w, b, *rest, **more))


def _batch_norm(_: Any, x: Range, weight: Any, bias: Any, mean: Any, var: Any, *rest: Any, **__: Any) -> Range:
    if rest[0] or mean is None:
        raise ConfigError("No bound: there is no interval rule for a batch norm that measures its batch.")
    eps, mean, var = float(rest[2]), _as_pair(mean), _as_pair(var)
    weight, bias = (None if value is None else _as_pair(value) for value in (weight, bias))
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


def _batch_norm_at_rest(target: Any, x: Range, weight: Any, bias: Any, *rest: Any) -> tuple[Range]:
    mean, var, momentum, eps = rest
    return (_batch_norm(target, x, weight, bias, mean, var, False, momentum, eps),)


def _activation(name: str) -> Callable[..., Range]:
    def run(target: Any, x: Range, *rest: Any, **more: Any) -> Range:
        names = [argument.name for argument in target._schema.arguments[1:]]
        usual = {argument.name: argument.default_value for argument in target._schema.arguments[1:]}
        curve = CURVES[name](**usual | dict(zip(names, rest, strict=False)) | more)
        return through(lambda t: target(t, *rest, **more), curve, x)

    return run


def through(function: Callable[[Tensor], Tensor], curve: Curve, x: Range) -> Range:
    """The values of an activation.

    Args:
        function: the activation, elementwise.
        curve: what is known of it.
        x: what it reads.
    Example:
        >>> x = Range(*(torch.tensor([v], dtype=torch.float64) for v in (-1.0, 2.0, 0.25)))
        >>> {k: v.item() for k, v in vars(through(torch.relu, Curve(1.0), x)).items()}
        {'lo': 0.0, 'hi': 2.0, 'e': 0.25}
    """
    low, high = _values(function, curve, x.lo, x.hi)
    least, most = _values(function, curve, x.lo - x.e, x.hi + x.e)
    steep = torch.where(x.e > 0, curve.slope * x.e, 0.0) if math.isinf(curve.slope) else curve.slope * x.e
    for place, height in curve.jumps:
        steep = steep + height * ((x.e > 0) & (x.lo - x.e <= place) & (place <= x.hi + x.e))
    return Range(low, high, torch.minimum(steep, torch.maximum(most - low, high - least)))


def _values(function: Callable[[Tensor], Tensor], curve: Curve, lo: Tensor, hi: Tensor) -> tuple[Tensor, Tensor]:
    """The least and the largest value between two ends: taken at an end, at a turn, or on either side of a jump."""
    found = [function(lo), function(hi)]
    sides = [math.nextafter(place, end) for place, _ in curve.jumps for end in (-math.inf, math.inf)]
    for place in (*curve.turns, *(place for place, _ in curve.jumps), *sides):
        found.append(function(torch.full_like(lo, place).clamp(lo, hi)))
    return torch.stack(found).amin(0), torch.stack(found).amax(0)


def _prelu(target: Any, x: Range, weight: Any) -> Range:
    """Slopes left of zero, which are parameters: one for all channels, or one for each."""
    slopes = _as_pair(weight)
    first, second = (
        w if w.numel() == 1 else w.reshape(1, -1, *(1,) * (x.lo.ndim - 2)) for w in (slopes.first, slopes.second)
    )
    low, high = _values(lambda t: target(t, slopes.first), Curve(1.0), x.lo, x.hi)
    return Range(low, high, x.e * second.abs().clamp_min(1) + (first - second).abs() * (-x.lo).clamp_min(0))


def _glu(_: Any, x: Range, dim: int = -1) -> Range:
    parts = [t.chunk(2, dim) for t in (x.lo, x.hi, x.e)]
    value, gate = (Range(*(part[k] for part in parts)) for k in (0, 1))
    return _multiply(None, value, through(torch.sigmoid, CURVES["sigmoid"](), gate))


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


def _subtract_from(target: Any, a: Any, b: Any, alpha: float = 1.0) -> Range:
    return _add(target, b, a, alpha=-float(alpha))


def _divide(target: Any, a: Any, b: Any, *, rounding_mode: str | None = None) -> Range:
    if isinstance(b, Range | Pair) or rounding_mode is not None:
        raise ConfigError("No bound: there is no interval rule for a division by a value of the network.")
    return _multiply(target, a, 1.0 / torch.as_tensor(b, dtype=torch.float64))


def _as_range(value: Any) -> Range:
    if isinstance(value, Range):
        return value
    if isinstance(value, Pair):
        return Range(value.first, value.first, (value.first - value.second).abs())
    fixed = torch.as_tensor(value, dtype=torch.float64)
    return Range(fixed, fixed, torch.zeros_like(fixed))


def _as_pair(value: Any) -> Pair:
    if isinstance(value, Range):
        raise ConfigError("No bound: there is no interval rule for weights that are computed from others.")
    return value if isinstance(value, Pair) else Pair(value.double(), value.double())


def _each(target: Any, x: Range, *rest: Any, **more: Any) -> Any:
    """Sums with weights that are not negative, largest values, rearrangements: all three alike, part by part."""
    found = [target(t, *rest, **more) for t in (x.lo, x.hi, x.e)]
    return Range(*found) if isinstance(found[0], Tensor) else tuple(Range(*parts) for parts in zip(*found, strict=True))


def _largest(target: Any, x: Range, *rest: Any, **more: Any) -> Any:
    """Pools that may give places beside the values."""
    found = [target(t, *rest, **more) for t in (x.lo, x.hi, x.e)]
    return Range(*found) if isinstance(found[0], Tensor) else (Range(*(pair[0] for pair in found)),)


def _padded(target: Any, x: Range, pad: Any, mode: str = "constant", value: float | None = None) -> Range:
    fill = 0.0 if value is None else value
    return Range(*(target(t, pad, mode, 0.0 if t is x.e else fill) for t in (x.lo, x.hi, x.e)))


def _constant_padded(_: Any, x: Range, pad: Any, value: float = 0.0) -> Range:
    return _padded(torch.ops.aten.pad.default, x, pad, value=value)


def _joined(target: Any, parts: Any, dim: int = 0) -> Range:
    ranges = [_as_range(part) for part in parts]
    return Range(*(target([getattr(r, k) for r in ranges], dim) for k in ("lo", "hi", "e")))


def _same(target: Any, x: Range, *rest: Any, **more: Any) -> Range:
    name = str(target).split(".")[1]
    if name in DROPOUTS and (rest[1] if len(rest) > 1 else more.get("train", True)):
        raise ConfigError(f"No bound: a '{name}' that draws its mask has none.")
    kinds = [value for value in (*rest, *more.values()) if isinstance(value, torch.dtype)]
    if any(not kind.is_floating_point for kind in kinds):
        raise ConfigError("No bound: there is no interval rule for numbers that are cut off to whole ones.")
    return x


ARITHMETIC: dict[str, Callable[..., Range]] = {
    "add": _add,
    "sub": _subtract,
    "rsub": _subtract_from,
    "mul": _multiply,
    "div": _divide,
}
RULES: dict[str, Callable[..., Any]] = {
    **ARITHMETIC,
    "linear": _linear,
    "batch_norm": _batch_norm,
    "_native_batch_norm_legit_no_training": _batch_norm_at_rest,
    "cat": _joined,
    "pad": _padded,
    "constant_pad_nd": _constant_padded,
    "prelu": _prelu,
    "glu": _glu,
    **{f"conv{kind}{d}d": _convolution for kind in ("", "_transpose") for d in (1, 2, 3)},
    **{f"max_pool{d}d{more}": _largest for d in (1, 2, 3) for more in ("", "_with_indices")},
    **{f"adaptive_max_pool{d}d": _largest for d in (1, 2, 3)},
    **{f"{kind}_pool{d}d": _each for kind in ("avg", "adaptive_avg", "_adaptive_avg") for d in (1, 2, 3)},
    **dict.fromkeys(("mean", "sum", "amax", "split", "split_with_sizes", "chunk", "unbind", *RESHAPES), _each),
    **dict.fromkeys(PASSED, _same),
    **{name: _activation(name) for name in CURVES},
}
