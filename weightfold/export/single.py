"""A model that computes in half precision, as one in single precision, for which other runtimes have kernels.

Every half of the model's own graph becomes a single: weights, inputs, constants, the types that its forward names. So a
forward that casts by itself or runs under autocast is taken too. Halves are singles, so no weight changes; what the
module rounds on its way is not rounded.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx.node import map_aggregate
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from weightfold.errors import ExportError
from weightfold.export.check import measure
from weightfold.export.example import DTYPES, draw
from weightfold.export.program import to_program
from weightfold.export.source import Source
from weightfold.runtime.require import quiet

HALVES = (torch.float16, torch.bfloat16)


def in_single(source: Source) -> tuple[Source, tuple[str, ...]]:
    """Make of a source that holds or computes halves one that computes in float32; any other is given back.

    Returns:
        source: with the graph of the module in place of the module.
        notes: what was cast, in words, and how far the module itself lies from that.
    Raises:
        ExportError: the forward cannot be expressed as a graph.
    """
    halves = _halves(source)
    if not halves:
        return source, ()
    if source.grids:
        raise ExportError(
            "Learned grids of activations are those of a network in float32; this one computes in halves.",
            remedy="Convert the model with model.float(), as it was when the grids were learned.",
        )
    twin = _widened(to_program(source).module(check_guards=False))
    inputs = tuple(
        item.model_copy(update={"dtype": "float32"}) if DTYPES[item.dtype] in HALVES else item for item in source.inputs
    )
    apart = measure(source.model, lambda *args, **named: twin(*_cast(args), **_cast(named)), [draw(source.inputs)])
    names = " and ".join(sorted(str(kind).removeprefix("torch.") for kind in halves))
    note = (
        f"cast from {names} to float32, in which the file computes; the module, which rounds to {names}, "
        f"differs from that by {100 * apart.relative:.2g} % of its outputs' norm"
    )
    real: Any = source.calibration if isinstance(source.calibration, str) else [_cast(each) for each in source.real]
    return replace(source, model=twin, inputs=inputs, calibration=real), (note,)


def _halves(source: Source) -> set[torch.dtype]:
    """Types of 16 bits among the weights, the inputs, or, where there are none, what the forward computes with."""
    tensors = [*source.model.parameters(), *source.model.buffers()]
    held = {tensor.dtype for tensor in tensors} | {DTYPES[item.dtype] for item in source.inputs}
    if held.isdisjoint(HALVES):
        seen = _Seen()
        args, named = draw(source.inputs)
        try:
            with torch.no_grad(), seen:
                source.model(*args, **named)
        except Exception:  # what the forward has against the example is told where its graph is made
            return set()
        held = seen.dtypes
    return held.intersection(HALVES)


class _Seen(TorchDispatchMode):
    """Takes down the types of all that operators give."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: set[torch.dtype] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        self.dtypes |= {leaf.dtype for leaf in tree_leaves(found) if isinstance(leaf, Tensor)}
        return found


def _widened(graph: nn.Module) -> nn.Module:
    """A graph with singles in place of all halves; autocast, which would make halves again, is off."""
    with quiet():
        twin = copy.deepcopy(graph)
    for part in (module for module in twin.modules() if isinstance(module, torch.fx.GraphModule)):
        for node in part.graph.nodes:
            node.args, node.kwargs = map_aggregate(node.args, _wide), map_aggregate(node.kwargs, _wide)
            if node.target is torch.ops.higher_order.wrap_with_autocast:
                device, dtype, _, *rest = node.args
                node.args = (device, dtype, False, *rest)
        part.recompile()
    for module in twin.modules():
        for name, value in vars(module).items():
            if isinstance(value, Tensor):
                setattr(module, name, _cast(value))
    return twin._apply(_cast)


def _wide(value: Any) -> Any:
    return torch.float32 if isinstance(value, torch.dtype) and value in HALVES else value


def _cast(values: Any) -> Any:
    """Halves among some tensors as singles."""
    return tree_map(lambda v: v.float() if isinstance(v, Tensor) and v.dtype in HALVES else v, values)
