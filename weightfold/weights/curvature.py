"""Curvature of a loss: the Hessian's trace and largest eigenvalue, without the Hessian.

**Trace** by Hutchinson: the mean of vᵀ H v over random signs v is unbiased. **Largest eigenvalue** by power iteration.
Both need products H v alone, the gradient of gᵀ v, at about twice the cost of a gradient.

Scale symmetries change both without changing the function: balance the model first (`canonical`) to compare two.

References: Hutchinson 1990; Yao et al. 2020, arXiv 1912.07145 (PyHessian); Dinh et al. 2017, arXiv 1703.04933 (flatness
depends on the scales).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from weightfold.errors import DataError


@dataclass(frozen=True)
class Curvature:
    """How a loss bends.

    Args:
        trace: of the Hessian.
        trace_error: standard error of the estimate.
        largest: its eigenvalue of largest magnitude.
        steps: power iterations.
    """

    trace: float
    trace_error: float
    largest: float
    steps: int


def curvature(
    model: nn.Module,
    loss: Callable[[nn.Module], Tensor],
    generator: torch.Generator,
    *,
    samples: int = 16,
    steps: int = 50,
    tolerance: float = 1e-3,
) -> Curvature:
    """Estimate the trace and the largest eigenvalue of the Hessian of a loss by the model's parameters.

    Args:
        loss: the model's loss on some fixed data; called once.
        generator: draws the probes.
        samples: probes for the trace, >= 2.
        steps: most power iterations.
        tolerance: relative change of the eigenvalue at which iteration ends.
    Raises:
        DataError: the loss is not finite.
    Example:
        >>> net = nn.Linear(3, 1, bias=False)
        >>> scale = torch.tensor([1.0, 2.0, 3.0])
        >>> found = curvature(net, lambda m: (m.weight.square() * scale).sum(), torch.Generator().manual_seed(0))
        >>> round(found.trace, 4), round(found.largest, 2)
        (12.0, 6.0)
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    value = loss(model)
    if not bool(torch.isfinite(value)):
        raise DataError("The loss is not finite: it has no curvature.", remedy="Check the data and the weights.")
    slopes = torch.autograd.grad(value, parameters, create_graph=True, allow_unused=True)
    used = [(p, g) for p, g in zip(parameters, slopes, strict=True) if g is not None and g.requires_grad]

    def times(v: list[Tensor]) -> list[Tensor]:
        if not used:
            return v
        out = torch.autograd.grad([g for _, g in used], [p for p, _ in used], v, retain_graph=True, allow_unused=True)
        return [torch.zeros_like(x) if o is None else o for o, x in zip(out, v, strict=True)]

    traces = []
    for _ in range(samples):
        signs = [(torch.randint(0, 2, p.shape, generator=generator) * 2 - 1).to(p) for p, _ in used]
        traces.append(_dot(signs, times(signs)) if used else 0.0)
    spread = torch.tensor(traces, dtype=torch.float64)
    v = [torch.randn(p.shape, generator=generator).to(p) for p, _ in used]
    largest, done, size = 0.0, 0, _dot(v, v) ** 0.5
    while done < steps and size > 0:
        done += 1
        v = [x / size for x in v]
        w = times(v)
        before, largest = largest, _dot(v, w)
        v, size = w, _dot(w, w) ** 0.5
        if abs(largest - before) <= tolerance * abs(largest):
            break
    error = float(spread.std() / samples**0.5) if samples > 1 else float("nan")
    return Curvature(float(spread.mean()), error, largest, done)


def _dot(a: list[Tensor], b: list[Tensor]) -> float:
    return sum(float((x.double() * y.double()).sum()) for x, y in zip(a, b, strict=True))
