"""Where an operator comes from, and why a forward cannot be traced: module, line of the user's code, hook, remedy."""

from __future__ import annotations

import functools
import itertools
import linecache
import os
import re
import types
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

from weightfold.errors import TraceError
from weightfold.graph.copies import code_of
from weightfold.graph.hooks import Hook, hooks_of
from weightfold.graph.rules.core import module_path

CALLS = frozenset({"_call_impl", "_wrapped_call_impl", "inner"})
"""Functions of PyTorch in which a module is called, and its hooks are."""


def source_line(node: torch.fx.Node) -> str:
    """The module that an operator belongs to and where in the user's code, as " (in 'path', file:line: code)"."""
    text = node.meta.get("stack_trace") or ""
    hits = re.findall(r'File "([^"]+)", line (\d+), in [^\n]*\n\s*([^\n]*)', text)
    own = [f"{file}:{line}: {code.strip()}" for file, line, code in hits if _is_users(file)]
    return _place(module_path(node) or "", own[-1] if own else "")


def user_line(error: BaseException) -> str:
    """The last line of user code in a traceback, as " (file:line: code)"."""
    return _place("", _last_line(error))


def _place(path: str, line: str) -> str:
    parts = [part for part in (f"in '{path}'" if path else "", line) if part]
    return f" ({', '.join(parts)})" if parts else ""


def _last_line(error: BaseException) -> str:
    found = ""
    for frame, number in _frames(error):
        file = frame.f_code.co_filename
        if _is_users(file):
            found = f"{file}:{number}: {linecache.getline(file, number).strip()}"
    return found


def _frames(error: BaseException) -> Iterator[tuple[types.FrameType, int]]:
    trace = error.__traceback__
    while trace is not None:
        yield trace.tb_frame, trace.tb_lineno
        trace = trace.tb_next


def _is_users(file: str) -> bool:
    """Whether a file is neither PyTorch's, nor ours, nor made up."""
    return not (file.startswith("<") or file.startswith(_packages()))


@functools.cache
def _packages() -> tuple[str, ...]:
    homes = (Path(torch.__file__).parent, Path(__file__).parents[1])
    return tuple(f"{home}{os.sep}" for home in homes)


def said(error: BaseException) -> str:
    """Type and first line of an exception; some say nothing."""
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')[:200]}".rstrip(": ")


def failing_hook(twin: nn.Module, error: BaseException) -> Hook | None:
    """The user's forward hook in which an error was raised, if it was one."""
    frames = [frame for frame, _ in _frames(error)]
    for call, inside in itertools.pairwise(frames):
        module = call.f_locals.get("self")
        if call.f_code.co_name in CALLS and isinstance(module, nn.Module):
            for hook in hooks_of(twin):
                code = code_of(hook.of(twin))
                if twin.get_submodule(hook.path) is module and code is not None and code.__code__ is inside.f_code:
                    return hook
    return None


def failing_module(twin: nn.Module, error: BaseException) -> str:
    """Path of the innermost module whose call raised an error."""
    paths = {id(module): path for path, module in twin.named_modules()}
    called = [frame.f_locals.get("self") for frame, _ in _frames(error) if frame.f_code.co_name in CALLS]
    return next((paths[id(module)] for module in reversed(called) if id(module) in paths), "")


def is_branch(error: Exception) -> bool:
    """Whether a forward asked for the value of a tensor."""
    kind = type(error).__name__
    return "GuardOnDataDependent" in kind or "data-dependent" in str(error).lower() or "DynamicOutputShape" in kind


def explain(twin: nn.Module, name: str, error: Exception, hook: Hook | None, *, runs: bool) -> TraceError:
    """The error for the user.

    Args:
        twin: the copy that was traced.
        name: of the model's class.
        hook: where it was raised, if in one.
        runs: whether the model itself runs on the example.
    """
    text = re.sub(r" at 0x[0-9a-fA-F]+", "", str(error).strip().split("\n")[0][:300])
    what = f"{type(error).__name__}: {text}"
    where = _place(failing_module(twin, error), _last_line(error))
    if hook is not None and runs:
        return TraceError(
            f"The {hook.described(twin)} cannot be traced{user_line(error)}: {what}",
            remedy="Compute what it returns by operators of torch on tensors, or take it off.",
        )
    if is_branch(error):
        return TraceError(
            f"The forward of '{name}' branches on the values of a tensor{where}: {text}",
            remedy="Move the branch out of the forward, or replace it by torch.where / torch.cond.",
        )
    if runs:
        return TraceError(
            f"The forward of '{name}' runs on the example, but cannot be traced{where}: {what}",
            remedy="Compute this by operators of torch on tensors, or keep it out of the forward.",
        )
    mode, call = ("training", "eval") if twin.training else ("evaluation", "train")
    return TraceError(
        f"The forward of '{name}' in {mode} mode fails on the example{where}: {what}",
        remedy=f"Pass an example with the shapes and types that the model takes in {mode}; or call model.{call}().",
    )
