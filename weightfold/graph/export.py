"""From a model to the operators that its forward runs: `torch.export` on a copy.

Forward hooks are part of the forward. A hook without which all outputs are the same only watches: nothing of it is left
in the program, and where it cannot be followed (it prints a number, it writes a file) it is left out.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager, redirect_stderr
from io import StringIO
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Distribution
from torch.nn.parameter import is_lazy
from torch.utils import _pytree as pytree

from weightfold.errors import TraceError
from weightfold.graph import rules
from weightfold.graph.constants import export_with_constant_branches
from weightfold.graph.copies import Copier, cloned, structural_copy
from weightfold.graph.dead_ends import without_dead_ends
from weightfold.graph.failures import explain, failing_hook, is_branch
from weightfold.graph.hooks import Hook, changes_nothing, numbers_of, take_off, undisturbed
from weightfold.graph.standins import traceable

PARTIAL_WRITES = frozenset({"copy", "add", "sub", "mul", "div", "addcmul", "lerp", "masked_fill", "where", "fill",
                            "zero", "index_put", "index_add", "index_copy", "scatter", "scatter_add", "index_fill",
                            "masked_scatter"})  # fmt: skip
"""Operators whose in-place form, on a view, changes a part of a tensor by what another tensor holds."""

Example = Any
"""One tensor, a tuple of positional arguments, or a mapping of keyword arguments."""

PLAIN = (Tensor, bool, int, float, complex, str, type(None), torch.dtype, torch.device, torch.layout)
"""What `torch.export` takes inside of the containers that it knows."""


def arguments(example: Example) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments that an example stands for."""
    if isinstance(example, Mapping):
        return (), dict(example)
    if (
        isinstance(example, tuple)
        and len(example) == 2
        and isinstance(example[0], tuple)
        and isinstance(example[1], dict)
    ):
        return example
    return (tuple(example), {}) if isinstance(example, (tuple, list)) else ((example,), {})


@contextmanager
def quiet() -> Iterator[None]:
    """Keep the tracer's side effects away: RNG state, warnings, the fused attention path, gradients."""
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=range(torch.cuda.device_count())))
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        for name in ("torch._subclasses.fake_tensor", "torch.fx.experimental.symbolic_shapes"):
            logger = logging.getLogger(name)
            stack.callback(logger.setLevel, logger.level)
            logger.setLevel(logging.CRITICAL + 1)
        stack.enter_context(_unvalidated())
        fast = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)
        stack.callback(torch.backends.mha.set_fastpath_enabled, fast)
        yield


@contextmanager
def _unvalidated() -> Iterator[None]:
    """Let distributions be made without a look at the values of their parameters, which is a branch on data."""
    before = Distribution._validate_args
    Distribution.set_default_validate_args(False)
    try:
        yield
    finally:
        Distribution.set_default_validate_args(before)


def export_program(model: nn.Module, example: Example) -> torch.export.ExportedProgram:
    """Export a structural copy of a model; what no output needs is left out.

    Raises:
        TraceError: the forward fails on the example, branches on data, or cannot be followed.
    """
    refuse_unready(model)
    given = arguments(example)
    left_out: list[Hook] = []
    with quiet(), undisturbed(model):
        while True:
            twin = _twin(model, left_out)
            try:
                with traceable():
                    program = _exported(twin, *given)
                return without_dead_ends(program)
            except Exception as error:
                hook = failing_hook(twin, error)
                if hook is None or not changes_nothing(model, given, hook, left_out):
                    raise explain(twin, type(model).__name__, error, hook, runs=runs(model, example)) from error
                left_out.append(hook)


def refuse_unready(model: nn.Module) -> None:
    """Refuse what has no tensors that could be edited."""
    if isinstance(model, torch.jit.ScriptModule):
        raise TraceError(
            f"The model is a program of TorchScript ('{model.original_name}'), whose modules cannot be edited.",
            remedy="Trace the module that it was made from, and make the program of the result.",
        )
    unmade = next((name for name, p in model.named_parameters() if is_lazy(p)), None)
    if unmade is not None:
        raise TraceError(
            f"'{unmade}' of '{type(model).__name__}' has no size yet: its module is a lazy one.",
            remedy="Call the model once on an example: its lazy modules take their sizes from it.",
        )


def _twin(model: nn.Module, left_out: Collection[Hook]) -> nn.Module:
    twin = take_off(structural_copy(model), left_out)
    config = getattr(twin, "config", None)
    if config is not None and getattr(config, "use_cache", None):
        config.use_cache = False
    twin.register_forward_hook(lambda *call: numbers_of(call[-1]))
    return twin


def runs(model: nn.Module, example: Example) -> bool:
    """Whether a copy of the model runs on the example."""
    args, kwargs = pytree.tree_map_only(Tensor, lambda t: t.detach().clone(), arguments(example))
    try:
        structural_copy(model, cloned)(*args, **kwargs)
    except Exception:  # whatever it is, it is the user's own
        return False
    return True


def _exported(twin: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.export.ExportedProgram:
    if not all(isinstance(leaf, PLAIN) for leaf in pytree.tree_leaves((args, kwargs))):
        args, kwargs = _flattened(twin, args, kwargs), {}
    try:
        with redirect_stderr(StringIO()):  # where it fails, PyTorch prints all that it had traced
            program = torch.export.export(twin, args, kwargs, strict=False)
        rewritten = _writes_through_views(program.graph_module) or _is_transformed(program.graph_module)
        return program.run_decompositions({}) if rewritten else program
    except Exception as error:
        if is_branch(error) and (program := _along_constants(twin, args, kwargs)) is not None:
            return program
        raise


def _flattened(twin: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, ...]:
    """The tensors of arguments that hold objects of the user's own; the copy puts them together again."""
    tensors: list[Tensor] = []
    Copier(lambda tensor: tensors.append(tensor) or tensor)((args, kwargs))

    def restore(_: nn.Module, given: tuple[Any, ...], __: dict[str, Any]) -> Any:
        now = {id(tensor): value for tensor, value in zip(tensors, given, strict=True)}
        return Copier(lambda tensor: now.get(id(tensor), tensor))((args, kwargs))

    forward = twin.forward
    twin.forward = lambda *given, **named: forward(*given, **named)  # one that takes any number of tensors
    twin.register_forward_pre_hook(restore, prepend=True, with_kwargs=True)
    return tuple(tensors)


def _along_constants(twin: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    try:
        return export_with_constant_branches(twin, args, kwargs)
    except Exception:  # whatever it is, the first refusal says more
        return None


def _writes_through_views(module: torch.fx.GraphModule) -> bool:
    """Whether values are written into parts of a tensor: then the program is rewritten without such writes."""
    return any(
        rules.node_name(node) in PARTIAL_WRITES and rules.in_place(node) and rules.is_view(node.args[0])
        for part in module.modules()
        if isinstance(part, torch.fx.GraphModule)
        for node in part.graph.nodes
        if node.op == "call_function" and node.args and isinstance(node.args[0], torch.fx.Node)
    )


def _is_transformed(module: torch.fx.GraphModule) -> bool:
    """Whether a part runs under `torch.vmap` or the like: then the program is rewritten as what that computes."""
    return any(
        node.op == "call_function" and getattr(node.target, "__module__", "") == "torch._functorch.predispatch"
        for node in module.graph.nodes
    )
