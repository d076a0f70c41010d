"""Networks of every kind, their norms' parameters and statistics away from 1 and 0."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from weightfold.models import Classes, ImageInput, NextToken, TaskSpec, TextInput, build

IMAGES = TaskSpec(input=ImageInput(channels=3, height=16, width=16), output=Classes(n=10))
TEXT = TaskSpec(input=TextInput(vocab=20, context=8), output=NextToken(vocab=20))
Made = tuple[nn.Module, Tensor]


def _tokens() -> Tensor:
    return torch.randint(0, 20, (2, 8), generator=torch.Generator().manual_seed(1))


def _grouped() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=4), nn.ReLU()),
        *(nn.Conv2d(8, 8, 3, groups=8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 4, 3)),
    )


def _convs() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 5, 3), nn.BatchNorm2d(5)),
        *(nn.SiLU(), nn.Flatten(), nn.Linear(5 * 16, 4)),
    )


MAKERS: dict[str, Callable[[], Made]] = {
    "relu and tanh": lambda: (
        nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3)),
        torch.randn(2, 4),
    ),
    "linear": lambda: (
        nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3)),
        torch.randn(2, 4),
    ),
    "grouped": lambda: (_grouped(), torch.randn(2, 3, 8, 8)),
    "convs": lambda: (_convs(), torch.randn(2, 3, 8, 8)),
    "encoder": lambda: (nn.TransformerEncoderLayer(16, 4, 32, batch_first=True), torch.randn(2, 5, 16)),
    "gru": lambda: (build("gru", TEXT), _tokens()),
    "char-gpt": lambda: (build("char-gpt", TEXT, depth=2, width=16, num_heads=2), _tokens()),
    "resnet": lambda: (build("resnet20", IMAGES, depth=8, width=4), torch.randn(2, 3, 16, 16)),
    "vit": lambda: (build("vit-tiny", IMAGES, depth=1), torch.randn(2, 3, 16, 16)),
}


def lively(model: nn.Module, seed: int = 0) -> nn.Module:
    """Move biases, norms and statistics away from where they start."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim == 1:
                p.add_(0.1 * torch.randn(p.shape, generator=generator))
        for b in model.buffers():
            if b.is_floating_point():
                b.add_(0.3 * torch.rand(b.shape, generator=generator))
    return model.eval()


@pytest.fixture(params=MAKERS)
def made(request: pytest.FixtureRequest) -> Made:
    """One network of each kind, and an input."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        model, example = MAKERS[request.param]()
    return lively(model), example
