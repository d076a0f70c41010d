"""The same edit on optimiser state.

Weights are vectors, gradients covectors: where writers become ``A @ W`` and readers ``W @ B``, the gradient of a writer
becomes ``B.T @ g`` and that of a reader ``g @ A.T``. First moments follow gradients. Second moments follow their
squares: gradients of duplicates add up (c copies: c^2 times the square), others add in squares. Steps that were taken,
and sizes of steps, are those of the channel that is carried on. Averaged weights follow the weights.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from weightfold.errors import ConfigError, EditError
from weightfold.graph.edit import Edit
from weightfold.graph.group import Axis, ChannelGroup
from weightfold.graph.layout import Layout, edited, from_front, gauge_factors, layout, mix, scale_rows, select, to_front

GRADIENT = frozenset({"momentum_buffer", "exp_avg", "grad_avg", "prev"})
SQUARE = frozenset({"exp_avg_sq", "max_exp_avg_sq", "square_avg", "sum"})
MAGNITUDE = frozenset({"exp_inf"})
UPDATE = frozenset({"acc_delta", "step_size", "delta"})
WEIGHT = frozenset({"ax"})
FACTORED = (("row_var", "col_var", True), ("exp_avg_sq_row", "exp_avg_sq_col", False))


def _dual(axis: Axis, edit: Edit) -> Tensor | None:
    """The map that gradients along an axis follow, shape (K, C); None for a selection."""
    if axis.role == "read":
        return edit.write
    if edit.read is not None:
        return edit.read.T.contiguous()
    if edit.reads:
        mean = torch.stack(list(edit.reads.values())).mean(0)
        return mean.T.contiguous()
    return None


def _gradient(front: Tensor, axis: Axis, plan: Layout, edit: Edit, factors: Tensor | None) -> Tensor:
    dual = _dual(axis, edit)
    out = select(front, plan) if dual is None else mix(front, axis, plan, dual)
    return out if factors is None else scale_rows(out, 1 / factors)


def _square(front: Tensor, axis: Axis, plan: Layout, edit: Edit, factors: Tensor | None) -> Tensor:
    dual = _dual(axis, edit)
    if dual is None:
        out = select(front, plan)
    else:
        same = dual.abs() * ((dual.abs() - dual.abs().amax(1, keepdim=True)).abs() < 1e-6)
        rest = torch.where(same > 0, 0.0, dual)
        root = mix(front.clamp_min(0).sqrt(), axis, plan, same)
        out = root.square() + torch.where(_inside(plan, front), mix(front, axis, plan, rest.square()), 0)
    return out if factors is None else scale_rows(out, factors**-2)


def _inside(plan: Layout, front: Tensor) -> Tensor:
    return (plan.channel >= 0).to(front.device).reshape(-1, *(1,) * (front.ndim - 1))


def _update(front: Tensor, _axis: Axis, plan: Layout, _edit: Edit, factors: Tensor | None) -> Tensor:
    out = select(front, plan)
    return out if factors is None else scale_rows(out, factors)


def _magnitude(front: Tensor, axis: Axis, plan: Layout, edit: Edit, factors: Tensor | None) -> Tensor:
    return _square(front.square(), axis, plan, edit, factors).sqrt()


def _through(state: Tensor, group: ChannelGroup, edit: Edit, tensor: str, rule: Callable[..., Tensor]) -> Tensor:
    value = state
    for axis in sorted((a for a in group.axes if a.tensor == tensor), key=lambda a: (-a.slabs, a.dim)):
        plan = layout(group, axis, edit)
        front = to_front(value, axis.dim, axis.slabs)
        value = from_front(rule(front, axis, plan, edit, gauge_factors(group, axis, edit, plan)), axis.dim, axis.slabs)
    return value.to(state.dtype)


def _rule(optimizer: torch.optim.Optimizer, key: str) -> Callable[..., Tensor] | None:
    if key == "momentum_buffer" and type(optimizer).__name__ == "RMSprop":
        return _update
    if key in GRADIENT:
        return _gradient
    if key in SQUARE or key == "variance":
        return _square
    if key in MAGNITUDE:
        return _magnitude
    return _update if key in UPDATE else edited if key in WEIGHT else None


def _factored(state: dict[str, Any], shape: torch.Size, through: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    """Adafactor: rebuild the rank-one second moment, edit it, factor it again."""
    for row_key, col_key, keepdim in FACTORED:
        if row_key not in state or not isinstance(state[row_key], Tensor) or len(shape) < 2:
            continue
        row = state[row_key] if keepdim else state[row_key].unsqueeze(-1)
        col = state[col_key] if keepdim else state[col_key].unsqueeze(-2)
        full = row * col / row.mean(-2, keepdim=True).clamp_min(torch.finfo(row.dtype).tiny)
        full = through(full.expand(shape))
        new_row, new_col = full.mean(-1, keepdim=True), full.mean(-2, keepdim=True)
        return {
            row_key: new_row if keepdim else new_row.squeeze(-1),
            col_key: new_col if keepdim else new_col.squeeze(-2),
        }
    return {}


def new_states(
    optimizers: Sequence[torch.optim.Optimizer], parameter: Tensor, group: ChannelGroup, edit: Edit, tensor: str
) -> list[tuple[torch.optim.Optimizer, dict[str, Any] | None]]:
    """What an edit makes of the state that each optimiser holds for one parameter; None: unknown, to be reset."""
    out = []
    for optimizer in optimizers:
        state = optimizer.state.get(parameter)
        if state:
            out.append((optimizer, _new_state(optimizer, state, parameter, group, edit, tensor)))
    return out


def _new_state(
    optimizer: torch.optim.Optimizer,
    state: dict[str, Any],
    parameter: Tensor,
    group: ChannelGroup,
    edit: Edit,
    tensor: str,
) -> dict[str, Any] | None:
    new = dict(state)
    new |= _factored(state, parameter.shape, lambda full: _through(full, group, edit, tensor, _square))
    for key, value in state.items():
        if isinstance(value, list | tuple | dict | deque) and any(isinstance(x, Tensor) for x in tree_leaves(value)):
            return None
        if not isinstance(value, Tensor) or value.ndim == 0 or any(key in pair[:2] for pair in FACTORED):
            continue
        rule = _rule(optimizer, key)
        if rule is None or value.shape != parameter.shape:
            return None
        new[key] = _through(value, group, edit, tensor, rule)
    return new


def plain(optimizers: Sequence[Any]) -> tuple[torch.optim.Optimizer, ...]:
    """The optimisers that step, inside what frameworks wrap around them.

    Raises:
        ConfigError: something else than an optimiser was given.
    Example:
        >>> class Wrapped:
        ...     def __init__(self, optimizer):
        ...         self.optimizer = optimizer
        >>> [type(o).__name__ for o in plain([Wrapped(torch.optim.SGD([torch.zeros(1)], lr=0.1))])]
        ['SGD']
    """
    found: dict[int, torch.optim.Optimizer] = {}
    for given in optimizers:
        inside = _held_by(given, set())
        if not inside:
            raise _no_optimizer(given)
        found.update((id(optimizer), optimizer) for optimizer in inside)
    return tuple(found.values())


def _held_by(given: Any, seen: set[int]) -> list[torch.optim.Optimizer]:
    """The optimisers that an object holds, or it itself where it holds none."""
    if id(given) in seen:
        return []
    seen.add(id(given))
    values = getattr(given, "__dict__", {}).values()
    parts = [part for value in values for part in (value if isinstance(value, list | tuple) else (value,))]
    held = [o for part in parts if _looks_like_one(part) for o in _held_by(part, seen)]
    return held or ([given] if isinstance(given, torch.optim.Optimizer) else [])


def _looks_like_one(part: Any) -> bool:
    """Wrappers need not be optimisers themselves."""
    named = all(callable(getattr(type(part), name, None)) for name in ("step", "zero_grad"))
    return isinstance(part, torch.optim.Optimizer) or named


def _no_optimizer(given: Any) -> ConfigError:
    return ConfigError(
        f"prepare() takes torch optimisers; got '{type(given).__name__}'.",
        remedy="Pass the optimiser whose step() trains the model, or a list of them.",
    )


def check_follows(optimizers: Sequence[torch.optim.Optimizer]) -> None:
    """Refuse optimisers whose state cannot follow an edit: one history for all parameters together.

    Raises:
        EditError: names the optimiser.
    """
    for optimizer in optimizers:
        named = any("lbfgs" in kind.__name__.lower() for kind in type(optimizer).__mro__)
        if named or any(_is_joint(optimizer, group["params"]) for group in optimizer.param_groups):
            raise EditError(
                f"The optimiser {type(optimizer).__name__} keeps one history for all parameters together, "
                "which cannot follow an edit.",
                remedy="Train with one that keeps its state by parameter, such as torch.optim.AdamW; or compress after "
                "training, with once() of a compressor that is prepared without an optimiser.",
            )


def _is_joint(optimizer: torch.optim.Optimizer, params: Sequence[Tensor]) -> bool:
    """Whether some parameter's state is as long as all parameters of its group together."""
    n_all = sum(p.numel() for p in params)
    for p in params:
        for value in optimizer.state.get(p, {}).values() if n_all > p.numel() else ():
            parts = value if isinstance(value, list | tuple | deque) else (value,)
            if any(isinstance(part, Tensor) and part.shape == (n_all,) for part in parts):
                return True
    return False


def assert_live(model: nn.Module, optimizers: Sequence[torch.optim.Optimizer], beside: Sequence[Tensor] = ()) -> None:
    """Every parameter that an optimiser holds is a live one, and its state has its shape.

    Args:
        beside: further live tensors, which methods hold beside the network's own.
    Raises:
        EditError: names what is dead or misshapen.
    """
    if not optimizers:
        return
    live = {id(p): name for name, p in model.named_parameters()} | {id(t): "a follower" for t in beside}
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for p in group["params"]:
                if id(p) not in live:
                    raise EditError(
                        f"The optimiser holds a parameter of shape {tuple(p.shape)} that is not in the model.",
                        remedy="Build the optimiser from model.parameters() of the model that is being compressed.",
                    )
                for key, value in optimizer.state.get(p, {}).items():
                    if isinstance(value, Tensor) and key in GRADIENT | SQUARE and value.shape != p.shape:
                        raise EditError(
                            f"State '{key}' of '{live[id(p)]}' has shape {tuple(value.shape)}, not {tuple(p.shape)}."
                        )
