"""What a task accepts, and what it makes of outputs and targets."""

from __future__ import annotations

import math

import pytest
import torch

from weightfold.errors import ConfigError
from weightfold.models import Classes, ImageInput, NextToken, Regression, TableInput, TaskSpec, TextInput

TASKS = [
    TaskSpec(input=ImageInput(channels=3, height=8, width=9), output=Classes(n=4)),
    TaskSpec(input=TableInput(n_features=5), output=Regression(n_targets=2)),
    TaskSpec(input=TextInput(vocab=7, context=6), output=NextToken(vocab=7)),
]


@pytest.mark.parametrize("task", TASKS)
def test_survives_json(task: TaskSpec) -> None:
    assert TaskSpec.from_json(task.to_json()) == task
    assert hash(TaskSpec.from_json(task.to_json())) == hash(task)


@pytest.mark.parametrize("task", TASKS)
def test_example_has_the_declared_shape(task: TaskSpec) -> None:
    example = task.example(3)
    assert example.shape == (3, *task.input.shape)
    assert example.dtype == (torch.int64 if task.input.kind == "text" else torch.float32)


def test_losses_match_their_closed_forms() -> None:
    # Equal logits: the cross-entropy is the logarithm of the number of choices.
    classes, regression, text = TASKS
    assert classes.loss(torch.zeros(2, 4), torch.tensor([0, 3])).item() == pytest.approx(math.log(4))
    assert text.loss(torch.zeros(2, 6, 7), torch.zeros(2, 6, dtype=torch.int64)).item() == pytest.approx(math.log(7))
    assert regression.loss(torch.ones(2, 2), torch.zeros(2, 2)).item() == 1.0


@pytest.mark.parametrize(
    ("make", "complaint"),
    [
        (lambda: ImageInput(channels=0, height=8, width=8), "'channels' setting of ImageInput"),
        (lambda: Classes(n=1), "'n' setting of Classes"),
        (lambda: TaskSpec(input=TableInput(n_features=2), output=NextToken(vocab=3)), "needs text input"),
        (lambda: TaskSpec(input=TextInput(vocab=4, context=2), output=NextToken(vocab=3)), "same vocabulary"),
        (lambda: TableInput.from_json('{"n_feature": 2}'), "n_features"),
    ],
)
def test_refuses_what_makes_no_sense(make, complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        make()
