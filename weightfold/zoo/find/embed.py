"""One vector of 256 numbers a model: near for relatives, far for strangers, whatever the order and scale of channels.

Every tensor is described by numbers that no permutation changes: size, moments of the entries, quantiles of norms of
its rows and columns, quantiles of its singular values. Where the architecture is known they are taken of the balanced
weights (`weightfold.weights.point`), so scales, signs, batch norms and the axes of attention heads do not count either.
Otherwise they are taken of the tensors as they stand (`raw` says so): permutations still do not count, scales do.

Tensors are pooled by their place from the first to the last in four overlapping parts, matrices and vectors apart, so
that models of any depth compare; models of one architecture compare number by number. Distances are Euclidean.

References: Unterthiner et al. 2020, arXiv 2002.11448 (statistics of layers); differ in: gauge, rows, columns, spectra.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from weightfold.errors import GraphError
from weightfold.weights.canon import MOST_TOGETHER, NUMBERS_TOGETHER, hashes_at
from weightfold.weights.point import points
from weightfold.weights.symmetry import Symmetries

DIM = 256
PLACES = 4
"""Overlapping parts from the first tensor to the last."""
OF_MATRIX, OF_VECTOR = 48, 12
LARGEST_SPECTRUM = 1024
"""Matrices with more rows and columns than this are described without singular values: they would take seconds."""
QUANTILES = 12
RAW = -1.0
Vectors = npt.NDArray[np.float32]


def embedding(state: Mapping[str, Tensor], found: Symmetries | None = None) -> Vectors:
    """Embed one model.

    Args:
        state: tensors by name, any types.
        found: the architecture's symmetries; without them scales and signs of channels count.
    Returns:
        256 numbers, float32.
    Raises:
        GraphError: the tensors do not fit the symmetries.
    Example:
        >>> state = {"0.weight": torch.eye(3), "0.bias": torch.ones(3)}
        >>> turned = {"0.weight": torch.eye(3)[[1, 0, 2]], "0.bias": torch.ones(3)}
        >>> vector = embedding(state)
        >>> vector.shape, bool(np.allclose(vector, embedding(turned), atol=1e-5))
        ((256,), True)
    """
    if found is None:
        return _embedded({name: value[None] for name, value in _floats(state).items()}, frozenset(), raw=True)[0]
    return _embedded(points(found, [state]), _signed_freely(found))[0]


def described(
    found: Symmetries, states: Sequence[Mapping[str, Tensor]]
) -> tuple[list[str | None], list[str | None], Vectors]:
    """Hash and embed many models of one architecture at once.

    Returns:
        The semantic hash of each or None, why there is none or None, and the embeddings, shape (B, 256). A model that
        cannot be hashed (NaN, say) is embedded as it stands.
    Example:
        >>> from torch import nn
        >>> from weightfold.weights.symmetry import symmetries
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> hashes, reasons, vectors = described(symmetries(net, torch.zeros(1, 4)), [net.state_dict()] * 2)
        >>> hashes[0] == hashes[1], reasons, vectors.shape
        (True, [None, None], (2, 256))
    """
    size = max(1, sum(math.prod(shape) for shape in found.shapes.values()))
    step = max(1, min(MOST_TOGETHER, NUMBERS_TOGETHER // size))
    hashes: list[str | None] = []
    reasons: list[str | None] = []
    vectors: list[Vectors] = [np.zeros((0, DIM), np.float32)]
    for first in range(0, len(states), step):
        for part in _sound(found, states[first : first + step]):
            text, why, vector = part
            hashes += text
            reasons += why
            vectors.append(vector)
    return hashes, reasons, np.concatenate(vectors)


def _sound(
    found: Symmetries, states: Sequence[Mapping[str, Tensor]]
) -> list[tuple[Sequence[str | None], Sequence[str | None], Vectors]]:
    try:
        stack = points(found, states)
        return [(hashes_at(found, stack), [None] * len(states), _embedded(stack, _signed_freely(found)))]
    except GraphError as error:
        if len(states) > 1:
            return [part for state in states for part in _sound(found, [state])]
        return [([None], [error.message], embedding(states[0])[None])]


def is_raw(vector: Vectors) -> bool:
    """Whether an embedding was taken of tensors as they stand, without the architecture's symmetries.

    Example:
        >>> is_raw(embedding({"w": torch.eye(3)}))
        True
    """
    return float(vector[-1]) == RAW


def _floats(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Finite float32 tensors, each storage once, in the state's order; other types than numbers are left out."""
    out: dict[str, Tensor] = {}
    for name, value in state.items():
        if value.numel() and not value.is_complex() and not name.endswith("num_batches_tracked"):
            out[name] = value.detach().cpu().float().nan_to_num(0.0, 0.0, 0.0).clamp(-1e15, 1e15)
    return out


def _signed_freely(found: Symmetries) -> frozenset[str]:
    """Tensors in which some sign is free: there only sizes of entries count."""
    free = [f for f in found.freedoms if f.kind != "scale"]
    return frozenset(slot.tensor for f in free for slot in (*f.plus, *f.minus))


def _embedded(stack: Mapping[str, Tensor], unsigned: frozenset[str], *, raw: bool = False) -> Vectors:
    """Embed B models, tensors of shape (B, ...)."""
    n_models = len(next(iter(stack.values()))) if stack else 1
    pools = [torch.zeros(n_models, PLACES, n) for n in (OF_MATRIX, OF_VECTOR)]
    weights = [torch.zeros(PLACES, 1), torch.zeros(PLACES, 1)]
    matrices = [name for name, t in stack.items() if t.ndim > 2]
    total = torch.zeros(n_models)
    depth = -1
    for name, tensor in stack.items():
        if not tensor[0].numel():
            continue
        depth += tensor.ndim > 2
        kind = int(tensor.ndim <= 2)
        at = max(depth, 0) / max(1, len(matrices) - 1) * (PLACES - 1)
        hats = (1 - (torch.arange(PLACES) - at).abs()).clamp_min(0.0)[:, None]
        values = tensor.float().reshape(n_models, tensor.shape[1] if tensor.ndim > 1 else 1, -1)
        told = _of_vector(values, name in unsigned) if kind else _of_matrix(tensor.float(), name in unsigned)
        pools[kind] += hats * told[:, None]
        weights[kind] += hats
        total += values.square().sum((1, 2))
    parts = [(pool / w.clamp_min(1e-6)).flatten(1) for pool, w in zip(pools, weights, strict=True)]
    numbers = sum(math.prod(t.shape[1:]) for t in stack.values())
    whole = torch.zeros(n_models, DIM - sum(p.shape[1] for p in parts))
    whole[:, 0] = math.log1p(numbers) / 4
    whole[:, 1] = math.log1p(len(matrices))
    whole[:, 2] = (total.clamp_min(1e-30) / max(1, numbers)).log() / 8
    whole[:, -1] = RAW if raw else 0.0
    return torch.cat([*parts, whole], 1).numpy().astype(np.float32)


def _quantiles(values: Tensor, n: int = QUANTILES) -> Tensor:
    """Quantiles along the last dimension, from least to largest, shape (B, n)."""
    ordered = values.sort(-1).values
    at = torch.linspace(0, ordered.shape[-1] - 1, n)
    low = at.floor().long()
    high = (low + 1).clamp_max(ordered.shape[-1] - 1)
    part = at - low
    return ordered[:, low] * (1 - part) + ordered[:, high] * part


def _of_matrix(tensor: Tensor, unsigned: bool) -> Tensor:
    """48 numbers of a matrix or convolution: size, moments, norms of rows and columns, spectrum; shape (B, 48)."""
    rows = tensor.flatten(2)
    n, (o, f) = len(rows), rows.shape[1:]
    square = rows.square()
    size = (square.mean((1, 2)) + 1e-20).sqrt()
    moment = [
        rows.mean((1, 2)) / size * (0.0 if unsigned else 1.0),
        rows.abs().mean((1, 2)) / size,
        (square / size[:, None, None] ** 2).square().mean((1, 2)).clamp(1e-9, 1e9).log() / 4,
    ]
    head = [(size + 1e-10).log() / 4, torch.full((n,), math.log(o) / 4), torch.full((n,), math.log(f) / 4), *moment]
    by_row = (square.mean(2) / size[:, None] ** 2).sqrt()
    by_column = (tensor.square().transpose(1, 2).flatten(2).mean(2) / size[:, None] ** 2).sqrt()
    means = (rows.abs() if unsigned else rows).mean(2) / size[:, None]
    parts = [torch.stack(head, 1), _quantiles(by_row), _quantiles(by_column), _quantiles(means, 6)]
    return torch.cat([*parts, _spectrum(rows, size)], 1)


def _spectrum(rows: Tensor, size: Tensor) -> Tensor:
    """Quantiles of the singular values over the root of their mean square, shape (B, 12)."""
    if min(rows.shape[1:]) > LARGEST_SPECTRUM:
        return torch.zeros(len(rows), QUANTILES)
    short = rows if rows.shape[1] <= rows.shape[2] else rows.transpose(1, 2)
    gram = short @ short.transpose(1, 2) / (size.square() * short.shape[2])[:, None, None]
    return _quantiles(torch.linalg.eigvalsh(gram).clamp_min(0.0).sqrt())


def _of_vector(values: Tensor, unsigned: bool) -> Tensor:
    """12 numbers of a vector: size, length, quantiles; shape (B, 12)."""
    flat = values.flatten(1)
    size = (flat.square().mean(1) + 1e-20).sqrt()
    scaled = (flat.abs() if unsigned else flat) / size[:, None]
    length = torch.full((len(flat),), math.log(flat.shape[1]) / 4)
    return torch.cat([(size + 1e-10).log()[:, None] / 4, length[:, None], _quantiles(scaled, OF_VECTOR - 2)], 1)
