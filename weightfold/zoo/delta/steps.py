"""How coarse a lossy difference may be: a step that is given, or the largest one that keeps what is measured."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from weightfold.errors import ConfigError
from weightfold.graph.exactness import outputs, relative_error
from weightfold.zoo.delta.codec import decode, encode, spread_of
from weightfold.zoo.delta.moves import Alignment
from weightfold.zoo.distance import relative_distance

State = Mapping[str, Tensor]
Change = Callable[[State, State], float]
"""What differs between a model and what is decoded of it, >= 0."""
COARSEST, FINEST = 3, -10
"""Steps that are tried, as powers of two of the root mean square of the differences."""
ROUNDS = 7
N_INPUTS = 64


@dataclass(frozen=True)
class Lossy:
    """How differences may be rounded.

    Args:
        step: differences below 0.7 steps are dropped, others off by half a step at most; None: found by `change`.
        relative: the step is a share of the root mean square of a model's differences.
        carry: weights are rounded so that sums over inputs stay.
        change: what is measured; see `by_measure`, `by_outputs`.
        within: the most that `change` may be.
    Raises:
        ConfigError: neither a step nor a bound, or both.
    Example:
        >>> Lossy(step=0.01).step
        0.01
    """

    step: float | None = None
    relative: bool = False
    change: Change | None = None
    within: float | None = None
    carry: bool = False

    def __post_init__(self) -> None:
        if (self.step is None) == (self.within is None):
            raise ConfigError("A lossy difference takes either a step, or a bound on what may change.")
        if self.within is not None and (self.change is None or self.within < 0):
            raise ConfigError("A bound needs a way to measure the change, and must not be below 0.")
        if self.step is not None and not 0 < self.step < float("inf"):
            raise ConfigError(f"The step must be above 0. Got {self.step} instead.")


def by_measure(measure: Callable[[State], float]) -> Change:
    """The change of a number that is measured of a model, an accuracy say, up or down.

    Example:
        >>> by_measure(lambda state: float(state["w"].sum()))({"w": torch.ones(2)}, {"w": torch.zeros(2)})
        2.0
    """
    return lambda before, after: abs(measure(after) - measure(before))


def by_outputs(model: nn.Module, inputs: tuple[Tensor, ...]) -> Change:
    """The largest relative change of a model's outputs on some inputs.

    Args:
        model: of the architecture; its own weights do not matter.
        inputs: positional arguments, at best real ones; see `random_inputs`.
    """

    def change(before: State, after: State) -> float:
        answers = []
        for state in (before, after):
            try:
                model.load_state_dict(dict(state))
            except RuntimeError:
                raise ConfigError(
                    "its outputs cannot be measured: the model that computes them is another one."
                ) from None
            answers.append(outputs(model.eval(), inputs))
        return relative_error(*answers)

    return change


def random_inputs(example: tuple[Tensor, ...], generator: torch.Generator) -> tuple[Tensor, ...]:
    """Inputs like an example, 64 of them: normal numbers; whole ones as they are in the example."""

    def one(x: Tensor) -> Tensor:
        if not x.is_floating_point():
            return x.repeat(N_INPUTS, *[1] * (x.ndim - 1)) if x.ndim else x
        return torch.randn((N_INPUTS, *x.shape[1:]), generator=generator, dtype=x.dtype)

    return tuple(one(x) for x in example)


def largest_step(child: State, parent: State, moves: Alignment, lossy: Lossy) -> float | None:
    """The largest step that keeps the bound, to a tenth of an octave; None if none of those tried does.

    Bisection: a coarser step is taken to change no less. What is returned was itself tried.
    """
    assert lossy.change is not None
    assert lossy.within is not None
    change, within = lossy.change, lossy.within
    low, high = float(FINEST), float(COARSEST)
    size = spread_of(child, parent, moves)

    def keeps(power: float) -> bool:
        back = decode(encode(child, parent, moves=moves, step=size * 2**power, carry=lossy.carry), parent)
        return change(child, back) <= within

    if size == 0:
        return None
    if keeps(high):
        return size * 2**high
    best = None
    for _ in range(ROUNDS):
        middle = (low + high) / 2
        if keeps(middle):
            best, low = middle, middle
        else:
            high = middle
    return None if best is None else size * 2**best


def change_of(child: State, decoded: State, lossy: Lossy | None) -> float:
    """What a lossy difference changed, as it is measured; without a measure, of all weights relative to their norm."""
    if lossy is not None and lossy.change is not None:
        return lossy.change(child, decoded)
    return relative_distance(child, decoded)
