"""What edits change of a module besides its values: shapes and integer attributes. Taken down, compared, put back."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from weightfold.artifact.format import Attribute, Resized, Shape, Structure, Value, differences
from weightfold.errors import ArtifactError

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

    def changes_to(self, later: Blueprint) -> tuple[dict[str, Resized], tuple[Attribute, ...]]:
        """List what differs in a later blueprint of the same module."""
        changed = tuple(
            Attribute(module=path, name=name, before=value, after=later.attributes[path, name])
            for (path, name), value in self.attributes.items()
            if (path, name) in later.attributes and later.attributes[path, name] != value
        )
        return differences(self.shapes, later.shapes, later.aliases), changed


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
        _resize(model, tensors, name, resized, where)
    for change in structure.attributes:
        _set_attribute(model, change, where)
    tied = find_aliases(model)
    for alias, name in structure.aliases.items():
        if tied.get(alias) != name:
            raise ArtifactError(
                f"'{where}' ties '{alias}' to '{name}'; the model made by '{structure.builder.name}' does not.",
                remedy=_REMEDY,
            )


def _resize(model: nn.Module, tensors: Mapping[str, Tensor], name: str, resized: Resized, where: str) -> None:
    old = tensors.get(name)
    if old is None:
        raise ArtifactError(f"The model has no tensor '{name}', which '{where}' resizes.", remedy=_REMEDY)
    if tuple(old.shape) == resized.after:
        return
    if tuple(old.shape) != resized.before:
        raise ArtifactError(
            f"'{name}' has the shape {tuple(old.shape)} in the model; '{where}' was made from one with "
            f"{resized.before} and holds {resized.after}.",
            remedy=_REMEDY,
        )
    _replace(model, old, torch.empty(resized.after, dtype=old.dtype, device=old.device))


def _replace(model: nn.Module, old: Tensor, new: Tensor) -> None:
    """Put one tensor in the place of another wherever the module holds it, so that ties stay ties."""
    if isinstance(old, nn.Parameter):
        new = nn.Parameter(new, requires_grad=old.requires_grad)
    for module in list(model.modules()):
        for name, value in (*module._parameters.items(), *module._buffers.items()):
            if value is old:
                setattr(module, name, new)


def _set_attribute(model: nn.Module, change: Attribute, where: str) -> None:
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
    if current not in (change.before, change.after):
        raise ArtifactError(
            f"'{place}' is {current} in the model; '{where}' was made from one with {change.before}.", remedy=_REMEDY
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
