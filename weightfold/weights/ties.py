"""Ties: tensors that stand under several names of a model, and copies of a model in which they stand apart.

Two models are alike only in what is tied in both. Where one holds an embedding and a head in one tensor and the other
in two, whatever is written to the one name would change the other: so the tied one is first untied. That leaves its
function as it is, and each name then has its own value to be mixed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor, nn

from weightfold.graph.apply import find_tensor
from weightfold.graph.copies import independent_copy


def owners_of(model: nn.Module) -> dict[str, str]:
    """The first name of the tensor that stands under each name: floating parameters and persistent buffers.

    Two tensors of one memory, shape and type are one, whatever objects hold them.

    Example:
        >>> net = nn.Sequential(nn.Embedding(4, 2), nn.Linear(2, 4, bias=False))
        >>> net[1].weight = net[0].weight
        >>> owners_of(net)
        {'0.weight': '0.weight', '1.weight': '0.weight'}
    """
    first: dict[object, str] = {}
    return {name: first.setdefault(_memory(tensor), name) for name, tensor in _named(model)}


def common_owners(models: Sequence[nn.Module]) -> dict[str, str]:
    """The first name of what is tied in every model, for each name that all of them hold."""
    each = [owners_of(model) for model in models]
    first: dict[tuple[str, ...], str] = {}
    names = [name for name in each[0] if all(name in owners for owners in each)]
    return {name: first.setdefault(tuple(owners[name] for owners in each), name) for name in names}


def tie_differences(models: Sequence[nn.Module]) -> list[str]:
    """What is tied in some of the models and not in all, one sentence each."""
    common = common_owners(models)
    found = []
    for number, model in enumerate(models, 1):
        owners = owners_of(model)
        found += [
            f"'{owners[name]}' and '{name}' are one tensor in model {number} (tied), and two in another"
            for name in common
            if common[name] != common.get(owners[name])
        ]
    return found


def untied(model: nn.Module, owners: Mapping[str, str] | None = None) -> nn.Module:
    """A copy of the same function in which tied names hold tensors of their own; the model itself if nothing is tied.

    Args:
        owners: the first name of what shall stay tied, by name (`owners_of`); by default nothing stays tied.
    Example:
        >>> net = nn.Sequential(nn.Embedding(4, 2), nn.Linear(2, 4, bias=False))
        >>> net[1].weight = net[0].weight
        >>> twin = untied(net)
        >>> twin[0].weight is twin[1].weight, bool((twin[0].weight == twin[1].weight).all())
        (False, True)
    """
    held = owners_of(model)
    wanted = {name: name if owners is None else owners.get(name, name) for name in held}
    if wanted == held:
        return model
    twin = independent_copy(model)
    _split_(twin, {name for name in held if wanted[name] != held[name] or wanted[held[name]] != held[name]})
    for name, owner in wanted.items():
        if owner == held[name]:
            continue
        module, leaf, tensor = find_tensor(twin, name)
        if owner != name:
            setattr(module, leaf, find_tensor(twin, owner)[2])
        elif isinstance(tensor, nn.Parameter):
            setattr(module, leaf, nn.Parameter(tensor.detach().clone(), requires_grad=tensor.requires_grad))
        else:
            setattr(module, leaf, tensor.detach().clone())
    return twin


def _split_(model: nn.Module, names: Iterable[str]) -> None:
    """Give each path of the named tensors a module of its own; what the module holds stays shared."""
    paths = {".".join(parts[:i]) for parts in (name.split(".") for name in names) for i in range(1, len(parts))}
    seen: set[int] = set()

    def visit(module: nn.Module, path: str) -> None:
        seen.add(id(module))
        for leaf, child in list(module._modules.items()):
            if child is None:
                continue
            inner = f"{path}.{leaf}" if path else leaf
            if id(child) in seen and inner in paths:
                child = _twin_of(child)
                module._modules[leaf] = child
            visit(child, inner)

    visit(model, "")


def _twin_of(module: nn.Module) -> nn.Module:
    """Another module that holds the same tensors and submodules."""
    held = [*module.parameters(), *module.buffers(), *module.children()]
    return independent_copy(module, shared=held)


def _named(model: nn.Module) -> list[tuple[str, Tensor]]:
    transient = {
        f"{path}.{leaf}" if path else leaf
        for path, module in model.named_modules(remove_duplicate=False)
        for leaf in module._non_persistent_buffers_set
    }
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return [(name, t) for name, t in named if t.is_floating_point() and name not in transient]


def _memory(tensor: Tensor) -> object:
    if tensor.is_meta or not tensor.numel() or not tensor.data_ptr():
        return id(tensor)
    return tensor.device, tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride()
