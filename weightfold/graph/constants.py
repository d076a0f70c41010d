"""Forwards that branch on numbers which they make from nothing but written-down ones (a mask of ones by default).

`torch.export` refuses every branch on the value of a tensor. Where that value depends neither on the input nor on a
parameter, the branch is the same for every input of these shapes: the program with this branch taken is the forward.
"""

from __future__ import annotations

import operator
from contextlib import redirect_stderr
from io import StringIO
from typing import Any

import torch
import torch._functorch.config as functorch_config
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils import _pytree as pytree

NUMBERS = (torch.SymInt, torch.SymFloat, torch.SymBool)

MAX_NUMBERS = 1 << 20
"""Tensors up to this size are followed."""


def export_with_constant_branches(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> torch.export.ExportedProgram | None:
    """Export a model along the branches that the example takes; None if one of them depends on more than constants."""
    with functorch_config.patch(fake_tensor_propagate_real_tensors=True), redirect_stderr(StringIO()):
        program = torch.export.export(
            model, args, kwargs, strict=False, prefer_deferred_runtime_asserts_over_guards=True
        )
        pure = program.run_decompositions({})
    known = constants_of(program)
    asked = [a for node in _nodes(program) if _reads_values(node) for a in node.all_input_nodes]
    if _lost_reads(program) or any(a not in known for a in asked) or any(map(_open_size, pure.graph.nodes)):
        return None
    return pure


def _lost_reads(program: torch.export.ExportedProgram) -> bool:
    """Whether a number was read off a tensor by an operator that is no longer in the program."""
    vals = [v for node in _nodes(program) for v in pytree.tree_leaves(node.meta.get("val"))]
    env = next((v.fake_mode.shape_env for v in vals if isinstance(v, FakeTensor)), None)
    seen = {symbol for v in vals if isinstance(v, NUMBERS) for symbol in v.node._expr.free_symbols}
    if env is None:
        return False
    read = env.real_tensor_prop_unbacked_vals
    return any(not seen & (number.free_symbols | env.replace(number).free_symbols) for number in read)


def _nodes(program: torch.export.ExportedProgram) -> list[torch.fx.Node]:
    parts = [m for m in program.graph_module.modules() if isinstance(m, torch.fx.GraphModule)]
    return [node for part in parts for node in part.graph.nodes]


def _reads_values(node: torch.fx.Node) -> bool:
    """Whether an operator makes a number of Python of a tensor."""
    makes = [v for v in pytree.tree_leaves(node.meta.get("val")) if v is not None and not isinstance(v, Tensor)]
    takes = [a for a in node.all_input_nodes if isinstance(a.meta.get("val"), Tensor)]
    return isinstance(node.target, torch._ops.OpOverload) and bool(makes) and bool(takes)


def _open_size(node: torch.fx.Node) -> bool:
    """Whether a tensor's shape depends on the values of another."""
    tensors = [v for v in pytree.tree_leaves(node.meta.get("val")) if isinstance(v, Tensor)]
    return any(not isinstance(n, int) for v in tensors for n in v.shape)


def constants_of(program: torch.export.ExportedProgram) -> dict[torch.fx.Node, Any]:
    """What a program computes from its own constants, by node: it is run, as far as they reach."""
    lifted = program.graph_signature.inputs_to_lifted_tensor_constants
    known: dict[torch.fx.Node, Any] = {}
    for node in program.graph.nodes:
        constant = program.constants.get(lifted.get(node.name, ""))
        if node.op == "placeholder" and isinstance(constant, Tensor):
            known[node] = constant.detach().clone()
        elif node.op == "call_function" and _can_run(node) and all(a in known for a in node.all_input_nodes):
            args, kwargs = pytree.tree_map_only(torch.fx.Node, known.__getitem__, (node.args, dict(node.kwargs)))
            known[node] = node.target(*args, **kwargs)
        elif node.op == "call_function":
            _forget_written(node, known)
    return known


def _forget_written(node: torch.fx.Node, known: dict[torch.fx.Node, Any]) -> None:
    """An operator that was not run may have written into known tensors: nothing that shares their memory is known."""
    if isinstance(node.target, torch._ops.OpOverload) and not node.target._schema.is_mutable:
        return
    lost = {address for a in node.all_input_nodes if a in known for address in _memory(known[a])}
    for other in [n for n, value in known.items() if lost & _memory(value)]:
        del known[other]


def _memory(value: Any) -> set[int]:
    return {v.untyped_storage().data_ptr() for v in pytree.tree_leaves(value) if isinstance(v, Tensor)}


def _can_run(node: torch.fx.Node) -> bool:
    """Small operators that give the same result every time and return tensors."""
    tensors = [v for v in pytree.tree_leaves(node.meta.get("val")) if isinstance(v, Tensor)]
    small = all(isinstance(n, int) for v in tensors for n in v.shape) and sum(v.numel() for v in tensors) <= MAX_NUMBERS
    if node.target is operator.getitem or not tensors or not small:
        return small and bool(tensors)
    return isinstance(node.target, torch._ops.OpOverload) and torch.Tag.nondeterministic_seeded not in node.target.tags
