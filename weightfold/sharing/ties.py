"""One parameter in several places, with its optimiser state; and back.

A parameter that stands in c places receives the sum of c gradients; ``gradient="mean"`` divides by c, so that it learns
at the pace of those that it replaced. Optimiser state at the tie: first moments add up, second moments as squares of
sums of roots (c equal copies: c and c²), an upper bound for unequal ones; then, as gradients are, divided by c or not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from weightfold.errors import ConfigError, EditError
from weightfold.graph.apply import find_tensor
from weightfold.graph.optim import GRADIENT, SQUARE

State = dict[str, Any]
Optimizers = Sequence[torch.optim.Optimizer]


@dataclass(frozen=True, eq=False)
class Link:
    """One parameter that stands in for another, and how to go back.

    Args:
        kept: name of the parameter that stays.
        copy: name of the place that it now stands in as well.
        own: the parameter that stood there, with its value before the tie.
        places: modules and attributes that held it.
        shared: the parameter that stays; ``before`` is its value before the tie.
        states: of both before the tie, for each optimiser that held the copy, and the copy's group in it.
    """

    kept: str
    copy: str
    own: nn.Parameter
    places: tuple[tuple[nn.Module, str], ...]
    shared: nn.Parameter
    before: Tensor
    states: tuple[tuple[torch.optim.Optimizer, State | None, State | None, int], ...]


class Ties:
    """Ties and unties single parameters of a model, with their optimiser state.

    A parameter that another optimiser holds hands its place over, not its state. Moving averages of the model are left
    as they are: their copies of tied parameters come together as the average goes on.

    Args:
        gradient: see `TieConfig`.

    Example:
        >>> net = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
        >>> optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
        >>> ties = Ties(net, [optimizer])
        >>> link = ties.tie("0.weight", "1.weight")
        >>> net[0].weight is net[1].weight, len(optimizer.param_groups[0]["params"])
        (True, 1)
        >>> ties.untie(link)
        >>> net[0].weight is net[1].weight, len(optimizer.param_groups[0]["params"])
        (False, 2)
    """

    def __init__(self, model: nn.Module, optimizers: Optimizers = (), gradient: str = "mean") -> None:
        self.model, self.optimizers, self.gradient = model, tuple(optimizers), gradient
        self.links: list[Link] = []
        self._hooks: dict[nn.Parameter, Any] = {}
        held = (p for o in self.optimizers for group in o.param_groups for p in group["params"])
        self._rank = {p: rank for rank, p in enumerate(held)}

    def uses(self, shared: nn.Parameter) -> int:
        """Layers that a parameter stands in by ties of ours, itself included."""
        return 1 + sum(link.shared is shared for link in self.links)

    @torch.no_grad()
    def tie(self, kept: str, copy: str, value: Literal["first", "mean"] = "mean") -> Link:
        """Let one parameter stand in for another.

        Raises:
            EditError: there is no such parameter.
            ConfigError: they differ in shape, type or trainability, are one already, or the copy is itself shared.
        """
        shared, own = self._parameter(kept), self._parameter(copy)
        _check_pair(kept, shared, copy, own)
        if self.uses(own) > 1:
            raise ConfigError(f"'{copy}' stands in for other layers.", remedy=f"Tie '{kept}' to it instead.")
        m = self.uses(shared)
        link = Link(kept, copy, own, _places(self.model, own), shared, shared.detach().clone(), self._take(shared, own))
        self._merge_states(link, m)
        if value == "mean":
            shared.copy_((m * shared + own) / (m + 1))
        for module, leaf in link.places:
            setattr(module, leaf, shared)
        own.grad = None
        self.links.append(link)
        self._hook(shared)
        return link

    def _parameter(self, name: str) -> nn.Parameter:
        _, _, found = find_tensor(self.model, name)
        if not isinstance(found, nn.Parameter):
            raise EditError(f"'{name}' is no parameter.", remedy="Tie parameters, not buffers or computed weights.")
        return found

    def _take(self, shared: nn.Parameter, own: nn.Parameter) -> tuple[Any, ...]:
        """Take a parameter out of the optimisers that hold it; return the states and its group."""
        out = []
        for optimizer in self.optimizers:
            for g, group in enumerate(optimizer.param_groups):
                if any(p is own for p in group["params"]):
                    states = [_copied(optimizer.state[p]) if p in optimizer.state else None for p in (shared, own)]
                    group["params"] = [p for p in group["params"] if p is not own]
                    optimizer.state.pop(own, None)
                    out.append((optimizer, *states, g))
        return tuple(out)

    def _merge_states(self, link: Link, m: int) -> None:
        for optimizer, state, own, _ in link.states:
            if own is not None and _holds(optimizer, link.shared):
                optimizer.state[link.shared] = _merged(state or {}, own, m, self.gradient)

    def _hook(self, shared: nn.Parameter) -> None:
        """Divide the gradient by the number of places; nothing to do for one place, or for the sum."""
        if shared in self._hooks:
            self._hooks.pop(shared).remove()
        c = self.uses(shared)
        if self.gradient == "mean" and c > 1 and shared.requires_grad:
            self._hooks[shared] = shared.register_hook(lambda grad: grad / c)

    @torch.no_grad()
    def untie(self, link: Link) -> None:
        """Give a place its own parameter again, with the present value and its share of the optimiser's state."""
        c = self.uses(link.shared)
        self._release(link, link.shared.detach())
        for optimizer, _, _, g in link.states:
            state = optimizer.state.get(link.shared)
            self._insert(optimizer, g, link.own)
            if state:
                optimizer.state[link.own] = _scaled(state, 1 if self.gradient == "mean" else 1 / c)
                optimizer.state[link.shared] = _scaled(state, 1 if self.gradient == "mean" else (c - 1) / c)

    @torch.no_grad()
    def undo(self, link: Link) -> None:
        """Take the latest tie back, bit for bit when nothing was trained since.

        Raises:
            EditError: it is not the latest.
        """
        if not self.links or self.links[-1] is not link:
            raise EditError(f"The tie of '{link.copy}' is not the latest.", remedy="Use untie() for earlier ones.")
        self._release(link, None)
        link.shared.copy_(link.before)
        for optimizer, state, own, g in link.states:
            self._insert(optimizer, g, link.own)
            for parameter, value in ((link.shared, state), (link.own, own)):
                optimizer.state.pop(parameter, None)
                if value is not None:
                    optimizer.state[parameter] = value

    def _release(self, link: Link, value: Tensor | None) -> None:
        if value is not None:
            link.own.copy_(value)
        for module, leaf in link.places:
            setattr(module, leaf, link.own)
        link.shared.grad = None
        self.links.remove(link)
        self._hook(link.shared)

    def _insert(self, optimizer: torch.optim.Optimizer, g: int, parameter: nn.Parameter) -> None:
        """Put a parameter back into its group, in the order that the optimiser was built with."""
        members = [*optimizer.param_groups[g]["params"], parameter]
        optimizer.param_groups[g]["params"] = sorted(members, key=lambda p: self._rank.get(p, len(self._rank)))

    def close(self) -> None:
        """Leave no hook behind; the ties stay, with plain gradients."""
        for hook in self._hooks.values():
            hook.remove()
        self._hooks.clear()


def _check_pair(kept: str, shared: nn.Parameter, copy: str, own: nn.Parameter) -> None:
    if shared is own:
        raise ConfigError(f"'{kept}' and '{copy}' are one parameter already.")
    for what, a, b in (
        ("shape", tuple(shared.shape), tuple(own.shape)),
        ("type", shared.dtype, own.dtype),
        ("device", shared.device, own.device),
        ("requires_grad", shared.requires_grad, own.requires_grad),
    ):
        if a != b:
            raise ConfigError(f"'{kept}' and '{copy}' cannot be tied: their {what} is {a} and {b}.")


def _places(model: nn.Module, parameter: nn.Parameter) -> tuple[tuple[nn.Module, str], ...]:
    return tuple((m, leaf) for m in model.modules() for leaf, p in m._parameters.items() if p is parameter)


def _holds(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> bool:
    return any(p is parameter for group in optimizer.param_groups for p in group["params"])


def _copied(state: Mapping[str, Any]) -> State:
    return {key: value.clone() if isinstance(value, Tensor) else value for key, value in state.items()}


def _merged(state: State, own: State, m: int, gradient: str) -> State:
    """State of a parameter in m places that takes over one more; see the top of this file."""
    scale = 1 / (m + 1) if gradient == "mean" else 1.0
    before = m if gradient == "mean" else 1
    out = dict(state) or _scaled(own, 0)
    for key, value in own.items():
        old = out.get(key)
        if not isinstance(value, Tensor) or value.ndim == 0 or not isinstance(old, Tensor):
            continue
        if key in GRADIENT:
            out[key] = scale * (before * old + value)
        elif key in SQUARE:
            out[key] = (scale * (before * old.clamp_min(0).sqrt() + value.clamp_min(0).sqrt())).square()
    return out


def _scaled(state: Mapping[str, Any], factor: float) -> State:
    """State of a parameter whose gradient becomes a share of what it was."""
    powers = {**dict.fromkeys(GRADIENT, 1), **dict.fromkeys(SQUARE, 2)}
    out = _copied(state)
    for key, value in out.items():
        if isinstance(value, Tensor) and value.ndim > 0 and key in powers:
            out[key] = value * factor ** powers[key]
    return out
