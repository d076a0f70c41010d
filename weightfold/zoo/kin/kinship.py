"""Who comes from whom in one family: what two possible parents of a model look like beside each other.

Training goes on in the direction that lowers the loss, so brothers and sisters move alike and can stand nearer to each
other than to their parent; and a small step followed by a large one hides in it. Plain distances then say little. Four
things help, and are put together by weights that were fitted on zoos of known parents (`fitted`):

- distances that count every place alike, however far it moved (mean logarithms), since what a step left alone tells
  most; also after rows and columns were brought to one size;
- the same without the direction in which all of the family moves, row by row, found from the likeliest parents;
- the same in the singular basis of the family's differences, weighted against what moves most;
- growth: balanced weights grow with training, so it is their norms that tell earlier from later.

Features compare a possible parent a with another b, a the one of smaller norm: logarithms of ratios, the angles of the
triangle, growth for the way gone. Weights are those of balanced, aligned models (`families`).

References: Horwitz et al. 2024, arXiv 2405.18432 (trees of models by distance and kurtosis); differs in all features.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

MOST_SIDE, MOST_MATRICES = 192, 48
"""Rows and columns of a matrix, and matrices of a model, that are looked at: evenly chosen beyond that."""
N_NEAR = 12
"""Possible parents of each model."""
FLOOR = 1e-5
"""Differences below this share of a matrix's mean size are rounding."""
Matrix = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Kin:
    """A family's distances.

    Args:
        logs: by metric, logarithms of distances, shape (n, n); infinite where no pair was looked at.
        squares: by metric, squared distances, shape (n, n), of all pairs.
        size: squared norms of all weights, of the first matrix and of the last, each over its own mean, shape (3, n).
        near: possible parents of each model, nearest first.
    """

    logs: dict[str, Matrix]
    squares: dict[str, Matrix]
    size: Matrix
    near: list[list[int]]


def matrices(tensors: dict[str, Tensor]) -> list[Tensor]:
    """The tensors of n aligned models, (n, ...) by name, as matrices (n, O, F) of mean size 1, biases beside weights.

    Example:
        >>> [tuple(m.shape) for m in matrices({"w": torch.randn(5, 4, 3), "b": torch.randn(5, 4)})]
        [(5, 4, 4)]
    """
    out: list[Tensor] = []
    for tensor in tensors.values():
        if tensor.ndim > 2:
            out.append(tensor.flatten(2))
        elif tensor.ndim == 2 and out and out[-1].shape[1] == tensor.shape[1]:
            out[-1] = torch.cat([out[-1], tensor[:, :, None]], 2)
        elif tensor.ndim == 2:
            out.append(tensor[:, None, :])
    out = [_thinned(out[i]).double() for i in _evenly(len(out), MOST_MATRICES)]
    return [m / m.square().mean().sqrt().clamp_min(1e-30) for m in out]


def _thinned(m: Tensor) -> Tensor:
    return m[:, _evenly(m.shape[1], MOST_SIDE)][:, :, _evenly(m.shape[2], MOST_SIDE)]


def _evenly(n: int, most: int) -> list[int]:
    return list(range(n)) if n <= most else [i * n // most for i in range(most)]


def kin(parts: list[Tensor]) -> Kin:
    """Measure a family of aligned models, matrices of shape (n, O, F)."""
    n = len(parts[0])
    sums = torch.stack([p.square().sum((1, 2)) for p in parts]).numpy()
    size = np.stack([sums.sum(0), sums[0], sums[-1]])
    raw = _squares(parts)
    order = np.argsort(raw + np.diag(np.full(n, np.inf)), 1)[:, : min(N_NEAR, n - 1)]
    pairs = sorted({(min(i, int(j)), max(i, int(j))) for i in range(n) for j in order[i]})
    near = [sorted({a + b - i for a, b in pairs if i in (a, b)}, key=lambda j: raw[i, j]) for i in range(n)]
    logs = _logs(parts, pairs, n, "")
    parents = _nearest_earlier(logs["even"], size[0], near)
    drift = parts
    for _ in range(2):
        drift = _without_drift(parts, parents, 1)
        parents = _nearest_earlier(_logs(drift, pairs, n, "")["even"], size[0], near)
    calm = [_calm(part, pairs) for part in parts]
    logs |= _logs(drift, pairs, n, "drift ") | _logs([c[0] for c in calm], pairs, n, "calm ")
    logs |= _logs(_without_drift(parts, parents, 3), pairs, n, "drifts ")
    squares = {
        "raw": raw,
        "drift": _squares(drift),
        "calm": _squares([c[0] for c in calm]),
        "white": _squares([c[1] for c in calm]),
        "first": _squares(parts[:1]),
        "last": _squares(parts[-1:]),
    }
    return Kin(logs, squares, size, near)


def _squares(parts: list[Tensor]) -> Matrix:
    total = torch.zeros(len(parts[0]), len(parts[0]), dtype=torch.float64)
    for part in parts:
        flat = (part - part.mean(0)).flatten(1)
        own = flat.square().sum(1)
        total += (own[:, None] + own - 2 * flat @ flat.T).clamp_min(0.0)
    return total.fill_diagonal_(0.0).numpy()


def _logs(parts: list[Tensor], pairs: list[tuple[int, int]], n: int, name: str) -> dict[str, Matrix]:
    """Mean logarithms of squared differences: of every place, and after rows and columns were evened out."""
    one, two = torch.tensor([p[0] for p in pairs]), torch.tensor([p[1] for p in pairs])
    count = sum(p[0].numel() for p in parts)
    each, even = torch.zeros(len(pairs), dtype=torch.float64), torch.zeros(len(pairs), dtype=torch.float64)
    for part in parts:
        step = max(1, 2**21 // part[0].numel())
        for at in range(0, len(pairs), step):
            here = slice(at, at + step)
            square = (part[one[here]] - part[two[here]]).square() + FLOOR**2
            each[here] += square.log().sum((1, 2))
            rows = square.mean(2, keepdim=True)
            columns = (square / rows).mean(1, keepdim=True)
            even[here] += rows.log().sum((1, 2)) * square.shape[2] + columns.log().sum((1, 2)) * square.shape[1]
    out = {}
    for kind, values in (("each", each), ("even", even)):
        table = np.full((n, n), np.inf)
        table[one.numpy(), two.numpy()] = table[two.numpy(), one.numpy()] = (values / count).numpy()
        out[name + kind] = table
    return out


def _nearest_earlier(table: Matrix, size: Matrix, near: list[list[int]]) -> list[int | None]:
    out: list[int | None] = []
    for x, others in enumerate(near):
        earlier = [a for a in others if size[a] < size[x]]
        out.append(min(earlier, key=lambda a: table[a, x]) if earlier else None)
    return out


def _without_drift(parts: list[Tensor], parents: list[int | None], n_directions: int) -> list[Tensor]:
    """Take away, in each row, the direction that most steps of the family share; or the three that they share most."""
    child = [x for x, a in enumerate(parents) if a is not None]
    parent = [a for a in parents if a is not None]
    out = []
    for part in parts:
        steps = part[child] - part[parent]
        steps = steps / steps.flatten(1).norm(dim=1).clamp_min(1e-30)[:, None, None]
        if n_directions == 1:
            basis = steps.mean(0)[:, None]
            basis = basis / basis.norm(dim=2, keepdim=True).clamp_min(1e-30)
        else:
            basis = torch.linalg.svd(steps.transpose(0, 1), full_matrices=False).Vh[:, :n_directions]
        along = torch.einsum("nof,okf->nok", part, basis)
        out.append(part - torch.einsum("nok,okf->nof", along, basis))
    return out


def _calm(part: Tensor, pairs: list[tuple[int, int]]) -> tuple[Tensor, Tensor]:
    """A matrix without the quarter of input directions in which the family moves most; and weighted against both."""
    steps = part[[p[0] for p in pairs]] - part[[p[1] for p in pairs]]
    weight = 1 / steps.flatten(1).norm(dim=1).clamp_min(1e-30)
    steps = steps * weight[:, None, None]
    inward, v = torch.linalg.eigh(torch.einsum("pof,pog->fg", steps, steps))
    outward, u = torch.linalg.eigh(torch.einsum("pof,pqf->oq", steps, steps))
    turned = part @ v
    kept = turned[:, :, : max(1, turned.shape[2] - turned.shape[2] // 4)]
    scale = [(e.clamp_min(0.0) / e.max().clamp_min(1e-30) + 1e-6).sqrt() for e in (inward, outward)]
    return kept, (u.T @ turned) / scale[0] / scale[1][:, None]


# features -------------------------------------------------------------------------------------------------------------


def features(found: Kin, x: int, a: int, b: int) -> list[float]:
    """What tells whether a model x comes from a or from b, where a's weights are smaller than b's."""
    out = [_bounded(table[a, x] - table[b, x]) for table in found.logs.values()]
    for name in ("raw", "drift", "calm", "white", "first", "last"):
        square = found.squares[name]
        ab, ax, bx = (max(float(v), 1e-20) for v in (square[a, b], square[a, x], square[b, x]))
        out += [(ab + bx - ax) / 2 / math.sqrt(ab * bx), (ab + ax - bx) / 2 / math.sqrt(ab * ax)]
        out.append(_bounded(math.log(ax / bx)))
    square = found.squares["raw"]
    ab, ax, bx = (max(float(v), 1e-20) for v in (square[a, b], square[a, x], square[b, x]))
    out += [_bounded(math.log(ab / ax)), _bounded(math.log(ab / bx))]
    for row, name in enumerate(("raw", "first", "last")):
        size, square = found.size[row], found.squares[name]
        ab, ax, bx = (max(float(v), 1e-20) for v in (square[a, b], square[a, x], square[b, x]))
        ways = ((size[x] - size[a]) / ax, (size[x] - size[b]) / bx, (size[b] - size[a]) / ab)
        rates = [math.asinh(float(way)) for way in ways]
        out += [*rates, rates[1] - rates[2], rates[0] - rates[2]]
    return out


def root_features(found: Kin) -> Matrix:
    """What tells the root of a family: small weights, in the middle; shape (n, 4), over the spread in the family."""
    rows = [found.size[0], found.size[1], found.size[2], np.sqrt(found.squares["raw"]).mean(1)]
    table = np.stack([(row - row.min()) / max(float(row.std()), 1e-12) for row in rows], 1)
    return table.clip(0.0, 6.0)


def _bounded(value: float) -> float:
    return max(-8.0, min(8.0, value))
