"""Run a batch through somebody's network, and leave the network as it was.

A batch is what `trace` takes as an example: a tensor, a tuple or list of positional arguments, a mapping of keyword
arguments, or a pair of both. What a data loader gives besides (targets, further keys) is left out.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils import _pytree as pytree

from weightfold.graph.trace import arguments

Arguments = tuple[tuple[Any, ...], dict[str, Any]]
"""Positional and keyword arguments of one call."""


def inputs_of(model: nn.Module, batch: Any, example: Any = None) -> Arguments:
    """The arguments that a batch stands for, without what the model does not take.

    There are no more positional arguments than the example has, or without one than the forward takes; keys that the
    forward does not know are dropped.

    Args:
        batch: as a data loader gives it, with targets behind the inputs or without.
        example: one that the model takes.
    Example:
        >>> x, y = torch.zeros(5, 2), torch.zeros(5)
        >>> [len(inputs_of(nn.Linear(2, 3), batch)[0]) for batch in (x, (x,), [x, y], (x, y))]
        [1, 1, 1, 1]
        >>> sorted(inputs_of(nn.Linear(2, 3), {"input": x, "target": y})[1])
        ['input']
    """
    args, kwargs = arguments(batch)
    takes = _Signature(model)
    known = None if example is None else arguments(example)
    most = takes.most if known is None else len(known[0]) + len(known[1])
    if args and not kwargs and _is_nested(args, most, known):
        return inputs_of(model, args[0], example)
    named = kwargs if takes.any_key else {k: v for k, v in kwargs.items() if k in takes.keys}
    return (args if most is None else args[:most]), named


def _is_group(values: tuple[Any, ...]) -> bool:
    return bool(values) and isinstance(values[0], Mapping | tuple | list)


def _is_nested(args: tuple[Any, ...], most: int | None, known: Arguments | None) -> bool:
    """Whether these are (inputs, targets), the inputs being several."""
    if len(args) != 2 or not _is_group(args):
        return False
    if known is None:
        return most is not None and most < 2
    return not _is_group(known[0])


class _Signature:
    """How many positional arguments a forward takes at most (None: any number), and which keys."""

    def __init__(self, model: nn.Module) -> None:
        self.most: int | None = None
        self.any_key, self.keys = True, frozenset[str]()
        try:
            found = inspect.signature(model.forward).parameters.values()
        except (TypeError, ValueError):  # compiled code tells nothing of its arguments
            return
        if not any(p.kind is p.VAR_POSITIONAL for p in found):
            self.most = sum(p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) for p in found)
        self.any_key = any(p.kind is p.VAR_KEYWORD for p in found)
        self.keys = frozenset(p.name for p in found if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD))


def call(model: nn.Module, batch: Any, example: Any = None) -> Any:
    """Run a model on a batch; see `inputs_of`.

    Example:
        >>> call(nn.Bilinear(2, 3, 4), (torch.zeros(5, 2), torch.zeros(5, 3))).shape
        torch.Size([5, 4])
    """
    args, kwargs = inputs_of(model, batch, example)
    return model(*args, **kwargs)


def n_samples(*batches: Any) -> int:
    """Samples of a batch: the length of its first tensor, however deep it stands; 0 without one.

    Example:
        >>> n_samples({"x": torch.zeros(5, 2)}), n_samples("none", ((torch.zeros(3),), {}))
        (5, 3)
    """
    leaves = pytree.tree_leaves([dict(b) if isinstance(b, Mapping) else b for b in batches])
    return next((len(leaf) for leaf in leaves if isinstance(leaf, Tensor) and leaf.ndim), 0)


@contextmanager
def keeping_modes(model: nn.Module) -> Iterator[None]:
    """Let modes be changed, and put them all back, whatever happens.

    Modules with a `train` of their own, which may merge weights in evaluation, are told so by that call.
    """
    modes = {module: module.training for module in model.modules()}
    try:
        yield
    finally:
        for module, training in modes.items():
            if training and not module.training and type(module).train is not nn.Module.train:
                module.train(True)
        for module, training in modes.items():
            module.training = training


@contextmanager
def keeping_buffers(model: nn.Module) -> Iterator[None]:
    """Let the network write into copies of its buffers, and put its own back, whatever happens."""
    kept = [(m, name, b) for m in model.modules() for name, b in m._buffers.items() if b is not None]
    copies: dict[int, Tensor] = {}
    try:
        for module, name, buffer in kept:
            if not is_lazy(buffer):
                module._buffers[name] = copies.setdefault(id(buffer), buffer.detach().clone())
        yield
    finally:
        for module, name, buffer in kept:
            module._buffers[name] = buffer


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode. Modes, buffers and the global random state are as they were afterwards, whatever happens.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 2), nn.Dropout())
        >>> with evaluating(net):
        ...     net[1].training
        False
        >>> net[1].training
        True
    """
    devices = {t.device.index for t in model.parameters() if t.device.type == "cuda"} - {None}
    with torch.random.fork_rng(devices=sorted(devices)), keeping_modes(model), keeping_buffers(model):
        model.eval()
        yield


@contextmanager
def probing(model: nn.Module) -> Iterator[None]:
    """No gradients, no dropout; batch norms use the batch and leave their running statistics alone.

    Running statistics lag behind an edit; measuring with them would mix that lag with real damage.
    """
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and _follows_batch(m, model)]
    with evaluating(model), torch.no_grad():
        for norm in norms:
            norm.train()
        yield


def _follows_batch(norm: nn.Module, model: nn.Module) -> bool:
    """Whether training lets a batch norm follow the batch: it is not frozen, and would not wait for other processes."""
    return not isinstance(norm, nn.SyncBatchNorm) and (norm.training or not model.training)
