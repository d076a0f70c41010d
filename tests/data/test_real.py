"""Real data, where it is at hand: what is read, and that networks learn from it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from weightfold.data import Dataset, Scaling, load, load_model
from weightfold.models import Classes, NextToken, Regression, build

Shared = Callable[[str], Path]


def train(data: Dataset, model: torch.nn.Module, *, steps: int, lr: float, batch_size: int = 64) -> None:
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    done = 0
    while done < steps:
        for inputs, targets in data.batches("train", batch_size, generator=generator):
            loss = data.task.loss(model(inputs), targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            done += 1


@torch.no_grad()
def accuracy(data: Dataset, model: torch.nn.Module) -> float:
    model.eval()
    right = sum(int((model(x).argmax(1) == y).sum()) for x, y in data.batches("test", 250))
    return right / len(data.test)


@torch.no_grad()
def loss_on_test(data: Dataset, model: torch.nn.Module) -> float:
    model.eval()
    total = sum(data.task.loss(model(x), y).item() * len(y) for x, y in data.batches("test", 250))
    return total / len(data.test)


def test_the_published_resnet20_reaches_its_accuracy(shared_data: Shared) -> None:
    # The data's README measures 81.0 % on all 10,000 test images; on 2,000 the standard error is 0.9 %.
    data = load(shared_data("cifar10-jpeg-train.parquet"), limit=2000)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    data = dataclasses.replace(data, input_scaling=Scaling(mean[:, None, None], std[:, None, None]))
    model = load_model("resnet20", shared_data("cifar10-resnets/resnet20.safetensors"), task=data.task)
    assert len(data.test) == 2000
    assert accuracy(data, model) == pytest.approx(0.81, abs=0.025)


def test_cifar_has_its_classes(shared_data: Shared) -> None:
    data = load(shared_data("cifar10-jpeg-test.parquet"), limit=300)
    assert data.classes[:3] == ("airplane", "automobile", "bird")
    assert data.task.input.shape == (3, 32, 32)
    assert torch.bincount(data.test.targets).tolist() == [6] * 10


def test_mnist_is_learnt_in_a_few_steps(shared_data: Shared) -> None:
    data = load(shared_data("mnist-train.parquet"), limit=2000)
    assert (len(data.train) + len(data.val), len(data.test)) == (2000, 2000)
    assert data.task.input.shape == (1, 28, 28)
    model = build("mlp", data.task, hidden=(64,))
    train(data, model, steps=100, lr=3e-3)
    assert accuracy(data, model) > 0.85


def test_digits_are_learnt_by_the_default_network() -> None:
    pytest.importorskip("sklearn")
    data = load("digits")
    model = build("mlp", data.task, hidden=(64, 64))
    train(data, model, steps=300, lr=3e-3)
    assert accuracy(data, model) > 0.94


@pytest.mark.parametrize(
    ("name", "settings", "n_rows", "n_features"),
    [
        ("uci/abalone.csv", {}, 4177, 7 + 3),
        ("uci/concrete.txt", {"target": 8}, 1030, 8),
        ("uci/energy.txt", {"target": 8}, 768, 8),
    ],
)
def test_small_tables_are_learnt(shared_data: Shared, name: str, settings: dict, n_rows: int, n_features: int) -> None:
    data = load(shared_data(name), **settings)
    assert data.task.output == Regression()
    assert data.task.input.shape == (n_features,)
    assert len(data.train) + len(data.val) + len(data.test) == n_rows
    model = build("mlp", data.task, width=32)
    train(data, model, steps=200, lr=3e-3)
    assert loss_on_test(data, model) < 0.6  # predicting the mean leaves about 1


def test_metro_has_dates_and_weather(shared_data: Shared) -> None:
    data = load(shared_data("uci/metro.csv"), limit=5000)
    numbers, dates = 4, 7
    assert data.task.output == Regression()
    assert data.task.input.shape[0] > numbers + dates + 11  # eleven kinds of weather, and more texts
    model = build("mlp", data.task, width=32)
    train(data, model, steps=200, lr=3e-3)
    assert loss_on_test(data, model) < 0.5


def test_shakespeare_is_learnt_a_little(shared_data: Shared) -> None:
    data = load(shared_data("text/tinyshakespeare.txt"), limit=60_000, context=32)
    assert isinstance(data.task.output, NextToken)
    model = build("char-gpt", data.task, width=32, depth=1, num_heads=2)
    before = loss_on_test(data, model)
    train(data, model, steps=60, lr=1e-2)
    after = loss_on_test(data, model)
    assert before == pytest.approx(torch.tensor(float(data.task.output.vocab)).log().item(), abs=0.2)
    assert after < 2.9  # letter frequencies alone leave about 3.3 nats


def test_the_whole_of_shakespeare_has_65_characters(shared_data: Shared) -> None:
    data = load(shared_data("text/tinyshakespeare.txt"))
    assert len(data.vocabulary) == 65 + 1


def test_sentiment_phrases_are_read(shared_data: Shared) -> None:
    data = load(shared_data("text/sst2-train.tsv"), limit=2000, context=64)
    assert data.task.output == Classes(n=2)
    assert len(data.test) == 872
    model = build("gru", data.task, width=8)
    assert loss_on_test(data, model) == pytest.approx(0.69, abs=0.05)
