"""Leave out of a program what only looks at a tensor, and whose result nothing takes up: what a hook prints or stores.

Such an operator says nothing about the function, but a mean over channels, say, would count as one that reads them.
What joins several tensors stays, needed or not: it has to go on running after an edit, so their sizes hang together.
"""

from __future__ import annotations

import operator

import torch
from torch.export import ExportedProgram
from torch.fx import Node


def without_dead_ends(program: ExportedProgram) -> ExportedProgram:
    """Remove operators on one tensor whose results nothing needs; the program itself is changed.

    Example:
        >>> net, seen = torch.nn.Linear(2, 3), []
        >>> handle = net.register_forward_hook(lambda module, args, out: seen.append(out.abs().mean()))
        >>> program = torch.export.export(net, (torch.zeros(1, 2),))
        >>> [str(n.target) for n in without_dead_ends(program).graph.nodes if n.op == "call_function"]
        ['aten.linear.default']
    """
    graph = program.graph_module.graph
    for node in reversed(list(graph.nodes)):
        if not node.users and _only_looks(node):
            graph.erase_node(node)
    return program


def _only_looks(node: Node) -> bool:
    """Whether a node takes at most one tensor and writes into none."""
    if node.op != "call_function" or len(node.all_input_nodes) > 1:
        return False
    if isinstance(node.target, torch._ops.OpOverload):
        return not node.target._schema.is_mutable
    return node.target is operator.getitem
