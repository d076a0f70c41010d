"""Do two models have the same architecture, and if not, what differs; may they be merged, and why not."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from weightfold.errors import GraphError
from weightfold.graph.trace import Example
from weightfold.weights.finite import holes, remedy_for
from weightfold.weights.symmetry import Symmetries, symmetries
from weightfold.weights.ties import common_owners, owners_of, untied

N_SHOWN = 5
UNREAD = "is not used by the traced forward"
"""The reason for which a tensor that the forward does not read is frozen."""
PAIR = ("the first model", "the second model")


def differences(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> list[str]:
    """What two sets of named tensors do not have in common: names and shapes, one sentence each.

    Example:
        >>> differences({"w": torch.zeros(2, 3)}, {"w": torch.zeros(2, 4), "v": torch.zeros(1)})
        ["'w' has shape (2, 3) in the first and (2, 4) in the second", "the first lacks 'v' (1,)"]
    """
    found = []
    for name in a:
        if name not in b:
            found.append(f"the second lacks '{name}' {tuple(a[name].shape)}")
        elif a[name].shape != b[name].shape:
            one, two = tuple(a[name].shape), tuple(b[name].shape)
            found.append(f"'{name}' has shape {one} in the first and {two} in the second")
    return found + [f"the first lacks '{name}' {tuple(b[name].shape)}" for name in b if name not in a]


def unmixable(found: Symmetries, a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> list[str]:
    """Sizes that differ where there are no channels to be mixed: a vocabulary, classes, inputs. One sentence each."""
    frozen = {(f.tensor, f.dim): f.reason for f in found.graph.frozen}
    channels = {(axis.tensor, axis.dim) for group in found.graph for axis in group.axes}
    return [
        f"'{name}' has {one} entries in dimension {dim} in the first and {two} in the second, and these are no "
        f"channels: {frozen[name, dim]}"
        for name in a
        if name in b and a[name].ndim == b[name].ndim
        for dim, (one, two) in enumerate(zip(a[name].shape, b[name].shape, strict=True))
        if one != two and (name, dim) in frozen and (name, dim) not in channels
    ]


def require_alike(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> None:
    """Refuse models of unlike architecture.

    Raises:
        GraphError: says what differs.
    """
    found = differences(a, b)
    if found:
        more = f"; and {len(found) - N_SHOWN} more" if len(found) > N_SHOWN else ""
        widths = not any("lacks" in text for text in found)
        raise GraphError(
            f"The models differ in architecture: {'; '.join(found[:N_SHOWN])}{more}.",
            remedy="Bring one to the widths of the other by soft(a, b, example) of weightfold.weights.soft."
            if widths
            else "Pass models of the same layers: only widths may differ, and those by soft matching.",
        )


def alike(models: Sequence[nn.Module], roles: Sequence[str] = (), loose: Collection[str] = ()) -> list[nn.Module]:
    """Models of one architecture and finite weights, each tie of which is a tie of all: the only door to mixing them.

    What is tied in some and not in all is untied in a copy, which computes the same.

    Args:
        roles: what each model is to the caller, for messages; "model 2 of 3" by default.
        loose: names of tensors that all hold, but perhaps in other shapes.
    Raises:
        GraphError: the architectures differ, or a tensor holds NaN or infinity; says where, and in which model.
    Example:
        >>> tied, free = (nn.Sequential(nn.Embedding(4, 2), nn.Linear(2, 4, bias=False)) for _ in range(2))
        >>> tied[1].weight = tied[0].weight
        >>> [twin[0].weight is twin[1].weight for twin in alike([tied, free])]
        [False, False]
    """
    states = [weights_of(model) for model in models]
    require_finite(states, roles)
    same = [{n: t.new_empty(0) if n in loose else t for n, t in state.items()} for state in states]
    for state in same[1:]:
        require_alike(same[0], state)
    owners = common_owners(models)
    return [untied(model, owners) for model in models]


def fitting(found: Symmetries | None, model: nn.Module, example: Example) -> Symmetries:
    """Symmetries that are at hand, if they are of a model with these ties; otherwise the model's own."""
    tied = {name: owner for name, owner in owners_of(model).items() if name != owner}
    if found is not None and dict(found.graph.aliases) == tied and found.shapes.keys().isdisjoint(tied):
        return found
    return symmetries(model, example)


def untied_symmetries(model: nn.Module, example: Example, found: Symmetries | None = None) -> Symmetries:
    """The symmetries of the same function with nothing tied, under which a model and its untied copy are one.

    A name that the forward does not read stays with one that it does: a second path to a layer is no weight.
    ``graph.aliases`` says what is one tensor in the model, for files that hold it once.

    Args:
        found: returned if it is these.
    Example:
        >>> net = nn.Sequential(nn.Embedding(4, 2), nn.Linear(2, 4, bias=False))
        >>> net[1].weight = net[0].weight
        >>> [list(made(net, torch.tensor([0])).shapes) for made in (symmetries, untied_symmetries)]
        [['0.weight'], ['0.weight', '1.weight']]
    """
    held = owners_of(model)
    tied = {name: owner for name, owner in held.items() if name != owner}
    if not tied:
        return fitting(found, model, example)
    if found is not None and dict(found.graph.aliases) == tied and not found.shapes.keys().isdisjoint(tied):
        return found
    found = symmetries(untied(model), example)
    unread = {f.tensor for f in found.graph.frozen if f.reason == UNREAD}
    owners = _with_readers(held, unread)
    if any(name != owner for name, owner in owners.items()):
        found = symmetries(untied(model, owners), example)
    return replace(found, graph=replace(found.graph, aliases=tied))


def _with_readers(held: Mapping[str, str], unread: Collection[str]) -> dict[str, str]:
    """The first name of each tensor once those that are read stand apart, each unread one with the first that is."""
    together: dict[str, list[str]] = {}
    for name, owner in held.items():
        together.setdefault(owner, []).append(name)
    out = dict(zip(held, held, strict=True))
    for names in together.values():
        lead = next((name for name in names if name not in unread), names[0])
        one = [name for name in names if name == lead or name in unread]
        out |= dict.fromkeys(one, one[0])
    return out


def require_finite(states: Sequence[Mapping[str, Tensor]], roles: Sequence[str] = ()) -> None:
    """Refuse weights that hold NaN or infinity.

    Raises:
        GraphError: names the tensor and the model.
    """
    for number, state in enumerate(states):
        for name in holes(state):
            where = roles[number] if roles else f"model {number + 1} of {len(states)}"
            raise GraphError(
                f"'{name}' of {where} holds NaN or infinite numbers.",
                remedy=remedy_for(state[name]),
            )


@dataclass(frozen=True)
class Gate:
    """Whether two models can be merged.

    Args:
        verdict: "as they are", "after alignment", "softly" (other widths) or "no".
        reasons: why, one sentence each.
        cosine: of all weights as they are, and 0 where shapes differ.
        cosine_aligned: after alignment, if it was tried.
        chance: cosine that alignment reaches between unrelated weights of these sizes (the same, shuffled).
    """

    verdict: str
    reasons: tuple[str, ...]
    cosine: float = 0.0
    cosine_aligned: float | None = None
    chance: float | None = None


def cosine(a: Mapping[str, Tensor], b: Mapping[str, Tensor], names: Symmetries | None = None) -> float:
    """Cosine of two sets of weights, over all tensors that hold floating numbers (or those of the symmetries)."""
    keys = [n for n in a if a[n].is_floating_point() and (names is None or n in names.shapes)]
    dot = sum(float((a[n].double() * b[n].double()).sum()) for n in keys)
    size = sum(float(a[n].double().square().sum()) for n in keys) * sum(
        float(b[n].double().square().sum()) for n in keys
    )
    return dot / size**0.5 if size > 0 else 0.0


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and floating buffers by name, detached."""
    return {
        n: t.detach() for n, t in model.state_dict().items() if isinstance(t, Tensor) and torch.is_floating_point(t)
    }
