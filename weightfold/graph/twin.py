"""A copy of a model to try edits on: generic weights, nothing left to chance, every number that comes out.

What is zero or equal by accident (a bias that still holds its first zeros, a norm scale of ones, a gate of zero) hides
a wrong edit. So the copy's weights are moved a little: multiplied where a tensor has one sign, so that variances and
scales stay positive; added to elsewhere. Ties stay ties; integers, masks and tables that no graph knows stay what they
are. It computes in float64 where it can, with dropout off and noise replaced by constants: a random mask does not
permute with the channels.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from weightfold.graph.copies import Copier, structural_copy
from weightfold.graph.export import Example, arguments, quiet
from weightfold.graph.failures import failing_hook, failing_module, said, user_line
from weightfold.graph.trace import canonical_names

LOW = (torch.float32, torch.float16, torch.bfloat16)
N_NOISE = 1_048_583
"""Length of the noise that all tensors share, a prime: no two rows of a tensor meet the same stretch of it."""
SPREAD = 0.2
"""How far weights are moved, as a share of their size."""
SMALL = 64
"""Buffers with at most this many distinct values may be tables of choices or masks."""


# all in float64 -------------------------------------------------------------------------------------------------------


class Doubled(TorchFunctionMode):
    """Inside, whatever asks for float32, float16 or bfloat16 gets float64: models that upcast to float32 in the middle
    of their forward compute in float64 throughout."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise_up = lambda a: torch.float64 if isinstance(a, torch.dtype) and a in LOW else a  # noqa: E731
        args = tuple(raise_up(a) for a in args)
        kwargs = {k: raise_up(v) for k, v in (kwargs or {}).items()}
        if func in (torch.Tensor.float, torch.Tensor.half, torch.Tensor.bfloat16):
            func = torch.Tensor.double
        out = func(*args, **kwargs)
        if isinstance(out, Tensor) and out.dtype in LOW:
            return out.double()
        return out


@contextmanager
def doubled() -> Iterator[None]:
    """Compute in float64, whatever the model asks for; gradients are left as they are."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with Doubled():
            yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def float64() -> Iterator[None]:
    """Compute in float64 without gradients, whatever the model asks for."""
    with doubled(), torch.no_grad():
        yield


# nothing left to chance -----------------------------------------------------------------------------------------------

_DROPS = {
    F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout,
    torch.dropout, torch.dropout_, torch.feature_dropout, torch.feature_dropout_,
    torch.alpha_dropout, torch.alpha_dropout_, torch.feature_alpha_dropout, torch.feature_alpha_dropout_,
}  # fmt: skip
_LIKE = {torch.rand_like: 0.5, torch.randn_like: 0.0}
_NEW = {torch.rand: 0.5, torch.randn: 0.0}
_FILLS = {
    torch.Tensor.uniform_: 0.5, torch.Tensor.normal_: 0.0, torch.Tensor.bernoulli_: 1.0, torch.Tensor.exponential_: 1.0,
    torch.Tensor.log_normal_: 1.0, torch.Tensor.cauchy_: 0.0,
}  # fmt: skip
_RRELU = {F.rrelu, torch.rrelu, torch.rrelu_}
_SDPA = F.scaled_dot_product_attention


class Settled(TorchFunctionMode):
    """Inside, dropout drops nothing and noise is constant."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in _DROPS:
            return args[0] if args else kwargs["input"]
        if func in _RRELU:
            return _mean_slope(*args, **kwargs)
        if func in _LIKE:
            return torch.full_like(args[0], _LIKE[func], **kwargs)
        if func in _NEW:
            return _constant(_NEW[func], args, kwargs)
        if func in _FILLS:
            return args[0].fill_(_FILLS[func])
        if func in (torch.bernoulli, torch.Tensor.bernoulli):
            return torch.ones_like(args[0])
        if func is _SDPA and len(args) > 4:
            args = (*args[:4], 0.0, *args[5:])
        elif func is _SDPA and "dropout_p" in kwargs:
            kwargs["dropout_p"] = 0.0
        elif func is F.multi_head_attention_forward and len(args) > 10:
            args = (*args[:10], 0.0, *args[11:])
        return func(*args, **kwargs)


def _mean_slope(input: Tensor, lower: float = 1 / 8, upper: float = 1 / 3, *_: Any, **__: Any) -> Tensor:
    """A randomised leaky ReLU at the slope that it has on average."""
    return F.leaky_relu(input, (lower + upper) / 2)


def _constant(value: float, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    size = kwargs.pop("size", None) or (args[0] if args and isinstance(args[0], (tuple, list, torch.Size)) else args)
    kwargs.pop("generator", None)
    return torch.full(tuple(size), value, **{"dtype": torch.get_default_dtype(), **kwargs})


def _without_dropout(model: nn.Module) -> None:
    """Recurrent layers and attention drop inside their kernels, by an attribute."""
    for module in model.modules():
        if isinstance(module, (nn.RNNBase, nn.MultiheadAttention)):
            module.dropout = 0.0


# every number that comes out ------------------------------------------------------------------------------------------


def numbers(value: Any) -> list[Tensor]:
    """All numbers inside a value, whatever holds them: containers, dataclasses, plain objects, packed sequences.

    Example:
        >>> [tuple(t.shape) for t in numbers({"a": torch.zeros(2), "b": [3, (torch.ones(1, 4), None)]})]
        [(2,), (), (1, 4)]
    """
    found: list[Tensor] = []
    _collect(value, found, set())
    return found


def _collect(value: Any, found: list[Tensor], seen: set[int]) -> None:
    if isinstance(value, Tensor):
        found.append(value)
        return
    if isinstance(value, (int, float)):
        found.append(torch.tensor(float(value), dtype=torch.float64))
        return
    if value is None or isinstance(value, (str, bytes, nn.Module)):
        return
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, Mapping):
        inside: Any = value.values()
    elif isinstance(value, (list, tuple, set, frozenset)):
        inside = value
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        inside = [getattr(value, f.name, None) for f in dataclasses.fields(value)]
    else:
        inside = getattr(value, "__dict__", {}).values()
    for item in list(inside):
        _collect(item, found, seen)


def _plain(tensor: Tensor) -> Tensor:
    """A tensor's numbers as floats, detached."""
    tensor = tensor.detach()
    if tensor.layout != torch.strided:
        tensor = tensor.to_dense()
    if tensor.is_nested:
        tensor = tensor.to_padded_tensor(0.0)
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor.resolve_conj())
    return tensor.double().clone() if tensor.device.type != "mps" else tensor.float().clone()


def _kept_scalars(model: nn.Module) -> dict[str, Tensor]:
    """Single numbers that modules keep as attributes: losses that a forward computes on the way."""
    return {
        f"{path}.{name}".lstrip("."): value
        for path, module in model.named_modules()
        for name, value in vars(module).items()
        if isinstance(value, Tensor) and value.numel() == 1 and not value.is_meta
    }


def why_not(model: nn.Module, example: Example, modes: Sequence[bool] = (False, True)) -> str:
    """Why the forward of a model as it is now fails on the example, and in which module or hook; empty where it runs.

    The model, its buffers and the random state are left alone.

    Args:
        modes: False for evaluation, True for training.
    """
    twin = structural_copy(model, lambda t: t if isinstance(t, nn.Parameter) else t.detach().clone())
    for training in modes:
        args, kwargs = Copier(Tensor.clone)(arguments(example))
        twin.train(training)
        try:
            with quiet(), torch.no_grad():
                twin(*args, **kwargs)
        except Exception as error:
            mode = "training" if training else "evaluation"
            hook, where = failing_hook(twin, error), failing_module(twin, error)
            inside = f"the {hook.described(twin)}" if hook else f"'{where}'" if where else "the model itself"
            return f"the forward in {mode} mode fails in {inside}{user_line(error)}: {said(error)}"
    return ""


def modes_that_run(model: nn.Module, example: Example) -> tuple[bool, ...]:
    """The modes in which a model's forward runs on the example; none without storage."""
    if any(t.is_meta for t in (*model.parameters(), *model.buffers())):
        return ()
    return tuple(mode for mode in (False, True) if not why_not(model, example, (mode,)))


def change(before: list[Tensor], after: list[Tensor]) -> tuple[float, int]:
    """The largest change of any output, as a share of that output's largest value, and which output.

    Infinite where numbers, shapes or places of NaN and infinities differ. An output that is nothing but rounding is
    measured against the others.
    """
    if len(before) != len(after):
        return float("inf"), min(len(before), len(after))
    sizes = [float(x[torch.isfinite(x)].abs().max()) if bool(torch.isfinite(x).any()) else 0.0 for x in before]
    floor = max(1e-5 * max(sizes, default=0.0), 1e-7)
    worst, at = 0.0, 0
    for k, (x, y, size) in enumerate(zip(before, after, sizes, strict=True)):
        error = _difference(x, y) / max(size, floor)
        if error > worst:
            worst, at = error, k
    return worst, at


def _difference(x: Tensor, y: Tensor) -> float:
    if x.shape != y.shape:
        return float("inf")
    if not x.numel():
        return 0.0
    finite = torch.isfinite(x)
    if not torch.equal(finite, torch.isfinite(y)) or not torch.equal(
        torch.nan_to_num(x[~finite], nan=0.5), torch.nan_to_num(y[~finite], nan=0.5)
    ):
        return float("inf")
    return float((x[finite] - y[finite]).abs().max()) if bool(finite.any()) else 0.0


# generic weights ------------------------------------------------------------------------------------------------------


class _Noise:
    """Standard normal numbers, drawn once and read from a new place for each tensor."""

    def __init__(self, generator: torch.Generator, n: int) -> None:
        self.generator = generator
        self.values = torch.randn(min(n, N_NOISE), generator=generator)

    def like(self, tensor: Tensor) -> Tensor:
        n, length = tensor.numel(), self.values.numel()
        start = int(torch.randint(length, (1,), generator=self.generator))
        parts, left = [self.values[start : start + n]], n - min(n, length - start)
        while left > 0:
            parts.append(self.values[:left])
            left -= length
        flat = torch.cat(parts) if len(parts) > 1 else parts[0].clone()
        return flat.reshape(tensor.shape).to(tensor.device)


def _moved(source: Tensor, noise: _Noise, dtype: torch.dtype) -> Tensor:
    """A tensor's values moved a little: multiplied where all have one sign, added to elsewhere."""
    value = source.detach().to(dtype, copy=True)
    if not value.numel() or not bool(torch.isfinite(value.sum())):
        return value
    step = noise.like(value)
    low, high = (float(v) for v in value.aminmax())
    if low > 0 or high < 0:
        return value.mul_(step.mul_(SPREAD).exp_())
    size = float(value.norm()) / value.numel() ** 0.5
    return value.add_(step, alpha=SPREAD * (size or 0.5))


def _is_table(buffer: Tensor) -> bool:
    """Whether a floating buffer holds choices rather than quantities: a mask, integers written as floats."""
    if buffer.numel() < 2 or not bool(torch.isfinite(buffer).all()):
        return True
    if buffer.unique().numel() == 1:
        return False
    return bool((buffer == buffer.round()).all()) or (buffer.numel() > SMALL and buffer.unique().numel() <= 3)


def _generic_input(value: Tensor, noise: _Noise, dtype: torch.dtype) -> Tensor:
    """An example as it is; noise where it is a mere placeholder that holds one number everywhere."""
    if not value.is_floating_point():
        return value.clone()
    value = value.detach().to(dtype)
    if value.numel() < 2 or not bool((value == value.flatten()[0]).all()) or not bool(torch.isfinite(value).all()):
        return value.clone()
    step = noise.like(value).to(dtype)
    return value + step if float(value.flatten()[0]) == 0.0 else value * (SPREAD * step).exp()


# the copy -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Failure(Exception):
    """The copy's forward raised: what."""

    error: Exception


@dataclass(eq=False)
class Twin:
    """A generic copy of a model and how it is run.

    Args:
        model: the copy; edits on it are free.
        inputs: positional and keyword arguments of a forward.
        wide: whether it computes in float64.
        modes: modes to compare: False is evaluation, True is training. Training is left out where its outputs are those
            of evaluation: it is the same computation.
        plain: outputs of the copy as it was made, mode by mode.
        same: whether training computes what evaluation does.
        left_out: what cannot be compared, and why.
    """

    model: nn.Module
    inputs: tuple[tuple[Any, ...], dict[str, Any]]
    wide: bool
    modes: tuple[bool, ...] = (False,)
    plain: dict[bool, list[Tensor]] = dataclasses.field(default_factory=dict)
    same: bool = False
    left_out: str = ""

    @property
    def tolerance(self) -> float:
        """Relative change of an output up to which it counts as rounding."""
        return 1e-8 if self.wide else 2e-3

    def run(self, training: bool) -> list[Tensor]:
        """All numbers of one forward. Buffers are put back, random state is left alone.

        Raises:
            Failure: the forward raised.
        """
        model = self.model
        model.train(training)
        kept = _kept_scalars(model)
        args, kwargs = Copier(Tensor.clone)(self.inputs)
        try:
            with _buffers_kept(model), quiet(), Settled(), doubled() if self.wide else _as_is():
                torch.manual_seed(0)
                out = model(*args, **kwargs)
                scalars = [v for k, v in _kept_scalars(model).items() if kept.get(k) is not v]
                return [_plain(t) for t in (*numbers(out), *scalars)]
        except Exception as error:
            raise Failure(error) from error

    def slopes(self) -> dict[str, Tensor]:
        """The gradient of the outputs, weighted at random, by parameter; empty where there is none to be had."""
        model = self.model.train(False)
        parameters = dict(model.named_parameters())
        args, kwargs = Copier(Tensor.clone)(self.inputs)
        try:
            with (
                _buffers_kept(model), quiet(), Settled(), doubled() if self.wide else _as_is(), torch.enable_grad()
            ):  # fmt: skip
                for parameter in parameters.values():
                    parameter.requires_grad_(True)
                torch.manual_seed(0)
                outputs = [t for t in numbers(model(*args, **kwargs)) if t.requires_grad]
                total = torch.stack([(t * torch.rand(t.shape, dtype=t.dtype)).abs().sum() for t in outputs]).sum()
                found = torch.autograd.grad(total, list(parameters.values()), allow_unused=True)
        except Exception:  # a forward without gradients says nothing of who is alive
            return {}
        finally:
            for parameter in parameters.values():
                parameter.requires_grad_(False)
        slopes = zip(parameters.items(), found, strict=True)
        return {name: torch.zeros_like(p) if slope is None else slope for (name, p), slope in slopes}

    def repeats(self) -> bool:
        """Whether the copy as it was made gives the same outputs again."""
        return all(change(self.plain[mode], self.run(mode))[0] <= self.tolerance for mode in self.modes)

    @property
    def compared(self) -> tuple[str, ...]:
        """The modes of which something is known once all trials are run."""
        modes = (False, True) if self.same else self.modes
        return tuple("training" if mode else "evaluation" for mode in modes)


@contextmanager
def _buffers_kept(model: nn.Module) -> Iterator[None]:
    """Put back what a forward writes into buffers: the next one starts as this one did."""
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, before in buffers:
                if buffer.shape == before.shape:
                    buffer.copy_(before)


@contextmanager
def _as_is() -> Iterator[None]:
    yield


@dataclass(frozen=True)
class Limits:
    """What the trials on a copy may take.

    Args:
        memory_bytes: of the copies of the weights; past it in float64, float32 is tried.
        seconds: of forwards, reckoned from the first.
    """

    memory_bytes: int = 6 * 2**30
    seconds: float = 120.0


N_PASSES = 16
"""Forwards in each mode that trials with nothing wrong may take."""


def copy_within(
    model: nn.Module, example: Example, limits: Limits, *, training: bool = True, seed: int = 0
) -> Twin | str:
    """A generic copy of the model, if limits allow one; else why not."""
    tensors = [*model.parameters(), *model.buffers()]
    if any(t.is_meta for t in tensors):
        return "the weights have no storage"
    n = sum(t.numel() for t in tensors if t.is_floating_point())
    wide = n * 8 * 3 <= limits.memory_bytes
    if n * 4 * 3 > limits.memory_bytes:
        return f"copies of {n:,} weights take {n * 12 / 2**30:.1f} GiB, more than {limits.memory_bytes / 2**30:.1f} GiB"
    started = time.perf_counter()
    twin = twin_of(model, example, torch.Generator().manual_seed(seed), wide=wide, training=training)
    if isinstance(twin, str):
        return f"the forward of a copy cannot be compared: {twin}"
    needed = (time.perf_counter() - started) / 2 * N_PASSES
    if needed > limits.seconds:
        return f"its forwards would take about {needed:.0f} s, more than {limits.seconds:.0f} s"
    return twin


def twin_of(
    model: nn.Module, example: Example, generator: torch.Generator, *, wide: bool = True, training: bool = True
) -> Twin | str:
    """Make a generic copy that runs; or say why there is none.

    Generic weights first, then the weights as they are (a forward may hold only for some: a learned exponent); float64
    first, then float32. Where only the training forward fails, as with one sample under batch norm, evaluation is left.

    Args:
        wide: whether to try float64.
        training: whether to compare the training forward too.
    """
    problem = ""
    for dtype in (torch.float64, torch.float32) if wide else (torch.float32,):
        for generic in (True, False):
            twin = _copied(model, example, generator, dtype, generic=generic)
            problem = _started(twin, False)
            if not problem:
                return _with_training(twin) if training else twin
    return problem


def _copied(
    model: nn.Module, example: Example, generator: torch.Generator, dtype: torch.dtype, *, generic: bool
) -> Twin:
    noise = _Noise(generator, max((t.numel() for t in (*model.parameters(), *model.buffers())), default=1))
    known = {id(tensor) for tensor in canonical_names(model)[1].values()}

    def copied(source: Tensor) -> Tensor:
        value = source.detach()
        if not value.is_floating_point():
            value = value.clone()
        elif generic and id(source) in known and (isinstance(source, nn.Parameter) or not _is_table(value)):
            value = _moved(value, noise, dtype)
        else:
            value = value.to(dtype, copy=True)
        return nn.Parameter(value, requires_grad=False) if isinstance(source, nn.Parameter) else value

    twin = structural_copy(model, copied)
    _without_dropout(twin)
    args, kwargs = arguments(example)
    make = lambda t: _generic_input(t, noise, dtype) if generic else t.detach().clone()  # noqa: E731
    inputs = Copier(make)((args, kwargs))
    config = getattr(twin, "config", None)
    if config is not None and getattr(config, "use_cache", None):
        config.use_cache = False
    return Twin(twin, inputs, dtype == torch.float64)


def _started(twin: Twin, training: bool) -> str:
    """Run a copy in one more mode; why its outputs cannot be compared, empty where they can."""
    try:
        out = twin.run(training)
    except Failure as failure:
        text = (str(failure.error).splitlines() or [""])[0]
        return f"{type(failure.error).__name__}: {text[:200]}"
    if not any(bool(torch.isfinite(x).any()) for x in out if x.numel()):
        return "no output is finite"
    twin.plain[training] = out
    return ""


def _with_training(twin: Twin) -> Twin:
    """The same copy, to be compared in training mode too where that says more."""
    problem = _started(twin, True)
    if problem:
        twice = dataclasses.replace(twin, inputs=Copier(_two_samples)(twin.inputs), plain={})
        if _started(twice, False) or _started(twice, True):
            return dataclasses.replace(twin, left_out=f"the training forward: {problem}")
        twin = twice
    if change(twin.plain[False], twin.plain[True])[0] <= twin.tolerance:
        return dataclasses.replace(twin, same=True)
    return dataclasses.replace(twin, modes=(False, True))


def _two_samples(value: Tensor) -> Tensor:
    """One sample, and the same a little changed: batch norm has nothing to learn from a single one."""
    if value.ndim < 1 or value.shape[0] != 1:
        return value
    second = value.roll(1, -1) if not value.is_floating_point() else value.roll(1, -1) * 0.9
    return torch.cat([value, second])
