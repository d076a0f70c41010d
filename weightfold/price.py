"""What an edit will cost the loss, predicted from single samples before it is made.

Folding replaces what a reader gets of the dropped channels, a_S, by M a_K + m: its input is short of the residual
r = a_S - M a_K - m. With g = ∂ℓ/∂a, the gradient of one sample's loss at the reader's input, the loss changes by about

    E_i[-u_i] + ½ E_i[u_i²],    u_i = Σ_positions g_S · r    (sample i, summed over positions before squaring)

the second term being the Gauss-Newton curvature by the empirical Fisher. Readers of one group, and groups of one plan,
add up their u_i. The Kronecker form ½ tr(G V R Vᵀ) drops the first term and treats positions as independent.

Cost: one forward and backward pass of a few hundred samples for any number of edits; O(R C²) an edit for R rows.
Reference: Hassibi & Stork, NeurIPS 1992 (second order); Theis et al., arXiv 1801.05787 (Fisher pruning of channels);
differs in: residuals after compensation in place of whole channels, and the first-order term is kept.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from weightfold.gate import Batch, Loss
from weightfold.graph.group import Axis, ChannelGroup
from weightfold.graph.observe import Key, rows_of
from weightfold.stats.running import call, n_samples, probing
from weightfold.stats.taps import tapped

MAX_NUMBERS = 2**25
"""Activations and gradients that are kept at most, in numbers (128 MiB of float32)."""


@dataclass(eq=False)
class Trail:
    """What one reader read, and the gradient of each sample's loss at it.

    Args:
        read_RC: one row per sample, position and slot, shape (R, C), float32.
        gradient_RC: the same for ∂ℓ/∂a.
        sample_R: which sample each row belongs to, shape (R,).
    """

    read_RC: Tensor
    gradient_RC: Tensor
    sample_R: Tensor


@dataclass(frozen=True, eq=False)
class Trails:
    """Trails of all readers over the same samples.

    Args:
        by_reader: trails by reading axis.
        n_samples: samples behind them.
        error_percent: share of the answers that is wrong now; None where the targets are not classes.
        n_judged: samples behind that share: all that were given, also those without trails.
    """

    by_reader: Mapping[tuple[str, Key], Trail]
    n_samples: int
    error_percent: float | None = None
    n_judged: int = 0

    def residual(self, group: str, key: Key, keep: np.ndarray, drop: np.ndarray, map_SK: Any, left: Any) -> Tensor:
        """u_i of one reader, shape (S,), float64.

        Args:
            map_SK: M, shape (S, K).
            left: m, what the bias takes up of each dropped channel, shape (S,); None without an intercept.
        """
        trail = self.by_reader[group, key]
        kept, dropped = torch.from_numpy(keep), torch.from_numpy(drop)
        rest_RS = trail.read_RC[:, dropped] - trail.read_RC[:, kept] @ torch.from_numpy(map_SK).float().T
        if left is not None:
            rest_RS -= torch.from_numpy(left).float()
        u_R = (trail.gradient_RC[:, dropped] * rest_RS).sum(1).double()
        return torch.zeros(self.n_samples, dtype=torch.float64).index_add_(0, trail.sample_R, u_R)


def predict(residual_S: Tensor) -> float:
    """The predicted change of the mean loss, from u_i summed over all that changes at once.

    Example:
        >>> predict(torch.tensor([0.1, -0.1], dtype=torch.float64))
        0.005
    """
    return round(float(-residual_S.mean() + residual_S.square().mean() / 2), 12)


@dataclass(eq=False)
class _Open:
    """A reader that is being recorded."""

    axis: Axis
    calls: list[tuple[Tensor, list[Tensor]]] = field(default_factory=list)


def trails(
    model: nn.Module,
    groups: Sequence[ChannelGroup],
    batches: Sequence[Batch],
    loss: Loss,
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> Trails:
    """Record what the readers of some groups read and the gradients there, on probe batches.

    The loss must be a mean over samples. Batch norms use the batch, and nothing of the model changes. Readers whose
    input does not have the samples in front are left out; of batches that do not fit into `MAX_NUMBERS` after the
    first, only the answers are counted.

    Args:
        batches: (inputs, targets), from the training split.
    Example:
        >>> import weightfold as wf
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> batch = torch.randn(16, 4), torch.randint(2, (16,))
        >>> found = trails(net, list(wf.trace(net, torch.zeros(1, 4))), [batch], nn.functional.cross_entropy)
        >>> found.n_samples, found.by_reader["0", ("2.weight", 1)].gradient_RC.shape
        (16, torch.Size([16, 8]))
    """
    parts: dict[tuple[str, Key], list[Trail]] = {}
    errors: list[tuple[float | None, int]] = []
    n_recorded = n_numbers = 0
    for inputs, targets in batches:
        size = n_samples(targets, inputs)
        if n_recorded and n_numbers + n_numbers * size / n_recorded > MAX_NUMBERS:
            errors.append((answers(model, [(inputs, targets)], autocast), size))
            continue
        found, wrong = _record(model, groups, inputs, targets, loss, n_recorded, autocast)
        n_recorded += size
        errors.append((wrong, size))
        for key, trail in found.items():
            parts.setdefault(key, []).append(trail)
            n_numbers += 2 * trail.read_RC.numel()
    n_judged = sum(size for _, size in errors)
    wrongs = [wrong * size for wrong, size in errors if wrong is not None]
    mean = sum(wrongs) / n_judged if n_judged and len(wrongs) == len(errors) else None
    return Trails({key: _joined(trails) for key, trails in parts.items()}, n_recorded, mean, n_judged)


def _joined(trails: list[Trail]) -> Trail:
    return Trail(
        torch.cat([t.read_RC for t in trails]),
        torch.cat([t.gradient_RC for t in trails]),
        torch.cat([t.sample_R for t in trails]),
    )


def _record(
    model: nn.Module,
    groups: Sequence[ChannelGroup],
    inputs: Any,
    targets: Any,
    loss: Loss,
    first: int,
    autocast: Callable[[], AbstractContextManager[Any]],
) -> tuple[dict[tuple[str, Key], Trail], float | None]:
    opened = {(g.name, a.key): _Open(a) for g in groups for a in g.role("read") if a.tap is not None}
    size = n_samples(targets, inputs)
    with probing(model), torch.enable_grad(), _recording(model, opened):
        with autocast():
            outputs = call(model, inputs)
            value = loss(outputs, targets)
        _differentiate(value, opened.values())
    found = {key: trail for key, o in opened.items() if (trail := _trail(o, size, first)) is not None}
    return found, error_percent(outputs, targets)


def _differentiate(value: Tensor, readers: Iterable[_Open]) -> None:
    """Gradients at the recorded inputs alone: nothing reaches parameters, their hooks or their gradients."""
    inputs = list({id(x): x for reader in readers for x, _ in reader.calls}.values())
    gradients = torch.autograd.grad(value, inputs, allow_unused=True) if inputs else ()
    by_input = {id(x): g for x, g in zip(inputs, gradients, strict=True)}
    for reader in readers:
        for x, gradient in reader.calls:
            found = by_input[id(x)]
            if found is not None:
                gradient.append(found)


def answers(
    model: nn.Module, batches: Sequence[Batch], autocast: Callable[[], AbstractContextManager[Any]] = nullcontext
) -> float | None:
    """Share of the answers on some batches that is wrong, in per cent; None where the targets are not classes."""
    with probing(model), autocast():
        found = [(error_percent(call(model, x), y), n_samples(y, x)) for x, y in batches]
    wrongs = [wrong * size for wrong, size in found if wrong is not None]
    return sum(wrongs) / sum(size for _, size in found) if wrongs and len(wrongs) == len(found) else None


def chance_percent(batches: Sequence[Batch]) -> float | None:
    """Share that the most frequent class gets wrong, in per cent; None where the targets are not classes.

    Example:
        >>> chance_percent([(None, torch.tensor([0, 1, 1, 2]))])
        50.0
    """
    classes = [y[y >= 0] for _, y in batches if isinstance(y, Tensor) and not y.is_floating_point()]
    if not classes or len(classes) < len(batches) or not sum(map(len, classes)):
        return None
    every = torch.cat([y.reshape(-1) for y in classes])
    return 100 - 100 * int(every.bincount().max()) / len(every)


def error_percent(outputs: Any, targets: Any) -> float | None:
    """Share of the answers that are wrong; None where the targets are not classes.

    Args:
        outputs: scores, classes in dimension 1 or last, or an object with ``logits``.
    """
    scores = getattr(outputs, "logits", outputs)
    if not isinstance(scores, Tensor) or not isinstance(targets, Tensor) or targets.is_floating_point():
        return None
    for dim in (1, -1):
        answers = scores.detach().argmax(dim) if scores.ndim > 1 else scores
        if scores.ndim > 1 and answers.shape == targets.shape:
            counted = targets >= 0
            return 100 * float((answers != targets)[counted].double().mean()) if bool(counted.any()) else None
    return None


def _recording(model: nn.Module, opened: Mapping[tuple[str, Key], _Open]) -> AbstractContextManager[None]:
    """Note each reader's input, and let gradients reach it."""
    by_path: dict[str, list[_Open]] = {}
    for reader in opened.values():
        assert reader.axis.tap is not None
        by_path.setdefault(reader.axis.tap[0], []).append(reader)
    return tapped(model, {path: partial(_record_input, readers=readers) for path, readers in by_path.items()})


def _record_input(read: Tensor, readers: Sequence[_Open]) -> Tensor | None:
    if not read.is_floating_point():
        return None
    x = read.view_as(read)
    if not x.requires_grad:
        x.requires_grad_()
    for reader in readers:
        reader.calls.append((x, []))
    return x


def _trail(reader: _Open, size: int, first: int) -> Trail | None:
    """Rows of all calls of a reader; None where samples cannot be told apart or no gradient came."""
    reads, gradients, samples = [], [], []
    assert reader.axis.tap is not None
    dim = reader.axis.tap[1]
    for x, gradient in reader.calls:
        if len(x) != size or dim % x.ndim == 0 or not gradient:
            return None
        rows_RC = rows_of(x.detach(), dim, reader.axis.index)
        reads.append(rows_RC.float().cpu())
        gradients.append(rows_of(gradient[0], dim, reader.axis.index).float().cpu() * size)
        samples.append(torch.arange(first, first + size).repeat_interleave(math.ceil(len(rows_RC) / size)))
    return _joined([Trail(*parts) for parts in zip(reads, gradients, samples, strict=True)]) if reads else None
