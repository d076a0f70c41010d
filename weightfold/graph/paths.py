"""What a forward does beside the path that an example takes: in the other mode, or behind a flag.

Many networks compute more in training than in evaluation: auxiliary heads, losses on the way, a normalisation by the
batch. Both forwards are traced where they differ, and what either says of the channels holds. A layer that neither runs
cannot be followed: where the code of the forward names it, the channels that it may read are left alone.
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Collection, Iterator
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from weightfold.graph.copies import cloned, meta_tensor, structural_copy
from weightfold.graph.export import Example, arguments, quiet
from weightfold.graph.group import ChannelGraph, ChannelGroup, Frozen
from weightfold.graph.hooks import undisturbed

TRUE_COPY_BYTES = 512 * 2**20
"""Models up to this size are run on a true copy, larger ones on one without storage."""
REMEDY = "Pass an example that runs it, or take it out of the model."


# the other mode -------------------------------------------------------------------------------------------------------


def other_mode(model: nn.Module, example: Example) -> nn.Module | None:
    """A copy of a model in the mode that it is not in, where its forward does other things there; it shares tensors.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.Dropout(), nn.Linear(8, 2))
        >>> other_mode(net, torch.zeros(1, 4)) is None
        True
    """
    if not any(_asks_for_mode(module) for module in model.modules()):
        return None
    calls = [_calls(model, example, training) for training in (False, True)]
    if None not in calls and calls[0] == calls[1]:
        return None
    return in_mode(model, not model.training)


def in_mode(model: nn.Module, training: bool) -> nn.Module:
    """A copy of a model in a mode; it shares tensors."""
    return _switched(structural_copy(model), training)


def _switched(model: nn.Module, training: bool) -> nn.Module:
    """Set the mode alone: what a module's own `train` may do to its weights is not done to shared ones."""
    for module in model.modules():
        module.training = training
    return model


def _asks_for_mode(module: nn.Module) -> bool:
    """Whether the code of a module, or a hook on it, looks at the mode."""
    own = [v for v in vars(module).values() if callable(v) and not isinstance(v, nn.Module)]
    hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
    return _class_asks(type(module)) or any("training" in _names_of(f) for f in (*own, *hooks))


@lru_cache(maxsize=4096)
def _class_asks(kind: type) -> bool:
    if issubclass(kind, torch.jit.ScriptModule):
        return True
    return any("train" in vars(k) or "training" in _names_of(f) for k in _own_classes(kind) for f in _parts(k))


def _own_classes(kind: type) -> Iterator[type]:
    """The classes that a module is made of, without PyTorch's own."""
    return (k for k in kind.__mro__ if k is not object and not f"{k.__module__}.".startswith("torch."))


def _parts(kind: type) -> Iterator[Any]:
    return (value.fget if isinstance(value, property) else value for value in vars(kind).values())


def _code_of(function: Any) -> types.CodeType | None:
    """The code behind a function, a method, or what wraps one."""
    function = inspect.unwrap(getattr(function, "func", function))
    code = getattr(getattr(function, "__func__", function), "__code__", None)
    return code if isinstance(code, types.CodeType) else None


def _names_of(function: Any, depth: int = 4) -> frozenset[str]:
    """Names that a function mentions, and those that functions which it calls by a global name or holds mention."""
    function = inspect.unwrap(getattr(function, "func", function))
    function = getattr(function, "__func__", function)
    names = _names_in(_code_of(function))
    if depth == 0 or not isinstance(function, types.FunctionType):
        return names
    known = function.__globals__
    called = [known[name] for name in names if isinstance(known.get(name), types.FunctionType)]
    held = [cell.cell_contents for cell in function.__closure__ or () if _is_filled(cell)]
    ours = [f for f in (*called, *held) if callable(f) and not isinstance(f, (type, nn.Module))]
    return names.union(*(_names_of(f, depth - 1) for f in ours if not _is_torchs(f)))


def _is_filled(cell: types.CellType) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return False
    return True


def _is_torchs(function: Any) -> bool:
    return f"{getattr(function, '__module__', '')}.".startswith("torch.")


def _names_in(code: types.CodeType | None) -> frozenset[str]:
    """Names of attributes and globals that a piece of code and the functions inside it mention."""
    if code is None:
        return frozenset()
    inner = [_names_in(c) for c in code.co_consts if isinstance(c, types.CodeType)]
    return frozenset(code.co_names).union(*inner)


_DROPS = frozenset({
    "dropout", "dropout_", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "alpha_dropout_", "feature_dropout",
    "feature_dropout_", "feature_alpha_dropout", "feature_alpha_dropout_",
})  # fmt: skip
_MODAL = frozenset({"batch_norm", "instance_norm", "scaled_dot_product_attention", "multi_head_attention_forward",
                    "lstm", "gru", "rnn_tanh", "rnn_relu"})  # fmt: skip
"""Functions that take the mode, or how much to drop, among their numbers."""


_VALUES: dict[str, type] = {"item": int, "__bool__": bool, "__int__": int, "__float__": float, "__index__": int}
"""Methods that ask for the value of a tensor."""


class _Calls(TorchFunctionMode):
    """Writes down which functions are called, with which numbers, and on which weights."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.weights = {id(t): name for name, t in (*model.named_parameters(), *model.named_buffers())}
        self.found: list[Any] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = getattr(func, "__name__", str(func)), kwargs or {}
        if name not in _DROPS and name not in ("__get__", "__set__") and not _counts_batches(name, args):
            leaves = () if name in _MODAL else pytree.tree_leaves((args, kwargs))
            numbers = tuple(a for a in leaves if isinstance(a, int | float) and a is not True)
            given = (a for a in pytree.tree_leaves((args, kwargs)) if isinstance(a, Tensor))
            weights = tuple(self.weights[id(a)] for a in given if id(a) in self.weights)
            self.found.append((name, numbers, weights))
        if name in _VALUES and args and isinstance(args[0], Tensor) and args[0].is_meta:
            return _VALUES[name](0)  # there is no value; both modes take the same path
        return func(*args, **kwargs)


def _counts_batches(name: str, args: Any) -> bool:
    """Whether a call counts up an integer, as batch norms do in training."""
    counter = args[0] if args and isinstance(args[0], Tensor) else None
    return name == "add_" and counter is not None and counter.numel() == 1 and not counter.is_floating_point()


def _calls(model: nn.Module, example: Example, training: bool) -> list[Any] | None:
    """What a forward calls in a mode; None where it does not run on a copy."""
    size = sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))
    meta = size > TRUE_COPY_BYTES or any(t.is_meta for t in (*model.parameters(), *model.buffers()))
    move: Callable[[Tensor], Tensor] = (lambda t: t.to("meta")) if meta else (lambda t: t.detach().clone())
    try:
        twin = _switched(structural_copy(model, meta_tensor if meta else cloned), training)
        calls = _Calls(twin)
        args, kwargs = pytree.tree_map_only(Tensor, move, arguments(example))
        with quiet(), undisturbed(model), torch.no_grad():
            torch.manual_seed(0)
            with calls:
                twin(*args, **kwargs)
    except Exception:  # whatever it is: then both modes are traced, and the tracer says why one cannot be
        return None
    return calls.found


# layers that do not run -----------------------------------------------------------------------------------------------


def without_unrun(model: nn.Module, graph: ChannelGraph, used: Collection[str]) -> ChannelGraph:
    """The graph without the groups whose channels may be read or written by a layer that did not run.

    Args:
        used: names of the tensors that the traced forwards use.
    """
    for layer, owner in _unrun(model, graph, used).items():
        widths = {n for name, shape in graph.shapes.items() if _inside(name, layer) for n in shape if n > 1}
        kind = type(model.get_submodule(owner)).__name__
        reason = (
            f"the layer '{layer}' does not run on the example, though the forward of '{kind}' names it: it may read or "
            f"write these channels. {REMEDY}"
        )
        lost = [g for g in graph if g.admits and _meets(g, owner, widths)]
        bare = {g.name: replace(g.without(set(g.admits), reason), gauges=()) for g in lost}
        frozen = [Frozen(a.tensor, a.dim, a.size, reason) for g in lost for a in g.axes if a.slabs == 1]
        graph = replace(graph.with_groups(tuple(bare.get(g.name, g) for g in graph)), frozen=(*graph.frozen, *frozen))
    return graph


def _meets(group: ChannelGroup, owner: str, widths: Collection[int]) -> bool:
    return any(_inside(axis.tensor, owner) and axis.slabs == 1 and axis.size in widths for axis in group.axes)


def _inside(name: str, path: str) -> bool:
    return not path or name.startswith(f"{path}.")


def _unrun(model: nn.Module, graph: ChannelGraph, used: Collection[str]) -> dict[str, str]:
    """Paths of layers that did not run though a forward names them, with the path of the module whose forward does."""
    live = {alias for alias, name in graph.aliases.items() if name in used} | set(used)
    idle: list[str] = []
    for path, module in model.named_modules():
        names = [f"{path}.{n}" for n, _ in module.named_parameters(remove_duplicate=False)]
        if path and names and not live.intersection(names) and not any(_inside(path, other) for other in idle):
            idle.append(path)
    owners = {path: _namer(model, path) for path in idle}
    return {p: owner for p, owner in owners.items() if owner is not None and not _runs_in_a_twin(model, p, owner, live)}


def _runs_in_a_twin(model: nn.Module, path: str, owner: str, live: Collection[str]) -> bool:
    """Whether the layer of that name runs in another module of the owner's class: the network itself says in which."""
    kind, leaf = type(model.get_submodule(owner)), path[len(owner) :].lstrip(".")
    twins = [other for other, module in model.named_modules() if type(module) is kind and other != owner]
    return any(name.startswith(f"{other}.{leaf}.".lstrip(".")) for other in twins for name in live)


def _namer(model: nn.Module, path: str) -> str | None:
    """Path of the module whose forward names a layer, be it in a list; None where none does."""
    while path:
        path, _, name = path.rpartition(".")
        owner = model.get_submodule(path)
        if not isinstance(owner, nn.ModuleList | nn.ModuleDict | nn.Sequential):
            found = _reached(type(owner))
            return path if name in found or "getattr" in found else None
    return None


@lru_cache(maxsize=4096)
def _reached(kind: type) -> frozenset[str]:
    """Names that the forward of a class mentions, itself or in methods that it mentions."""
    methods = {name: value for k in reversed(list(_own_classes(kind))) for name, value in vars(k).items()}
    seen: set[str] = set()
    waiting = ["forward"]
    while waiting:
        name = waiting.pop()
        found = _names_in(_code_of(methods.get(name)))
        waiting += [n for n in found if n not in seen and n in methods]
        seen |= found
    return frozenset(seen)
