"""Grids for what layers read: a step and a bit width for each quantised layer's input, learned like those of weights.

    q(x) = s · clamp(round(x / s), l, h)        l = -Q, h = Q, Q = 2**(b - 1) - 1     where inputs have both signs
                                                l = 0,  h = 2**b - 1                  behind a ReLU and the like

What a layer then costs is counted in bit operations, BOPs = MACs · bits of weights · bits of inputs, relative to 32 by
32. A plain network holds no such grid, so it is not part of the converted network: the grids are given beside it, for
an export that quantises activations, and `running` puts them on for a measurement.

Reference: van Baalen et al., NeurIPS 2020, arXiv 2005.07093 (BOPs); Esser et al., ICLR 2020, arXiv 1902.08153 (learned
steps); differs in: whole bits in the forward pass, their price from the secant to one bit less.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from weightfold.quant.fake import LN2, step_of
from weightfold.ranks import Ranks
from weightfold.stats.running import call, probing
from weightfold.stats.taps import tap, tapped

MIN_BITS, MAX_BITS, FIRST_BITS = 2, 8, 8
EXPONENT_LR, BITS_LR = 3e-3, 1e-2
"""In octaves and bits a step."""
FULL = 32 * 32
"""Bits times bits of a product in single precision."""


@dataclass(frozen=True)
class Grid:
    """The grid of a layer's input.

    Args:
        step: distance of two values.
        bits: width.
        signed: whether it reaches below zero.
    """

    step: float
    bits: int
    signed: bool

    @property
    def limits(self) -> tuple[int, int]:
        """Least and largest whole number.

        Example:
            >>> Grid(0.1, 4, True).limits, Grid(0.1, 4, False).limits
            ((-7, 7), (0, 15))
        """
        top = 2 ** (self.bits - 1) - 1 if self.signed else 2**self.bits - 1
        return (-top if self.signed else 0), top

    def on(self, x: Tensor) -> Tensor:
        """Round to the grid."""
        low, high = self.limits
        return torch.clamp(torch.round(x / self.step), low, high) * self.step


class _Quantise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, exponent: Tensor, bits: Tensor, signed: bool) -> Tensor:
        s = step_of(exponent.reshape(1))[0].to(x.dtype)
        width = int(torch.round(bits.detach()).clamp(MIN_BITS, MAX_BITS))
        low, high = Grid(1.0, width, signed).limits
        q = torch.clamp(torch.round(x / s), low, high) * s
        ctx.save_for_backward(x, q, s)
        ctx.high = high
        return q

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        x, q, s = ctx.saved_tensors
        inside = (q - x).abs() <= 0.5001 * s
        by_exponent = LN2 * (grad * torch.where(inside, q - x, q)).sum()
        half = (ctx.high // 2) * s
        by_bits = (grad * (q - torch.clamp(q, -half, half))).sum()
        return torch.where(inside, grad, 0.0), by_exponent, by_bits, None


@dataclass(frozen=True, eq=False)
class _Input:
    exponent: Tensor
    bits: Tensor
    signed: bool

    def whole_bits(self) -> Tensor:
        """The width that is used, with the gradient of the one that is learned."""
        return self.bits + (torch.round(self.bits.detach()) - self.bits.detach())


def _quantised(x: Tensor, held: _Input) -> Tensor:
    return _Quantise.apply(x, held.exponent, held.bits, held.signed)


class Activations:
    """Learned grids at the inputs of layers, by hooks; gradients reach layers below unchanged where nothing clips.

    Args:
        model: the network.
        paths: modules whose first input is quantised, and the MACs of each for one sample.
        inputs: batches that say how large inputs are.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> grids = Activations(net, {"0": 32, "2": 16}, [torch.randn(64, 4)])
        >>> [grid.signed for grid in grids.grids().values()]
        [True, False]
        >>> grids.release()
    """

    def __init__(self, model: nn.Module, paths: Mapping[str, float], inputs: Sequence[Any]) -> None:
        self.model = model
        self.macs = dict(paths)
        self._full = FULL * sum(paths.values())
        self._inputs: dict[str, _Input] = {}
        self._handles: list[Any] = []
        for path, (low, high) in _ranges(model, list(paths), inputs).items():
            top = max(abs(low), abs(high)) or 1.0
            signed = low < 0
            n_steps = 2 ** (FIRST_BITS - 1) - 1 if signed else 2**FIRST_BITS - 1
            device = next(model.get_submodule(path).parameters()).device
            exponent = torch.tensor(math.log2(top / n_steps), device=device, requires_grad=True)
            bits = torch.tensor(float(FIRST_BITS), device=device, requires_grad=True)
            self._inputs[path] = _Input(exponent, bits, signed)
        self._optimizer = torch.optim.Adam(
            [
                {"params": [h.exponent for h in self._inputs.values()], "lr": EXPONENT_LR},
                {"params": [h.bits for h in self._inputs.values()], "lr": BITS_LR},
            ]
        )
        self._attach()

    def _attach(self) -> None:
        for path, held in self._inputs.items():
            self._handles.append(tap(self.model.get_submodule(path), partial(_quantised, held=held)))

    def bops(self, weight_bits: Mapping[str, Tensor]) -> Tensor:
        """Bit operations of one sample, as a share of the first network's in single precision; differentiable.

        Args:
            weight_bits: mean width of each layer's rows, by path.
        """
        parts = [n * weight_bits[path] * self._inputs[path].whole_bits() for path, n in self.macs.items()]
        return torch.stack(parts).sum() / self._full

    def learn(self, ranks: Ranks, scale: float, pace: float) -> None:
        """One step of exponents and bits.

        Args:
            ranks: whose gradients are added up.
            scale: what the loss was multiplied by, over all ranks; 0: no step.
            pace: learning rates as a share of their highest.
        """
        held = [tensor for item in self._inputs.values() for tensor in (item.exponent, item.bits)]
        flat = torch.stack([torch.zeros_like(t) if t.grad is None else t.grad for t in held])
        self._optimizer.zero_grad()
        if ranks.group is not None:
            dist.all_reduce(flat, group=ranks.group)
        if scale == 0 or not bool(torch.isfinite(flat).all()):
            return
        for tensor, grad in zip(held, flat / scale, strict=True):
            tensor.grad = grad
        for group, full in zip(self._optimizer.param_groups, (EXPONENT_LR, BITS_LR), strict=True):
            group["lr"] = full * pace
        self._optimizer.step()
        self._optimizer.zero_grad()
        with torch.no_grad():
            for item in self._inputs.values():
                item.bits.clamp_(MIN_BITS, MAX_BITS)

    def grids(self) -> dict[str, Grid]:
        """The grids as they are, by module path."""
        return {
            path: Grid(
                float(step_of(held.exponent.detach().reshape(1))[0]),
                int(torch.round(held.bits.detach()).clamp(MIN_BITS, MAX_BITS)),
                held.signed,
            )
            for path, held in self._inputs.items()
        }

    def release(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def state_dict(self) -> dict[str, Any]:
        """What a restart needs."""
        grids = {p: [float(h.exponent.detach()), float(h.bits.detach()), h.signed] for p, h in self._inputs.items()}
        return {"grids": grids, "optimizer": self._optimizer.state_dict()}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Read back what `state_dict` gave."""
        with torch.no_grad():
            for path, (exponent, bits, signed) in state["grids"].items():
                held = self._inputs[path]
                held.exponent.fill_(exponent)
                held.bits.fill_(bits)
                self._inputs[path] = _Input(held.exponent, held.bits, bool(signed))
        self._optimizer.load_state_dict(state["optimizer"])
        self.release()
        self._attach()


def _ranges(model: nn.Module, paths: Sequence[str], inputs: Sequence[Any]) -> dict[str, tuple[float, float]]:
    """Least and largest value that each module reads first."""
    found: dict[str, tuple[float, float]] = {}

    def look(x: Tensor, path: str) -> None:
        low, high = found.get(path, (math.inf, -math.inf))
        found[path] = min(low, float(x.min())), max(high, float(x.max()))

    with probing(model), tapped(model, {path: partial(look, path=path) for path in paths}):
        for batch in inputs:
            call(model, batch)
    return {path: found[path] for path in paths if path in found}


@contextmanager
def running(model: nn.Module, grids: Mapping[str, Grid]) -> Iterator[None]:
    """Run a plain network with its layers' inputs on their grids, to measure it.

    Example:
        >>> layer = nn.Linear(2, 1)
        >>> with running(layer, {"": Grid(0.5, 2, True)}):
        ...     same = torch.equal(layer(torch.tensor([[0.3, 9.0]])), layer(torch.tensor([[0.5, 0.5]])))
        >>> same
        True
    """

    with tapped(model, {path: grid.on for path, grid in grids.items()}):
        yield
