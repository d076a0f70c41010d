"""Palette: few values in place of many. The weights of a tensor, or of each group of its rows, come from a codebook.

    w_i = c[a_i],   c: k values (or short vectors), a_i: log2 k bits

At once on a trained network: exact k-means of each tensor (`palettize`). In training, by a reparametrisation that needs
no penalty, the values being learned with the network:

    dkm   w_i = Σ_j A_ij c_j with A the softmax of negative squared distances; gradients flow through A and c
    ste   w_i = c[nearest]; the gradient goes straight through to w_i, and to c as to its members' mean

Sharing values saves bytes in a file and in transit. It saves no time: a matrix product does the same multiplications
whatever the number of distinct values, and in training the clustering is added work. Norm scales and biases stay as
they are. Codebooks belong to tensors as they are: fold first, then attach.

Cost: one-shot O(k N log N) a tensor; a training step O(N k) time and memory (dkm), O(N log k) (ste).
Reference: Han et al., ICLR 2016, arXiv 1510.00149; Cho et al., ICLR 2022, arXiv 2108.12659 (dkm); differs in: exact
k-means at the start, temperature in units of the codebook's spacing.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.utils import parametrize

from weightfold.config import Config, nearest
from weightfold.errors import ConfigError, DataError
from weightfold.gate import Batch, Loss
from weightfold.quant.clustered import Clustered, Coding, Layout, assign, cluster, padded, write_clustered
from weightfold.quant.codebook import dkm, snap
from weightfold.size import unique_state
from weightfold.stats.running import call, evaluating
from weightfold.stats.taps import tapped

_RECURRENT = nn.RNNBase
_DTYPES = {"float16": torch.float16, "float32": torch.float32}


class PaletteConfig(Config):
    """Settings of `palette`."""

    k: int = Field(default=16, ge=2, le=65536)
    """values of a codebook, 2 to 65,536; an index takes log2 k bits, rounded up"""
    group_size: int | None = Field(default=None, ge=1)
    """rows (output channels) behind one codebook; one codebook for the whole tensor by default"""
    vector: int = Field(default=1, ge=1)
    """consecutive weights of a row that are one entry of the codebook, in weights"""
    book: Literal["float16", "float32"] = "float16"
    """type in which codebooks are stored"""
    tensors: str | None = None
    """pattern of the names of tensors to cluster, such as "layer?.*"; all weights but those of norms by default"""
    mode: Literal["dkm", "ste"] = "dkm"
    """in training: soft attention over the codebook, or the nearest value with straight-through gradients"""
    temperature: float = Field(default=0.2, gt=0)
    """dkm: softness at the start, in squared spacings of the codebook; 0.01 is nearly hard, 1 very soft"""
    end_temperature: float = Field(default=0.02, gt=0)
    """dkm: softness at the end of the run, approached geometrically"""
    iterations: int = Field(default=1, ge=1)
    """dkm: steps of k-means within one forward; codebooks also carry over from step to step"""
    mean_gradient: bool = True
    """ste: whether a codebook entry moves with the mean gradient of its members, not their sum"""

    def layout(self) -> Layout:
        """How tensors share codebooks."""
        return Layout(self.k, self.group_size, self.vector)


# what can be clustered ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Place:
    """One parameter and all modules that hold it."""

    name: str
    parameter: nn.Parameter
    owners: tuple[tuple[nn.Module, str], ...]


def places(model: nn.Module, config: PaletteConfig, *, training: bool = False) -> tuple[list[Place], dict[str, str]]:
    """The parameters that can be clustered, and why the other weights cannot.

    Args:
        training: whether they are to be trained, so that frozen ones and fused recurrent layers' are left out.
    Raises:
        ConfigError: the pattern matches no parameter; names the nearest.
    """
    owners: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for leaf, parameter in module._parameters.items():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append((module, leaf))
    named = {n: p for n, p in model.named_parameters() if _matches(n, config.tensors)}
    if config.tensors is not None and not named:
        names = [name for name, _ in model.named_parameters()]
        raise ConfigError(f"No parameter matches '{config.tensors}'.", remedy=nearest(config.tensors, names))
    found, refused = [], {}
    for name, parameter in named.items():
        place = Place(name, parameter, tuple(owners[id(parameter)]))
        reason = _refusal(place, config, training)
        if reason is None:
            found.append(place)
        else:
            refused[name] = reason
    return found, refused


def _matches(name: str, pattern: str | None) -> bool:
    return pattern is None or fnmatch.fnmatchcase(name, pattern)


def _refusal(place: Place, config: PaletteConfig, training: bool) -> str | None:
    parameter, modules = place.parameter, [module for module, _ in place.owners]
    if not parameter.is_floating_point():
        return "it holds no real numbers"
    if any(_is_norm(module) for module in modules) or parameter.ndim < 2:
        return "norm scales and biases are kept"
    if any(isinstance(module, parametrize.ParametrizationList) for module in modules):
        return "it is parametrized already"
    if training and not parameter.requires_grad:
        return "it is frozen (requires_grad is False)"
    if training and any(isinstance(module, _RECURRENT) for module in modules):
        return "fused recurrent layers read their weights past any parametrization: cluster after training"
    reason = config.layout().refusal(tuple(parameter.shape))
    return _no_gain(parameter, config) if reason is None else reason


def _is_norm(module: nn.Module) -> bool:
    return "norm" in type(module).__name__.lower()


def _no_gain(parameter: Tensor, config: PaletteConfig) -> str | None:
    """A codebook beside the numbers can take more room than the weights themselves."""
    layout, n = config.layout(), parameter.numel()
    n_books = -(-parameter.shape[0] // (config.group_size or max(parameter.shape[0], 1)))
    k = min(layout.k, n // layout.vector)
    book = n_books * k * layout.vector * _DTYPES[config.book].itemsize
    index = n // layout.vector * (k - 1).bit_length() / 8
    return "codebook and indices would take more room" if book + index >= n * parameter.element_size() else None


# the result -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Palettized:
    """Which tensors of a network are clustered, and how.

    Args:
        tensors: clustered tensors by name.
        refused: why other weights are not.
    """

    tensors: Mapping[str, Clustered]
    refused: Mapping[str, str] = field(default_factory=dict)

    def unique_values(self) -> int:
        """Distinct values that stand behind the clustered tensors, each codebook's added up."""
        return sum(item.unique_values() for item in self.tensors.values())

    def summary(self) -> list[dict[str, Any]]:
        """One plain record for each clustered tensor, for tables, JSON and the ledger."""
        return [
            {
                "name": name,
                "shape": list(item.shape),
                "codebooks": len(item.book_GKV),
                "bits": item.bits,
                "vector": item.layout.vector,
                "unique_values": item.unique_values(),
                "packed_bytes": item.size_bytes(),
            }
            for name, item in self.tensors.items()
        ]

    def save(self, path: str | Path, model: nn.Module, *, coding: Coding = "packed") -> int:
        """Write the network's whole state to a file, the clustered tensors as codebooks and indices.

        Args:
            path: of the safetensors file; `weightfold.quant.clustered.read_clustered` reads it.
            model: the clustered network.
            coding: "packed" (ceil(log2 k) bits an index) or "deflated" (entropy-coded by zlib).
        Returns:
            size_bytes: of the file, all side information included.
        Raises:
            DataError: the network's values are not the clustered ones any more; names the tensor.
        """
        state = unique_state(model)
        for name, item in self.tensors.items():
            if name not in state or not torch.equal(state[name].detach().cpu(), item.values()):
                raise DataError(
                    f"'{name}' no longer holds the clustered values.", remedy="Cluster again after changing weights."
                )
        others = {name: value for name, value in state.items() if name not in self.tensors}
        return write_clustered(Path(path), self.tensors, others, aliases=_aliases(model, state), coding=coding)


def _aliases(model: nn.Module, unique: Mapping[str, Tensor]) -> dict[str, str]:
    """Further name -> stored name, of tensors that a network holds under several names."""
    stored = {_place(value): name for name, value in unique.items()}
    state = {name: value for name, value in model.state_dict().items() if isinstance(value, Tensor)}
    return {name: stored[_place(value)] for name, value in state.items() if name not in unique}


def _place(value: Tensor) -> tuple[Any, ...]:
    return value.untyped_storage()._cdata, value.storage_offset(), value.shape, value.stride(), value.dtype


# at once --------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def palettize(
    model: nn.Module,
    config: PaletteConfig | None = None,
    *,
    importance: Mapping[str, Tensor] | None = None,
    generator: torch.Generator | None = None,
    **settings: Any,
) -> Palettized:
    """Cluster the weights of a trained network, in place.

    Args:
        config: settings; or pass them by name.
        importance: how much each weight counts, by parameter name (see `fisher`, `input_energy`); all alike by default.
        generator: draws the first codebooks where `vector` > 1; a fresh one of seed 0 by default.
    Raises:
        ConfigError: nothing can be clustered, or importance names no parameter.
        DataError: weights are not finite; names the tensor. Nothing is changed then.
    Example:
        >>> net = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 8))
        >>> palettized = palettize(net, k=4)
        >>> palettized.unique_values(), len(net[0].weight.unique())
        (8, 4)
    """
    config = PaletteConfig(**settings) if config is None else config
    found, refused = places(model, config)
    if not found:
        raise _nothing(refused)
    _check_names(importance or {}, model)
    clustered = {}
    for place in found:
        given = None if importance is None else importance.get(place.name)
        clustered[place.name] = _clustered(place, config, given, generator)
    for place in found:
        place.parameter.copy_(clustered[place.name].values())
    return Palettized(clustered, refused)


def _clustered(
    place: Place, config: PaletteConfig, importance: Tensor | None, generator: torch.Generator | None
) -> Clustered:
    try:
        return cluster(
            place.parameter, config.layout(), _DTYPES[config.book], importance=importance, generator=generator
        )
    except (ConfigError, DataError) as error:
        raise type(error)(f"'{place.name}': {error.message}", remedy=error.remedy) from None


def _nothing(refused: Mapping[str, str]) -> ConfigError:
    reasons = "; ".join(f"'{name}': {why}" for name, why in list(refused.items())[:4])
    return ConfigError(f"No weights of this network can be clustered: {reasons or 'it has none'}.")


def _check_names(importance: Mapping[str, Tensor], model: nn.Module) -> None:
    names = [name for name, _ in model.named_parameters()]
    for name in importance:
        if name not in names:
            raise ConfigError(f"The importance names no parameter '{name}'.", remedy=nearest(name, names))


def fisher(model: nn.Module, batches: Iterable[Batch], loss: Loss) -> dict[str, Tensor]:
    """Mean over batches of the squared gradient of each parameter: the diagonal by which `palettize` may weight.

    In evaluation mode; the smaller the batches, the nearer to the Fisher information. Gradients held by the model stay.

    Example:
        >>> net = nn.Linear(2, 1, bias=False)
        >>> x = torch.tensor([[1.0, 2.0]])
        >>> fisher(net, [(x, None)], lambda out, _: out.sum())
        {'weight': tensor([[1., 4.]])}
    """
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    total = {name: torch.zeros_like(p) for name, p in named.items()}
    n = 0
    with evaluating(model):
        for inputs, targets in batches:
            value = loss(call(model, inputs), targets)
            grads = torch.autograd.grad(value, list(named.values()), allow_unused=True)
            for name, grad in zip(named, grads, strict=True):
                if grad is not None:
                    total[name] += grad.square()
            n += 1
    if n == 0:
        raise DataError("The Fisher information needs at least one batch.")
    return {name: value / n for name, value in total.items()}


_READERS = nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d


@torch.no_grad()
def input_energy(model: nn.Module, batches: Iterable[Any]) -> dict[str, Tensor]:
    """Mean square of what each weight of linear and convolution layers multiplies: an importance that needs no labels.

    The error of a layer's output is Σ E[a_i a_j] Δw_i Δw_j; this is its diagonal. In evaluation mode.

    Args:
        batches: inputs as the model takes them.
    Example:
        >>> net = nn.Linear(2, 1, bias=False)
        >>> input_energy(net, [torch.tensor([[1.0, 2.0]])])
        {'weight': tensor([[1., 4.]])}
    """
    readers = {f"{path}.weight".lstrip("."): m for path, m in model.named_modules() if isinstance(m, _READERS)}
    sums: dict[str, list[Tensor]] = {name: [] for name in readers}

    def look(x: Tensor, name: str) -> None:
        dim = -1 if isinstance(readers[name], nn.Linear) else 1
        sums[name].append(x.square().movedim(dim, -1).flatten(0, -2).mean(0))

    looks = {name.removesuffix("weight").removesuffix("."): partial(look, name=name) for name in readers}
    with evaluating(model), tapped(model, looks):
        for batch in batches:
            call(model, batch)
    return {name: _spread(module, torch.stack(sums[name]).mean(0)) for name, module in readers.items() if sums[name]}


def _spread(module: Any, energy_I: Tensor) -> Tensor:
    """A number for each input channel, in the shape of the weight that reads it."""
    weight, groups = module.weight, getattr(module, "groups", 1)
    rows = energy_I.reshape(groups, -1).repeat_interleave(weight.shape[0] // groups, 0)
    return rows.reshape(*rows.shape, *[1] * (weight.ndim - 2)).expand_as(weight).clone()


# in training ----------------------------------------------------------------------------------------------------------


class _Clustering(nn.Module):
    """Stands between a stored weight and its readers; in evaluation mode it gives what `convert` will leave."""

    temperature: float
    book: Tensor

    def __init__(self, start: Clustered, config: PaletteConfig, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.config, self.layout, self.temperature = config, start.layout, config.temperature
        book = start.book_GKV.to(device=device, dtype=dtype)
        if config.mode == "ste":
            self.book = nn.Parameter(book)
        else:
            self.register_buffer("book", book)

    def forward(self, weight: Tensor) -> Tensor:
        parts = self.layout.split(weight)
        soft = self.config.mode == "dkm" and self.training
        out = self._soft(parts) if soft else self._hard(parts)
        return torch.cat([part.flatten() for part in out]).reshape(weight.shape)

    def _soft(self, parts: list[Tensor]) -> list[Tensor]:
        mixed, books = [], []
        for points, book in zip(parts, self.book, strict=True):
            out, new = dkm(points, book, self.temperature, self.config.iterations)
            mixed.append(out)
            books.append(new.detach())
        with torch.no_grad():
            self.book.copy_(padded(books))
        return mixed

    def _hard(self, parts: list[Tensor]) -> list[Tensor]:
        stored = self.book.to(_DTYPES[self.config.book]).to(self.book.dtype)
        rounded = stored.detach() + (self.book - self.book.detach())
        return [
            snap(points, book, mean=self.config.mean_gradient)[0] for points, book in zip(parts, rounded, strict=True)
        ]


class Palette:
    """Clusters weights while a network trains: attach, train as ever, convert.

    Args:
        config: settings; or pass them by name.

    Example:
        >>> net = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 8))
        >>> optimizer, x = torch.optim.Adam(net.parameters()), torch.randn(16, 32)
        >>> palette = Palette(k=4, mode="ste")
        >>> palette.attach(net, optimizer, total_steps=3)
        >>> for _ in range(3):
        ...     optimizer.zero_grad()
        ...     net(x).square().mean().backward()
        ...     optimizer.step()
        ...     palette.step()
        >>> palettized = palette.convert()
        >>> type(net[0]).__name__, len(net[0].weight.unique()), palettized.unique_values()
        ('Linear', 4, 8)
    """

    name: ClassVar[str] = "palette"
    Config: ClassVar[type[PaletteConfig]] = PaletteConfig
    by_itself: ClassVar[str] = (
        "Call compressor.convert() first; then palette.attach(net, optimizer, total_steps=n), palette.step() after "
        "every optimiser step, and palette.convert()."
    )
    """how it is used, since a compressor does not take it"""

    def __init__(self, config: PaletteConfig | None = None, **settings: Any) -> None:
        self.config = PaletteConfig(**settings) if config is None else config
        self.total_steps = 0
        self._step = 0
        self._model: nn.Module | None = None
        self._places: list[Place] = []
        self._refused: dict[str, str] = {}
        self._clusterings: dict[str, _Clustering] = {}
        self._optimizer: torch.optim.Optimizer | None = None
        self._order: dict[nn.Module, list[str]] = {}

    def attach(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | None = None,
        *,
        total_steps: int = 0,
        importance: Mapping[str, Tensor] | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        """Put codebooks between the network's weights and their readers; they start from k-means of the weights.

        Args:
            optimizer: takes in what is learned besides the weights (ste: codebooks, without weight decay). An optimiser
                that is built from ``model.parameters()`` afterwards has them anyway.
            total_steps: length of the run in optimiser steps, over which the temperature falls; 0 keeps it.
            importance, generator: as in `palettize`.
        Raises:
            ConfigError: attached already, or nothing can be clustered (with the reasons).
            DataError: weights are not finite; names the tensor.
        """
        if self._model is not None:
            raise ConfigError("This palette is attached already.", remedy="Use one Palette for each network.")
        found, refused = places(model, self.config, training=True)
        if not found:
            raise _nothing(refused)
        _check_names(importance or {}, model)
        starts = {p.name: _clustered(p, self.config, (importance or {}).get(p.name), generator) for p in found}
        self._model, self._places, self._refused = model, found, refused
        self._optimizer, self.total_steps = optimizer, total_steps
        for place in found:
            self._put(place, starts[place.name])
        if optimizer is not None and self.books():
            optimizer.add_param_group({"params": self.books(), "weight_decay": 0.0})

    def _put(self, place: Place, start: Clustered) -> None:
        clustering = _Clustering(start, self.config, place.parameter.dtype, place.parameter.device)
        clustering.train(place.owners[0][0].training)
        self._clusterings[place.name] = clustering
        for module, leaf in place.owners:
            self._order.setdefault(module, list(module._parameters))
            parametrize.register_parametrization(module, leaf, clustering)

    def books(self) -> list[nn.Parameter]:
        """Codebooks that an optimiser is to learn; none in dkm, where they follow from the weights."""
        books = (clustering.book for clustering in self._clusterings.values())
        return [book for book in books if isinstance(book, nn.Parameter)]

    def step(self) -> None:
        """Call once after every optimiser step: the temperature falls."""
        self._step += 1
        self._cool()

    def _cool(self) -> None:
        share = min(self._step / self.total_steps, 1.0) if self.total_steps else 0.0
        start, end = self.config.temperature, self.config.end_temperature
        for clustering in self._clusterings.values():
            clustering.temperature = start * (end / start) ** share

    @torch.no_grad()
    def convert(self) -> Palettized:
        """Leave plain modules whose parameters hold the clustered values, the same objects as before `attach`.

        Raises:
            ConfigError: not attached.
            DataError: weights or codebooks are not finite; names the tensor.
        """
        if self._model is None:
            raise ConfigError("This palette is not attached.", remedy="Call attach(model) first.")
        clustered = {place.name: self._final(place) for place in self._places}
        for place in self._places:
            for module, leaf in place.owners:
                parametrize.remove_parametrizations(module, leaf, leave_parametrized=False)
            place.parameter.copy_(clustered[place.name].values())
        for module, order in self._order.items():
            module._parameters = {leaf: module._parameters[leaf] for leaf in order}
        self._forget_books()
        self._model = None
        return Palettized(clustered, self._refused)

    def _final(self, place: Place) -> Clustered:
        book = self._clusterings[place.name].book
        if not bool(torch.isfinite(place.parameter).all() & torch.isfinite(book).all()):
            raise DataError(
                f"'{place.name}' or its codebook holds values that are not finite.",
                remedy="Train with a smaller learning rate.",
            )
        return assign(place.parameter, self.config.layout(), book, _DTYPES[self.config.book])

    def _forget_books(self) -> None:
        books = {id(book) for book in self.books()}
        if self._optimizer is None or not books:
            return
        for group in self._optimizer.param_groups:
            group["params"] = [p for p in group["params"] if id(p) not in books]
        self._optimizer.param_groups[:] = [group for group in self._optimizer.param_groups if group["params"]]
        for book in self.books():
            self._optimizer.state.pop(book, None)

    def state_dict(self) -> dict[str, Any]:
        """What a restart needs besides the network's own state, which holds the codebooks."""
        return {"step": self._step}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up an interrupted run, after `attach` on a freshly built network."""
        self._step = int(state["step"])
        self._cool()
