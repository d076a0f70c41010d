"""Kill runs of a dial with signal 9 and take them up again: ``python killed_probe.py FOLDER STEP...``, JSON out.

Every run is a process of its own, forked before any tensor was made.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel

from weightfold.compressor import Compressor
from weightfold.fingerprint import fingerprint
from weightfold.ledger import Ledger
from weightfold.methods.fold import Fold
from weightfold.training.rewind import rewind

STEPS, EVERY = 60, 4
"""Steps of a run, and between two checkpoints."""


def data() -> list[tuple[Tensor, Tensor]]:
    g = torch.Generator().manual_seed(0)
    xs = [torch.randn(32, 6, generator=g) for _ in range(STEPS)]
    return [(x, (x[:, 0] > 0).long() + 2 * (x[:, 1] > 0).long()) for x in xs]


class Loop:
    """A user's own loop: dropout, a schedule, an average, and a checkpoint now and then."""

    def __init__(self, folder: Path, *, fresh: bool) -> None:
        self.folder = folder
        torch.manual_seed(0)
        self.model = nn.Sequential(
            nn.Linear(6, 32), nn.ReLU(), nn.Dropout(0.1), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4)
        )
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=3e-3)
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, STEPS)
        self.average = AveragedModel(self.model)
        path = folder / "run.ledger"
        self.ledger = Ledger.create(path, run={"seed": 0}) if fresh else Ledger.open(path)
        self.c = Compressor(
            self.model,
            torch.zeros(2, 6),
            [Fold(max_accuracy_loss=1e3, latency={"0.1": 0.3}, stats_batches=4, earliest=0.1, latest=0.5)],
            loss=self.loss,
            probe=data()[:8],
            ledger=self.ledger if fresh else None,
            total_steps=STEPS,
            max_increase=1e3,
        )
        self.c.prepare(self.optimizer, [self.average])
        self.step = 0
        torch.manual_seed(1)

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Higher while the network is narrow, so that its event is taken back."""
        narrow = self.model[0].out_features < 32  # pyright: ignore
        return F.cross_entropy(outputs, targets) + (10.0 if narrow else 0.0)

    def save(self) -> None:
        parts = {name: getattr(self, name).state_dict() for name in ("model", "optimizer", "schedule", "average", "c")}
        state = {**parts, "step": self.step, "entries": len(self.ledger), "rng": torch.get_rng_state()}
        torch.save(state, self.folder / "new.pt")
        (self.folder / "new.pt").replace(self.folder / "run.pt")

    @classmethod
    def resumed(cls, folder: Path) -> Loop:
        state = torch.load(folder / "run.pt", weights_only=True)
        rewind(folder / "run.ledger", state["entries"], state["step"])
        loop = cls(folder, fresh=False)
        for name in ("c", "model", "optimizer", "schedule", "average"):
            getattr(loop, name).load_state_dict(state[name])
        loop.c.ledger, loop.step = loop.ledger, state["step"]
        torch.set_rng_state(state["rng"])
        return loop

    def run(self, kill_at: int | None = None) -> None:
        for x, y in data()[self.step :]:
            F.cross_entropy(self.c.network(x), y).backward()
            self.optimizer.step()
            self.schedule.step()
            self.optimizer.zero_grad()
            self.average.update_parameters(self.model)
            self.c.step()
            self.step += 1
            if self.step == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            if self.step % EVERY == 0:
                self.save()
        self.c.convert()
        result = {
            "head": self.ledger.head,
            "fingerprint": fingerprint(self.model),
            "average": fingerprint(self.average),
            "kinds": [entry.kind for entry in self.ledger.entries()],
            "steps": {entry.kind: entry.body["step"] for entry in self.ledger.entries() if "step" in entry.body},
            "looks": self.c.methods[0].looks(STEPS),  # pyright: ignore
            "events": [[e.step, e.kind, e.channels_after] for e in self.c.events],
        }
        (self.folder / "result.json").write_text(json.dumps(result))


def begin(folder: Path, kill_at: int | None) -> None:
    folder.mkdir()
    loop = Loop(folder, fresh=True)
    loop.save()
    loop.run(kill_at)


def apart(work: Any) -> int:
    """Run something in a process of its own; returns its number."""
    child = os.fork()
    if child:
        return child
    try:
        work()
    except BaseException:
        sys.excepthook(*sys.exc_info())
        os._exit(1)
    os._exit(0)


def main(folder: Path, kills: list[int]) -> None:
    whole = apart(lambda: begin(folder / "whole", None))
    killed = [apart(lambda step=step: begin(folder / str(step), step)) for step in kills]
    assert {os.WTERMSIG(os.waitpid(child, 0)[1]) for child in killed} == {signal.SIGKILL}
    resumed = [apart(lambda step=step: Loop.resumed(folder / str(step)).run()) for step in kills]
    assert {os.waitpid(child, 0)[1] for child in (whole, *resumed)} == {0}
    names = ["whole", *map(str, kills)]
    print(json.dumps({name: json.loads((folder / name / "result.json").read_text()) for name in names}))


if __name__ == "__main__":
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), [int(step) for step in sys.argv[2:]])
