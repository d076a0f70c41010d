"""Correlations between the channels of two models on the same inputs.

Reference: Li et al. 2015, arXiv 1511.07543; Ainsworth et al. 2022, arXiv 2209.04836, section 3.1.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

import torch
from torch import Tensor, nn

from weightfold.errors import DataError
from weightfold.graph.group import Axis
from weightfold.graph.observe import rows_of as samples_of
from weightfold.graph.trace import Example
from weightfold.stats.running import call, evaluating
from weightfold.stats.taps import Look, tapped
from weightfold.weights.symmetry import Symmetries


@torch.no_grad()
def correlations(a: nn.Module, b: nn.Module, found: Symmetries, data: Iterable[Example]) -> dict[str, Tensor]:
    """Correlation of each channel of a with each of b on the same inputs, summed over readers, shape (C, C').

    The groups are those of the first model; the second's channels stand at the same places.

    Raises:
        DataError: there are no data.
    """
    sums: dict[tuple[str, str], list[Tensor]] = {}
    taps = [
        (group.name, axis)
        for group in found.graph
        if group.kind == "channels"
        for axis in group.role("read")
        if axis.tap is not None
    ]
    held: dict[tuple[str, str], Tensor] = {}

    def looks(seen: dict[tuple[str, str], Tensor]) -> dict[str, Look]:
        found: dict[str, list[tuple[str, Axis]]] = {}
        for name, axis in taps:
            assert axis.tap is not None
            found.setdefault(axis.tap[0], []).append((name, axis))

        def look(x: Tensor, axes: list[tuple[str, Axis]]) -> None:
            for name, axis in axes:
                assert axis.tap is not None
                seen[name, axis.tensor] = samples_of(x.detach(), axis.tap[1], axis.index, 4096).double()

        return {path: partial(look, axes=axes) for path, axes in found.items()}

    others: dict[tuple[str, str], Tensor] = {}
    with evaluating(a), evaluating(b), tapped(a, looks(held)), tapped(b, looks(others)):
        for batch in data:
            call(a, batch)
            call(b, batch)
            for key, x in held.items():
                y = others[key]
                now = [x.T @ y, x.sum(0), y.sum(0), x.square().sum(0), y.square().sum(0), torch.tensor(float(len(x)))]
                sums[key] = [p + q for p, q in zip(sums[key], now, strict=True)] if key in sums else now
    if not sums:
        raise DataError("Activation matching needs data.", remedy="Pass some inputs, or match weights.")
    out: dict[str, Tensor] = {}
    for (name, _), (xy, x, y, xx, yy, n) in sums.items():
        covariance = xy / n - torch.outer(x / n, y / n)
        spread = torch.outer((xx / n - (x / n) ** 2).clamp_min(0).sqrt(), (yy / n - (y / n) ** 2).clamp_min(0).sqrt())
        found_now = torch.where(spread > 1e-12, covariance / spread.clamp_min(1e-12), 0.0)
        out[name] = out[name] + found_now if name in out else found_now
    return out
