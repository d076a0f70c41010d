"""What is found wrong before a run, before an event, or at the end."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from weightfold.errors import ConfigError, EditError
from weightfold.methods.base import Method

DIVERGED = "Start from weights of a run that did not diverge."
GO_BACK = "Load weights from before that with load_state_dict; lower the learning rate, or clip the gradients."


def checked_methods(methods: Any) -> tuple[Method, ...]:
    """Take in what is to run.

    Raises:
        ConfigError: they are no list, are no methods, or one that a run can have but once is given twice.
    """
    if isinstance(methods, Method | type) or not isinstance(methods, Iterable):
        name = methods.__name__ if isinstance(methods, type) else type(methods).__name__
        raise ConfigError(f"'methods' must be a list; got '{name}'.", remedy=f"Pass it in a list: [{name}(...)].")
    found = tuple(methods)
    for method in found:
        if not isinstance(method, Method):
            raise _no_method(method)
    names = [method.name for method in found if method.alone]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ConfigError(f"The method '{twice}' is given twice.", remedy="Give it once, with all its settings.")
    return found


def _no_method(given: Any) -> ConfigError:
    if isinstance(given, type):
        name = given.__name__
        return ConfigError(f"'methods' holds the class '{name}', not an object of it.", remedy=f"Pass [{name}(...)].")
    name = type(given).__name__
    by_itself = getattr(given, "by_itself", None)
    if by_itself is not None:
        return ConfigError(f"'{name}' does not run inside a compressor.", remedy=by_itself)
    return ConfigError(
        f"'methods' holds a '{name}', which is no method.", remedy="Pass methods, such as [weightfold.Fold(keep=0.5)]."
    )


def checked_steps(total_steps: Any) -> int:
    """Take in the length of the run.

    Raises:
        ConfigError: it is no whole number, or negative.
    """
    try:
        steps = operator.index(total_steps)
    except TypeError:
        steps = -1
    if steps < 0:
        raise ConfigError(
            f"'total_steps' must be a whole number from 0; got {total_steps!r}.",
            remedy="Pass the number of optimiser steps that the run takes.",
        )
    return steps


def check_sized(model: nn.Module) -> None:
    """Refuse modules that have no sizes yet.

    Raises:
        ConfigError: names the module and its class.
    """
    for path, module in model.named_modules():
        if any(is_lazy(t) for t in (*module._parameters.values(), *module._buffers.values()) if t is not None):
            raise ConfigError(
                f"'{path}' is a {type(module).__name__} that has no sizes yet.",
                remedy="Call the model once on the example before it is prepared: lazy modules take their sizes then.",
            )


def check_finite(model: nn.Module, remedy: str = DIVERGED) -> None:
    """Refuse weights and running statistics that nothing can be learned from.

    Other buffers may hold infinities, as masks of attention do.

    Raises:
        EditError: names the tensor.
    """
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if not tensor.is_floating_point() or tensor.is_meta or is_lazy(tensor):
            continue
        constant = not isinstance(tensor, nn.Parameter) and not name.rpartition(".")[2].startswith("running_")
        if not _is_finite(tensor.detach(), constant):
            raise EditError(f"'{name}' holds values that are not finite.", remedy=remedy)


def _is_finite(tensor: Tensor, constant: bool) -> bool:
    if bool(torch.isfinite(tensor.sum(dtype=torch.float64 if tensor.device.type == "cpu" else torch.float32))):
        return True
    return not bool(torch.isnan(tensor).any()) if constant else bool(torch.isfinite(tensor).all())
