"""Which layers are alike, and hidden channels put into the same order."""

from __future__ import annotations

import fnmatch
import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from scipy.optimize import linear_sum_assignment
from torch import nn

from weightfold.config import nearest
from weightfold.errors import ConfigError, DataError
from weightfold.graph.apply import Undo, apply
from weightfold.graph.edit import permute
from weightfold.graph.group import ChannelGraph, ChannelGroup
from weightfold.graph.observe import gather
from weightfold.sharing.ties import Optimizers

_LAYERS = nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d


@dataclass(frozen=True)
class Pair:
    """Two layers that could be one: names of their weights, and how alike these are."""

    kept: str
    copy: str
    tensors: tuple[tuple[str, str], ...]
    similarity: float

    def turned(self) -> Pair:
        """The same pair, the other layer being kept."""
        return Pair(self.copy, self.kept, tuple((b, a) for a, b in self.tensors), self.similarity)


def pairs(model: nn.Module, layers: str | None = None) -> list[Pair]:
    """Pairs of modules of one kind with weights of the same shapes, the most alike first.

    Raises:
        ConfigError: the pattern matches no module; names the nearest.
        DataError: weights are not finite; names the tensor.
    Example:
        >>> net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3))
        >>> net[1].load_state_dict(net[0].state_dict())
        <All keys matched successfully>
        >>> [(p.kept, p.copy, round(p.similarity, 3)) for p in pairs(net)]
        [('0', '1', 1.0)]
    """
    units = _units(model, layers)
    found = [
        _pair(a, weights_a, b, weights_b)
        for (a, weights_a), (b, weights_b) in itertools.combinations(units.items(), 2)
        if _alike(model, a, weights_a, b, weights_b)
    ]
    return sorted(found, key=lambda pair: -round(pair.similarity, 12))


def _units(model: nn.Module, layers: str | None) -> dict[str, dict[str, nn.Parameter]]:
    """Weights that may be tied, by module path and name within the module."""
    named = {path: module for path, module in model.named_modules() if path}
    chosen = {p: m for p, m in named.items() if (isinstance(m, _LAYERS) if layers is None else _fits(p, layers))}
    if layers is not None and not chosen:
        raise ConfigError(f"No module matches '{layers}'.", remedy=nearest(layers, named))
    out = {path: dict(_weights(module)) for path, module in chosen.items()}
    for path, weights in out.items():
        for name, weight in weights.items():
            if not bool(torch.isfinite(weight).all()):
                raise DataError(f"'{path}.{name}' holds values that are not finite.")
    return {path: weights for path, weights in out.items() if weights}


def _fits(path: str, pattern: str) -> bool:
    return fnmatch.fnmatchcase(path, pattern)


def _weights(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    for path, inner in module.named_modules():
        for leaf, parameter in inner._parameters.items():
            norm = "norm" in type(inner).__name__.lower()
            if parameter is not None and parameter.ndim > 1 and parameter.is_floating_point() and not norm:
                yield f"{path}.{leaf}".lstrip("."), parameter


def _alike(
    model: nn.Module, a: str, weights_a: Mapping[str, nn.Parameter], b: str, weights_b: Mapping[str, nn.Parameter]
) -> bool:
    same_kind = type(model.get_submodule(a)) is type(model.get_submodule(b))
    nested = a.startswith(f"{b}.") or b.startswith(f"{a}.")
    if not same_kind or nested or weights_a.keys() != weights_b.keys():
        return False
    both = [(weights_a[name], weights_b[name]) for name in weights_a]
    return all(
        p is not q and p.shape == q.shape and p.dtype == q.dtype and p.requires_grad == q.requires_grad for p, q in both
    )


def _pair(a: str, weights_a: Mapping[str, nn.Parameter], b: str, weights_b: Mapping[str, nn.Parameter]) -> Pair:
    u, v = (torch.cat([w.detach().double().flatten() for w in weights.values()]) for weights in (weights_a, weights_b))
    cosine = float(u @ v / (u.norm() * v.norm()).clamp_min(1e-300))
    return Pair(a, b, tuple((f"{a}.{name}", f"{b}.{name}") for name in weights_a), cosine)


def inner_groups(graph: ChannelGraph, a: str, b: str) -> list[tuple[ChannelGroup, ChannelGroup]]:
    """Groups of hidden channels that lie wholly within two modules and correspond to each other."""
    found = []
    for group in graph:
        names = {axis.key for axis in group.axes}
        if group.block is not None or not group.free or not all(t.startswith(f"{b}.") for t, _ in names):
            continue
        wanted = {(f"{a}.{tensor.removeprefix(f'{b}.')}", dim) for tensor, dim in names}
        twin = next((g for g in graph if {axis.key for axis in g.axes} == wanted), None)
        if twin is not None and twin.n_channels == group.n_channels:
            found.append((twin, group))
    return found


def align_(
    model: nn.Module, graph: ChannelGraph, a: str, b: str, optimizers: Optimizers = ()
) -> tuple[ChannelGraph, list[Undo]]:
    """Put hidden channels of one module into the order of another's, most alike to most alike; exact.

    Returns:
        The graph, and what takes it back, latest last.
    """
    undos = []
    for twin, group in inner_groups(graph, a, b):
        gain = gather(model, twin, ("write", "read")) @ gather(model, group, ("write", "read")).T
        order = torch.from_numpy(linear_sum_assignment(gain.cpu().numpy(), maximize=True)[1])
        graph, undo = apply(model, graph, permute(graph[group.name], order), optimizers)
        undos.append(undo)
    return graph, undos
