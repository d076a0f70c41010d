"""The user's forward hooks: which there are, which of them only watch, and what outside of the model they write to."""

from __future__ import annotations

import types
from collections.abc import Callable, Collection, Iterator, MutableMapping, MutableSequence, MutableSet
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from weightfold.graph.copies import FORWARD_HOOKS, cloned, code_of, is_ours, structural_copy

NUMBERS = (Tensor, bool, int, float, complex, torch.SymInt, torch.SymFloat, torch.SymBool)
CODE = (nn.Module, type, types.ModuleType, types.FunctionType, types.MethodType, types.BuiltinFunctionType)

MAX_KEPT = 100_000
"""Entries of lists and dictionaries outside of a model that are put back after its hooks have run."""


@dataclass(frozen=True)
class Hook:
    """Where a forward hook stands: path of its module, which kind, its number there. A copy has it in its place."""

    path: str
    kind: str
    key: int

    def of(self, model: nn.Module) -> Any:
        """The hook itself."""
        return getattr(model.get_submodule(self.path), self.kind)[self.key]

    def described(self, model: nn.Module) -> str:
        """For a message: kind, name, place in the code, module."""
        hook = self.of(model)
        code = code_of(hook)
        name = type(hook).__name__ if code is None or not isinstance(hook, types.FunctionType) else code.__qualname__
        line = "" if code is None else f" ({code.__code__.co_filename}:{code.__code__.co_firstlineno})"
        kind = "forward pre-hook" if "pre" in self.kind else "forward hook"
        return f"{kind} '{name}'{line} on '{self.path}'" if self.path else f"{kind} '{name}'{line}"


def hooks_of(model: nn.Module) -> list[Hook]:
    """All forward hooks that are not ours, by module."""
    return [
        Hook(path, kind, key)
        for path, module in model.named_modules()
        for kind in FORWARD_HOOKS
        for key, hook in getattr(module, kind).items()
        if not is_ours(hook)
    ]


def take_off(twin: nn.Module, hooks: Collection[Hook]) -> nn.Module:
    """Remove hooks from a copy."""
    for hook in hooks:
        del getattr(twin.get_submodule(hook.path), hook.kind)[hook.key]
    return twin


def numbers_of(value: Any) -> list[Any]:
    """Every tensor and number in what a forward returns, in order, whatever objects hold them."""
    found: list[Any] = []
    _collect(value, found, set())
    return found


def _collect(value: Any, found: list[Any], seen: set[int]) -> None:
    for leaf in pytree.tree_leaves(value):
        if isinstance(leaf, NUMBERS):
            found.append(leaf)
        elif not isinstance(leaf, CODE) and id(leaf) not in seen:
            seen.add(id(leaf))
            _collect(attributes_of(leaf), found, seen)


def attributes_of(value: Any) -> dict[str, Any]:
    """What a plain object holds, by name."""
    slots = [name for kind in reversed(type(value).__mro__) for name in _listed(vars(kind).get("__slots__", ()))]
    return {name: getattr(value, name) for name in slots if hasattr(value, name)} | getattr(value, "__dict__", {})


def _listed(slots: Any) -> list[str]:
    names = [slots] if isinstance(slots, str) else list(slots)
    return [name for name in names if name not in ("__dict__", "__weakref__")]


def changes_nothing(
    model: nn.Module, arguments: tuple[tuple[Any, ...], dict[str, Any]], hook: Hook, without: Collection[Hook]
) -> bool:
    """Whether all outputs are the same without a hook, for the model's own weights and for others.

    Others, since a hook that adds ``B(A(x))`` with B still zero changes nothing yet.

    Args:
        without: hooks that are left out anyway.
    """
    try:
        return all(
            _same(_outputs(model, without, arguments, own), _outputs(model, [*without, hook], arguments, own))
            for own in (True, False)
        )
    except Exception:  # a model that does not run without it needs it
        return False


def _outputs(model: nn.Module, without: Collection[Hook], arguments: Any, own: bool) -> list[Any]:
    twin = take_off(structural_copy(model, cloned if own else _other_numbers()), without)
    args, kwargs = pytree.tree_map_only(Tensor, lambda t: t.detach().clone(), arguments)
    torch.manual_seed(0)
    with torch.no_grad():
        return numbers_of(twin(*args, **kwargs))


def _other_numbers() -> Callable[[Tensor], Tensor]:
    """Weights near the model's own, none of them zero; what is positive stays so."""
    generator = torch.Generator().manual_seed(0)

    def change(source: Tensor) -> Tensor:
        tensor = cloned(source)
        if tensor.is_floating_point() and not tensor.is_meta:
            noise = torch.rand(tensor.shape, generator=generator).to(tensor)
            with torch.no_grad():
                tensor.copy_(torch.where(tensor == 0, 0.1 * noise, tensor * (0.9 + 0.2 * noise)))
        return tensor

    return change


def _same(a: list[Any], b: list[Any]) -> bool:
    return len(a) == len(b) and all(
        torch.equal(torch.nan_to_num(x), torch.nan_to_num(y)) if isinstance(x, Tensor) else x == y
        for x, y in zip(a, b, strict=True)
    )


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Put back what the model's hooks write to global lists, dictionaries and objects, once they have run on copies."""
    held: dict[int, tuple[Any, Any]] = {}
    rebound: list[tuple[dict[str, Any], str, Any]] = []
    for hook in hooks_of(model):
        function = code_of(hook.of(model))
        if function is None:
            continue
        space = function.__globals__
        for name in _names(function.__code__):
            if name in space:
                rebound.append((space, name, space[name]))
                _keep(space[name], held)
    try:
        yield
    finally:
        for value, content in held.values():
            _put_back(value, content)
        for space, name, value in rebound:
            space[name] = value


def _names(code: types.CodeType) -> set[str]:
    """Names that a function and the functions inside of it look up."""
    inner = (part for part in code.co_consts if isinstance(part, types.CodeType))
    return set(code.co_names).union(*map(_names, inner))


def _keep(value: Any, held: dict[int, tuple[Any, Any]]) -> None:
    if isinstance(value, (*CODE, *NUMBERS, str, bytes)) or id(value) in held or len(held) > MAX_KEPT:
        return
    if isinstance(value, MutableMapping):
        held[id(value)] = (value, dict(value))
    elif isinstance(value, MutableSequence | MutableSet):
        held[id(value)] = (value, list(value))
    elif isinstance(getattr(value, "__dict__", None), dict):
        held[id(value)] = (value.__dict__, dict(value.__dict__))
    else:
        return
    content = held[id(value)][1]
    for inner in content.values() if isinstance(content, dict) else content:
        _keep(inner, held)


def _put_back(value: Any, content: Any) -> None:
    """Restore what a container holds, if it holds anything else by now."""
    if isinstance(content, dict):
        if value.keys() != content.keys() or any(value[key] is not item for key, item in content.items()):
            value.clear()
            value.update(content)
    elif len(value) != len(content) or any(a is not b for a, b in zip(value, content, strict=True)):
        value.clear()
        value.extend(content) if isinstance(value, MutableSequence) else value.__ior__(set(content))
