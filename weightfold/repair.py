"""Repair a compressed network on unlabelled inputs, so that it gives what the uncompressed one gives.

Gauss-Newton: with outputs f(θ) and wished outputs y, each round solves the least-squares problem of the network made
linear in its weights, damped as Levenberg and Marquardt do,

    (JᵀJ + μ diag) δ = Jᵀ (y - f(θ)),

by conjugate gradients on products with J and Jᵀ, which automatic differentiation gives without the matrix. A round is
kept only if it lowers the error. No labels, no learning rate; cost: rounds x (iterations x 2 + trials) passes over the
inputs. Batch norms stay in evaluation mode; their statistics are measured anew by `recalibrate_`.

Reference: Levenberg 1944, Marquardt 1963; Hinton, Vinyals, Dean, arXiv 1503.02531 (the outputs as the target).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp, vjp
from torch.utils import _pytree as pytree

from weightfold.errors import DataError
from weightfold.graph.copies import independent_copy
from weightfold.stats.norms import recalibrate_ as recalibrate_
from weightfold.stats.running import inputs_of

Weights = dict[str, Tensor]


def output_of(model: nn.Module, inputs: Any, weights: Mapping[str, Tensor] | None = None) -> Tensor:
    """The first floating numbers that a network returns for a batch, one row a sample, shape (B, F).

    A loss comes to a single number, shape (1, 1), and counts where nothing else is returned.
    """
    args, kwargs = inputs_of(model, inputs)
    found = model(*args, **kwargs) if weights is None else functional_call(model, dict(weights), args, kwargs)
    found = getattr(found, "logits", found)
    leaves = [x for x in pytree.tree_leaves(found) if isinstance(x, Tensor) and x.is_floating_point()]
    if not leaves:
        raise DataError("The network returns no numbers to be compared.")
    first = next((x for x in leaves if x.ndim), leaves[0])
    return first.reshape(len(first) if first.ndim else 1, -1)


@torch.no_grad()
def distance(model: nn.Module, reference: nn.Module, batches: Iterable[Any]) -> dict[str, float]:
    """How far two networks' outputs lie apart on some inputs.

    Returns:
        max_abs: the largest difference of one output; rms: root mean square; relative: rms over that of the reference.
    """
    worst, total, whole, n = 0.0, 0.0, 0.0, 0
    for batch in batches:
        a, b = output_of(reference, batch).double(), output_of(model, batch).double()
        worst = max(worst, float((a - b).abs().max()))
        total, whole, n = total + float((a - b).square().sum()), whole + float(a.square().sum()), n + a.numel()
    if n == 0:
        raise DataError("There are no inputs to compare the networks on.")
    return {"max_abs": worst, "rms": (total / n) ** 0.5, "relative": (total / max(whole, 1e-300)) ** 0.5}


def gauss_newton_(
    model: nn.Module,
    inputs: Any,
    wished: Tensor,
    *,
    rounds: int = 6,
    iterations: int = 24,
    masks: Mapping[str, Tensor] | None = None,
    damping: float = 1e-3,
    enough: float = 1e-7,
    dtype: torch.dtype | None = None,
) -> list[float]:
    """Fit all weights of a network to wished outputs, in place.

    Args:
        inputs: one batch of inputs, as the model takes it.
        wished: outputs to reach, one row a sample, shape (B, F).
        rounds: linearisations at most.
        iterations: of conjugate gradients in each.
        masks: which entries of a weight may move, by name; all by default.
        damping: μ at the start.
        enough: mean square error over the wished outputs' variance at which to stop.
        dtype: to compute in; float64 by default below two million weights, else the network's own.
    Returns:
        The mean square error before and after each kept round.
    Raises:
        DataError: the outputs are not finite.
    Example:
        >>> net, x = nn.Linear(3, 1), torch.randn(20, 3, generator=torch.Generator().manual_seed(0))
        >>> errors = gauss_newton_(net, x, x.sum(1, keepdim=True), rounds=4, damping=1e-9)
        >>> errors[-1] < 1e-8
        True
    """
    _load_forward_mode()
    work = independent_copy(model).eval()
    if dtype is None and sum(p.numel() for p in work.parameters()) < 2_000_000:
        dtype = torch.float32 if wished.device.type == "mps" else torch.float64
    work = work if dtype is None else work.to(dtype)
    cast: Callable[[Any], Any] = lambda x: x if dtype is None or not x.is_floating_point() else x.to(dtype)  # noqa: E731
    inputs = pytree.tree_map_only(Tensor, cast, inputs)
    wished = cast(wished)
    weights = {n: p.detach() for n, p in work.named_parameters() if p.is_floating_point()}
    masks = {n: m.to(weights[n]) for n, m in (masks or {}).items()}
    forward: Callable[[Weights], Tensor] = lambda w: output_of(work, inputs, w)  # noqa: E731
    count = wished.numel()

    def off(at: Weights) -> float:
        with torch.no_grad():
            return float((forward(at) - wished).square().mean())

    error = off(weights)
    if not error < float("inf"):
        raise DataError("The network's outputs are not finite.", remedy="Check the inputs and the weights.")
    errors, mu = [error], damping
    goal = enough * float((wished - wished.mean(0)).square().mean())
    for _ in range(rounds if error > goal else 0):
        out, pull = vjp(forward, weights)[:2]
        gradient = _masked({n: g / count for n, g in pull(wished - out)[0].items()}, masks)
        scale = _scales(weights, pull, out, masks)
        for _ in range(4):
            step = _solve(forward, weights, pull, gradient, scale, mu, iterations, masks, count)
            trial = {n: weights[n] + step[n] for n in weights}
            if (now := off(trial)) < error:
                break
            mu *= 8
        else:
            break
        gain, weights, error, mu = error - now, trial, now, mu / 3
        errors.append(error)
        if gain < 1e-4 * error or error <= goal:
            break
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in weights:
                parameter.copy_(weights[name].to(parameter.dtype))
    return errors


def _load_forward_mode() -> None:
    """Load what forward-mode differentiation needs; torch warns of its own old code while it does."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        import torch._decomp.decompositions_for_jvp  # noqa: F401


def _masked(values: Weights, masks: Mapping[str, Tensor]) -> Weights:
    return {n: v * masks[n] if n in masks else v for n, v in values.items()}


def _scales(
    weights: Weights, pull: Callable[[Tensor], tuple[Weights]], out: Tensor, masks: Mapping[str, Tensor]
) -> Weights:
    """Estimate the diagonal of JᵀJ from a few products with random signs, at least its thousandth mean."""
    total = {n: torch.zeros_like(w) for n, w in weights.items()}
    generator = torch.Generator().manual_seed(0)
    for _ in range(4):
        signs = (torch.randint(0, 2, out.shape, generator=generator) * 2 - 1).to(out)
        for name, value in _masked(pull(signs)[0], masks).items():
            total[name] += value.square() / 4 / out.numel()
    mean = sum(float(v.sum()) for v in total.values()) / max(sum(v.numel() for v in total.values()), 1)
    return {n: v + 1e-3 * mean + 1e-30 for n, v in total.items()}


def _solve(
    forward: Callable[[Weights], Tensor],
    weights: Weights,
    pull: Callable[[Tensor], tuple[Weights]],
    gradient: Weights,
    scale: Weights,
    mu: float,
    iterations: int,
    masks: Mapping[str, Tensor],
    count: int,
) -> Weights:
    """Conjugate gradients on (JᵀJ + μ S) δ = g, preconditioned by S."""

    def product(p: Weights) -> Weights:
        pushed = jvp(forward, (weights,), (p,))[1]
        back = _masked(pull(pushed)[0], masks)
        return {n: back[n] / count + mu * scale[n] * p[n] for n in p}

    step = {n: torch.zeros_like(w) for n, w in weights.items()}
    rest = dict(gradient)
    z = {n: rest[n] / scale[n] for n in rest}
    direction = dict(z)
    size = first = _dot(rest, z)
    for _ in range(iterations):
        if size <= 1e-20 * first or size == 0:
            break
        moved = product(direction)
        alpha = size / max(_dot(direction, moved), 1e-300)
        step = {n: step[n] + alpha * direction[n] for n in step}
        rest = {n: rest[n] - alpha * moved[n] for n in rest}
        z = {n: rest[n] / scale[n] for n in rest}
        new = _dot(rest, z)
        direction = {n: z[n] + new / size * direction[n] for n in z}
        size = new
    return step


def _dot(a: Weights, b: Weights) -> float:
    return sum(float((a[n] * b[n]).sum()) for n in a)


def jittered(x: Tensor, n: int, generator: torch.Generator, size: float = 0.1) -> Tensor:
    """Fill inputs up to n with copies of them, each number moved at random by a share of its column's deviation.

    The network itself says what it gives there, so that a fit with many weights has more than a few inputs to match.

    Args:
        x: inputs, shape (B, ...), floating.
        size: standard deviation of the noise over that of the numbers in the same place.
    Example:
        >>> jittered(torch.randn(10, 3), 64, torch.Generator().manual_seed(0)).shape
        torch.Size([64, 3])
    """
    if len(x) >= n:
        return x
    rows = torch.randint(len(x), (n - len(x),), generator=generator)
    noise = torch.randn((len(rows), *x.shape[1:]), generator=generator, dtype=x.dtype)
    return torch.cat([x, x[rows] + size * x.std(0, keepdim=True) * noise])
