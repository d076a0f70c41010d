"""The graph of a model inside its file: what lets a model of the user's own be loaded without the user's class.

The graph is PyTorch's exported program without its weights, a few kilobytes of text in the file's metadata; the weights
are the file's own tensors. It runs no code of the file, only operators of PyTorch.
"""

from __future__ import annotations

import base64
import io
import zlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from weightfold.errors import ArtifactError, ExportError
from weightfold.export.program import to_program
from weightfold.export.source import Source
from weightfold.runtime.graphs import graph_module
from weightfold.runtime.opened import program_of
from weightfold.runtime.require import quiet

PROGRAM = "program"
"""Key of the metadata."""
_MOST = 256
"""Bytes of a graph for each byte that it takes compressed: a hundred equal blocks come to 30."""
ORIGINS = ("stack_trace", "nn_module_stack", "source_fn_stack", "torch_fn", "from_node")
"""Metadata of a node: lines and paths of the machine, names of modules and functions."""


def program_text(source: Source) -> str | None:
    """Write a model's graph as text; None where it cannot be expressed as a graph, or no example is known."""
    if not source.inputs:
        return None
    try:
        program = to_program(source)
    except ExportError:
        return None
    for name, value in list(program.state_dict.items()):
        program.state_dict[name] = _like(value, torch.zeros((), dtype=value.dtype).expand(value.shape))
    _bare_(program)
    buffer = io.BytesIO()
    with quiet():
        torch.export.save(program, buffer)
    return base64.b64encode(zlib.compress(buffer.getvalue(), 9)).decode()


def _bare_(program: Any) -> None:
    """Take off what computes nothing: the inputs that it was traced with, and where each operator came from."""
    program.example_inputs = None
    for part in program.graph_module.modules():
        for node in part.graph.nodes if isinstance(part, torch.fx.GraphModule) else ():
            for key in ORIGINS:
                node.meta.pop(key, None)


def program_module(text: str, tensors: Mapping[str, Tensor], where: str) -> nn.Module:
    """Make the module of a graph and its tensors; it computes as in evaluation mode.

    Args:
        text: what `program_text` gave.
        tensors: by every name that the module has for them.
        where: the file, for errors.
    Raises:
        ArtifactError: the text is damaged, or a tensor is missing or of another shape; names it.
    """
    try:
        short, inflate = base64.b64decode(text, validate=True), zlib.decompressobj()
        data = inflate.decompress(short, _MOST * len(short) + 1)
        if not inflate.eof:
            raise ValueError("it is cut off or too long")
    except (ValueError, zlib.error) as error:
        raise ArtifactError(f"The graph in '{where}' is damaged: {error}.", remedy="Copy or write it again.") from None
    program: Any = program_of(data, where)
    for name, value in list(program.state_dict.items()):
        given = tensors.get(name)
        if given is None or given.shape != value.shape:
            found = "lacks it" if given is None else f"holds the shape {tuple(given.shape)}"
            raise ArtifactError(
                f"The graph in '{where}' needs '{name}' of shape {tuple(value.shape)}; the file {found}."
            )
        program.state_dict[name] = _like(value, given)
    return graph_module(program)


def _like(old: Tensor, new: Tensor) -> Tensor:
    """A parameter in the place of a parameter, a buffer in that of a buffer."""
    return nn.Parameter(new, requires_grad=False) if isinstance(old, nn.Parameter) else new
