"""The main job: train a dense network and, paired with it, one that grows smaller while it trains.

Both start from the same weights and see the same batches in the same order. They take turns in short stretches, so that
whatever else the machine does falls on both. A stretch is a pure function of the seed, the epoch and its place in the
epoch; so a run that was interrupted goes on from its last checkpoint to the same result and the same head of the
ledger.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from weightfold.artifact import Builder
from weightfold.data import Dataset, load, load_model
from weightfold.data.dataset import Batch
from weightfold.errors import ConfigError, WeightfoldError
from weightfold.fingerprint import fingerprint
from weightfold.graph.copies import independent_copy
from weightfold.ledger import Ledger
from weightfold.models import NAMES
from weightfold.training import folder as files
from weightfold.training.arm import Arm
from weightfold.training.checkpoint import NAME as CHECKPOINT
from weightfold.training.checkpoint import read_checkpoint, write_checkpoint
from weightfold.training.config import TrainConfig
from weightfold.training.environment import machine, pick_device, versions
from weightfold.training.finish import finish
from weightfold.training.looks import Look, Watch, look_values
from weightfold.training.measure import evaluate, outputs
from weightfold.training.rewind import rewind

if TYPE_CHECKING:
    from weightfold.replay import Replay

STRETCH = 32
"""Batches that one network takes before the other one's turn."""

N_POINTS = 400
"""About how many points of a loss curve are kept."""

N_PROBE = 8
"""Batches of training samples by which edits are judged."""

After = Callable[[Path], object]
"""Called with the folder of a finished run."""

Progress = Callable[[int, int, dict[str, Any]], None]
"""Called after each epoch with the epochs done, all epochs, and the latest scores."""


def train(
    config: TrainConfig,
    out: str | Path,
    *,
    force: bool = False,
    progress: Progress | None = None,
    forced: Replay | None = None,
    watch: Watch | None = None,
    after: After | None = None,
) -> dict[str, Any]:
    """Train, compare, and write the folder of the run; go on with it where it was interrupted.

    Args:
        config: what to train.
        out: the folder; missing, empty, or of an interrupted run of the same settings.
        force: write over the run that the folder holds.
        progress: told after each epoch.
        forced: decisions of an earlier run, in place of the method's own; not judged by a gate.
        watch: told after every few batches.
        after: called with the folder of the finished run, before others may work in it.
    Returns:
        run: what `run.json` holds.
    Raises:
        WeightfoldError: anything that can be found wrong, before the first batch. The folder is left as it was then.
        ConfigError: another process is at work in the folder, or it holds something else.
    """
    out = Path(out)
    files.check(out, force=force)
    with _own_state(config):
        run = _Run(config, out, forced)
        with files.claimed(out, "train", force=force, kind="train", config=run.config.model_dump(mode="json")) as left:
            facts = run.carry_out(left, progress, watch)
            if after is not None:
                after(out)
            return facts


def resume(
    out: str | Path, *, progress: Progress | None = None, watch: Watch | None = None, after: After | None = None
) -> dict[str, Any]:
    """Go on with an interrupted run; a finished one is only read.

    Raises:
        ArtifactError: the folder holds no run, or its checkpoint is damaged.
        LedgerError: its ledger is damaged.
        ConfigError: another process is at work in the folder.
    """
    out = Path(out)
    facts = files.begun(out)
    if facts["status"] == "done" and not files.is_interrupted(out):
        if after is not None:
            after(out)
        return facts
    if "replays" in facts or facts["kind"] != "train":
        what = "replays another one" if "replays" in facts else f"is one of weightfold {facts['kind']}"
        raise ConfigError(
            f"The run in '{out}' {what} and was interrupted.", remedy="Give the command that began it once more."
        )
    return train(TrainConfig(**facts["config"]), out, progress=progress, watch=watch, after=after)


class _Run:
    """A run between two checkpoints."""

    def __init__(self, config: TrainConfig, out: Path, forced: Replay | None = None) -> None:
        self.out = out
        self.forced = forced
        self.device = pick_device(config.device)
        self.data = load(config.data, seed=0, limit=config.limit)
        self.config = config = config.resolved(self.data.task)
        self.model = build_model(config, self.data)
        self.initial = fingerprint(self.model)
        self.steps_per_epoch = sum(1 for _ in self._epoch(0))
        self.total_steps = self.steps_per_epoch * config.epochs
        self.epoch, self.step = 0, 0
        self.ledger: Ledger | None = None
        self.arms: dict[str, Arm] = {}
        self.scores: dict[str, Any] = {}
        self.watch: Watch | None = None
        self.started: dict[str, Any] | None = None

    def facts(self) -> dict[str, Any]:
        """What is hashed into the first entry: all that the result depends on, as it was when the run began."""
        if self.started is not None:
            return self.started
        data = self.data
        return {
            "config": self.config.model_dump(mode="json"),
            "versions": versions(),
            "device": self.device.type,
            "threads": torch.get_num_threads(),
            "data": {
                "name": data.name,
                "fingerprint": data.fingerprint,
                "samples": {"train": len(data.train), "val": len(data.val), "test": len(data.test)},
                "task": data.task.model_dump(mode="json"),
            },
            "initial_weights": self.initial,
            "total_steps": self.total_steps,
            **({} if self.forced is None else {"replays": self.forced.config.head}),
        }

    def carry_out(self, left: dict[str, Any] | None, progress: Progress | None, watch: Watch | None) -> dict[str, Any]:
        """Begin, or go on with what an interrupted run has left, to the end."""
        if left is not None:
            facts = self.facts()
            told = {key: facts[key] for key in ("config", "data", "initial_weights", "total_steps")}
            files.check_same(self.out, left, {"kind": "train", **told, "replays": facts.get("replays")})
            if left["status"] == "done":
                (self.out / CHECKPOINT).unlink(missing_ok=True)
                return left
        if left is not None and self.forced is None:
            self.started = {key: left[key] for key in self.facts()}
            self.take_up()
        else:
            files.clear(self.out)
            self._begin_or_clear()
        return self.go(progress, watch)

    def _begin_or_clear(self) -> None:
        try:
            self.begin()
        except BaseException:
            self.close()
            files.clear(self.out)
            raise

    def begin(self) -> None:
        """Start from nothing."""
        self.ledger = Ledger.create(self.out / files.LEDGER, run=self.facts())
        self._make_arms(self.ledger)
        for arm in self.arms.values():
            if arm.start is not None:
                self.ledger.log_metrics(0, arm.start.values())
        self._write_status("running")
        self._save()

    def take_up(self) -> None:
        """Go on from the last checkpoint."""
        state = read_checkpoint(self.out)
        if state is None:
            for suffix in ("", "-wal", "-shm"):
                (self.out / f"{files.LEDGER}{suffix}").unlink(missing_ok=True)
            self.begin()
            return
        rewind(self.out / files.LEDGER, state["entries"], state["step"])
        self._make_arms(None)
        self.epoch, self.step = state["epoch"], state["step"]
        for name, arm in self.arms.items():
            arm.load_state_dict(state["arms"][name])
        self.ledger = Ledger.open(self.out / files.LEDGER)
        for arm in self.arms.values():
            if arm.compressor is not None:
                arm.compressor.ledger = self.ledger

    def go(self, progress: Progress | None, watch: Watch | None = None) -> dict[str, Any]:
        """Train to the end and account for it."""
        self.watch = watch
        try:
            for epoch in range(self.epoch, self.config.epochs):
                self._train_epoch(epoch)
                self.epoch = epoch + 1
                self._save()
                self._tell()
                if progress is not None:
                    progress(self.epoch, self.config.epochs, self.scores)
            assert self.ledger is not None
            results = finish(self.arms, self.data, self.ledger, self.out, builder_of(self.config, self.data))
        finally:
            self.close()
        facts = self._write_status("done", results)
        (self.out / CHECKPOINT).unlink(missing_ok=True)
        return facts

    def close(self) -> None:
        """Close the ledger."""
        if self.ledger is not None:
            self.ledger.close()

    def _make_arms(self, ledger: Ledger | None) -> None:
        probe = list(itertools.islice(self._probe(), N_PROBE))
        for name in self.config.arms:
            model = independent_copy(self.model)
            arm = Arm(name, model, self.config, self.data.task, self.total_steps, self.device)
            arm.warm_up(probe[0])
            if name == "folded":
                arm.attach(probe, ledger, builder_of(self.config, self.data), self.forced)
            self.arms[name] = arm

    def _probe(self) -> Iterator[Batch]:
        generator = torch.Generator().manual_seed(self.config.seed)
        return self.data.batches("train", 64, generator=generator)

    def _epoch(self, epoch: int) -> Iterator[Batch]:
        generator = torch.Generator().manual_seed(_mix(self.config.seed, epoch))
        return self.data.batches("train", self.config.batch_size, generator=generator, augment=self.config.augment)

    def _train_epoch(self, epoch: int) -> None:
        batches, first = self._epoch(epoch), self.step
        for turn in itertools.count():
            stretch = self._take(batches)
            if not stretch:
                break
            order = list(self.arms.values()) if (epoch + turn) % 2 == 0 else list(reversed(self.arms.values()))
            for arm in order:
                torch.manual_seed(_mix(self.config.seed, epoch, turn))
                arm.train(stretch, self.step)
            self.step += len(stretch)
            self._tell()
        self._log(first)

    def _tell(self) -> None:
        """Say where the run stands."""
        if self.watch is None:
            return
        arm = next(reversed(self.arms.values()))
        looks = arm.looks(0)
        numbers = (self.epoch, self.config.epochs, self.step, self.total_steps)
        self.watch(Look(*numbers, self.scores, arm.start, looks[-1] if looks else None))

    def _take(self, batches: Iterator[Batch]) -> list[Batch]:
        """Make the next stretch; the time that takes counts for each network, as if it were alone."""
        with timing() as clock:
            stretch = [
                (inputs.to(self.device), targets.to(self.device))
                for inputs, targets in itertools.islice(batches, STRETCH)
            ]
        for arm in self.arms.values():
            arm.seconds += clock[0]
        return stretch

    def _log(self, first: int) -> None:
        """Record the losses and looks of the steps after `first`, and the scores on the validation samples."""
        assert self.ledger is not None
        window = max(1, self.total_steps // N_POINTS)
        for name, arm in self.arms.items():
            for record in arm.looks(first):
                self.ledger.log_metrics(record["step"], look_values(record))
            for step, values in arm.curve(window, last=self.epoch + 1 == self.config.epochs):
                self.ledger.log_metrics(step, {f"{name}/{key}": value for key, value in values.items()})
            score = evaluate(arm.model, self.data, "val", self.device)
            self.scores[name] = {"loss": score.loss, "score": score.value, "seconds": arm.seconds}
            values = {"val_loss": score.loss, "val_score": score.value, "val_seconds": arm.seconds}
            self.ledger.log_metrics(self.step, {f"{name}/{key}": value for key, value in values.items()})

    def _save(self) -> None:
        assert self.ledger is not None
        arms = {name: arm.state_dict() for name, arm in self.arms.items()}
        state = {"epoch": self.epoch, "step": self.step, "entries": len(self.ledger), "arms": arms}
        write_checkpoint(self.out, state)

    def _write_status(self, status: str, results: dict[str, Any] | None = None) -> dict[str, Any]:
        facts = {"status": status, "kind": "train", **self.facts(), "machine": machine(self.device)}
        if results is not None:
            facts["results"] = results
        return files.write_run(self.out, facts)


def build_model(config: TrainConfig, data: Dataset) -> nn.Module:
    """Make the network that the settings name, and see that it takes the data.

    Raises:
        ConfigError: it is unknown, or cannot do the task.
        DataError: it fails on a batch of the data, or answers in the wrong shape.
    """
    if config.model in NAMES:
        from weightfold.models import build

        model = build(config.model, data.task, seed=config.seed, **config.overrides)
    else:
        model = load_model(config.model, task=data.task, seed=config.seed)
    inputs, targets = next(data.batches("train", 2))
    try:
        with torch.no_grad():
            was_training = model.training
            data.task.loss(outputs(model.eval(), inputs), targets)
            model.train(was_training)
    except WeightfoldError:
        raise
    except Exception as error:
        raise misfit(config.model, data, error) from error
    return model


def misfit(name: str, data: Dataset, error: Exception) -> WeightfoldError:
    """Say that a model does not take a data set's samples."""
    from weightfold.errors import DataError

    reason = str(error).strip().partition("\n")[0][:200]
    return DataError(
        f"The model '{name}' fails on '{data.name}', whose inputs have the shape (B, {_sizes(data)}) and whose answers "
        f"have {data.task.output.width} numbers: {type(error).__name__}: {reason}",
        remedy="Pass a model that is made for these inputs and answers.",
    )


def _sizes(data: Dataset) -> str:
    return ", ".join(map(str, data.task.input.shape))


def builder_of(config: TrainConfig, data: Dataset) -> Builder:
    """Say how the network is made."""
    if config.model in NAMES:
        return Builder(
            kind="built-in", name=config.model, task=data.task.model_dump(mode="json"), overrides=config.overrides
        )
    return Builder(kind="folder" if Path(config.model).is_dir() else "function", name=config.model)


def _mix(*numbers: int) -> int:
    """Make one seed of several."""
    mixed = 0
    for number in numbers:
        mixed = (mixed * 1_000_003 + number + 1) % 2**63
    return mixed


@contextmanager
def timing() -> Iterator[list[float]]:
    """Time a block; the seconds are in the list afterwards."""
    import time

    clock = [0.0]
    start = time.perf_counter()
    try:
        yield clock
    finally:
        clock[0] = time.perf_counter() - start


@contextmanager
def _own_state(config: TrainConfig) -> Iterator[None]:
    """Leave the process's random state and number of threads as they were."""
    threads = torch.get_num_threads()
    with torch.random.fork_rng():
        try:
            if config.threads is not None:
                torch.set_num_threads(config.threads)
            yield
        finally:
            torch.set_num_threads(threads)
