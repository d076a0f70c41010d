"""Measure networks: the score on a split, the time of one inference."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import sqrt
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from weightfold.data import Dataset
from weightfold.data.dataset import SplitName
from weightfold.models import TaskSpec
from weightfold.stats.running import evaluating

EVAL_BATCH = 256
ROUNDS = 100


@dataclass(frozen=True)
class Score:
    """How well a network does on a split.

    Args:
        loss: mean loss.
        value: accuracy (classes, next token), or the explained share of the variance (regression).
        answers: what was right, one entry per answer, for paired comparisons; None for regression.
    """

    loss: float
    value: float
    answers: Tensor | None


def score_name(task: TaskSpec) -> str:
    """Name the score of a task."""
    return "R²" if task.output.kind == "regression" else "accuracy"


def outputs(model: nn.Module, inputs: Tensor) -> Tensor:
    """Call a model; from what Hugging Face models return, take the logits."""
    result = model(inputs)
    return getattr(result, "logits", result)


@torch.no_grad()
def evaluate(model: nn.Module, data: Dataset, split: SplitName, device: torch.device) -> Score:
    """Score a network on a split, in evaluation mode; the modes are put back."""
    total, count, squares, right, every = 0.0, 0, 0.0, [], []
    with evaluating(model):
        for inputs, targets in data.batches(split, EVAL_BATCH):
            inputs, targets = inputs.to(device), targets.to(device)
            predicted = outputs(model, inputs)
            total += data.task.loss(predicted, targets).item() * len(targets)
            count += len(targets)
            if data.task.output.kind == "regression":
                squares += (predicted - targets).double().square().sum().item()
                every.append(targets.double().cpu())
            else:
                right.append((predicted.argmax(-1) == targets).flatten().cpu())
    if every:
        truth = torch.cat(every)
        spread = (truth - truth.mean(0)).square().sum().item()
        return Score(total / count, 1 - squares / spread if spread else 0.0, None)
    answers = torch.cat(right)
    return Score(total / count, answers.double().mean().item(), answers)


def paired_difference(before: Score, after: Score) -> dict[str, Any] | None:
    """Compare two networks on the same answers.

    The interval is the usual one of paired proportions: only answers that changed carry information.

    Returns:
        facts: answers gained and lost, the difference and its 95 % interval; None for a regression.
    Example:
        >>> old = Score(0.0, 0.5, torch.tensor([True, True, False, False]))
        >>> new = Score(0.0, 0.5, torch.tensor([True, False, True, False]))
        >>> paired_difference(old, new)["gained"], paired_difference(old, new)["lost"]
        (1, 1)
    """
    if before.answers is None or after.answers is None:
        return None
    n = before.answers.numel()
    gained = int((~before.answers & after.answers).sum())
    lost = int((before.answers & ~after.answers).sum())
    middle = (gained - lost) / n
    half = 1.96 * sqrt(max(gained + lost - (gained - lost) ** 2 / n, 0.0)) / n
    return {
        "answers": n,
        "gained": gained,
        "lost": lost,
        "difference": middle,
        "interval": [middle - half, middle + half],
    }


@torch.no_grad()
def latency_ms(models: Mapping[str, nn.Module], inputs: Tensor, rounds: int = ROUNDS) -> dict[str, float]:
    """Time one inference of each network: on one thread, warm, in turns, the median over the rounds.

    Several threads that share cores with other programs wait for one another, which would measure the other programs.

    Args:
        models: by name; all take the same inputs.
        inputs: one batch, on the networks' device.
        rounds: measurements of each network.
    Returns:
        milliseconds: of one call, by name.
    """
    times: dict[str, list[float]] = {name: [] for name in models}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        calls = {name: _calls_for(model, inputs) for name, model in models.items()}
        for at in range(rounds):
            for name in list(models)[:: 1 if at % 2 == 0 else -1]:
                times[name].append(_time(models[name], inputs, calls[name]))
    finally:
        torch.set_num_threads(threads)
    return {name: 1000 * median(values) for name, values in times.items()}


def _calls_for(model: nn.Module, inputs: Tensor, seconds: float = 0.002) -> int:
    """Warm a network up, and find how many calls make a measurable time."""
    _time(model, inputs, 3)
    return max(1, min(100, int(seconds / max(_time(model, inputs, 3), 1e-9))))


def _time(model: nn.Module, inputs: Tensor, calls: int) -> float:
    """Seconds of one call, averaged over some."""
    synchronise(inputs.device)
    start = time.perf_counter()
    for _ in range(calls):
        model(inputs)
    synchronise(inputs.device)
    return (time.perf_counter() - start) / calls


def synchronise(device: torch.device) -> None:
    """Wait until the device has done what it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def slice_inputs(data: Dataset, n: int, device: torch.device) -> Tensor:
    """Take n inputs of the test split, some twice if there are fewer."""
    batches: Sequence[Tensor] = [inputs for inputs, _ in data.batches("test", n)]
    inputs = batches[0]
    while len(inputs) < n:
        inputs = torch.cat([inputs, inputs])[:n]
    return inputs.to(device)
