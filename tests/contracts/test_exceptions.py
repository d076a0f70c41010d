"""An exception at any stage, in any code of the user's: it comes through, and the network is as it was."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from weightfold.compressor import Compressor
from weightfold.config import Config
from weightfold.errors import ConfigError
from weightfold.graph.edit import remove
from weightfold.ledger import Ledger
from weightfold.methods.base import Method, Moment, Proposal

EXAMPLE = torch.zeros(2, 3, 6, 6)


class Boom(Exception):
    """What the user's own code raises."""


class Fuse:
    """Raises at the n-th call after it was armed, or at all calls until it is disarmed."""

    def __init__(self) -> None:
        self.left: int | None = None
        self.always = False

    def arm(self, n: int = 1) -> None:
        self.left = n

    def __call__(self) -> None:
        if self.always:
            raise Boom
        if self.left is not None:
            self.left -= 1
            if self.left == 0:
                self.left = None
                raise Boom


class CutConfig(Config):
    """Settings of `Cut`."""


class Cut(Method):
    """Halves two groups together at step 2, and one at once; calls back at each of its stages."""

    name: ClassVar[str] = "cut"
    Config: ClassVar[type[Config]] = CutConfig

    def __init__(self, stages: dict[str, Fuse]) -> None:
        super().__init__()
        self.stages = stages

    def prepare(self, moment: Moment) -> None:
        self.stages["prepare"]()

    def observes(self, step: int, total_steps: int) -> bool:
        return step < 2

    def updates(self, step: int, total_steps: int) -> bool:
        return True

    def update(self, moment: Moment) -> None:
        self.stages["update"]()

    def watch(self, total_steps: int) -> int:
        return 2

    def step(self, moment: Moment) -> list[Proposal]:
        self.stages["step"]()
        if moment.total_steps and moment.step != 2:
            return []
        groups = [moment.graph[name] for name in ("one", "head")]
        cuts = [remove(g, torch.arange(g.n_channels // 2)) for g in groups if g.n_channels > 1]
        return [Proposal(cut, less=self.less) for cut in cuts]

    def less(self) -> Proposal | None:
        self.stages["less"]()
        return None

    def convert(self, moment: Moment) -> None:
        self.stages["convert"]()


class Net(nn.Module):
    """A depthwise convolution between plain ones, norms of two kinds, dropout; one norm is frozen."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.deep, self.frozen = nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.BatchNorm2d(8)
        self.drop, self.head, self.out = nn.Dropout(0.3), nn.Linear(8, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.frozen(self.deep(F.relu(self.norm(self.one(x))))))
        return self.out(F.relu(self.head(self.drop(x.mean((2, 3))))))


def batch(seed: int) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(16, 3, 6, 6, generator=g), torch.randint(4, (16,), generator=g)


STAGES = ("prepare", "update", "step", "less", "convert", "loss", "check", "forward", "batches", "ledger")


class Run:
    """A network in training, with a fuse in each piece of code that is called back."""

    def __init__(self, path: Path, monkeypatch: pytest.MonkeyPatch, refuse: bool = False) -> None:
        self.fuses = {stage: Fuse() for stage in STAGES}
        self.model = Net()
        self.model.frozen.eval()
        self.model.deep.register_forward_hook(lambda *_: self.fuses["forward"]())
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3)
        ledger = Ledger.create(path / "a.ledger", run={})
        append = ledger.append

        def failing(kind: str, *args: Any, **kwargs: Any) -> Any:
            if kind == "edit":
                self.fuses["ledger"]()
            return append(kind, *args, **kwargs)

        monkeypatch.setattr(ledger, "append", failing)
        self.compressor = Compressor(
            self.model,
            EXAMPLE,
            [Cut(self.fuses)],
            loss=self.loss,
            probe=[batch(8), batch(9)],
            total_steps=6,
            max_increase=-1.0 if refuse else 9.0,
            ledger=ledger,
            check=self.check,
        )

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        self.fuses["loss"]()
        return F.cross_entropy(outputs, targets)

    def check(self, _: nn.Module) -> str:
        self.fuses["check"]()
        return ""

    def batches(self) -> Iterator[Tensor]:
        for number in range(2):
            yield batch(number)[0]
            self.fuses["batches"]()

    def train(self, n: int) -> None:
        for number in range(n):
            x, y = batch(number)
            F.cross_entropy(self.compressor.network(x), y).backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.compressor.step()

    def state(self) -> list[Any]:
        """All that must not change: modes, sizes, values, statistics, momentum, optimiser, random state, hooks."""
        model, graph = self.model, self.compressor._surgeon
        return [
            [(m.training, getattr(m, "momentum", 0), getattr(m, "groups", 0)) for m in model.modules()],
            {name: value.tolist() for name, value in model.state_dict().items()},
            [[(k, torch.as_tensor(v).tolist()) for k, v in s.items()] for s in self.optimizer.state.values()],
            torch.get_rng_state().tolist(),
            [] if graph is None else [(g.name, g.n_channels) for g in self.compressor.graph],
            [] if graph is None else len(graph.applied),
            sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()),
        ]


AT_THE_EVENT: dict[str, tuple[str, int]] = {
    "the method's update": ("update", 1),
    "the method's step": ("step", 1),
    "the loss, before": ("loss", 1),
    "the check": ("check", 1),
    "a hook, before": ("forward", 1),
    "the record of the first edit": ("ledger", 1),
}


@pytest.mark.parametrize("stage", AT_THE_EVENT)
def test_at_an_event(stage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(tmp_path, monkeypatch)
    run.compressor.prepare(run.optimizer)
    run.train(1)
    fuse, calls = AT_THE_EVENT[stage]
    run.compressor._watcher.rest()
    before = run.state()
    run.fuses[fuse].arm(calls)
    with pytest.raises(Boom):
        run.compressor.step()
    assert run.state()[:-1] == before[:-1]
    run.compressor._watcher.rest()
    assert run.state() == before
    run.train(3)
    run.compressor.convert()
    assert run.state()[-1] == before[-1]


@pytest.mark.parametrize("where", ["a hook", "the loss"])
def test_code_that_fails_on_the_edited_network_refuses_the_edit(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(tmp_path, monkeypatch)
    run.compressor.prepare(run.optimizer)
    run.train(1)

    def narrow(module: nn.Module, _: Any, out: Tensor) -> None:
        if out.shape[1] < module.full:
            raise Boom

    if where == "a hook":
        for layer, full in ((run.model.deep, 8), (run.model.head, 6)):
            layer.full = full
            layer.register_forward_hook(narrow)
    else:
        sizes = lambda: (run.model.one.out_channels, run.model.head.out_features)  # noqa: E731
        run.fuses["loss"] = lambda: None if sizes() == (8, 6) else run.fuses["always"]()  # pyright: ignore
        run.fuses["always"] = Fuse()
        run.fuses["always"].always = True
    run.compressor._watcher.rest()
    before = run.state()
    run.compressor.step()
    run.compressor._watcher.rest()
    assert run.state() == before
    assert {e.group for e in run.compressor.events} == {"one", "head"}
    assert all(not e.accepted and "Boom" in e.reason for e in run.compressor.events)


def test_a_record_that_fails_on_the_second_edit_leaves_what_is_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(tmp_path, monkeypatch)
    run.compressor.prepare(run.optimizer)
    run.train(1)
    run.fuses["ledger"].arm(2)
    with pytest.raises(Boom):
        run.compressor.step()
    assert run.compressor.ledger is not None
    recorded = [e.body["what"]["group"] for e in run.compressor.ledger.entries() if e.kind == "edit"]
    assert recorded == [applied.edit.group for applied in run.compressor._hands.applied] == ["one"]
    assert (run.model.one.out_channels, run.model.deep.groups, run.model.head.out_features) == (4, 4, 6)
    run.train(2)


def test_in_what_a_method_falls_back_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(tmp_path, monkeypatch, refuse=True)
    run.compressor.prepare(run.optimizer)
    run.train(1)
    run.compressor._watcher.rest()
    before = run.state()
    run.fuses["less"].arm()
    with pytest.raises(Boom):
        run.compressor.step()
    run.compressor._watcher.rest()
    assert run.state() == before


@pytest.mark.parametrize("stage", ["prepare", "loss", "forward"])
def test_before_the_run(stage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is as if `prepare` had not been called: it can be called again."""
    run = Run(tmp_path, monkeypatch)
    before = run.state()
    run.fuses[stage].always = True
    with pytest.raises(Exception) as caught:  # noqa: PT011
        run.compressor.prepare(run.optimizer)
    assert isinstance(caught.value, Boom) or "Boom" in str(caught.value)
    assert run.state() == before
    run.fuses[stage].always = False
    with pytest.raises(ConfigError, match="not prepared"):
        run.compressor.step()
    run.compressor.prepare(run.optimizer)
    run.train(3)
    assert run.model.one.out_channels == 4


def test_when_an_event_is_looked_at_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(tmp_path, monkeypatch)
    run.compressor.prepare(run.optimizer)
    run.train(3)
    assert run.compressor._watch is not None
    before = run.state()
    run.fuses["loss"].arm()
    with pytest.raises(Boom):
        run.compressor.step()
    assert run.state() == before
    assert run.compressor._watch is not None, "it can be looked at again"
    run.compressor.step()
    assert run.compressor._watch is None


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("stage", "calls"), [("batches", 1), ("forward", 2), ("loss", 1)])
def test_at_once(stage: str, calls: int, training: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(tmp_path, monkeypatch)
    run.model.train(training)
    run.compressor.prepare(run.optimizer)
    run.compressor._watcher.rest()
    before = run.state()
    run.fuses[stage].arm(calls)
    with pytest.raises(Boom):
        run.compressor.once(run.batches())
    assert run.state() == before
    assert all(event.accepted for event in run.compressor.once(run.batches()))


@pytest.mark.parametrize("stage", ["loss", "convert"])
def test_at_the_end(stage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(tmp_path, monkeypatch)
    run.compressor.prepare(run.optimizer)
    run.train(3)
    before = run.state()
    run.fuses[stage].arm()
    with pytest.raises(Boom):
        run.compressor.convert()
    assert run.state() == before
    assert run.compressor.convert() is run.model
