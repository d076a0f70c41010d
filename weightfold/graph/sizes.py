"""Keep the integer attributes of modules true to their tensors: ``out_features``, ``groups``, ``num_heads``."""

from __future__ import annotations

import copy
from collections.abc import Collection, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from weightfold.graph.edit import Edit
from weightfold.graph.group import ChannelGraph, ChannelGroup

Change = tuple[Any, str, Any]
"""(owner, attribute, value before)."""

_SIZES: dict[str, tuple[str, int]] = {
    "out_features": ("weight", 0),
    "in_features": ("weight", 1),
    "num_features": ("weight", 0),
    "num_channels": ("weight", 0),
    "embedding_dim": ("weight", 1),
    "num_embeddings": ("weight", 0),
    "nf": ("weight", 1),
    "nx": ("weight", 0),
}
_RECURRENT = {"input_size": ("weight_ih_l0", 1), "hidden_size": ("weight_hh_l0", 0), "proj_size": ("weight_hr_l0", 0)}
_CELL = {"input_size": ("weight_ih", 1), "hidden_size": ("weight_hh", 1)}


def _set(owner: Any, name: str, value: Any, changes: list[Change]) -> None:
    if getattr(owner, name) != value:
        changes.append((owner, name, getattr(owner, name)))
        setattr(owner, name, value)


def _tensor(module: nn.Module, leaf: str) -> Any:
    """What a module holds under a name. A parametrized weight is computed, as in evaluation: in training that would
    move its buffers (the power iteration of a spectral norm)."""
    if not parametrize.is_parametrized(module, leaf):
        return getattr(module, leaf, None)
    modes = [(part, part.training) for part in cast(nn.ModuleDict, module.parametrizations)[leaf].modules()]
    try:
        for part, _ in modes:
            part.training = False
        with torch.no_grad():
            return getattr(module, leaf)
    finally:
        for part, training in modes:
            part.training = training


def _shape(module: nn.Module, leaf: str) -> tuple[int, ...] | None:
    tensor = _tensor(module, leaf)
    if tensor is None and leaf == "weight":
        tensor = getattr(module, "running_mean", None)
    return tuple(tensor.shape) if isinstance(tensor, Tensor) else None


def sync_module(
    module: nn.Module,
    blocks: bool,
    rows_before: int | None,
    changes: list[Change],
    scales_groups: bool | None = None,
) -> None:
    """Set the sizes that one module tells of itself.

    Args:
        blocks: whether whole groups of a GroupNorm have gone.
        rows_before: of its weight, before.
        scales_groups: whether a convolution has fewer groups with fewer rows; None: as it looks.
    """
    if isinstance(module, torch.jit.ScriptModule):  # its numbers are part of its code: those that count show in a trial
        return
    if isinstance(module, nn.modules.conv._ConvNd):
        depthwise = module.groups > 1 and module.in_channels == module.groups
        scales_groups = depthwise if scales_groups is None else scales_groups
        _sync_conv(module, rows_before if scales_groups else None, changes)
        return
    if isinstance(module, nn.RNNBase | nn.RNNCellBase):
        for name, (leaf, dim) in (_RECURRENT if isinstance(module, nn.RNNBase) else _CELL).items():
            shape = _shape(module, leaf)
            if shape is not None:
                gates = {"LSTM": 4, "GRU": 3}.get(getattr(module, "mode", ""), 1) if leaf == "weight_hh_l0" else 1
                _set(module, name, shape[dim] // gates, changes)
        return
    if isinstance(module, nn.LayerNorm | nn.RMSNorm):
        shape = _shape(module, "weight")
        if shape is not None:
            _set(module, "normalized_shape", shape, changes)
        return
    if isinstance(module, nn.GroupNorm) and blocks and rows_before:
        _set(module, "num_groups", module.num_groups * _tensor(module, "weight").shape[0] // rows_before, changes)
    for name, (leaf, dim) in _SIZES.items():
        shape = _shape(module, leaf)
        if shape is not None and dim < len(shape) and isinstance(getattr(module, name, None), int):
            _set(module, name, shape[dim], changes)


def _sync_conv(conv: Any, rows_before: int | None, changes: list[Change]) -> None:
    shape = tuple(_tensor(conv, "weight").shape)
    if rows_before:
        _set(conv, "groups", conv.groups * shape[0] // rows_before, changes)
    out, into = (1, 0) if conv.transposed else (0, 1)
    _set(conv, "out_channels", shape[out] * (conv.groups if conv.transposed else 1), changes)
    _set(conv, "in_channels", shape[into] * (1 if conv.transposed else conv.groups), changes)


def owner_of(model: nn.Module, tensor: str) -> nn.Module:
    """The module whose sizes a tensor sets; the original module behind a parametrization."""
    path = tensor.rpartition(".")[0]
    return model.get_submodule(path.split(".parametrizations.")[0] if ".parametrizations." in path else _strip(path))


def _strip(path: str) -> str:
    return "" if path.startswith("parametrizations.") else path


def _scales_groups(group: ChannelGroup, tensor: str, grouped: Collection[str]) -> bool:
    """Whether a convolution has fewer groups where it has fewer rows: a depthwise one, or one that loses whole groups.

    The graph tells, not the layer: one that is left with a single channel looks like any other.
    """
    rows = [a for a in group.axes if a.dim == 0 and _weight_of(a.tensor) == _weight_of(tensor)]
    depthwise = bool(rows) and all(a.role == "pointwise" for a in rows)
    return depthwise or (group.kind == "blocks" and tensor in grouped)


def _weight_of(tensor: str) -> str:
    """What the parts of a normalised or parametrized weight have in common."""
    head, found, leaf = tensor.rpartition(".")
    return head if found and leaf.startswith("original") else tensor.removesuffix("_g").removesuffix("_v")


def grouped_tensors(graph: ChannelGraph) -> set[str]:
    """The weights that are read in slabs, one per group of a convolution."""
    return {axis.tensor for group in graph.groups for axis in group.axes if axis.slabs > 1}


def sync_sizes(
    model: nn.Module,
    group: ChannelGroup,
    edit: Edit,
    names: Sequence[str],
    grouped: Collection[str],
    changes: list[Change],
) -> None:
    """Set the attributes of every module that owns an edited tensor, and those in the group's own plan.

    Args:
        grouped: weights of grouped convolutions in the wider of both networks, from `grouped_tensors`.
        changes: takes up the values before, one by one, for undoing.
    """
    if not edit.resizes:
        return
    rows = {a.tensor: a.size for a in group.axes if a.dim == 0}
    owners: dict[int, tuple[nn.Module, str]] = {}
    for name in names:
        owner = owner_of(model, name)
        if id(owner) not in owners or name.endswith("weight"):
            owners[id(owner)] = (owner, name)
    for owner, name in owners.values():
        scales = _scales_groups(group, name, grouped)
        sync_module(owner, group.kind == "blocks", rows.get(name), changes, scales)
    for path, name, factor in group.attributes:
        set_attribute(model.get_submodule(path), name, int(edit.n_after * factor), changes)


def get_attribute(module: nn.Module, name: str) -> Any:
    """Read an attribute, possibly of the module's configuration (``config.num_heads``)."""
    head, _, tail = name.partition(".")
    value = getattr(module, head)
    return getattr(value, tail) if tail else value


def set_attribute(module: nn.Module, name: str, value: Any, changes: list[Change]) -> None:
    """Set an attribute; a configuration shared with other modules is copied first."""
    head, _, tail = name.partition(".")
    if not tail:
        if isinstance(getattr(module, head), tuple):
            value = (value,)
        _set(module, head, value, changes)
        return
    own = copy.copy(getattr(module, head))
    setattr(own, tail, value)
    changes.append((module, head, getattr(module, head)))
    setattr(module, head, own)
