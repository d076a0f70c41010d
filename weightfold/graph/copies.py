"""Copies of the modules of a model that leave the model alone: its tensors are shared, cloned, or left without storage.

`copy.deepcopy` is no copy of a model whose parts refer to one another through code. A hook that is a closure over the
model, or over a list that the forward reads, would go on writing into the original; a tensor with a history cannot be
copied at all; a lock ends everything. Here closures are bound to the copy, and tensors are never followed back into
the computation that they came from.
"""

from __future__ import annotations

import copyreg
import functools
import inspect
import threading
import types
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.nn.utils import parametrize

from weightfold.errors import TraceError

FORWARD_HOOKS = ("_forward_pre_hooks", "_forward_hooks")
BACKWARD_HOOKS = ("_backward_pre_hooks", "_backward_hooks")
LOCKS = {type(threading.Lock()): threading.Lock, type(threading.RLock()): threading.RLock}
WRAPPED = {DataParallel: "module", DistributedDataParallel: "module"}
"""Wrappers that compute what the module inside does, and the name under which they hold it."""


def itself(tensor: Tensor) -> Tensor:
    """The same tensor."""
    return tensor


def cloned(source: Tensor) -> Tensor:
    """A tensor of its own with the same numbers."""
    copied = source.detach().clone()
    return nn.Parameter(copied, requires_grad=source.requires_grad) if isinstance(source, nn.Parameter) else copied


def meta_tensor(source: Tensor) -> Tensor:
    """A tensor without storage of the same kind."""
    empty = torch.empty_like(source, device="meta")
    if isinstance(source, nn.Parameter):
        return nn.Parameter(empty, requires_grad=source.requires_grad)
    return empty


def structural_copy(model: nn.Module, tensor: Callable[[Tensor], Tensor] = itself) -> nn.Module:
    """Copy the modules, with the user's forward hooks; ours, and those of the backward pass, are left behind.

    Args:
        tensor: what to put in place of each tensor (the default shares them; a meta copy costs nothing).
    Raises:
        TraceError: an attribute cannot be copied; names it.
    """
    twin = independent_copy(model, tensor)
    for module in twin.modules():
        _drop_hooks(module)
    with _own_tensors(twin):
        flush_caches(twin)
    return twin


def independent_copy(
    model: nn.Module, tensor: Callable[[Tensor], Tensor] = cloned, shared: Iterable[object] = ()
) -> nn.Module:
    """Copy a model with all of its hooks; what closures and bound methods refer to inside of it is the copy's.

    Args:
        tensor: what to put in place of each tensor.
        shared: tensors and modules that the copy holds as well.
    Raises:
        TraceError: an attribute cannot be copied; names it.
    Example:
        >>> net, seen = nn.Sequential(nn.Linear(2, 2)), []
        >>> handle = net[0].register_forward_hook(lambda module, args, out, seen=seen: seen.append(out))
        >>> _ = independent_copy(net)(torch.zeros(1, 2))
        >>> len(seen)
        0
    """
    copier = Copier(tensor)
    copier.memo |= {id(part): part for part in shared}
    try:
        return copier(model)
    except NotCopied as error:
        raise error.explained(model) from error


def _drop_hooks(module: nn.Module) -> None:
    for name in BACKWARD_HOOKS:
        getattr(module, name).clear()
    for name in FORWARD_HOOKS:
        hooks = getattr(module, name)
        for key in [key for key, hook in hooks.items() if is_ours(hook)]:
            del hooks[key]


def is_ours(hook: Any) -> bool:
    """Whether a hook is one of this library: it watches, or quantises in training; no part of the user's function."""
    code = code_of(hook)
    module = type(hook).__module__ if code is None else (getattr(code, "__module__", None) or "")
    return module.partition(".")[0] == __name__.partition(".")[0]


def code_of(hook: Any) -> types.FunctionType | None:
    """The function of Python that runs when a hook is called, if there is one."""
    while isinstance(hook, functools.partial):
        hook = hook.func
    if isinstance(hook, types.MethodType):
        hook = hook.__func__
    if not isinstance(hook, types.FunctionType):
        hook = inspect.getattr_static(type(hook), "__call__", None)
    return hook if isinstance(hook, types.FunctionType) else None


class NotCopied(Exception):
    """Something that cannot be copied, and the attributes through which it is reached."""

    def __init__(self, value: Any, error: Exception) -> None:
        super().__init__(str(error))
        self.value = value
        self.trail: list[str] = []

    def explained(self, model: nn.Module) -> TraceError:
        """The error for the user: module, attribute, type, and what to do."""
        path: list[str] = []
        steps = iter(step for step in self.trail if step not in ("_parameters", "_buffers"))
        attribute = ""
        for step in steps:
            if step != "_modules":
                attribute = step
                break
            path.append(next(steps, ""))
        where = f"module '{'.'.join(path)}' of '{type(model).__name__}'" if path else f"'{type(model).__name__}'"
        kind = type(self.value)
        name = kind.__name__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__name__}"
        return TraceError(
            f"The attribute '{attribute}' of {where} holds what cannot be copied ({name}): {self}",
            remedy="Open it where it is used instead of keeping it in the module, or give its class a '__deepcopy__'.",
        )


class _Inside(nn.Module):
    """Stands for a wrapper that computes what the module inside does (compiled, data parallel), under its name."""

    def __init__(self, name: str, training: bool) -> None:
        super().__init__()
        self.training = training
        self._name = name

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.get_submodule(self._name)(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name not in self._modules and self._modules:
                return getattr(self._modules[self._name], name)
            raise


class _Scripted(nn.Module):
    """Stands for a module of TorchScript: the same tensors under the same names, in a tree of plain modules.

    Tracers replace the tensors of modules for a while, and cannot look into those of TorchScript. So the program gets
    what this module holds, each time that it is called.
    """

    def __init__(self, program: Any, source: nn.Module, copier: Copier) -> None:
        super().__init__()
        self.training = source.training
        for name, parameter in source.named_parameters(recurse=False):
            self.register_parameter(name, copier(parameter))
        for name, buffer in source.named_buffers(recurse=False):
            self.register_buffer(name, copier(buffer), persistent=name not in source._non_persistent_buffers_set)
        for name, child in source.named_children():
            self.add_module(name, _Scripted(getattr(program, name), child, copier))
        self.__dict__["_program"] = (program,)  # in a tuple, for it shall be no child

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._ready()(*args, **kwargs)

    def _ready(self) -> Any:
        for module in self.modules():
            program = module.__dict__["_program"][0]
            for name, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
                program._c.setattr(name, tensor)
            program._c.setattr("training", module.training)
        return self.__dict__["_program"][0]

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "_program" not in self.__dict__:
                raise
            return getattr(self._ready(), name)


class Copier:
    """Copies like `copy.deepcopy`, with its protocol, and one memory for all that it is called with.

    Functions with a closure, weak references and locks are copied too; tensors become what ``tensor`` makes of them.

    Args:
        tensor: what to put in place of each tensor.
    """

    def __init__(self, tensor: Callable[[Tensor], Tensor]) -> None:
        self.tensor = tensor
        self.memo: dict[int, Any] = {}
        self.memo[id(self.memo)] = []

    def __call__(self, value: Any) -> Any:
        found = self.memo.get(id(value), self)
        if found is not self:
            return found
        if _is_shared(value):
            return value
        copied = self._copied(value)
        if copied is not value:
            self._remember(value, copied)
        return copied

    def _remember(self, value: Any, copied: Any) -> None:
        self.memo[id(value)] = copied
        self.memo[id(self.memo)].append(value)  # as long as the memory lasts, nobody else gets this id

    def _copied(self, value: Any) -> Any:
        kind = type(value)
        if kind in weakref.ProxyTypes:
            return weakref.proxy(self(value.__repr__.__self__))
        if isinstance(value, Tensor):
            return self.tensor(value if value.is_leaf else value.detach())
        if kind in (list, dict, tuple, set):
            return self._container(value)
        if kind is types.FunctionType:
            return self._function(value)
        if kind is types.MethodType:
            return types.MethodType(value.__func__, self(value.__self__))
        if isinstance(value, weakref.ReferenceType):
            return self._weak(value)
        if kind in LOCKS:
            return LOCKS[kind]()
        if isinstance(value, torch.Generator):
            return value.clone_state()
        if isinstance(value, torch.jit.ScriptModule):
            return _Scripted(value.__deepcopy__({}), value, self)
        if isinstance(value, nn.Module) and (name := _name_inside(value)) is not None:
            return self._wrapper(value, name)
        return self._object(value)

    def _container(self, value: Any) -> Any:
        if isinstance(value, tuple):
            copied = tuple(self._step(k, v) for k, v in enumerate(value))
            return value if all(a is b for a, b in zip(value, copied, strict=True)) else copied
        copied = type(value)()
        self._remember(value, copied)
        if isinstance(value, dict):
            copied.update((self(k), self._step(k, v)) for k, v in list(value.items()))
        elif isinstance(value, list):
            copied.extend(self._step(k, v) for k, v in enumerate(value))
        else:
            copied.update(map(self, value))
        return copied

    def _step(self, name: Any, value: Any) -> Any:
        try:
            return self(value)
        except NotCopied as error:
            error.trail.insert(0, str(name))
            raise

    def _function(self, value: types.FunctionType) -> Any:
        """A function whose closure and defaults refer to copies; itself where they refer to nothing that is copied."""
        cells = value.__closure__ or ()
        held = [*_contents(cells), *(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values()]
        if all(map(_is_shared, held)):
            return value
        fresh = tuple(types.CellType() for _ in cells)
        copied = types.FunctionType(value.__code__, value.__globals__, value.__name__, None, fresh)
        copied.__qualname__, copied.__module__ = value.__qualname__, value.__module__
        copied.__dict__.update(vars(value))
        self._remember(value, copied)
        for old, new in zip(cells, fresh, strict=True):
            for content in _contents([old]):
                new.cell_contents = self._held(content)
        if value.__defaults__ is not None:
            copied.__defaults__ = tuple(map(self._held, value.__defaults__))
        if value.__kwdefaults__ is not None:
            copied.__kwdefaults__ = {name: self._held(held) for name, held in value.__kwdefaults__.items()}
        now = [*_contents(fresh), *(copied.__defaults__ or ()), *(copied.__kwdefaults__ or {}).values()]
        if all(a is b or b is copied for a, b in zip(held, now, strict=True)):
            self.memo[id(value)] = copied = value
        return copied

    def _held(self, value: Any) -> Any:
        """What a function holds: shared where it cannot be copied (a file that a hook logs to)."""
        try:
            return self(value)
        except NotCopied:
            return value

    def _weak(self, value: weakref.ReferenceType[Any]) -> Any:
        target = value()
        return weakref.ref(self(target)) if isinstance(target, nn.Module) else value

    def _wrapper(self, value: nn.Module, name: str) -> nn.Module:
        copied = _Inside(name, value.training)
        self._remember(value, copied)
        copied._modules[name] = self(getattr(value, name))
        for hooks in (*FORWARD_HOOKS, "_forward_pre_hooks_with_kwargs", "_forward_hooks_with_kwargs"):
            setattr(copied, hooks, self(getattr(value, hooks)))
        return copied

    def _object(self, value: Any) -> Any:
        """Whatever else there is, by the protocol of `copy` and `pickle`."""
        try:
            own = getattr(value, "__deepcopy__", None)
            if own is not None and code_of(own) is not None and code_of(own).__module__ == parametrize.__name__:
                return self._rebuilt(value, type(value).__new__, (type(value),), vars(value))
            if own is not None:
                self._remember_tensors(value)
                return own(self.memo)
            reduce = copyreg.dispatch_table.get(type(value))
            plan: Any = value.__reduce_ex__(4) if reduce is None else reduce(value)
            return value if isinstance(plan, str) else self._rebuilt(value, *plan)
        except (NotCopied, RecursionError):
            raise
        except Exception as error:
            raise NotCopied(value, error) from error

    def _remember_tensors(self, value: Any) -> None:
        """Tensors of a module that copies itself are found in the memory by its own code."""
        for source in (*value.parameters(), *value.buffers()) if isinstance(value, nn.Module) else ():
            self._remember(source, self(source))

    def _rebuilt(
        self,
        value: Any,
        make: Callable[..., Any],
        args: tuple[Any, ...],
        state: Any = None,
        items: Iterator[Any] | None = None,
        pairs: Iterator[Any] | None = None,
        set_state: Callable[[Any, Any], None] | None = None,
    ) -> Any:
        copied = make(*map(self, args))
        self._remember(value, copied)
        for item in items or ():
            copied.append(self(item))
        for key, item in pairs or ():
            copied[self(key)] = self._step(key, item)
        if state is not None:
            self._set_state(copied, self._state(value, state), set_state)
        return copied

    def _state(self, value: Any, state: Any) -> Any:
        if not isinstance(value, nn.Module) or not isinstance(state, dict):
            return self(state)
        hooks = {name: type(state[name])() for name in (*FORWARD_HOOKS, *BACKWARD_HOOKS) if name in state}
        for name in hooks:
            hooks[name].update((key, self._held(hook)) for key, hook in state[name].items())
        return {k: hooks[k] if k in hooks else self._step(k, v) for k, v in state.items()}

    def _set_state(self, copied: Any, state: Any, set_state: Callable[[Any, Any], None] | None) -> None:
        if set_state is not None:
            set_state(copied, state)
        elif hasattr(copied, "__setstate__"):
            copied.__setstate__(state)
        else:
            named, slots = state if isinstance(state, tuple) and len(state) == 2 else (state, None)
            if named:
                copied.__dict__.update(named)
            for name, item in (slots or {}).items():
                setattr(copied, name, item)


def _contents(cells: Iterable[types.CellType]) -> Iterator[Any]:
    """What the filled ones among some cells hold."""
    for cell in cells:
        try:
            yield cell.cell_contents
        except ValueError:
            continue


def _is_shared(value: Any) -> bool:
    """Whether a copy holds the same: what cannot change, code, and classes."""
    return value is None or isinstance(value, _SHARED)


_SHARED = (
    *(bool, int, float, complex, str, bytes, type, range, slice),
    *(types.BuiltinFunctionType, types.ModuleType, types.CodeType, property, type(Ellipsis), type(NotImplemented)),
    *(torch.dtype, torch.device, torch.layout, torch.memory_format, torch.Size),
)


def _name_inside(module: nn.Module) -> str | None:
    if isinstance(module._modules.get("_orig_mod"), nn.Module):
        return "_orig_mod"
    return next((name for kind, name in WRAPPED.items() if isinstance(module, kind)), None)


@contextmanager
def _own_tensors(twin: nn.Module) -> Iterator[None]:
    """Give modules that act on `train` tensors of their own for a while: some write into their weights there."""
    places: list[tuple[dict[str, Any], str, Tensor, Tensor]] = []
    acting = [module for module in twin.modules() if type(module).train is not nn.Module.train]
    for module in dict.fromkeys(inner for outer in acting for inner in outer.modules()):
        held: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
        for tensors in held:
            for name, tensor in tensors.items():
                if tensor is not None:
                    places.append((tensors, name, tensor, cloned(tensor)))
    for tensors, name, _, own in places:
        tensors[name] = own
    try:
        yield
    finally:
        for tensors, name, shared, own in places:
            if tensors.get(name) is own:
                tensors[name] = shared


def flush_caches(model: nn.Module) -> None:
    """Let modules that keep tensors computed from their weights in eval mode (and drop them in `train`) drop them."""
    own = [module for module in model.modules() if type(module).train is not nn.Module.train]
    modes = [(part, part.training) for module in own for part in module.modules()]
    try:
        for module in own:
            module.train(True)
    finally:
        for part, training in modes:
            part.training = training
