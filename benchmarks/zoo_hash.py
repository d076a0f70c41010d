"""Pairs of networks of which it is known whether they are the same: what `benchmarks/zoo.py` tries the hash on.

Each network has random weights, norms' statistics included, and 20 steps of Adam behind it. Pairs, for n networks of an
architecture, each with 20 disguises (rounding noise on top):

    same        any two of a network and its disguises                                         210 n
    unrelated   a network, and any disguise of another                                         10 n (n - 1)
    one step    a network or any disguise of it, and a disguise of what one step of Adam (rate 1e-3) or SGD (1e-2), on
                one of 4 batches of 32 random samples, makes of it                             168 n
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from weightfold.models import Classes, ImageInput, NextToken, TaskSpec, TextInput, build
from weightfold.weights.canon import TOLERANCE, hash_distance, hash_keys, hashes_of
from weightfold.weights.disguise import disguise
from weightfold.weights.symmetry import Symmetries, symmetries

IMAGES = TaskSpec(input=ImageInput(channels=3, height=16, width=16), output=Classes(n=10))
TEXT = TaskSpec(input=TextInput(vocab=20, context=8), output=NextToken(vocab=20))
DISGUISES, BATCHES, ROUNDING = 20, 4, 6e-8


def _mlp(act: type[nn.Module]) -> nn.Module:
    return nn.Sequential(nn.Linear(20, 32), act(), nn.Linear(32, 24), act(), nn.Linear(24, 10))


def _convs() -> nn.Module:
    first = (nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 12, 3), nn.BatchNorm2d(12))
    return nn.Sequential(*first, nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(48, 10))


MAKERS: dict[str, Callable[[], nn.Module]] = {
    "mlp relu": lambda: _mlp(nn.ReLU),
    "mlp tanh": lambda: _mlp(nn.Tanh),
    "conv bn": _convs,
    "resnet8": lambda: build("resnet20", IMAGES, depth=8, width=4),
    "char-gpt": lambda: build("char-gpt", TEXT, depth=2, width=16, num_heads=2),
    "gru": lambda: build("gru", TEXT),
}


def batch(name: str, generator: torch.Generator, n: int = 32) -> tuple[Tensor, Tensor]:
    """Random inputs and targets."""
    if name in ("char-gpt", "gru"):
        x = torch.randint(0, 20, (n, 9), generator=generator)
        return x[:, :-1], x[:, 1:]
    shape = (20,) if name.startswith("mlp") else (3, 16, 16)
    return torch.randn(n, *shape, generator=generator), torch.randint(0, 10, (n,), generator=generator)


def step(model: nn.Module, optimiser: torch.optim.Optimizer, x: Tensor, y: Tensor) -> None:
    optimiser.zero_grad()
    out = model(x)
    F.cross_entropy(out.flatten(0, -2), y.flatten()).backward()
    optimiser.step()


def network(name: str, seed: int) -> nn.Module:
    """A network after 20 steps of Adam, its norms away from 1 and 0."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model = MAKERS[name]()
    with torch.no_grad():
        for value in [p for p in model.parameters() if p.ndim == 1]:
            value += 0.2 * torch.randn(value.shape, generator=generator)
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-3)
    for _ in range(20):
        step(model, optimiser, *batch(name, generator))
    return model


def tuned(model: nn.Module, name: str, number: int) -> nn.Module:
    """A network after one more step."""
    twin = copy.deepcopy(model)
    adam = number % 2 == 0
    kind, rate = (torch.optim.Adam, 1e-3) if adam else (torch.optim.SGD, 1e-2)
    step(twin, kind(twin.parameters(), lr=rate), *batch(name, torch.Generator().manual_seed(1000 + number)))
    return twin


def hidden(model: nn.Module, x: Tensor, found: Symmetries, generator: torch.Generator) -> dict[str, Tensor]:
    """The weights of a random disguise, each float with noise of half a unit in the last place."""
    twin = disguise(model.eval(), x, generator, found=found, shift_logits=True)
    out = {}
    for name, value in twin.state_dict().items():
        noise = ROUNDING * (2 * torch.rand(value.shape, generator=generator) - 1)
        out[name] = value * (1 + noise) if value.is_floating_point() else value
    return out


def measured(n: int) -> dict[str, object]:
    """Count wrong answers over all architectures."""
    rows = []
    for name in MAKERS:
        x = batch(name, torch.Generator().manual_seed(0), 2)[0]
        nets = [network(name, seed) for seed in range(n)]
        found = symmetries(nets[0].eval(), x)
        generator = torch.Generator().manual_seed(1)
        texts = hashes_of(found, [net.state_dict() for net in nets])
        same, one_step, keyless = [], [], 0
        twins: list[list[str]] = []
        for net, text in zip(nets, texts, strict=True):
            mine = [text, *hashes_of(found, [hidden(net, x, found, generator) for _ in range(DISGUISES)])]
            pairs = list(itertools.combinations(mine, 2))
            same += [hash_distance(a, b) for a, b in pairs]
            keyless += sum(not set(hash_keys(a)) & set(hash_keys(b)) for a, b in pairs)
            twins.append(mine)
            net.train()
            after = [hidden(tuned(net, name, i), x, found, generator) for i in range(2 * BATCHES)]
            one_step += [hash_distance(a, b) for b in hashes_of(found, after) for a in mine]
        unrelated = [hash_distance(texts[i], twin) for i in range(n) for j in range(i) for twin in twins[j][1:]]
        row = {
            "architecture": name,
            "same": len(same),
            "unrelated": len(unrelated),
            "one_step": len(one_step),
            "false_different": sum(d > TOLERANCE for d in same),
            "false_equal": sum(d <= TOLERANCE for d in unrelated + one_step),
            "largest_same": max(same),
            "least_unrelated": min(unrelated),
            "least_one_step": min(one_step),
            "no_common_key": keyless,
        }
        rows.append(row)
        print(row, flush=True)
    count = lambda key: sum(int(row[key]) for row in rows)  # noqa: E731
    return {
        "hash_false_equal": count("false_equal"),
        "hash_false_different": count("false_different"),
        "hash_pairs": {key: count(key) for key in ("same", "unrelated", "one_step", "no_common_key")},
        "hash_rows": rows,
    }
