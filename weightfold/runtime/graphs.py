"""Modules of PyTorch's exported programs: they compute as in evaluation mode, whatever mode is asked for."""

from __future__ import annotations

from types import MethodType
from typing import Any

from torch import nn

from weightfold.errors import ArtifactError, ConfigError


def graph_module(program: Any) -> nn.Module:
    """The module of an exported program, in evaluation mode.

    `eval` leaves it as it is; PyTorch's own module of a program refuses that.
    """
    try:
        module: nn.Module = program.module()
    except Exception as error:  # a graph that no forward can be written of fails in many ways
        reason = str(error).strip().partition("\n")[0][:300] or type(error).__name__
        raise ArtifactError(
            f"The graph of the file cannot be made a module: {reason.rstrip('.')}.",
            remedy="Write the file again from its model.",
        ) from error
    for part in module.modules():
        part.training = False
    vars(module).update(train=MethodType(_train, module), eval=MethodType(_eval, module))
    return module


def _train(module: nn.Module, mode: bool = True) -> nn.Module:
    if mode:
        raise ConfigError(
            "The graph of a file computes as in evaluation mode; it has no training mode.",
            remedy="To train it, load the file into an instance of its class: weightfold.load(path, MyNet()).",
        )
    return module


def _eval(module: nn.Module) -> nn.Module:
    return module
