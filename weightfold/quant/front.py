"""The Pareto front of a run: networks that it passed through, none of which is both smaller and better than another."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from weightfold.artifact import Builder, CodedTensor, Structure
from weightfold.blueprint import Blueprint, rebuild_
from weightfold.quant.attached import plain_copy
from weightfold.quant.codes import CodedModel, stored
from weightfold.size import unique_state
from weightfold.stats.norms import recalibrate_


@dataclass(frozen=True, eq=False)
class Point:
    """A network of the front of size against loss.

    Args:
        n_bytes: of its file.
        loss: on the probe.
        step: of the run.
        network: plain, with exactly the file's values.
        tensors: of the file.
    """

    n_bytes: float
    loss: float
    step: int
    network: nn.Module
    tensors: CodedModel


@dataclass
class Front:
    """Keeps at most so many networks, spread over the sizes.

    Args:
        most: networks that are kept; 0: none.

    Attributes:
        points: the smallest first.

    Example:
        >>> front, net = Front(2), nn.Linear(2, 1)
        >>> for n_bytes, loss in ((400, 0.1), (300, 0.3), (350, 0.4), (200, 0.5)):
        ...     front.keep(n_bytes, loss, 0, net, CodedModel({}, {}))
        >>> [(p.n_bytes, p.loss) for p in front.points]
        [(200, 0.5), (400, 0.1)]
    """

    most: int
    points: list[Point] = field(default_factory=list)

    def keep(
        self,
        n_bytes: float,
        loss: float,
        step: int,
        model: nn.Module,
        tensors: CodedModel,
        inputs: Sequence[Any] = (),
    ) -> None:
        """Take a network in if none that is kept is smaller and better; let those go that it beats.

        Args:
            model: in training; a plain copy of it is kept.
            tensors: its file's.
            inputs: batches on which the copy's batch norms are estimated anew: in training their running statistics
                lag behind the weights.
        """
        if not self.most or not math.isfinite(loss):
            return
        if any(p.n_bytes <= n_bytes and p.loss <= loss for p in self.points):
            return
        network = plain_copy(model).eval()
        tensors.load_into(network)
        if inputs and recalibrate_(network, inputs):
            state = unique_state(network)
            tensors = replace(tensors, plain={name: stored(state[name]) for name in tensors.plain})
            tensors.load_into(network)
        rest = [p for p in self.points if p.n_bytes < n_bytes or p.loss < loss]
        found = sorted([*rest, Point(n_bytes, loss, step, network, tensors)], key=lambda p: p.n_bytes)
        while len(found) > self.most:
            found.pop(_crowded(found))
        self.points = found

    def to_state(self, model: nn.Module) -> list[dict[str, Any]]:
        """What a restart needs: plain data and tensors.

        Args:
            model: the network as it is now, of which the kept ones are wider forms.
        """
        now = Blueprint.of(plain_copy(model)) if self.points else None
        return [] if now is None else [_state_of(point, now) for point in self.points]

    def load_state(self, state: Sequence[Mapping[str, Any]], model: nn.Module) -> None:
        """Read back what `to_state` gave, for a network as it was then."""
        self.points = [_point_of(kept, model) for kept in state]


def _crowded(found: Sequence[Point]) -> int:
    """The place of the network that is missed least: one of the closest two, but neither the smallest nor the best."""
    if len(found) <= 2:
        return 0
    gaps = [math.log(larger.n_bytes / smaller.n_bytes) for smaller, larger in pairwise(found)]
    return min(gaps.index(min(gaps)) + 1, len(found) - 2)


def _state_of(point: Point, now: Blueprint) -> dict[str, Any]:
    sizes, attributes = now.changes_to(Blueprint.of(point.network))
    coded = {n: [torch.from_numpy(t.codes), torch.from_numpy(t.steps)] for n, t in point.tensors.coded.items()}
    return {
        "numbers": [point.n_bytes, point.loss, point.step],
        "sizes": {name: resized.model_dump(mode="json") for name, resized in sizes.items()},
        "attributes": [change.model_dump(mode="json") for change in attributes],
        "coded": coded,
        "plain": {name: torch.from_numpy(value) for name, value in point.tensors.plain.items()},
    }


def _point_of(kept: Mapping[str, Any], model: nn.Module) -> Point:
    network = plain_copy(model)
    structure = {"builder": Builder(kind="instance", name="front"), "fingerprint": ""}
    changes = {"sizes": kept["sizes"], "attributes": kept["attributes"]}
    rebuild_(network, Structure.model_validate({**structure, **changes}), "the front")
    coded = {n: CodedTensor(codes.numpy(), steps.numpy()) for n, (codes, steps) in kept["coded"].items()}
    tensors = CodedModel(coded, {name: value.numpy() for name, value in kept["plain"].items()})
    tensors.load_into(network)
    n_bytes, loss, step = kept["numbers"]
    return Point(n_bytes, loss, step, network, tensors)
