"""The one tap: see what modules read while a network runs, or give them something else to read.

A module reads the first tensor among its arguments, in the order of its forward, however they are passed: by position
or by keyword.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

Look = Callable[[Tensor], Tensor | None]
"""Sees what is read; what it returns is read instead, None for the same."""


def tap(module: nn.Module, look: Look) -> RemovableHandle:
    """Let a function see what a module reads at every call, until the handle is removed.

    Example:
        >>> import torch
        >>> seen, layer = [], nn.Linear(2, 1)
        >>> handle = tap(layer, lambda x: seen.append(x.shape))
        >>> _ = layer(torch.zeros(5, 2)), layer(input=torch.zeros(4, 2))
        >>> handle.remove(), seen
        (None, [torch.Size([5, 2]), torch.Size([4, 2])])
    """

    def hook(owner: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        place = _place(owner, args, kwargs)
        if place is None:
            return None
        new = look(args[place] if isinstance(place, int) else kwargs[place])
        if new is None:
            return None
        if isinstance(place, int):
            return (*args[:place], new, *args[place + 1 :]), kwargs
        return args, {**kwargs, place: new}

    return module.register_forward_pre_hook(hook, with_kwargs=True)


@contextmanager
def tapped(model: nn.Module, looks: Mapping[str, Look]) -> Iterator[None]:
    """Taps at modules by path, taken off at the end, whatever happens."""
    with ExitStack() as stack:
        for path, look in looks.items():
            stack.callback(tap(model.get_submodule(path), look).remove)
        yield


def _place(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int | str | None:
    """Where the first tensor stands among the arguments; None without one."""
    for place, value in enumerate(args):
        if isinstance(value, Tensor):
            return place
    tensors = [key for key, value in kwargs.items() if isinstance(value, Tensor)]
    if len(tensors) < 2:
        return next(iter(tensors), None)
    declared = list(inspect.signature(module.forward).parameters)
    return min(tensors, key=lambda key: declared.index(key) if key in declared else len(declared))
