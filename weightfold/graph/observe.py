"""Second moments of what readers read: hooks on live modules that change nothing and cost little.

A reader (a linear layer, a convolution) sees a channel as one number per sample and position. Its second moment
E[a aᵀ] is all that least squares needs: which channels are combinations of others, and at what error. What the weights
say of a channel is one row of numbers per axis.
"""

from __future__ import annotations

import inspect
import math
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn

from weightfold.errors import DataError, GraphError
from weightfold.graph.apply import find_tensor
from weightfold.graph.group import Axis, ChannelGraph, ChannelGroup
from weightfold.graph.layout import to_front

Key = tuple[str, int]
"""(tensor, dimension) of a reading axis."""

FLUSH = 1024
"""Samples that are multiplied at once."""


@dataclass(frozen=True, eq=False)
class SecondMoment:
    """First and second moments of channels, over samples and positions.

    Args:
        count: samples seen.
        mean_C: E[a], shape (C,), float64.
        second_CC: E[a aᵀ], shape (C, C), float64.
        place_C: first position of each channel along the reader's axis, ascending, shape (C,), int64.

    Example:
        >>> moment = SecondMoment.of_samples(torch.tensor([[1.0, 0.0], [3.0, 2.0]]))
        >>> moment.mean_C, moment.covariance()[0]
        (tensor([2., 1.], dtype=torch.float64), tensor([1., 1.], dtype=torch.float64))
    """

    count: int
    mean_C: Tensor
    second_CC: Tensor
    place_C: Tensor

    @classmethod
    def of_samples(cls, samples_NC: Tensor) -> SecondMoment:
        """Measure samples, shape (N, C)."""
        total = _Sum(samples_NC.mean(0))
        total.add_(samples_NC)
        return total.moment(torch.arange(samples_NC.shape[1]))

    @property
    def n_channels(self) -> int:
        return self.mean_C.numel()

    def second(self) -> Tensor:
        """E[a aᵀ], shape (C, C): for readers without an intercept."""
        return self.second_CC

    def covariance(self) -> Tensor:
        """E[(a - E a)(a - E a)ᵀ], shape (C, C): for readers whose bias can take up the mean."""
        return self.second_CC - torch.outer(self.mean_C, self.mean_C)

    def merge(self, other: SecondMoment) -> SecondMoment:
        """The moments of both sets of samples together."""
        if not torch.equal(self.place_C, other.place_C):
            raise GraphError("Moments of different channels cannot be merged.", remedy="Observe one graph at a time.")
        n = self.count + other.count
        share = other.count / max(n, 1)
        mean_C = torch.lerp(self.mean_C, other.mean_C, share)
        return SecondMoment(n, mean_C, torch.lerp(self.second_CC, other.second_CC, share), self.place_C)

    def without(self, earlier: SecondMoment) -> SecondMoment:
        """What came after an earlier state of the same sums."""
        n = self.count - earlier.count
        share = earlier.count / max(n, 1)
        mean_C = self.mean_C + share * (self.mean_C - earlier.mean_C)
        return SecondMoment(n, mean_C, self.second_CC + share * (self.second_CC - earlier.second_CC), self.place_C)

    def of(self, axis: Axis) -> SecondMoment:
        """The channels of one group, in the group's order; a channel that this axis does not hold is zero.

        Raises:
            GraphError: the axis has positions that were not observed.
        """
        far = torch.iinfo(torch.int64).max
        first_C = torch.where(axis.index >= 0, axis.index, far).min(1).values
        have_C = first_C < far
        row_C = torch.searchsorted(self.place_C, first_C).clamp_max(self.n_channels - 1)
        if not torch.equal(self.place_C[row_C[have_C]], first_C[have_C]):
            raise GraphError(
                f"The statistics of '{axis.tensor}' belong to other channels than the graph's.",
                remedy="Observe again after an edit.",
            )
        mask_C = have_C.double()
        second_CC = self.second_CC[row_C][:, row_C] * torch.outer(mask_C, mask_C)
        return SecondMoment(self.count, self.mean_C[row_C] * mask_C, second_CC, torch.where(have_C, first_C, -1))

    def to_state(self) -> dict[str, Tensor]:
        """The moments as named tensors, for checkpoints."""
        return {
            "count": torch.tensor(self.count),
            "mean_C": self.mean_C,
            "second_CC": self.second_CC,
            "place_C": self.place_C,
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Tensor]) -> Self:
        """Read back what `to_state` wrote."""
        return cls(int(state["count"]), state["mean_C"], state["second_CC"], state["place_C"])


class _Sum:
    """Running sums about a point near the mean: products in the samples' type, sums in float64.

    With c the mean of the first samples, S = Σ (a - c)(a - c)ᵀ and r = Σ (a - c) / n,

        E[a] = c + r,    E[a aᵀ] = S / n + c rᵀ + r cᵀ + c cᵀ.

    Samples wait until there are `FLUSH` of them, so that a wide product is taken once.
    """

    def __init__(self, near_C: Tensor) -> None:
        wide = torch.float32 if near_C.device.type == "mps" else torch.float64
        self.near_C = near_C
        self.count = 0
        self.sum_C = torch.zeros_like(near_C, dtype=wide)
        self.sum_CC = torch.zeros(len(near_C), len(near_C), dtype=wide, device=near_C.device)
        self.waiting: list[Tensor] = []

    def add_(self, samples_NC: Tensor) -> None:
        self.waiting.append(samples_NC - self.near_C)
        if sum(map(len, self.waiting)) >= FLUSH:
            self._flush_()

    def _flush_(self) -> None:
        near_NC = torch.cat(self.waiting)
        self.waiting = []
        self.count += len(near_NC)
        self.sum_C += near_NC.sum(0)
        self.sum_CC += near_NC.T @ near_NC

    def to_state(self) -> dict[str, Tensor]:
        """All there is, so that the sums go on as if nothing had been between."""
        return {
            "near_C": self.near_C,
            "count": torch.tensor(self.count),
            "sum_C": self.sum_C.clone(),
            "sum_CC": self.sum_CC.clone(),
            "waiting_NC": torch.cat(self.waiting) if self.waiting else self.near_C.new_zeros(0, len(self.near_C)),
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Tensor]) -> Self:
        total = cls(state["near_C"])
        total.count = int(state["count"])
        total.sum_C, total.sum_CC = state["sum_C"].clone(), state["sum_CC"].clone()
        total.waiting = [state["waiting_NC"]] if len(state["waiting_NC"]) else []
        return total

    def moment(self, place_C: Tensor) -> SecondMoment:
        """The moments so far, on the CPU; what waits goes on waiting."""
        count, sum_C, sum_CC = self.count, self.sum_C, self.sum_CC
        if self.waiting:
            near_NC = torch.cat(self.waiting)
            count, sum_C, sum_CC = count + len(near_NC), sum_C + near_NC.sum(0), sum_CC + near_NC.T @ near_NC
        near_C = self.near_C.double().cpu()
        rest_C = sum_C.double().cpu() / count
        mean_C = near_C + rest_C
        second_CC = sum_CC.double().cpu() / count + torch.outer(mean_C, mean_C) - torch.outer(rest_C, rest_C)
        return SecondMoment(count, mean_C, second_CC, place_C)


def axis_rows(model: nn.Module, axis: Axis) -> list[Tensor]:
    """The weights at each slot of an axis, one row per channel, shapes (C, F), float64; zero where there is none."""
    front = to_front(find_tensor(model, axis.tensor)[2].detach(), axis.dim, axis.slabs)
    flat_NF = front.reshape(front.shape[0], -1).double().cpu()
    have = (axis.index >= 0).double()
    return [flat_NF[axis.index[:, m].clamp_min(0)] * have[:, m : m + 1] for m in range(axis.index.shape[1])]


def gather(model: nn.Module, group: ChannelGroup, roles: Collection[str] = ("write", "pointwise")) -> Tensor:
    """One row of numbers per channel: all weights that write, scale or read it, axis after axis.

    Args:
        roles: which axes: "write", "pointwise", "read", "both".
    Returns:
        rows_CF: shape (C, F), float64.
    Example:
        >>> import weightfold as wf
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> gather(net, wf.trace(net, torch.zeros(1, 4))["0"]).shape
        torch.Size([8, 5])
    """
    return torch.cat([rows for axis in group.axes if axis.role in roles for rows in axis_rows(model, axis)], 1)


@dataclass(frozen=True, eq=False)
class _Tap:
    """What to take from the input of a module: the positions (C, M) of each channel along dimension ``dim``."""

    key: Key
    path: str
    dim: int
    index_CM: Tensor

    def samples(self, x: Tensor, limit: int | None) -> Tensor:
        """One row per sample, position and slot, shape (N, C), float32 or float64."""
        return rows_of(x, self.dim, self.index_CM, limit)


def rows_of(x: Tensor, dim: int, index_CM: Tensor, limit: int | None = None) -> Tensor:
    """The channels at positions (C, M) along a dimension: one row per sample, position and slot, shape (N, C).

    Args:
        limit: of more rows, an evenly spaced part of about this many; None: all.
    """
    n_channels, slots = index_CM.shape
    rows = _strided(x.movedim(dim, -1), None if limit is None else max(1, limit // slots))
    rows = rows.to(torch.float64 if x.dtype == torch.float64 else torch.float32)
    index = index_CM.T.reshape(-1).to(x.device)
    if torch.equal(index, torch.arange(rows.shape[1], device=x.device)):
        return rows.reshape(-1, n_channels)
    taken = rows[:, index.clamp_min(0)] * (index >= 0)
    return taken.reshape(-1, n_channels)


def first_input(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
    """What a module is called with first, by position or by name; of a packed or nested sequence, all its steps.

    None where that is no tensor.
    """
    x = args[0] if args else kwargs.get(next(iter(inspect.signature(module.forward).parameters), ""))
    if isinstance(x, nn.utils.rnn.PackedSequence):
        return x.data
    if isinstance(x, Tensor) and x.is_nested:
        return torch.cat([part.reshape(-1, part.shape[-1]) for part in x.unbind()])
    return x if isinstance(x, Tensor) else None


def _strided(x: Tensor, limit: int | None) -> Tensor:
    """At most about ``limit`` rows of x (..., F), a fixed step apart that shares no factor with their number."""
    n = math.prod(x.shape[:-1])
    if limit is None or n <= limit:
        return x.reshape(n, x.shape[-1])
    step = -(-n // limit)
    while math.gcd(step, n) > 1:
        step += 1
    picked = torch.arange(0, n, step, device=x.device)
    return x[torch.unravel_index(picked, x.shape[:-1])]


def taps(graph: ChannelGraph, group_names: Collection[str] | None = None) -> list[_Tap]:
    """Where the readers of the named groups (all by default) can be observed, one tap per axis.

    Groups that share an axis, as those of a residual stream can, share its tap.
    """
    found: dict[Key, list[Axis]] = {}
    wanted = graph.groups if group_names is None else [graph[name] for name in group_names]
    for group in wanted:
        for axis in group.role("read"):
            if axis.tap is not None and group.kind == "channels":
                found.setdefault(axis.key, []).append(axis)
    return [_Tap(key, *_place(axes), _union(axes)) for key, axes in found.items()]


def _place(axes: list[Axis]) -> tuple[str, int]:
    tap = axes[0].tap
    assert tap is not None
    return tap


def _union(axes: list[Axis]) -> Tensor:
    """The positions of all channels on an axis, by first position, shape (C, M), -1 where there is none."""
    slots = max(axis.index.shape[1] for axis in axes)
    padded = [nn.functional.pad(axis.index, (0, slots - axis.index.shape[1]), value=-1) for axis in axes]
    index_CM = torch.cat(padded)
    index_CM = index_CM[(index_CM >= 0).any(1)]
    far = torch.where(index_CM >= 0, index_CM, torch.iinfo(torch.int64).max)
    return index_CM[torch.argsort(far.min(1).values)]


class Observer:
    """Collects second moments at the readers while the model runs; hooks stand only inside ``with``.

    Outputs, gradients and random state stay as they are. It may be entered again and goes on counting. Compiled code
    takes nothing of it in, and is not observed.

    Args:
        model: the traced module.
        graph: its channel graph.
        group_names: whose readers to watch; all by default.
        max_samples_per_batch: of more samples and positions in one call, an evenly spaced part is used; None: all.

    Attributes:
        seconds: spent in the hooks so far.
        enabled: whether the hooks count what passes.

    Example:
        >>> import weightfold as wf
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> observer = Observer(net, wf.trace(net, torch.zeros(1, 4)))
        >>> with observer:
        ...     _ = net(torch.randn(100, 4))
        >>> moment = observer.statistics()["2.weight", 1]
        >>> moment.count, moment.second().shape
        (100, torch.Size([8, 8]))
    """

    def __init__(
        self,
        model: nn.Module,
        graph: ChannelGraph,
        group_names: Collection[str] | None = None,
        *,
        max_samples_per_batch: int | None = 4096,
    ) -> None:
        self.model = model
        self.limit = max_samples_per_batch
        self._taps = taps(graph, group_names)
        self._sums: dict[Key, _Sum] = {}
        self._handles: list[Any] = []
        self.seconds = 0.0
        self.enabled = True

    def __enter__(self) -> Self:
        for tap in self._taps:
            module = self.model.get_submodule(tap.path)
            self._handles.append(module.register_forward_pre_hook(self._hook(tap), with_kwargs=True))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def statistics(self) -> dict[Key, SecondMoment]:
        """The moments so far, on the CPU, by reading axis; axes that nothing passed are left out.

        Raises:
            DataError: a module was given NaN or infinite numbers.
        """
        return {tap.key: _finite(self._sums[tap.key], tap) for tap in self._taps if tap.key in self._sums}

    def to_state(self) -> dict[str, dict[str, Tensor]]:
        """The running sums, exactly as they are, for a checkpoint."""
        return {f"{tensor}|{dim}": total.to_state() for (tensor, dim), total in self._sums.items()}

    def load_state(self, state: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Go on from what `to_state` gave."""
        for name, value in state.items():
            tensor, _, dim = name.rpartition("|")
            self._sums[tensor, int(dim)] = _Sum.from_state(value)

    def _hook(self, tap: _Tap) -> Any:
        def observe(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if torch.compiler.is_compiling():
                return
            x = first_input(module, args, kwargs)
            if self.enabled and x is not None and x.numel():
                self._add(tap, x.detach())

        return observe

    @torch.no_grad()
    def _add(self, tap: _Tap, x: Tensor) -> None:
        start = time.perf_counter()
        with torch.autocast(x.device.type, enabled=False):
            samples_NC = tap.samples(x, self.limit)
            if tap.key not in self._sums:
                self._sums[tap.key] = _Sum(samples_NC.mean(0))
            self._sums[tap.key].add_(samples_NC)
        self.seconds += time.perf_counter() - start


def _finite(total: _Sum, tap: _Tap) -> SecondMoment:
    far = torch.where(tap.index_CM >= 0, tap.index_CM, torch.iinfo(torch.int64).max)
    moment = total.moment(far.min(1).values)
    if not bool(torch.isfinite(moment.second_CC).all()):
        raise DataError(
            f"The input of '{tap.path}' is not finite: its second moment holds NaN or infinite numbers.",
            remedy="Check the data and the loss; lower the learning rate if the run diverged.",
        )
    return moment
