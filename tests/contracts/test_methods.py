"""What every method promises. A file in `weightfold/methods` that defines a method is tested as soon as it exists."""

from __future__ import annotations

import copy
import importlib
import io
import json
import os
import pkgutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import weightfold.methods
from weightfold.compressor import Compressor
from weightfold.errors import ConfigError
from weightfold.fingerprint import fingerprint
from weightfold.graph.apply import apply
from weightfold.graph.edit import Edit
from weightfold.graph.resize import with_sizes
from weightfold.graph.trace import trace
from weightfold.ledger import Ledger
from weightfold.methods.base import Method

ROOT = Path(__file__).parents[2]
STEPS, CUT = 10, 6
EXAMPLE = torch.zeros(2, 3, 8, 8)


def discovered() -> dict[str, type[Method]]:
    """Every method by the name of its file."""
    found: dict[str, type[Method]] = {}
    for info in pkgutil.iter_modules(weightfold.methods.__path__):
        module = importlib.import_module(f"weightfold.methods.{info.name}")
        for value in vars(module).values():
            own = isinstance(value, type) and issubclass(value, Method) and value.__module__ == module.__name__
            if own and value is not Method:
                assert info.name not in found, f"weightfold/methods/{info.name}.py defines two methods"
                found[info.name] = value
    return found


METHODS = discovered()


class Net(nn.Module):
    """A residual convolutional network with batch norms and dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.n0 = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.c1, self.n1 = nn.Conv2d(8, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12)
        self.c2, self.n2 = nn.Conv2d(12, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.fc, self.drop, self.head = nn.Linear(8, 10), nn.Dropout(0.1), nn.Linear(10, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.n0(self.stem(x)))
        x = F.relu(x + self.n2(self.c2(F.relu(self.n1(self.c1(x))))))
        return self.head(self.drop(F.relu(self.fc(x.mean((2, 3))))))


def net() -> Net:
    torch.manual_seed(2)
    return Net()


def data(n: int, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(16, 3, 8, 8, generator=generator), torch.randint(0, 4, (16,), generator=generator))
        for _ in range(n)
    ]


def settings_of(cls: type[Method]) -> dict[str, Any]:
    """An early event, so that a short run contains it; grids so coarse that some channels are zero on them."""
    if cls.name == "self_compress":
        return {"at": 0.2, "resolution": 3.2, "check": 0.1, "dwell": 1, "refresh": 2}
    return {"at": 0.4} if "at" in cls.Config.model_fields else {}


class Run:
    """A small training run with one method; ``begin`` prepares, ``train`` does some of its steps."""

    def __init__(self, name: str, path: Path, *, create: bool = True) -> None:
        cls = METHODS[name]
        self.model = net()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=2e-3)
        self.ledger = Ledger.create(path, run={"seed": 3}) if create else Ledger.open(path)
        self.compressor = Compressor(
            self.model,
            EXAMPLE,
            [cls(**settings_of(cls))],
            loss=F.cross_entropy,
            probe=data(3, seed=1),
            ledger=self.ledger if create else None,
            total_steps=STEPS,
            seed=3,
            max_increase=10.0,
        )
        self.compressor.prepare(self.optimizer)
        torch.manual_seed(8)

    def train(self, start: int = 0, stop: int = STEPS) -> None:
        for x, y in data(STEPS)[start:stop]:
            loss = F.cross_entropy(self.model(x), y) + self.compressor.penalty()
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.compressor.step()

    def finish(self) -> tuple[str, str]:
        self.compressor.convert()
        with self.ledger:
            self.ledger.verify()
            return self.ledger.head, fingerprint(self.model)

    def checkpoint(self) -> bytes:
        stored = io.BytesIO()
        parts = {"model": self.model, "optimizer": self.optimizer, "compressor": self.compressor}
        torch.save({k: v.state_dict() for k, v in parts.items()} | {"rng": torch.get_rng_state()}, stored)
        return stored.getvalue()

    def resume(self, checkpoint: bytes) -> None:
        state = torch.load(io.BytesIO(checkpoint), weights_only=True)
        self.compressor.load_state_dict(state["compressor"])
        self.compressor.ledger = self.ledger
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["rng"])


def whole(name: str, path: Path) -> tuple[str, str]:
    run = Run(name, path)
    run.train()
    return run.finish()


every_method = pytest.mark.parametrize("name", METHODS)


def test_methods_are_found() -> None:
    assert {"fold", "prune"} <= METHODS.keys()


@every_method
def test_the_name_is_that_of_the_file(name: str) -> None:
    assert METHODS[name].name == name
    assert METHODS[name].__doc__


@every_method
def test_the_configuration_survives_json_and_refuses_unknown_keys(name: str) -> None:
    cls = METHODS[name]
    config = cls.Config(**settings_of(cls))
    assert cls.Config.from_json(config.to_json()) == config
    assert cls(cls.Config(**json.loads(json.dumps(config.model_dump(mode="json"))))).config == config
    with pytest.raises(ConfigError) as caught:
        cls(no_such_setting=1)
    assert "no_such_setting" in caught.value.message
    assert caught.value.remedy
    field = next(iter(cls.Config.model_fields))
    with pytest.raises(ConfigError, match=field):
        cls(**{field: object()})


@every_method
def test_prepare_leaves_the_network_as_it_was(name: str) -> None:
    cls, model = METHODS[name], net().eval()
    x = data(1)[0][0]
    output, before = model(x), fingerprint(model)
    compressor = Compressor(model, EXAMPLE, [cls(**settings_of(cls))], total_steps=STEPS)
    rng = torch.get_rng_state()
    compressor.prepare()
    assert torch.equal(rng, torch.get_rng_state())
    assert fingerprint(model) == before
    assert torch.equal(model(x), output)
    assert not model.training


@every_method
def test_the_penalty_is_nothing_or_finite_and_differentiable(name: str) -> None:
    cls, model = METHODS[name], net()
    method = cls(**settings_of(cls))
    Compressor(model, EXAMPLE, [method], total_steps=STEPS).prepare()
    value = method.penalty()
    if value is None:
        return
    assert value.numel() == 1
    assert bool(torch.isfinite(value))
    value.reshape(()).backward()
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    assert grads
    assert all(bool(torch.isfinite(g).all()) for g in grads)


@every_method
def test_a_run_is_replayed_from_its_ledger(name: str, tmp_path: Path) -> None:
    """The recorded edits, on a fresh copy, give the same structure step by step."""
    run = Run(name, tmp_path / "run.ledger")
    run.train()
    run.compressor.convert()
    fresh = net()
    graph = with_sizes(fresh, EXAMPLE, trace(fresh, EXAMPLE))
    shapes = {n: tuple(v.shape) for n, v in fresh.state_dict().items()}
    with run.ledger as ledger:
        bodies = [e.body for e in ledger.entries() if e.kind == "edit"]
        assert bodies, "the run changed nothing"
        for body in bodies:
            json.dumps(body)
            graph, _ = apply(fresh, graph, Edit.from_record(body["what"]["edit"], ledger.get_blob))
    final = {n: tuple(v.shape) for n, v in run.model.state_dict().items()}
    assert {n: tuple(v.shape) for n, v in fresh.state_dict().items()} == final
    assert final != shapes or all(e.channels_before == e.channels_after for e in run.compressor.events)
    assert fresh(EXAMPLE).shape == (2, 4)
    assert {id(p) for g in run.optimizer.param_groups for p in g["params"]} == {id(p) for p in run.model.parameters()}
    assert all(e.accepted for e in run.compressor.events)


@every_method
def test_a_run_does_not_touch_the_global_generator(name: str, tmp_path: Path) -> None:
    run = Run(name, tmp_path / "run.ledger")
    for x, y in data(STEPS):
        (F.cross_entropy(run.model(x), y) + run.compressor.penalty()).backward()
        run.optimizer.step()
        run.optimizer.zero_grad()
        rng = torch.get_rng_state()
        run.compressor.step()
        assert torch.equal(rng, torch.get_rng_state())
    run.ledger.close()


@every_method
def test_a_converted_network_is_plain(name: str, tmp_path: Path) -> None:
    run = Run(name, tmp_path / "run.ledger")
    run.train()
    run.finish()
    for module in run.model.modules():
        assert type(module) is Net or type(module).__module__.startswith("torch.nn.modules")
        for hooks in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"):
            assert not getattr(module, hooks)
        assert not [k for k, v in vars(module).items() if type(v).__module__.startswith("weightfold")]
    assert {type(p) for p in run.model.parameters()} == {nn.Parameter}
    copy.deepcopy(run.model)


@every_method
def test_a_killed_run_resumes_to_the_same_ledger_head(name: str, tmp_path: Path) -> None:
    expected = whole(name, tmp_path / "whole.ledger")
    for stop in (2, 4, CUT):
        path = tmp_path / f"{stop}.ledger"
        killed = Run(name, path)
        killed.train(stop=stop)
        checkpoint = killed.checkpoint()
        killed.ledger.close()
        resumed = Run(name, path, create=False)
        resumed.resume(checkpoint)
        resumed.train(start=stop)
        assert resumed.finish() == expected, f"killed after step {stop}"


SNIPPET = """
import json, sys
from pathlib import Path
from tests.contracts.test_methods import METHODS, whole
print(json.dumps({name: whole(name, Path(sys.argv[1]) / f"{name}.ledger") for name in METHODS}))
"""


def test_the_hash_seed_does_not_matter(tmp_path: Path) -> None:
    heads = []
    for seed in ("0", "1234"):
        (tmp_path / seed).mkdir()
        env = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONHASHSEED": seed, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-W", "ignore", "-c", SNIPPET, str(tmp_path / seed)]
        done = subprocess.run(command, capture_output=True, text=True, env=env)
        assert done.returncode == 0, done.stderr
        heads.append(json.loads(done.stdout))
    assert heads[0] == heads[1]
    assert heads[0].keys() == METHODS.keys()
