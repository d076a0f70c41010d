"""Networks with some of their channels removed, for every built-in family."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from weightfold.artifact import Builder
from weightfold.export import Blueprint, Source
from weightfold.export.example import task_input, zeros
from weightfold.graph import edit, trace
from weightfold.graph.apply import apply
from weightfold.models import Classes, ImageInput, NextToken, TaskSpec, TextInput, build

IMAGE = TaskSpec(input=ImageInput(channels=1, height=8, width=8), output=Classes(n=10))
TEXT = TaskSpec(input=TextInput(vocab=20, context=12), output=NextToken(vocab=20))
SMALL = {
    "mlp": (IMAGE, {"hidden": [12, 10]}),
    "lenet5": (IMAGE, {}),
    "resnet20": (IMAGE, {"width": 4, "depth": 8}),
    "resnet9": (IMAGE, {"width": 4}),
    "vgg-small": (IMAGE, {"width": 4}),
    "vit-tiny": (IMAGE, {"width": 16, "depth": 2, "num_heads": 2}),
    "gru": (IMAGE, {"width": 12}),
    "char-gpt": (TEXT, {"width": 16, "depth": 2, "num_heads": 2}),
}


def shrink_(model: nn.Module, example: object) -> int:
    """Remove half of the channels of every group that admits it; return how many groups that were."""
    graph, done = trace(model, example), 0
    for group in graph:
        if "remove" not in group.admits or group.kind != "channels" or group.block is not None:
            continue
        keep = torch.arange(0, group.n_channels, 2)
        graph, _ = apply(model, graph, edit.remove(graph[group.name], keep))
        done += 1
    return done


@pytest.fixture
def shrunk() -> Callable[[str], Source]:
    """Make a built-in network by name and remove half of its channels."""

    def make(name: str) -> Source:
        task, overrides = SMALL[name]
        model = build(name, task, seed=1, **overrides)
        before = Blueprint.of(model)
        inputs = (task_input(task),)
        shrink_(model, zeros(inputs))
        builder = Builder(kind="built-in", name=name, task=task.model_dump(mode="json"), overrides=overrides)
        return Source(model.eval(), inputs, before, builder, "ab" * 32)

    return make
