"""Codebooks: few values in place of many, as pure functions.

On a line, k-means is solved exactly. Sorted values fall into clusters that are intervals, so with D[m, j] the least
cost of the first j values in m clusters,

    D[m, j] = min over i <= j of D[m - 1, i] + cost(i, j),   cost(i, j) = Σ w x² - (Σ w x)² / Σ w  over i <= n < j.

The best i grows with j, so a row of D is filled by halving. Nothing is drawn at random, and no start matters.
Cost: O(k N log N) time, O(k N) memory for N distinct values; above `MAX_EXACT` of them, exact on as many bins and then
Lloyd's steps on the values.

In more dimensions: k-means++ from a generator and Lloyd's steps. Differentiable: attention over the centroids.

Reference: Wang and Song, R Journal 2011 (exact in one dimension); Grønlund et al. 2017, arXiv 1701.07204 (halving);
Arthur and Vassilvitskii 2007 (k-means++); Cho et al., ICLR 2022, arXiv 2108.12659 (attention), differs in: squared
distances, and a temperature in units of the centroids' spacing.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from weightfold.errors import ConfigError, DataError

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

MAX_EXACT = 8192
"""Distinct values up to which k-means on a line is exact."""
LLOYD_STEPS = 100
"""Lloyd's steps at most."""


def kmeans(values_N: Tensor, k: int, weight_N: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Cluster numbers with the least (weighted) sum of squared distances.

    Args:
        values_N: any float dtype, shape (N,).
        k: number of centroids, 1 to N.
        weight_N: how much each value counts, >= 0; all alike by default.
    Returns:
        centroids_K: ascending, float64; fewer than k where there are fewer distinct values.
        labels_N: the centroid of each value, int64.
    Raises:
        ConfigError: k lies outside 1 to N, or shapes differ.
        DataError: values or weights are not finite, or weights are negative.
    Example:
        >>> kmeans(torch.tensor([0.0, 9.0, 1.0, 8.0]), 2)
        (tensor([0.5000, 8.5000], dtype=torch.float64), tensor([0, 1, 0, 1]))
    """
    _check(values_N.reshape(-1, 1), k, weight_N)
    x, weight = _numpy(values_N), _weights(values_N, weight_N)
    distinct, place = np.unique(x, return_inverse=True)
    mass = _total(place, weight, len(distinct))
    if len(distinct) <= k:
        centroids = distinct
    elif len(distinct) <= MAX_EXACT:
        centroids = _exact(distinct, mass, k)
    else:
        centroids = _lloyd_1d(distinct, mass, _exact(*_binned(distinct, mass, MAX_EXACT // 2), k))
    labels = nearest_1d(distinct, centroids)[place]
    return torch.from_numpy(centroids), torch.from_numpy(labels)


def _check(points_ND: Tensor, k: int, weight_N: Tensor | None) -> None:
    n = len(points_ND)
    if not 1 <= k <= n:
        raise ConfigError(f"The 'k' of k-means must be 1 to the number of values, {n}. Got {k} instead.")
    if not bool(torch.isfinite(points_ND).all()):
        raise DataError("The values to be clustered are not all finite.", remedy="Train without divergence first.")
    if weight_N is None:
        return
    if weight_N.numel() != n:
        raise ConfigError(f"There are {n} values to be clustered, and weights for {weight_N.numel()}.")
    if not bool(torch.isfinite(weight_N).all()) or bool((weight_N < 0).any()):
        raise DataError("The weights of the values to be clustered must be finite and not negative.")


def _numpy(values: Tensor) -> Floats:
    return values.detach().cpu().double().numpy()


def _weights(values_N: Tensor, weight_N: Tensor | None) -> Floats:
    """Weights with the mean 1, a little above 0 so that every value has a place."""
    if weight_N is None:
        return np.ones(len(values_N))
    weight = _numpy(weight_N.flatten())
    mean = weight.mean()
    return np.ones(len(weight)) if mean == 0 else weight / mean + 1e-6


def _binned(x: Floats, mass: Floats, n_bins: int) -> tuple[Floats, Floats]:
    """Means and masses of equally wide bins; bins that hold nothing are left out."""
    share = (x - x[0]) / (x[-1] - x[0])
    at = np.minimum((share * n_bins).astype(np.int64), n_bins - 1)
    full, at = np.unique(at, return_inverse=True)
    total = _total(at, mass, len(full))
    return _total(at, mass * x, len(full)) / total, total


def _total(labels: npt.NDArray[np.integer], mass: Floats, n: int) -> Floats:
    """Sum of the masses under each label, shape (n,)."""
    return np.bincount(labels, mass, n).astype(np.float64)


def _exact(x: Floats, mass: Floats, k: int) -> Floats:
    """Centroids of least cost for ascending distinct values."""
    if len(x) <= k:
        return x
    middle = float(np.average(x, weights=mass))
    sums = _Sums(x - middle, mass)
    n = len(x)
    best = sums.cost(np.zeros(n, np.int64), np.arange(1, n + 1))
    best = np.concatenate([[0.0], best])
    starts = []
    for m in range(2, k + 1):
        best, start = _row(sums, best, m)
        starts.append(start)
    edges = [n]
    for start in reversed(starts):
        edges.append(int(start[edges[-1]]))
    bounds = np.array([0, *edges[::-1]])
    return sums.mean(bounds[:-1], bounds[1:]) + middle


class _Sums:
    """Cost and mean of any interval of sorted values, from running sums."""

    def __init__(self, x: Floats, mass: Floats) -> None:
        zero, wide = np.zeros(1), np.longdouble
        self.mass = np.concatenate([zero, np.cumsum(mass.astype(wide))])
        self.first = np.concatenate([zero, np.cumsum((mass * x).astype(wide))])
        self.second = np.concatenate([zero, np.cumsum((mass * x * x).astype(wide))])

    def cost(self, start: Ints, end: Ints) -> Floats:
        first = self.first[end] - self.first[start]
        mass = self.mass[end] - self.mass[start]
        cost = self.second[end] - self.second[start] - first * first / np.where(mass > 0, mass, 1)
        return np.maximum(cost, 0).astype(np.float64)

    def mean(self, start: Ints, end: Ints) -> Floats:
        return ((self.first[end] - self.first[start]) / (self.mass[end] - self.mass[start])).astype(np.float64)


def _row(sums: _Sums, before: Floats, m: int) -> tuple[Floats, Ints]:
    """Best costs of m clusters for each number of values, and where their last cluster starts.

    Halving, a whole level at a time: the columns between two that are known have their best start between theirs.
    """
    n = len(before) - 1
    best, start = np.full(n + 1, np.inf), np.zeros(n + 1, np.int64)
    known = np.array([m - 1, n + 1])
    low, high = np.array([m - 1]), np.array([n - 1])
    while len(known) < n + 3 - m:
        middle = (known[:-1] + known[1:]) // 2
        open_ = middle > known[:-1]
        middle, low, high = middle[open_], low[open_], np.minimum(high[open_], middle[open_] - 1)
        best[middle], start[middle] = _scan(sums, before, middle, low, high)
        known = np.union1d(known, middle)
        inner = known[1:-1]
        low, high = np.concatenate([[m - 1], start[inner]]), np.concatenate([start[inner], [n - 1]])
    return best, start


def _scan(sums: _Sums, before: Floats, end: Ints, low: Ints, high: Ints) -> tuple[Floats, Ints]:
    """For each end the best start within its bounds; the first of equal ones."""
    counts = high - low + 1
    offset = np.cumsum(counts) - counts
    start = np.arange(int(counts.sum())) - np.repeat(offset - low, counts)
    cost = before[start] + sums.cost(start, np.repeat(end, counts))
    least = np.minimum.reduceat(cost, offset)
    hit = np.flatnonzero(cost == np.repeat(least, counts))
    first = hit[np.searchsorted(hit, offset)]
    return least, start[first]


def _lloyd_1d(x: Floats, mass: Floats, centroids: Floats) -> Floats:
    """Lloyd's steps on ascending values until no label changes."""
    cuts = np.empty(0)
    for _ in range(LLOYD_STEPS):
        new = np.searchsorted(x, (centroids[1:] + centroids[:-1]) / 2)
        if np.array_equal(new, cuts):
            break
        cuts = new
        labels = np.searchsorted(cuts, np.arange(len(x)), side="right")
        total = _total(labels, mass, len(centroids))
        sums = _total(labels, mass * x, len(centroids))
        centroids = np.where(total > 0, sums / np.where(total > 0, total, 1), centroids)
    return centroids


def nearest_1d(x: Floats, centroids: Floats) -> Ints:
    """The nearest of ascending centroids, the lower of two equally near ones.

    Example:
        >>> nearest_1d(np.array([0.1, 0.5, 0.9]), np.array([0.0, 1.0]))
        array([0, 0, 1])
    """
    return np.searchsorted((centroids[1:] + centroids[:-1]) / 2, x).astype(np.int64)


# more than one dimension ----------------------------------------------------------------------------------------------


def kmeans_vectors(
    points_ND: Tensor, k: int, generator: torch.Generator, weight_N: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Cluster vectors: k-means++ and Lloyd's steps, near the least cost but not sure to reach it.

    Args:
        points_ND: shape (N, D).
        k: number of centroids, 1 to N.
        generator: draws the first centroids.
        weight_N: how much each vector counts, >= 0.
    Returns:
        centroids_KD: float64; labels_N: int64.
    Raises:
        ConfigError, DataError: as `kmeans`.
    Example:
        >>> points = torch.tensor([[0.0, 0.0], [5.0, 5.0], [0.0, 1.0]])
        >>> centroids, labels = kmeans_vectors(points, 2, torch.Generator().manual_seed(0))
        >>> bool(labels[0] == labels[2]), bool(labels[0] != labels[1])
        (True, True)
    """
    _check(points_ND, k, weight_N)
    points = points_ND.detach().cpu().double()
    weight = torch.from_numpy(_weights(points, weight_N))
    centroids = _seeded(points, k, generator, weight)
    labels = torch.full((len(points),), -1)
    for _ in range(LLOYD_STEPS):
        new = nearest(points, centroids)
        if torch.equal(new, labels):
            break
        labels = new
        total = torch.zeros(len(centroids), dtype=torch.float64).index_add_(0, labels, weight)
        sums = torch.zeros_like(centroids).index_add_(0, labels, points * weight[:, None])
        centroids = torch.where(total[:, None] > 0, sums / total.clamp_min(1e-300)[:, None], centroids)
    return centroids, labels


def _seeded(points_ND: Tensor, k: int, generator: torch.Generator, weight_N: Tensor) -> Tensor:
    """First centroids, each drawn in proportion to the squared distance from those before it."""
    chosen = [int(torch.multinomial(weight_N, 1, generator=generator))]
    distance = (points_ND - points_ND[chosen[0]]).square().sum(1)
    while len(chosen) < k and float(distance.max()) > 0:
        chosen.append(int(torch.multinomial(distance * weight_N, 1, generator=generator)))
        distance = torch.minimum(distance, (points_ND - points_ND[chosen[-1]]).square().sum(1))
    return points_ND[chosen].clone()


def nearest(points_ND: Tensor, centroids_KD: Tensor) -> Tensor:
    """The nearest centroid of each point, shape (N,); the first of equally near ones.

    Example:
        >>> nearest(torch.tensor([[0.2], [0.9]]), torch.tensor([[0.0], [1.0]]))
        tensor([0, 1])
    """
    if centroids_KD.shape[1] == 1:
        return _nearest_line(points_ND[:, 0], centroids_KD[:, 0])
    return distances(points_ND, centroids_KD).argmin(1)


def _nearest_line(values_N: Tensor, centroids_K: Tensor) -> Tensor:
    """By a search among the ascending centroids: O(N log K)."""
    ascending, order = centroids_K.sort(stable=True)
    return order[torch.bucketize(values_N, (ascending[1:] + ascending[:-1]) / 2)]


def distances(points_ND: Tensor, centroids_KD: Tensor) -> Tensor:
    """Squared distances, shape (N, K), by differences: no cancellation between near ones."""
    return sum(
        ((points_ND[:, d, None] - centroids_KD[None, :, d]).square() for d in range(points_ND.shape[1])),
        torch.zeros((), dtype=points_ND.dtype, device=points_ND.device),
    )


# differentiable -------------------------------------------------------------------------------------------------------


def spacing(centroids_KD: Tensor) -> Tensor:
    """Mean squared distance of each centroid from its nearest neighbour: the unit of the temperature, a number.

    Example:
        >>> spacing(torch.tensor([[0.0], [2.0], [4.0]]))
        tensor(4.)
    """
    if len(centroids_KD) < 2:
        return centroids_KD.new_ones(())
    if centroids_KD.shape[1] == 1:
        gap = centroids_KD[:, 0].sort().values.diff()
        return gap.square().mean().clamp_min(torch.finfo(gap.dtype).tiny)
    far = distances(centroids_KD, centroids_KD).fill_diagonal_(torch.inf)
    return far.amin(1).mean().clamp_min(torch.finfo(far.dtype).tiny)


def attend(points_ND: Tensor, centroids_KD: Tensor, temperature: float) -> Tensor:
    """Share of each centroid in each point: softmax of the negative squared distances, shape (N, K).

    Args:
        temperature: in units of the centroids' `spacing`, > 0; near 0 only the nearest centroid has a share.
    Example:
        >>> attend(torch.tensor([[0.0], [1.0]]), torch.tensor([[0.0], [2.0]]), 0.5)[1]
        tensor([0.5000, 0.5000])
    """
    return _share(points_ND, centroids_KD, temperature * spacing(centroids_KD))


def _share(points_ND: Tensor, centroids_KD: Tensor, width: Tensor) -> Tensor:
    return torch.softmax(-distances(points_ND, centroids_KD) / width, dim=1)


def dkm(
    points_ND: Tensor, centroids_KD: Tensor, temperature: float, iterations: int = 1, weight_N: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Differentiable k-means: every point becomes a mixture of centroids, which are means of the points.

        A = attend(W, C),   C <- Aᵀ W / Aᵀ 1  (``iterations`` times),   out = A C

    The gradient flows through all of it into the points. Cost: O(N K D) time and memory an iteration.

    Args:
        points_ND: the weights.
        centroids_KD: where to start; taken as constants.
        temperature: see `attend`.
        iterations: >= 1.
        weight_N: how much each point counts for the centroids.
    Returns:
        mixed_ND: what stands in for the points; centroids_KD: the new ones.
    Example:
        >>> w = torch.tensor([[0.0], [0.2], [1.0]], requires_grad=True)
        >>> mixed, centroids = dkm(w, torch.tensor([[0.0], [1.0]]), temperature=0.01)
        >>> centroids.flatten().detach().round(decimals=3), bool(mixed.sum().backward() is None and w.grad.any())
        (tensor([0.1000, 1.0000]), True)
    """
    centroids = centroids_KD.detach()
    width = temperature * spacing(centroids)
    share = _share(points_ND, centroids, width)
    for step in range(iterations):
        if step:
            share = _share(points_ND, centroids, width)
        mass = share if weight_N is None else share * weight_N[:, None]
        total = mass.sum(0)[:, None]
        alive = total > 1e-6
        centroids = torch.where(alive, mass.T @ points_ND / torch.where(alive, total, 1.0), centroids)
    return share @ centroids, centroids


class _Snap(torch.autograd.Function):
    """Centroids by label; the gradient goes straight to the points, and summed or averaged to the centroids."""

    @staticmethod
    def forward(ctx: Any, points_ND: Tensor, centroids_KD: Tensor, labels_N: Tensor, mean: bool) -> Tensor:
        ctx.save_for_backward(labels_N)
        ctx.size, ctx.mean = centroids_KD.shape, mean
        return centroids_KD[labels_N].to(points_ND.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        [grad_ND] = grads
        [labels_N] = ctx.saved_tensors
        grad_KD = torch.zeros(ctx.size, dtype=grad_ND.dtype, device=grad_ND.device).index_add_(0, labels_N, grad_ND)
        if ctx.mean:
            grad_KD /= torch.bincount(labels_N, minlength=ctx.size[0]).clamp_min(1)[:, None]
        return grad_ND, grad_KD, None, None


def snap(points_ND: Tensor, centroids_KD: Tensor, *, mean: bool = True) -> tuple[Tensor, Tensor]:
    """Put the nearest centroid in the place of each point, with a gradient to both (straight through to the points).

    Args:
        mean: whether a centroid's gradient is the mean of those of its points, so that a plain gradient step moves it
            as it moves their mean; else the sum, which is the true gradient.
    Returns:
        snapped_ND, labels_N.
    Example:
        >>> w = torch.tensor([[0.1], [0.2], [0.9]], requires_grad=True)
        >>> c = torch.tensor([[0.0], [1.0]], requires_grad=True)
        >>> out, labels = snap(w, c)
        >>> (out * torch.tensor([[1.0], [3.0], [5.0]])).sum().backward()
        >>> labels, w.grad.flatten(), c.grad.flatten()
        (tensor([0, 0, 1]), tensor([1., 3., 5.]), tensor([2., 5.]))
    """
    labels = nearest(points_ND.detach(), centroids_KD.detach())
    out: Any = _Snap.apply(points_ND, centroids_KD, labels, mean)
    return out, labels
