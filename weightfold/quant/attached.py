"""Quantise a parameter wherever a network reads it, and leave the parameter itself where it is.

The owner's class is replaced by one of its own with a property in the parameter's place, as
`torch.nn.utils.parametrize` does; but the parameter keeps its name and stays the object that optimisers, averages,
checkpoints and ties know. Exponents and bits stand beside it as plain attributes: they are in no state dict.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

from torch import Tensor, nn

from weightfold.graph.copies import independent_copy
from weightfold.quant.fake import fake_quantise

EXPONENT, BITS, REGROWTH = "_exponent", "_bits", "_regrowth"
"""What follows the parameter's name."""
_BASE, _LEAVES = "_class_before_quantising", "_quantised_parameters"


@cache
def _class_with(base: type, leaves: frozenset[str]) -> type:
    properties = {leaf: property(_reader(leaf)) for leaf in leaves}
    if issubclass(base, nn.RNNBase):
        properties["_flat_weights"] = property(_flat_weights, _keep_flat_weights)
    kept = {"__module__": base.__module__, _BASE: base, _LEAVES: leaves}
    return type(base.__name__, (base,), {**properties, **kept})


def _reader(leaf: str) -> Any:
    exponent, bits, regrowth = leaf + EXPONENT, leaf + BITS, leaf + REGROWTH

    def read(module: nn.Module) -> Tensor:
        weight = module._parameters[leaf]
        assert weight is not None
        if weight.is_meta:
            return weight
        return fake_quantise(weight, getattr(module, exponent), getattr(module, bits), getattr(module, regrowth))

    return read


def _flat_weights(module: nn.Module) -> list[Tensor]:
    """What a recurrent layer runs on, read anew at each call."""
    return [getattr(module, leaf) for leaf in module._flat_weights_names]  # pyright: ignore


def _keep_flat_weights(module: nn.Module, value: Any) -> None:
    """The layer's own list goes on holding the parameters themselves."""


def owners_of(model: nn.Module) -> dict[int, list[tuple[nn.Module, str]]]:
    """All modules that hold each parameter, with its name there, by the parameter's identity."""
    found: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for leaf, parameter in module._parameters.items():
            if parameter is not None:
                found.setdefault(id(parameter), []).append((module, leaf))
    return found


def attach(model: nn.Module, quantisers: Mapping[str, tuple[Tensor, Tensor]], regrowth: bool = True) -> None:
    """Quantise parameters from now on.

    Args:
        quantisers: exponents and bits, shape (R,), by parameter name. They are used as they are, not copied.
        regrowth: whether gradients reach weights that are clipped, or whose row is zero.
    Example:
        >>> import torch
        >>> layer = nn.Linear(2, 3)
        >>> attach(layer, {"weight": (torch.zeros(3), torch.full((3,), 2.0))})
        >>> bool((layer.weight.abs() <= 1).all()), [name for name, _ in layer.named_parameters()]
        (True, ['weight', 'bias'])
        >>> detach(layer)
        >>> type(layer) is nn.Linear, isinstance(layer.weight, nn.Parameter)
        (True, True)
    """
    owners, named = owners_of(model), dict(model.named_parameters())
    for name, (exponent_R, bits_R) in quantisers.items():
        for module, leaf in owners[id(named[name])]:
            setattr(module, leaf + EXPONENT, exponent_R)
            setattr(module, leaf + BITS, bits_R)
            setattr(module, leaf + REGROWTH, regrowth)
            base, leaves = _plain(module)
            module.__class__ = _class_with(base, leaves | {leaf})


def _plain(module: nn.Module) -> tuple[type, frozenset[str]]:
    """The class before any attaching, and what is attached."""
    return getattr(type(module), _BASE, type(module)), getattr(type(module), _LEAVES, frozenset())


def attached(model: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    """Modules with a quantised parameter, and its name there."""
    for module in model.modules():
        for leaf in sorted(_plain(module)[1]):
            yield module, leaf


def detach(model: nn.Module) -> None:
    """Take everything off again; parameters are as they are."""
    for module, leaf in list(attached(model)):
        delattr(module, leaf + EXPONENT)
        delattr(module, leaf + BITS)
        delattr(module, leaf + REGROWTH)
        module.__class__ = _plain(module)[0]


def plain_copy(model: nn.Module) -> nn.Module:
    """A copy of a network in training, without quantisers, and without the hooks that watch or quantise its inputs."""
    twin = independent_copy(model)
    detach(twin)
    for module in twin.modules():
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for key in [k for k, hook in hooks.items() if getattr(hook, "__module__", "").startswith("weightfold.")]:
                del hooks[key]
    return twin
