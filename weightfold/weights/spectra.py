"""Spectra of weight matrices: power laws, ranks and entropy, small layers included.

For a layer's matrix W (O, I), a convolution flattened to (O, I k k), with singular values s and eigenvalues λ = s² of
WᵀW:

- **alpha**: exponent of the tail, p(λ) ~ λ^-α for λ >= λ_min, by maximum likelihood, α = 1 + n / Σ ln(λ_i / λ_min);
  λ_min is where the distance of Kolmogorov and Smirnov is least. The standard error (α - 1) / √n says what a fit to few
  eigenvalues is worth, so that small layers need not be skipped.
- **stable rank** ‖W‖_F² / ‖W‖², **entropy** of λ / Σλ over its maximum, **effective rank** exp(entropy).

A matrix far from square has a narrow spectrum for that reason alone (Marchenko and Pastur), which biases alpha. It is
cut into blocks of a fixed shape, whose eigenvalues are taken together.

References: Clauset et al. 2009, arXiv 0706.1062 (fit); Martin et al. 2021, arXiv 2002.06716 (alpha of layers); Hu et
al. 2025, arXiv 2506.06280 (blocks of a fixed aspect ratio); Roy & Vetterli 2007 (effective rank).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

LEAST_TAIL = 4
"""Fewest eigenvalues that a tail is fitted to."""


@dataclass(frozen=True)
class PowerLaw:
    """A fitted tail.

    Args:
        alpha: the exponent, > 1; nan where there are too few eigenvalues.
        error: its standard error.
        smallest: λ_min, where the tail begins.
        n_tail: eigenvalues in the tail.
        distance: of Kolmogorov and Smirnov, between tail and fit.
    """

    alpha: float
    error: float
    smallest: float
    n_tail: int
    distance: float


@dataclass(frozen=True)
class Spectrum:
    """What the spectrum of one layer says.

    Args:
        rows, columns: shape of the matrix.
        norm: ‖W‖_F.
        largest: largest singular value.
        stable_rank: ‖W‖_F² / ‖W‖², between 1 and the rank.
        effective_rank: exp of the entropy of the eigenvalues' shares.
        entropy: that entropy over its maximum, 0 to 1.
        tail: power law of all eigenvalues.
        tail_of_blocks: the same of square blocks, free of the aspect ratio's bias.
    """

    name: str
    rows: int
    columns: int
    norm: float
    largest: float
    stable_rank: float
    effective_rank: float
    entropy: float
    tail: PowerLaw
    tail_of_blocks: PowerLaw

    @property
    def alpha_hat(self) -> float:
        """alpha log10 λ_max."""
        return self.tail.alpha * float(np.log10(max(self.largest**2, 1e-300)))


def power_law(eigenvalues: np.ndarray) -> PowerLaw:
    """Fit p(λ) ~ λ^-α to the tail of some positive numbers.

    Example:
        >>> quantiles = (np.arange(2000) + 0.5) / 2000
        >>> fit = power_law((1 - quantiles) ** (-1 / 1.5))  # exponent 2.5
        >>> round(fit.alpha, 1), fit.n_tail > 1000
        (2.5, True)
    """
    values = np.sort(np.asarray(eigenvalues, np.float64))
    values = values[values > (values[-1] * 1e-12 if len(values) else 0)]
    n = len(values)
    if n < LEAST_TAIL:
        return PowerLaw(float("nan"), float("nan"), float("nan"), n, float("nan"))
    logs = np.log(values)
    above = np.cumsum(logs[::-1])[::-1]
    best: PowerLaw | None = None
    starts = np.unique(np.linspace(0, n - LEAST_TAIL, min(n - LEAST_TAIL + 1, 200)).astype(int))
    for i in starts:
        size = n - int(i)
        total = above[i] - size * logs[i]
        if total <= 0:
            continue
        alpha = 1 + size / total
        model = 1 - np.exp((1 - alpha) * (logs[i:] - logs[i]))
        steps = np.arange(size) / size
        distance = float(max(np.abs(model - steps).max(), np.abs(model - steps - 1 / size).max()))
        if best is None or distance < best.distance:
            best = PowerLaw(float(alpha), float((alpha - 1) / size**0.5), float(values[i]), size, distance)
    return best or PowerLaw(float("nan"), float("nan"), float("nan"), n, float("nan"))


def square_blocks(matrix: Tensor) -> list[Tensor]:
    """Cut a matrix into blocks as square as its shorter side allows, strided through the longer one.

    Example:
        >>> [tuple(b.shape) for b in square_blocks(torch.zeros(4, 12))]
        [(4, 4), (4, 4), (4, 4)]
    """
    if matrix.shape[0] > matrix.shape[1]:
        matrix = matrix.T
    n_blocks = max(1, matrix.shape[1] // matrix.shape[0])
    size = matrix.shape[1] // n_blocks
    return [matrix[:, k::n_blocks][:, :size] for k in range(n_blocks)]


def spectrum(name: str, weight: Tensor) -> Spectrum:
    """Describe the spectrum of one weight.

    Args:
        weight: shape (O, I) or (O, I, k, ...), any floating type.
    Example:
        >>> found = spectrum("w", torch.eye(8))
        >>> found.stable_rank, round(found.entropy, 6)
        (8.0, 1.0)
    """
    matrix = weight.detach().double().cpu().reshape(weight.shape[0], -1)
    singular = torch.linalg.svdvals(matrix)
    values = singular.square().numpy()
    total = float(values.sum())
    share = values[values > 0] / total if total > 0 else np.zeros(0)
    entropy = float(-(share * np.log(share)).sum()) if len(share) else 0.0
    most = np.log(len(values)) if len(values) > 1 else 1.0
    blocks = [torch.linalg.svdvals(b).square().numpy() / b.shape[1] for b in square_blocks(matrix)]
    return Spectrum(
        name,
        *matrix.shape,
        norm=total**0.5,
        largest=float(singular[0]),
        stable_rank=total / float(values[0]) if total > 0 else 0.0,
        effective_rank=float(np.exp(entropy)) if len(share) else 0.0,
        entropy=entropy / float(most),
        tail=power_law(values),
        tail_of_blocks=power_law(np.concatenate(blocks)),
    )


def spectra(model: nn.Module) -> list[Spectrum]:
    """Describe the spectra of all weights of a model that are matrices, in its order.

    Example:
        >>> [s.name for s in spectra(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)))]
        ['0.weight', '2.weight']
    """
    return [
        spectrum(name, p)
        for name, p in model.named_parameters()
        if p.ndim >= 2 and p.is_floating_point() and min(p.shape[0], p[0].numel()) > 1 and bool(p.isfinite().all())
    ]
