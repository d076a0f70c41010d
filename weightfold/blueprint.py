"""What edits change of a module besides its values: shapes and integer attributes. Taken down, compared, put back."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from weightfold.artifact.format import Attribute, Input, Resized, Shape, Structure, Value, differences
from weightfold.errors import ArtifactError
from weightfold.graph.trace import Example, arguments

Place = tuple[str, str]
"""(path of a module, attribute)."""

_REMEDY = "Make the model with the settings that the saved one was made with, before any edit."


@dataclass(frozen=True)
class Blueprint:
    """Shapes, integer attributes and ties of a module at one time.

    Args:
        shapes: of every tensor in the module's state, by name.
        attributes: by (path of the module, attribute).
        aliases: other names of a tensor: alias -> first name.
    """

    shapes: Mapping[str, Shape]
    attributes: Mapping[Place, Value]
    aliases: Mapping[str, str]

    @classmethod
    def of(cls, model: nn.Module) -> Blueprint:
        """Take down a module as it is now.

        Example:
            >>> Blueprint.of(nn.Linear(3, 2)).attributes
            {('', 'in_features'): 3, ('', 'out_features'): 2}
        """
        return cls(
            {name: tuple(tensor.shape) for name, tensor in state_tensors(model).items()},
            dict(_attributes(model)),
            find_aliases(model),
        )

    def as_it_is(self) -> tuple[dict[str, Resized], tuple[Attribute, ...]]:
        """List every shape and attribute, where nobody knows which of them an edit has changed."""
        shapes = {name: shape for name, shape in self.shapes.items() if name not in self.aliases}
        sizes = {name: Resized(before=shape, after=shape) for name, shape in shapes.items()}
        found = (Attribute(module=p, name=n, before=value, after=value) for (p, n), value in self.attributes.items())
        return sizes, tuple(found)

    def changes_to(self, later: Blueprint) -> tuple[dict[str, Resized], tuple[Attribute, ...]]:
        """List what differs in a later blueprint of the same module."""
        changed = tuple(
            Attribute(module=path, name=name, before=value, after=later.attributes[path, name])
            for (path, name), value in self.attributes.items()
            if (path, name) in later.attributes and later.attributes[path, name] != value
        )
        return differences(self.shapes, later.shapes, later.aliases), changed


@dataclass(frozen=True)
class Origin:
    """What a network was before its first edit, an example of what it takes, and real inputs.

    Args:
        before: its blueprint then.
        inputs: empty where the example is not a flat list of tensors.
        probe: batches of inputs that the compressor measures by.
    """

    before: Blueprint
    inputs: tuple[Input, ...]
    probe: tuple[Any, ...] = ()


_ORIGINS: WeakKeyDictionary[nn.Module, Origin] = WeakKeyDictionary()
"""Beside the networks, not in them: what was compressed stays a plain module, and is forgotten with it."""


def remember(model: nn.Module, example: Example, probe: Iterable[Any] = ()) -> None:
    """Take down a module before its first edit, so that it can be saved later without being told what it was."""
    known = _ORIGINS.get(model, Origin(Blueprint.of(model), describe(example)))
    _ORIGINS[model] = replace(known, probe=tuple(probe) or known.probe)


def describe(example: Example) -> tuple[Input, ...]:
    """Take down an example input as sizes and types; nothing where it holds more than tensors.

    Example:
        >>> describe((torch.zeros(1, 3), torch.tensor([[4, 2]])))[1]
        Input(shape=(1, 2), dtype='int64', name=None, high=5)
    """
    args, named = arguments(example)
    values = [*((None, value) for value in args), *named.items()]
    if not all(isinstance(value, Tensor) and value.dim() and value.numel() for _, value in values):
        return ()
    return tuple(_input(name, value) for name, value in values)


def _input(name: str | None, value: Tensor) -> Input:
    whole = not value.is_floating_point() and value.dtype != torch.bool and not value.is_meta
    high = max(int(value.max()) + 1, 2) if whole else None
    return Input(name=name, shape=tuple(value.shape), dtype=str(value.dtype).removeprefix("torch."), high=high)


def origin_of(model: nn.Module) -> Origin | None:
    """What `remember` took down of this very module; copies of it are others.

    Example:
        >>> net = nn.Linear(3, 2)
        >>> remember(net, torch.zeros(1, 3))
        >>> origin_of(net).before.shapes["weight"], origin_of(copy.deepcopy(net))
        ((2, 3), None)
    """
    return _ORIGINS.get(model)


def state_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Tensors of a module's state under all their names, as the objects that the module holds."""
    return {name: value for name, value in model.state_dict(keep_vars=True).items() if isinstance(value, Tensor)}


def find_aliases(model: nn.Module) -> dict[str, str]:
    """Names of tied tensors beyond the first one of each."""
    first: dict[int, str] = {}
    names = {name: first.setdefault(id(tensor), name) for name, tensor in state_tensors(model).items()}
    return {alias: name for alias, name in names.items() if alias != name}


def rebuild_(model: nn.Module, structure: Structure, where: str) -> None:
    """Give a module, made as it was before any edit, the shapes and attributes of a saved one; values stay undefined.

    Raises:
        ArtifactError: the module is another one; names the tensor or attribute, and both sizes. It may be changed in
            part then.
    """
    tensors = state_tensors(model)
    for name, resized in structure.sizes.items():
        _resize(model, tensors, name, resized, where, strict=not structure.complete)
    for change in structure.attributes:
        _set_attribute(model, change, where, strict=not structure.complete)
    tied = find_aliases(model)
    for alias, name in structure.aliases.items():
        if tied.get(alias) != name:
            raise ArtifactError(
                f"'{where}' ties '{alias}' to '{name}'; the model made by '{structure.builder.name}' does not.",
                remedy=_REMEDY,
            )
    for alias, name in tied.items():
        if alias not in structure.aliases:
            raise ArtifactError(
                f"The model ties '{alias}' to '{name}'; '{where}' holds two tensors for them.", remedy=_REMEDY
            )


def _resize(
    model: nn.Module, tensors: Mapping[str, Tensor], name: str, resized: Resized, where: str, *, strict: bool
) -> None:
    old = tensors.get(name)
    if old is None:
        raise ArtifactError(f"The model has no tensor '{name}', which '{where}' resizes.", remedy=_REMEDY)
    if tuple(old.shape) == resized.after:
        return
    if tuple(old.shape) != resized.before if strict else old.dim() != len(resized.after):
        made_from = f"was made from one with {resized.before} and " if strict else ""
        raise ArtifactError(
            f"'{name}' has the shape {tuple(old.shape)} in the model; '{where}' {made_from}holds {resized.after}.",
            remedy=_REMEDY,
        )
    replace_tensor_(model, old, torch.empty(resized.after, dtype=old.dtype, device=old.device))


def replace_tensor_(model: nn.Module, old: Tensor, new: Tensor) -> None:
    """Put one tensor in the place of another wherever the module holds it, so that ties stay ties."""
    if isinstance(old, nn.Parameter):
        new = nn.Parameter(new, requires_grad=old.requires_grad)
    for module in list(model.modules()):
        for name, value in (*module._parameters.items(), *module._buffers.items()):
            if value is old:
                setattr(module, name, new)


def _set_attribute(model: nn.Module, change: Attribute, where: str, *, strict: bool) -> None:
    place = f"{change.module}.{change.name}".lstrip(".")
    if any(part.startswith("_") for part in place.split(".")):
        raise ArtifactError(f"'{where}' sets '{place}', which is no size of a layer.", remedy=_REMEDY)
    try:
        owner: Any = model.get_submodule(change.module)
        head, _, tail = change.name.partition(".")
        if tail:
            owner = _own_copy(owner, head)
        current = getattr(owner, tail or head)
    except AttributeError:
        raise ArtifactError(f"The model has no '{place}', which '{where}' sets.", remedy=_REMEDY) from None
    if current not in (change.before, change.after) if strict else type(current) is not type(change.after):
        raise ArtifactError(
            f"'{place}' is {current} in the model; '{where}' was made from one with {change.before}.",
            remedy=_REMEDY,
        )
    setattr(owner, tail or head, change.after)


def _own_copy(module: nn.Module, name: str) -> Any:
    """Give a module its own copy of an object that it may share with others, and return the copy."""
    own = copy.copy(getattr(module, name))
    setattr(module, name, own)
    return own


def _attributes(model: nn.Module) -> Iterator[tuple[Place, Value]]:
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            if name.startswith("_") or name == "training":
                continue
            if _is_size(value):
                yield (path, name), value
            elif (
                hasattr(value, "__dict__") and not isinstance(value, nn.Module | Tensor | type) and not callable(value)
            ):
                inner = ((f"{name}.{key}", item) for key, item in vars(value).items() if not key.startswith("_"))
                yield from (((path, key), item) for key, item in inner if _is_size(item))


def _is_size(value: Any) -> bool:
    if isinstance(value, tuple):
        return bool(value) and all(type(item) is int for item in value)
    return type(value) is int
