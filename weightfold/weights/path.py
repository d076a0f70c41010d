"""The straight path between two models: loss and accuracy along it, its barrier, and repair of what lies on it.

**Barrier** = max over t of L((1 - t) A + t B) - [(1 - t) L(A) + t L(B)]: 0 for models that are linearly connected.

**Repair.** Averaged units vary less than their parents (variance collapse). Where there are batch norms, their
statistics are estimated anew on data. Elsewhere each layer's outputs are rescaled and shifted, layer by layer, so that
mean and standard deviation of every channel are what its parents have on average; scale and shift go into the layer's
own weight and bias.

Reference: Frankle et al. 2020, arXiv 1912.05671 (barrier); Jordan et al. 2022, arXiv 2211.08403 (REPAIR).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from weightfold.errors import DataError
from weightfold.graph.copies import independent_copy
from weightfold.graph.trace import Example
from weightfold.stats.norms import recalibrate_ as reset_norms_
from weightfold.stats.running import call, evaluating
from weightfold.weights.compare import PAIR, alike, weights_of

Measure = Callable[[nn.Module], float]
"""A model's loss, or its accuracy."""
LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def between(a: nn.Module, b: nn.Module, t: float = 0.5) -> nn.Module:
    """The model at (1 - t) a + t b.

    Raises:
        GraphError: the architectures differ; says where.
    Example:
        >>> a, b = nn.Linear(1, 1), nn.Linear(1, 1)
        >>> torch.equal(between(a, b).weight, torch.lerp(a.weight, b.weight, 0.5))
        True
    """
    a, b = alike([a, b], PAIR)
    one, two = weights_of(a), weights_of(b)
    middle = independent_copy(a)
    middle.load_state_dict({name: torch.lerp(one[name], two[name].to(one[name]), t) for name in one}, strict=False)
    return middle


@dataclass(frozen=True)
class Path:
    """What was measured along the straight path.

    Args:
        at: places t between 0 and 1.
        values: the measure at each.
    """

    at: tuple[float, ...]
    values: tuple[float, ...]

    @property
    def barrier(self) -> float:
        """Largest excess over the straight line between the ends (of a loss)."""
        first, last = self.values[0], self.values[-1]
        return max(v - ((1 - t) * first + t * last) for t, v in zip(self.at, self.values, strict=True))

    def svg(self, title: str = "loss along the straight path") -> str:
        """A self-contained plot."""
        return plot({title: self})


def path(
    a: nn.Module,
    b: nn.Module,
    measure: Measure,
    *,
    points: int = 11,
    repaired: Callable[[nn.Module], nn.Module] | None = None,
) -> Path:
    """Measure models along the straight path from a to b.

    Args:
        measure: loss (or accuracy) of a model.
        points: number of places, the ends included, >= 2.
        repaired: what to do to each model between the ends before it is measured.
    Example:
        >>> a, b = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)
        >>> with torch.no_grad():
        ...     _ = a.weight.fill_(-1), b.weight.fill_(1)
        >>> path(a, b, lambda m: 1 - m.weight.item() ** 2, points=3).barrier
        1.0
    """
    at = [i / (points - 1) for i in range(points)]
    values = []
    for t in at:
        model = between(a, b, t)
        inside = 0 < t < 1 and repaired is not None
        values.append(float(measure(repaired(model) if inside and repaired else model)))
    return Path(tuple(at), tuple(values))


# repair ---------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def repair(
    merged: nn.Module, parents: Sequence[nn.Module], data: Iterable[Example], *, shares: Sequence[float] | None = None
) -> nn.Module:
    """Give the channels of a merged model the mean and spread that its parents' have on average.

    Args:
        parents: models in one basis (aligned), whose average `merged` is.
        data: inputs without labels; a few hundred samples are enough. Read several times.
        shares: of the parents in the average; equal by default.
    Returns:
        A repaired copy.
    Raises:
        DataError: there are no data.
    """
    batches = list(data)
    if not batches:
        raise DataError("REPAIR needs a few inputs.", remedy="Pass some; labels are not needed.")
    out = independent_copy(merged)
    norms = [m for m in out.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
    if norms:
        reset_norms_(out, batches)
        return out
    share = [1 / len(parents)] * len(parents) if shares is None else list(shares)
    names = [name for name, m in out.named_modules() if isinstance(m, LAYERS)]
    goals = [_moments(p, names, batches) for p in parents]
    for name in names[:-1]:
        mean = sum((s * g[name][0] for s, g in zip(share, goals, strict=True)), torch.zeros(()))
        spread = sum((s * g[name][1] for s, g in zip(share, goals, strict=True)), torch.zeros(()))
        now_mean, now_spread = _moments(out, [name], batches)[name]
        _rescale_(out.get_submodule(name), mean, spread, now_mean, now_spread)
    return out


def _moments(model: nn.Module, names: Sequence[str], batches: Sequence[Example]) -> dict[str, tuple[Tensor, Tensor]]:
    """Mean and standard deviation of every output channel of some layers, shapes (O,), float64."""
    sums: dict[str, list[Tensor]] = {}

    def hook_of(name: str) -> Any:
        def hook(module: nn.Module, _: Any, y: Tensor) -> None:
            flat = y.movedim(1, -1) if isinstance(module, nn.modules.conv._ConvNd) else y
            flat = flat.reshape(-1, flat.shape[-1]).double()
            now = [flat.sum(0), flat.square().sum(0), torch.tensor(float(len(flat)))]
            sums[name] = [p + q for p, q in zip(sums[name], now, strict=True)] if name in sums else now

        return hook

    with evaluating(model), ExitStack() as stack:
        for name in names:
            stack.callback(model.get_submodule(name).register_forward_hook(hook_of(name)).remove)
        for batch in batches:
            call(model, batch)
    found = {}
    for name in names:
        if name not in sums:
            zero = torch.zeros(model.get_submodule(name).weight.shape[0], dtype=torch.float64)  # type: ignore[union-attr]
            found[name] = (zero, zero)
            continue
        total, squares, n = sums[name]
        mean = total / n
        found[name] = (mean, (squares / n - mean.square()).clamp_min(0).sqrt())
    return found


def _rescale_(layer: nn.Module, mean: Tensor, spread: Tensor, now_mean: Tensor, now_spread: Tensor) -> None:
    """Change a layer so that its outputs have the wanted moments; channels that do not vary are left alone."""
    weight, bias = layer.weight, layer.bias
    assert isinstance(weight, Tensor)
    factor = torch.where(now_spread > 1e-9, spread / now_spread.clamp_min(1e-9), 1.0)
    if bias is None:
        weight.mul_(factor.to(weight).reshape(-1, *[1] * (weight.ndim - 1)))
        return
    assert isinstance(bias, Tensor)
    weight.mul_(factor.to(weight).reshape(-1, *[1] * (weight.ndim - 1)))
    bias.copy_((factor * (bias.double() - now_mean) + mean).to(bias))


# plot -----------------------------------------------------------------------------------------------------------------

COLOURS = ("#4269d0", "#efb118", "#ff725c", "#6cc5b0", "#3ca951", "#9c6b4e")
WIDTH, HEIGHT, EDGE = 640, 360, 56


def plot(paths: dict[str, Path], *, unit: str = "loss") -> str:
    """Draw measured paths into one self-contained SVG.

    Args:
        paths: by the name that the legend shows.
        unit: what was measured.
    Example:
        >>> plot({"naive": Path((0.0, 0.5, 1.0), (0.1, 0.9, 0.1))}).startswith("<svg")
        True
    """
    finite = [v for p in paths.values() for v in p.values if v == v and abs(v) != float("inf")]
    low, high = min(finite, default=0.0), max(finite, default=1.0)
    span = (high - low) or 1.0
    low, high = low - 0.05 * span, high + 0.05 * span

    def place(t: float, v: float) -> str:
        x = EDGE + t * (WIDTH - EDGE - 16)
        y = HEIGHT - EDGE - (v - low) / (high - low) * (HEIGHT - EDGE - 16)
        return f"{x:.1f},{y:.1f}"

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'font-family="system-ui, sans-serif" font-size="12"><title>{_escaped(unit)} along the straight path</title>',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#fff"/>',
    ]
    for i in range(5):
        value = low + (high - low) * i / 4
        x, y = place(0, value).split(",")
        end = place(1, value)
        parts.append(f'<polyline points="{x},{y} {end}" stroke="#ddd" fill="none"/>')
        parts.append(f'<text x="{EDGE - 6}" y="{y}" text-anchor="end" fill="#555">{value:.3g}</text>')
    for t in (0.0, 0.25, 0.5, 0.75, 1.0):
        x, _ = place(t, low).split(",")
        parts.append(f'<text x="{x}" y="{HEIGHT - EDGE + 18}" text-anchor="middle" fill="#555">{t:g}</text>')
    parts.append(f'<text x="{WIDTH / 2}" y="{HEIGHT - 8}" text-anchor="middle">share of the second model</text>')
    parts.append(f'<text x="14" y="{HEIGHT / 2}" transform="rotate(-90 14 {HEIGHT / 2})">{_escaped(unit)}</text>')
    for number, (name, line) in enumerate(paths.items()):
        colour = COLOURS[number % len(COLOURS)]
        known = [(t, v) for t, v in zip(line.at, line.values, strict=True) if v == v and abs(v) != float("inf")]
        points = " ".join(place(t, v) for t, v in known)
        parts.append(f'<polyline points="{points}" stroke="{colour}" stroke-width="2" fill="none"/>')
        x, y = EDGE + 12, 24 + 16 * number
        parts.append(f'<text x="{x}" y="{y}" fill="{colour}">{_escaped(name)}</text>')
    return "\n".join([*parts, "</svg>"])


def _escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
