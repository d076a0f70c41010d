"""The last trim: codes of a file that is too large at the end of a run are given up, those that the loss misses least.

In rounds of five per cent of the file each, for what a code is worth changes with those that went before. Codes of ±1
go in the order of

    ½ F s² / bits    (step s; F: mean squared gradient on pieces of the probe, the Fisher information, or 1)

and how many go is found by interval search on the bytes of the file itself, so that what went too far comes back. F is
noisy for a single weight, so the product of its row's mean and its column's is taken, and some of the tensor's. Both
orders, with F and without, are followed to the end, and the network with the lower loss on the probe is kept.

Reference: LeCun, Denker & Solla, NIPS 1989 (saliency by curvature); differs in: divided by what the code takes in the
file, and measured anew in every round.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from weightfold.artifact.coded import CodedTensor, step_value
from weightfold.gate import Batch, Loss, call, losses
from weightfold.quant.codes import CodedModel
from weightfold.quant.rate import prices

Array = npt.NDArray[Any]
SHARE = 0.95
"""Of the file that is left by a round."""
MOST_ROUNDS = 250
TRIES = 24
"""Files that are measured in a round, at most."""
NEAR, NEARER = 0.99, 0.9995
"""Shares of the wanted size at which the search of a round ends, and of the last one."""
PIECES = 32
"""Of the probe, each with a gradient of its own."""
DAMPING = 0.3
"""Of the tensor's mean curvature that is added to that of each weight."""


@dataclass(frozen=True, eq=False)
class Judge:
    """What a trimmed network is measured by.

    Args:
        network: a plain copy, into which candidates are put.
        probe: batches; without any nothing can be measured.
        loss: of an answer and targets.
        autocast: the mixed precision that training uses.
    """

    network: nn.Module
    probe: Sequence[Batch]
    loss: Loss | None
    autocast: Callable[[], AbstractContextManager[Any]]

    def value(self, model: CodedModel) -> float:
        """Mean loss on the probe."""
        assert self.loss is not None
        model.load_into(self.network)
        found = losses(self.network, self.probe, self.loss, self.autocast)
        return sum(found) / len(found)

    def curvature(self, model: CodedModel, names: Sequence[str]) -> dict[str, Array]:
        """Mean squared gradient of each weight over pieces of the probe, by tensor, shape (R, C) of its codes."""
        assert self.loss is not None
        model.load_into(self.network)
        self.network.eval()
        named = dict(self.network.named_parameters())
        held = [named[name] for name in names]
        total = [torch.zeros_like(p) for p in held]
        with torch.backends.cudnn.flags(enabled=False), torch.enable_grad():
            for inputs, targets in self._pieces():
                with self.autocast():
                    loss = self.loss(call(self.network, inputs), targets)
                for one, grad in zip(total, torch.autograd.grad(loss, held, allow_unused=True), strict=True):
                    one += 0 if grad is None else grad.square()
        return {
            name: one.double().cpu().numpy().reshape(model.coded[name].matrix_RC.shape)
            for name, one in zip(names, total, strict=True)
        }

    def _pieces(self) -> list[Batch]:
        n = max(1, PIECES // len(self.probe))
        return [piece for batch in self.probe for piece in _cut(batch, n)]


def _cut(batch: Batch, n: int) -> list[Batch]:
    """A batch in about so many parts, where all of it are tensors of one length; as it is otherwise."""
    leaves = tree_leaves(batch)
    if not all(isinstance(leaf, Tensor) and leaf.ndim for leaf in leaves) or len({len(leaf) for leaf in leaves}) != 1:
        return [batch]
    size = max(1, -(-len(leaves[0]) // n))
    parts = [slice(at, at + size) for at in range(0, len(leaves[0]), size)]
    return [tree_map(lambda tensor, part=part: tensor[part], batch) for part in parts]


def trimmed(
    model: CodedModel, names: Sequence[str], target: float, written: Callable[[CodedModel], float], judge: Judge
) -> CodedModel:
    """Give up codes until a file is as small as wanted, and hardly smaller.

    Args:
        model: whose file is too large.
        names: of the tensors whose codes may go.
        target: bytes.
        written: bytes of the file of a network.
        judge: measures candidates.
    Returns:
        model: of at most so many bytes, unless even without any of these codes it takes more.
    """
    plain = _path(model, names, target, written, lambda _: {})
    if judge.loss is None or not judge.probe:
        return plain
    curved = _path(model, names, target, written, lambda now: judge.curvature(now, names))
    found = [candidate for candidate in (curved, plain) if written(candidate) <= target] or [curved]
    return min(found, key=judge.value)


def _path(
    model: CodedModel,
    names: Sequence[str],
    target: float,
    written: Callable[[CodedModel], float],
    curvature: Callable[[CodedModel], Mapping[str, Array]],
) -> CodedModel:
    size = written(model)
    for _ in range(MOST_ROUNDS):
        if size <= target:
            break
        goal = max(target, SHARE * size)
        step = _Round.of(model, names, curvature(model))
        if step is None:
            break
        model, size = step.search(goal, written, size, NEARER if goal == target else NEAR)
    return model


@dataclass(frozen=True, eq=False)
class _Round:
    """Codes in the order in which they go.

    Args:
        order: of all codes end to end; those that may go come first.
        saved: bits that are saved by so many of them, by estimate.
    """

    model: CodedModel
    names: Sequence[str]
    order: Array
    saved: Array

    @classmethod
    def of(cls, model: CodedModel, names: Sequence[str], curvature: Mapping[str, Array]) -> _Round | None:
        """Rank the codes; those of ±1, and if there are none all others. None where every code is zero."""
        coded = [model.coded[name] for name in names]
        size = np.concatenate([np.abs(t.codes).reshape(-1).astype(np.int64) for t in coded])
        least = 1 if bool((size == 1).any()) else 2
        may = (size == 1) if least == 1 else size > 0
        if not may.any():
            return None
        parts = [_bits_and_loss(t, curvature.get(n)) for n, t in zip(names, coded, strict=True)]
        bits, loss = (np.concatenate([part[k].reshape(-1) for part in parts]) for k in (0, 1))
        order = np.argsort(np.where(may, loss / bits, np.inf), kind="stable")[: int(may.sum())]
        return cls(model, names, order, np.cumsum(bits[order]))

    def without(self, n: int) -> CodedModel:
        """The network with the first ``n`` codes one step nearer to zero."""
        out, at = dict(self.model.coded), 0
        chosen = np.zeros(sum(self.model.coded[name].codes.size for name in self.names), bool)
        chosen[self.order[:n]] = True
        for name in self.names:
            tensor = self.model.coded[name]
            gone = chosen[at : at + tensor.codes.size].reshape(tensor.codes.shape)
            at += tensor.codes.size
            if gone.any():
                codes = tensor.codes - gone * np.sign(tensor.codes)
                out[name] = CodedTensor(codes.astype(tensor.codes.dtype), tensor.steps)
        return replace(self.model, coded=out)

    def search(
        self, goal: float, written: Callable[[CodedModel], float], size: float, near: float
    ) -> tuple[CodedModel, float]:
        """As few codes as the goal takes: by interval search, from where the estimate says."""
        n_large, large, n_small, small = 0, size, len(self.order), None
        best = self.without(n_small)
        n = int(np.searchsorted(self.saved, 8 * (size - goal))) + 1
        for k in range(TRIES):
            n = min(max(n, n_large + 1), n_small)
            candidate = self.without(n)
            found = written(candidate)
            if found <= goal:
                best, n_small, small = candidate, n, found
            else:
                n_large, large = n, found
            if n_small - n_large <= 1 or (small is not None and small >= near * goal):
                break
            middle = (n_large + n_small) // 2
            if k % 3 == 2 or small is None or large <= small:
                n = middle
            else:
                n = n_large + int((n_small - n_large) * (large - goal) / (large - small))
        return best, written(best) if small is None else small


def _bits_and_loss(tensor: CodedTensor, curvature_RC: Array | None) -> tuple[Array, Array]:
    """What each code takes in the file, and what its going adds to the loss."""
    codes_RC = tensor.matrix_RC
    limit_R = torch.from_numpy(np.abs(codes_RC).max(1, initial=1).astype(np.float32))
    price = prices(torch.from_numpy(codes_RC.astype(np.float32)), limit_R)
    bits_RC = np.where(np.abs(codes_RC) <= 1, price.first_RC.numpy(), price.slope).astype(np.float64)
    worth_RC = np.ones(codes_RC.shape)
    if curvature_RC is not None:
        mean = max(float(curvature_RC.mean()), 1e-30)
        worth_RC = curvature_RC.mean(1, keepdims=True) * curvature_RC.mean(0, keepdims=True) / mean + DAMPING * mean
    return bits_RC, worth_RC * step_value(tensor.steps)[:, None].astype(np.float64) ** 2
