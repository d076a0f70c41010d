"""Every built-in network on every task that it claims, and the errors for the others."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from weightfold.errors import ConfigError
from weightfold.models import (
    NAMES,
    Classes,
    ImageInput,
    NextToken,
    Regression,
    TableInput,
    TaskSpec,
    TextInput,
    build,
    serving,
)

TASKS = {
    "digits": TaskSpec(input=ImageInput(channels=1, height=8, width=8), output=Classes(n=10)),
    "mnist": TaskSpec(input=ImageInput(channels=1, height=28, width=28), output=Classes(n=10)),
    "cifar": TaskSpec(input=ImageInput(channels=3, height=32, width=32), output=Classes(n=10)),
    "image-regression": TaskSpec(input=ImageInput(channels=3, height=11, width=17), output=Regression(n_targets=2)),
    "table-classes": TaskSpec(input=TableInput(n_features=6), output=Classes(n=3)),
    "table-regression": TaskSpec(input=TableInput(n_features=6), output=Regression()),
    "text-next-token": TaskSpec(input=TextInput(vocab=12, context=10), output=NextToken(vocab=12)),
    "text-classes": TaskSpec(input=TextInput(vocab=12, context=10), output=Classes(n=2)),
    "text-regression": TaskSpec(input=TextInput(vocab=12, context=10), output=Regression()),
}
SMALL = {
    "char-gpt": {"width": 32, "depth": 2, "num_heads": 2},
    "gru": {"width": 32},
    "lenet5": {},
    "mlp": {"hidden": (32, 32)},
    "resnet20": {"width": 8, "depth": 8},
    "resnet9": {"width": 8},
    "vgg-small": {"width": 8},
    "vit-tiny": {"width": 32, "depth": 2, "num_heads": 2},
}
SERVED = [(name, task) for task in TASKS for name in NAMES if name in serving(TASKS[task])]
EACH_ONCE = [(name, next(task for other, task in SERVED if other == name)) for name in NAMES]


def batch_of(task: TaskSpec, n: int = 8) -> tuple[Tensor, Tensor]:
    """Draw a batch that fits a task."""
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(n, *task.input.shape, generator=generator)
    if isinstance(task.input, TextInput):
        inputs = torch.randint(task.input.vocab, (n, task.input.context), generator=generator)
    if isinstance(task.output, Regression):
        return inputs, torch.randn(n, task.output.n_targets, generator=generator)
    shape = inputs.shape if isinstance(task.output, NextToken) else (n,)
    return inputs, torch.randint(task.output.width, shape, generator=generator)


def test_the_names_are_those_promised() -> None:
    assert set(NAMES) == set(SMALL)
    assert list(NAMES) == sorted(NAMES)


def test_every_model_serves_what_it_should() -> None:
    images = {"gru", "lenet5", "mlp", "resnet20", "resnet9", "vgg-small", "vit-tiny"}
    for task in ("digits", "mnist", "cifar", "image-regression"):
        assert set(serving(TASKS[task])) == images
    for task in ("table-classes", "table-regression"):
        assert set(serving(TASKS[task])) == {"gru", "mlp"}
    for task in ("text-next-token", "text-classes", "text-regression"):
        assert set(serving(TASKS[task])) == {"char-gpt", "gru"}


@pytest.mark.parametrize(("name", "task_name"), SERVED)
def test_every_model_learns_every_task_it_claims(name: str, task_name: str) -> None:
    task = TASKS[task_name]
    model = build(name, task, **SMALL[name])
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    inputs, targets = batch_of(task)
    losses = []
    for _ in range(6):
        loss = task.loss(model(inputs), targets)
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


@pytest.mark.parametrize(("name", "task_name"), SERVED)
def test_outputs_have_the_shape_of_the_task(name: str, task_name: str) -> None:
    task = TASKS[task_name]
    inputs, _ = batch_of(task, 3)
    places = inputs.shape[1:] if task.output.kind == "next-token" else ()
    model = build(name, task, **SMALL[name]).eval()
    assert model(inputs).shape == (3, *places, task.output.width)


@pytest.mark.filterwarnings("ignore:The tensor attributes self.gru._flat_weights")
@pytest.mark.parametrize(("name", "task_name"), EACH_ONCE)
def test_export_sees_the_model_whole(name: str, task_name: str) -> None:
    task = TASKS[task_name]
    model = build(name, task, **SMALL[name]).eval()
    program = torch.export.export(model, (task.example(),), strict=False)
    assert set(program.state_dict) == set(model.state_dict())


@settings(max_examples=25, deadline=None)
@given(
    name=st.sampled_from(sorted(serving(TASKS["digits"]))),
    channels=st.sampled_from([1, 3]),
    height=st.integers(8, 40),
    width=st.integers(8, 40),
)
def test_images_of_any_size_from_8_pixels_work(name: str, channels: int, height: int, width: int) -> None:
    task = TaskSpec(input=ImageInput(channels=channels, height=height, width=width), output=Classes(n=2))
    model = build(name, task, **SMALL[name])
    assert model(batch_of(task, 2)[0]).shape == (2, 2)


@pytest.mark.parametrize("name", NAMES)
def test_the_seed_decides_the_weights_and_nothing_else_changes(name: str) -> None:
    task = next(task for task in TASKS.values() if name in serving(task))
    torch.manual_seed(5)
    before = torch.get_rng_state()
    one, two, other = (build(name, task, seed=seed, **SMALL[name]) for seed in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), before)
    assert_same(one, two)
    assert any(not torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def test_a_generator_draws_the_seed() -> None:
    task = TASKS["table-classes"]
    generator = torch.Generator().manual_seed(0)
    first, second = build("mlp", task, generator=generator), build("mlp", task, generator=generator)
    assert not torch.equal(first.state_dict()["head.weight"], second.state_dict()["head.weight"])
    assert_same(first, build("mlp", task, generator=torch.Generator().manual_seed(0)))


def test_weights_do_not_depend_on_the_hash_seed(repository: Path) -> None:
    code = (
        "import hashlib, torch\n"
        "from weightfold.models import NAMES, TaskSpec, ImageInput, TableInput, TextInput, Classes, build, serving\n"
        "inputs = ImageInput(channels=1, height=8, width=8), TextInput(vocab=5, context=4)\n"
        "tasks = [TaskSpec(input=i, output=Classes(n=2)) for i in inputs]\n"
        "digest = hashlib.sha256()\n"
        "for task in tasks:\n"
        "    for name in serving(task):\n"
        "        for key, value in build(name, task).state_dict().items():\n"
        "            digest.update(key.encode() + value.numpy().tobytes())\n"
        "print(digest.hexdigest())\n"
    )
    runs = [
        subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            check=True,
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": str(repository), "OMP_NUM_THREADS": "1"},
        ).stdout
        for seed in ("1", "2")
    ]
    assert runs[0] == runs[1]


@pytest.mark.parametrize(
    ("name", "task_name", "overrides", "complaint"),
    [
        ("resnet21", "cifar", {}, "no built-in model 'resnet21'.*\n.*Did you mean 'resnet20'"),
        ("lenet5", "table-classes", {}, "'lenet5' reads image input. Got table.*\n.*gru, mlp"),
        ("mlp", "text-classes", {}, "'mlp' reads image or table input. Got text.*\n.*char-gpt, gru"),
        ("mlp", "digits", {"hiden": (3,)}, "no setting 'hiden'.*\n.*Did you mean 'hidden'"),
        ("mlp", "digits", {"hidden": (3,), "width": 4}, "either 'hidden' or"),
        ("mlp", "digits", {"hidden": (0,)}, "'hidden.0' setting of MlpConfig"),
        ("vit-tiny", "digits", {"width": 30, "num_heads": 4}, "multiple of 'num_heads'.*\n.*width=32"),
        ("resnet20", "digits", {"depth": 21}, r"6 n \+ 2. Got 21.*\n.*depth=20 or depth=26"),
        ("char-gpt", "text-classes", {"tied": True}, "A tied head predicts tokens"),
    ],
)
def test_errors_say_what_to_do(name: str, task_name: str, overrides: dict, complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        build(name, TASKS[task_name], **overrides)


def test_images_too_small_are_refused_with_models_that_can() -> None:
    task = TaskSpec(input=ImageInput(channels=1, height=7, width=9), output=Classes(n=2))
    with pytest.raises(ConfigError, match=r"at least 8×8 pixels\. Got 7×9 instead\.\n.*gru, mlp"):
        build("vgg-small", task)


def assert_same(one: nn.Module, two: nn.Module) -> None:
    for (name, a), (other, b) in zip(one.state_dict().items(), two.state_dict().items(), strict=True):
        assert name == other
        assert torch.equal(a, b), name


@pytest.fixture
def repository() -> Path:
    return Path(__file__).parents[2]
