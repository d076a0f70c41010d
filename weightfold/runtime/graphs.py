"""Modules of PyTorch's exported programs: they compute as in evaluation mode, whatever mode is asked for."""

from __future__ import annotations

from types import MethodType
from typing import Any

from torch import nn

from weightfold.errors import ConfigError


def graph_module(program: Any) -> nn.Module:
    """The module of an exported program, in evaluation mode.

    `eval` leaves it as it is; PyTorch's own module of a program refuses that.
    """
    module: nn.Module = program.module()
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
