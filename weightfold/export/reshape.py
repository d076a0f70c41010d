"""Give a fresh network the widths of tensors that were folded elsewhere.

A file of tensors alone says how wide a folded network is, but not which integer attributes (`num_heads`, a `width` of
the user's own) belong to these widths. With an example input the channel graph of the fresh network tells: every group
is cut to the size that its tensors have in the file, and the attributes follow as after any edit. Without one, only
networks whose sizes all stand in their layers are taken. Where the file can be read in two ways, it is refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from weightfold.artifact import Input
from weightfold.blueprint import Blueprint, find_aliases, replace_tensor_, state_tensors
from weightfold.errors import ArtifactError, WeightfoldError
from weightfold.export.example import zeros
from weightfold.graph.apply import apply
from weightfold.graph.edit import Edit
from weightfold.graph.group import Axis, ChannelGraph, ChannelGroup
from weightfold.graph.resize import with_sizes
from weightfold.graph.sizes import owner_of, sync_module
from weightfold.graph.trace import trace

Shapes = Mapping[str, tuple[int, ...]]

SAVE = "Save the folded network with weightfold.save(network, path): that file says how it is made."
EXAMPLE = (
    "Pass an example input, example=..., on the command line --example 1x3x32x32; or save the folded network with "
)
EXAMPLE += "weightfold.save(network, path)."


def reshape_(model: nn.Module, tensors: Mapping[str, Tensor], where: str, example: Any = None) -> None:
    """Give a network the shapes of tensors that are narrower than its own, if they are; values stay undefined.

    Args:
        model: as it was made; it is changed in place, also where it is refused.
        tensors: by name, as in the file.
        where: the file, for errors.
        example: what `trace` takes, or a list of `Input`.
    Raises:
        ArtifactError: the shapes do not tell how the network is made; names the tensor.
    Example:
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> narrow = {"0.weight": torch.ones(3, 4), "0.bias": torch.ones(3), "2.weight": torch.ones(2, 3)}
        >>> reshape_(net, narrow, "a file", torch.zeros(1, 4))
        >>> net[0].out_features, net[2].in_features
        (3, 3)
    """
    wanted = _wanted(model, tensors)
    if not _narrower(model, wanted):
        return
    if example is None or (isinstance(example, Sequence) and not example):
        _by_layers(model, wanted, where)
    else:
        given = zeros(example) if isinstance(example, Sequence) and isinstance(example[0], Input) else example
        _by_groups(model, wanted, where, given)


def _wanted(model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Shapes in the file by every name that the model has for a tensor."""
    first = find_aliases(model)
    wanted: dict[str, tuple[int, ...]] = {}
    for name in state_tensors(model):
        if name in tensors:
            wanted.setdefault(first.get(name, name), tuple(tensors[name].shape))
    return wanted


def _narrower(model: nn.Module, wanted: Shapes) -> bool:
    """Whether a network of these shapes can be this one, folded: no dimension is longer, one is shorter."""
    pairs = [(tuple(value.shape), wanted[name]) for name, value in state_tensors(model).items() if name in wanted]
    folded = all(len(own) == len(new) and all(n <= o for o, n in zip(own, new, strict=True)) for own, new in pairs)
    return folded and any(own != new for own, new in pairs)


# by the layers' own sizes ---------------------------------------------------------------------------------------------


def _by_layers(model: nn.Module, wanted: Shapes, where: str) -> None:
    """Set tensors and the attributes of torch's layers, where these are all the sizes that the network holds."""
    own = state_tensors(model)
    changed = {name: shape for name, shape in wanted.items() if tuple(own[name].shape) != shape}
    unsure = _unsure(model, changed)
    if unsure:
        name, shape = next(iter(changed.items()))
        raise ArtifactError(
            f"'{name}' has the shape {shape} in '{where}' and {tuple(own[name].shape)} in the model: its widths were "
            f"folded. What '{unsure}' must be then, the file does not say.",
            remedy=EXAMPLE,
        )
    rows = {name: own[name].shape[0] for name in changed}
    for name, shape in changed.items():
        replace_tensor_(model, own[name], torch.empty(shape, dtype=own[name].dtype, device=own[name].device))
    for name in changed:
        if name.endswith(("weight", "weight_ih_l0", "weight_hh_l0", "weight_hr_l0", "weight_ih", "running_mean")):
            sync_module(owner_of(model, name), False, rows[name], [])


def _unsure(model: nn.Module, changed: Shapes) -> str:
    """An attribute that may have to follow and that no shape tells."""
    owners = {id(owner_of(model, name)) for name in changed}
    plain = ("torch.nn.modules.", "torch.ao.nn.")
    for (path, name), _ in Blueprint.of(model).attributes.items():
        module = model.get_submodule(path)
        place = f"{path}.{name}".lstrip(".")
        if not type(module).__module__.startswith(plain):
            return place
        grouped = isinstance(module, nn.modules.conv._ConvNd) and module.groups > 1 and not _is_depthwise(module)
        if id(module) in owners and (grouped or isinstance(module, nn.MultiheadAttention | nn.GroupNorm)):
            return place
    return ""


def _is_depthwise(conv: nn.modules.conv._ConvNd) -> bool:
    return conv.groups == conv.in_channels


# by the channel graph -------------------------------------------------------------------------------------------------


def _by_groups(model: nn.Module, wanted: Shapes, where: str, example: Any) -> None:
    """Cut every group to the size that its tensors have in the file."""
    try:
        graph = with_sizes(model, example, trace(model, example))
        sizes = _sizes(graph, wanted, where)
        for name, n in sizes.items():
            graph, _ = apply(model, graph, _first(graph[name], n, where))
    except ArtifactError:
        raise
    except WeightfoldError as error:
        raise ArtifactError(
            f"The widths in '{where}' were folded, and the model cannot be given them: {error.message}", remedy=SAVE
        ) from error
    for name, value in state_tensors(model).items():
        if name in wanted and tuple(value.shape) != wanted[name]:
            raise ArtifactError(
                f"'{name}' has the shape {wanted[name]} in '{where}'; the model needs {tuple(value.shape)}, and no "
                "folding of its channels leads there.",
                remedy="Build the model with the settings that the weights were trained with.",
            )


def _sizes(graph: ChannelGraph, wanted: Shapes, where: str) -> dict[str, int]:
    """Channels of each group in the file, where they differ.

    A dimension that only one group reaches tells that group's size. A group whose size is known and unchanged is then
    left out of account, so that it tells that of others.
    """
    known: dict[str, int] = {}
    open_groups = {group.name: group for group in graph}
    while open_groups:
        found = {
            name: n for name, group in open_groups.items() if (n := _size(group, graph, known, wanted)) is not None
        }
        if not found:
            break
        known |= found
        open_groups = {name: group for name, group in open_groups.items() if name not in found}
    for name, group in open_groups.items():
        axis = group.axes[0]
        shapes = f"({graph.shapes[axis.tensor]} in the model, {wanted.get(axis.tensor)} in the file)"
        raise ArtifactError(
            f"The widths of '{name}' in '{where}' can be read in more than one way: which channels of '{axis.tensor}' "
            f"{shapes} were folded, whole {_kinds(graph, axis)} or parts of them, its shapes do not say.",
            remedy=SAVE,
        )
    return {name: n for name, n in known.items() if n != graph[name].n_channels}


def _kinds(graph: ChannelGraph, axis: Axis) -> str:
    return "blocks (heads)" if any(g.kind == "blocks" and _axis(g, axis) for g in graph) else "groups"


def _axis(group: ChannelGroup, like: Axis) -> Axis | None:
    return next((axis for axis in group.axes if axis.key == like.key), None)


def _size(group: ChannelGroup, graph: ChannelGraph, known: Mapping[str, int], wanted: Shapes) -> int | None:
    """The channels of a group in the file; None where no dimension tells them yet."""
    sizes = []
    for axis in group.axes:
        if axis.tensor not in wanted or axis.dim >= len(wanted[axis.tensor]):
            continue
        before, after = graph.shapes[axis.tensor][axis.dim], wanted[axis.tensor][axis.dim]
        if before == after and axis.slabs == 1:
            return group.n_channels
        others = [g for g in graph if g.name != group.name and _axis(g, axis) is not None]
        if axis.slabs > 1 or any(known.get(g.name) != g.n_channels for g in others):
            continue
        mine = int((axis.index >= 0).sum())
        left = mine - (before - after)
        sizes.append(left * group.n_channels / mine)
    if not sizes or any(size != sizes[0] for size in sizes) or sizes[0] != int(sizes[0]) or sizes[0] < 1:
        return None
    return int(sizes[0])


def _first(group: ChannelGroup, n: int, where: str) -> Edit:
    """The edit that leaves the first channels of every block: which ones does not matter, for values are loaded after.

    Raises:
        ArtifactError: the group cannot have so many.
    """
    block = torch.zeros(group.n_channels, dtype=torch.long) if group.block is None else group.block
    n_blocks = len(torch.unique(block))
    if n % n_blocks or not group.admits & {"remove", "merge"}:
        why = next((text for kind, text in group.reasons.items() if kind in ("remove", "merge")), "")
        reason = why or f"its {n_blocks} blocks must be of one size"
        raise ArtifactError(
            f"The widths of '{group.name}' in '{where}' ({n} of {group.n_channels}) are not those of a folded network: "
            f"{reason}.",
            remedy=SAVE,
        )
    kept = [(block == b).nonzero().flatten()[: n // n_blocks] for b in torch.unique(block)]
    return Edit(group.name, "reshape", group.n_channels, torch.sort(torch.cat(kept)).values)
