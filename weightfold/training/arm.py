"""One network in training: the model, its optimiser, perhaps a compressor, and the time that all of it takes."""

from __future__ import annotations

import importlib
import time
from collections.abc import Sequence
from dataclasses import asdict
from math import cos, pi
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from weightfold.artifact import Builder, Structure
from weightfold.blueprint import Blueprint, rebuild_
from weightfold.data.dataset import Batch
from weightfold.errors import ConfigError
from weightfold.export.example import task_input
from weightfold.export.source import Source
from weightfold.graph.copies import independent_copy
from weightfold.ledger import Ledger
from weightfold.models import TaskSpec
from weightfold.training.config import TrainConfig
from weightfold.training.looks import Start, header_more
from weightfold.training.measure import outputs, synchronise
from weightfold.training.speed import NotSlower

if TYPE_CHECKING:
    from weightfold.compressor import Compressor
    from weightfold.graph import ChannelGraph
    from weightfold.methods.base import Method
    from weightfold.methods.self_compress import SelfCompress
    from weightfold.replay import Replay

MOMENTUM = 0.9
EVENT = 0.1
"""When a method acts that was given no time, as a share of the steps."""

Point = tuple[int, Tensor | float, float]
"""Step, loss, seconds of training so far."""

N_STATS = 2048
"""Samples of which statistics are taken before an event: twice as many as the widest built-in layer has channels."""


class Arm:
    """A network that is trained, dense or folding itself.

    Args:
        name: "dense" or "folded".
        model: as it was made; trained in place.
        config: of the run.
        task: gives the loss.
        total_steps: of the whole run.
        device: where the model is.
    """

    def __init__(
        self, name: str, model: nn.Module, config: TrainConfig, task: TaskSpec, total_steps: int, device: torch.device
    ) -> None:
        self.name = name
        self.model = model.to(device).train()
        self.config = config
        self.task = task
        self.total_steps = total_steps
        self.device = device
        self.lr = config.lr or 0.0
        self.before = Blueprint.of(model)
        self.optimizer = make_optimizer(model, config)
        self.compressor: Compressor | None = None
        self.speed: NotSlower | None = None
        self.forced: Replay | None = None
        self.seconds = 0.0
        self.events: list[dict[str, Any]] = []
        self.prepare_seconds = 0.0
        self.event_seconds = 0.0
        self.widths: dict[str, int] = {}
        self.points: list[Point] = []
        self.start: Start | None = None

    def warm_up(self, batch: Batch) -> None:
        """Take one step on a copy, so that no network pays for what the first step of a process costs."""
        twin = independent_copy(self.model)
        inputs, targets = (part.to(self.device) for part in batch)
        self.task.loss(outputs(twin, inputs), targets).backward()
        synchronise(self.device)

    def attach(
        self, probe: Sequence[Batch], ledger: Ledger | None, builder: Builder, forced: Replay | None = None
    ) -> None:
        """Let a method work on this network; the time that its preparation takes counts.

        Args:
            probe: batches by which edits are judged.
            ledger: where they are recorded.
            builder: how the network is made.
            forced: recorded decisions in place of the method's own; nothing is judged then.
        """
        from weightfold.compressor import Compressor

        method = self._method(builder) if forced is None else forced
        self.speed = self._race(builder)
        start = time.perf_counter()
        self.compressor = Compressor(
            self.model,
            self.task.example().to(self.device),
            [method],
            loss=self._loss,
            probe=[(i.to(self.device), t.to(self.device)) for i, t in (probe if forced is None else ())],
            ledger=ledger,
            total_steps=self.total_steps,
            seed=self.config.seed,
            max_increase=self.config.max_increase,
            check=self.speed if forced is None else None,
        )
        self.forced = forced
        graph = self.compressor.prepare(self.optimizer)
        self.prepare_seconds = time.perf_counter() - start
        self.seconds += self.prepare_seconds
        self.widths = widths_of(graph)

    def _method(self, builder: Builder) -> Method:
        if self.config.method != "self_compress":
            return make_method(self.config)
        self.start = Start.of(self.model, self.config.target)
        source = Source(self.model, (task_input(self.task),), self.before, builder, "0" * 64)
        target = self.start.target and max(1, self.start.target - header_more(source))
        return make_method(self.config.model_copy(update={"target": target}))

    def _race(self, builder: Builder) -> NotSlower | None:
        if self.config.race is None:
            return None
        source = Source(independent_copy(self.model), (task_input(self.task),), self.before, builder)
        return NotSlower(source, self.config.race)

    def _loss(self, answer: Any, targets: Tensor) -> Tensor:
        return self.task.loss(getattr(answer, "logits", answer), targets)

    def train(self, batches: Sequence[Batch], first_step: int) -> None:
        """Take one step a batch; times itself, and remembers each loss."""
        self.model.train()
        synchronise(self.device)
        start = time.perf_counter()
        for step, (inputs, targets) in enumerate(batches, first_step):
            self._step(inputs, targets, step, start)
        synchronise(self.device)
        self.seconds += time.perf_counter() - start

    def _step(self, inputs: Tensor, targets: Tensor, step: int, start: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr * (1 + cos(pi * step / self.total_steps)) / 2
        loss = self.task.loss(outputs(self.model, inputs), targets)
        plain = loss.detach()
        if self.compressor is not None:
            loss = loss + self.compressor.penalty()
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.compressor is not None:
            self._let_act(step + 1, start)
        self.points.append((step, plain, self.seconds + time.perf_counter() - start))

    def _let_act(self, step: int, start: float) -> None:
        """Give the method its turn; when it has acted, remember what it did and how long that took in all."""
        assert self.compressor is not None
        began = time.perf_counter()
        if self.forced is not None:
            self.forced.before_step(self.compressor, step)
        events = self.compressor.step()
        if self.forced is not None:
            self.forced.after_step(self.compressor, step)
        if events:
            now = time.perf_counter()
            self.event_seconds += now - began
            self.events += [{**asdict(event), "at_seconds": self.seconds + now - start} for event in events]

    def curve(self, window: int, *, last: bool = False) -> list[tuple[int, dict[str, float]]]:
        """Give the losses since the last call, averaged over windows of steps; what fills no window waits.

        Args:
            window: steps a point.
            last: whether to give the rest too.
        Returns:
            points: the last step of each window, the mean loss, the seconds of training so far.
        """
        n = len(self.points) if last else len(self.points) // window * window
        ready = self.points[:n]
        rest: list[Point] = [(step, float(loss), at) for step, loss, at in self.points[n:]]
        self.points = rest
        parts = [ready[at : at + window] for at in range(0, n, window)]
        return [
            (part[-1][0] + 1, {"loss": sum(float(loss) for _, loss, _ in part) / len(part), "seconds": part[-1][2]})
            for part in parts
        ]

    @property
    def quantising(self) -> SelfCompress | None:
        """The method that learns bits, if this network has one."""
        from weightfold.methods.self_compress import SelfCompress

        methods = () if self.compressor is None else self.compressor.methods
        return next((method for method in methods if isinstance(method, SelfCompress)), None)

    def looks(self, after: int) -> list[dict[str, Any]]:
        """What the method that learns bits has found since a step."""
        method = self.quantising
        return [] if method is None else [record for record in method.history if record["step"] > after]

    def finish(self) -> nn.Module:
        """Give the plain network."""
        model = self.model if self.compressor is None else self.compressor.convert()
        return model.eval()

    def state_dict(self) -> dict[str, Any]:
        """Everything that the network's training goes on from."""
        sizes, attributes = self.before.changes_to(Blueprint.of(self.model))
        structure = {
            "sizes": {name: resized.model_dump(mode="json") for name, resized in sizes.items()},
            "attributes": [change.model_dump(mode="json") for change in attributes],
        }
        return {
            "structure": structure,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "compressor": None if self.compressor is None else self.compressor.state_dict(),
            "seconds": [self.seconds, self.prepare_seconds, self.event_seconds],
            "events": self.events,
            "points": [[step, float(loss), at] for step, loss, at in self.points],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state: first the shapes, then the values."""
        if self.compressor is not None:
            self.compressor.load_state_dict(state["compressor"])
        else:
            builder = {"kind": "instance", "name": self.name}
            structure = Structure.model_validate({"builder": builder, "fingerprint": "", **state["structure"]})
            rebuild_(self.model, structure, "the checkpoint")
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.seconds, self.prepare_seconds, self.event_seconds = state["seconds"]
        self.events = list(state["events"])
        self.points = [(step, loss, at) for step, loss, at in state["points"]]


def widths_of(graph: ChannelGraph) -> dict[str, int]:
    """List the channels of each group, in the order of the tensors that write them.

    Example:
        >>> from weightfold.graph import trace
        >>> widths_of(trace(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), torch.zeros(1, 4)))
        {'0': 8}
    """
    order = {tensor: at for at, tensor in enumerate(graph.shapes)}
    groups = [group for group in graph if group.kind == "channels"]
    groups.sort(key=lambda group: min((order[axis.tensor] for axis in group.axes if axis.role != "read"), default=-1))
    return {group.name: group.n_channels for group in groups}


def make_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """Make the optimiser that the settings name."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    lr = config.lr or 0.0
    if config.optimizer == "adamw":
        return torch.optim.AdamW(parameters, lr=lr, weight_decay=config.weight_decay)
    return torch.optim.SGD(parameters, lr=lr, momentum=MOMENTUM, weight_decay=config.weight_decay)


def make_method(config: TrainConfig) -> Method:
    """Make the method that the settings name, from the file of that name."""
    from weightfold.methods.base import Method

    module = importlib.import_module(f"weightfold.methods.{config.method}")
    found = [
        value
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, Method) and value.__module__ == module.__name__
    ]
    if config.method == "self_compress":
        return found[0](**_compression(config))
    settings: dict[str, Any] = {"keep": config.keep, "at": EVENT if config.at is None else config.at}
    for dial in ("max_accuracy_loss", "time_goal"):
        if getattr(config, dial) is not None:
            settings = {dial: getattr(config, dial)}
    if len(settings) == 1 and config.method != "fold":
        raise ConfigError(
            f"The method '{config.method}' has no '{next(iter(settings))}'.",
            remedy="Give keep= and at=, or method='fold'.",
        )
    if config.liked is not None:
        settings["liked"] = config.liked
    if "stats_batches" in found[0].Config.model_fields:
        settings["stats_batches"] = max(16, -(-N_STATS // config.batch_size))
    return found[0](**settings)


def _compression(config: TrainConfig) -> dict[str, Any]:
    """Settings of self-compression."""
    dials = {name: getattr(config, name) for name in ("target", "max_accuracy_loss", "strength", "liked", "at")}
    more = {"activation_strength": config.activation_strength, "pareto": config.pareto}
    return {**more, **{name: value for name, value in dials.items() if value is not None}}
