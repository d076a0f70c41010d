"""What these processes run: ``python workers.py RANK FOLDER NAME...``; results go to ``FOLDER/NAME/RANK.pt``."""

from __future__ import annotations

import copy
import sys
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from weightfold.compressor import Compressor
from weightfold.errors import ConfigError, EditError
from weightfold.fingerprint import fingerprint
from weightfold.ledger import Ledger
from weightfold.methods.fold import Fold
from weightfold.ranks import Ranks
from weightfold.sharded import change_sharded

WORLD, STEPS, EXAMPLE = 2, 40, torch.zeros(2, 6)
TABLE = {"0.5": 0.6, "0.1": 0.3}


def net(width: int = 32) -> nn.Sequential:
    """Far wider than the four quadrants of two inputs need."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 4))


def batches(n: int, rank: int, size: int = 32) -> list[tuple[Tensor, Tensor]]:
    g = torch.Generator().manual_seed(100 + rank)
    xs = [torch.randn(size, 6, generator=g) for _ in range(n)]
    return [(x, (x[:, 0] > 0).long() + 2 * (x[:, 1] > 0).long()) for x in xs]


def adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-2)


def compressor(network: nn.Module, fold: Fold, rank: int, folder: Path, **settings: Any) -> Compressor:
    """Each rank has a probe of its own; only the first one's may count."""
    ledger = Ledger.create(folder / f"{rank}.ledger", run={}) if settings.pop("record", rank == 0) else None
    settings = {"loss": F.cross_entropy, "probe": batches(6, 50 + rank), "max_increase": 1.0} | settings
    return Compressor(network, EXAMPLE, [fold], ledger=ledger, total_steps=STEPS, seed=rank, **settings)


class Joined:
    """One process that goes on from the latest event, on the batches of all ranks together."""

    def __init__(self) -> None:
        self.model: nn.Module | None = None
        self.batches = [batches(STEPS, rank) for rank in range(WORLD)]

    def begin(self, c: Compressor, optimizer: torch.optim.Optimizer, step: int) -> None:
        self.model, self.step = copy.deepcopy(c.model), step
        self.optimizer = adam(self.model)
        self.optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))

    def difference(self, model: nn.Module) -> float:
        """The largest difference of any weight from the distributed run's."""
        assert self.model is not None
        for parts in list(zip(*self.batches, strict=True))[self.step :]:
            F.cross_entropy(self.model(torch.cat([x for x, _ in parts])), torch.cat([y for _, y in parts])).backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
        pairs = zip(self.model.parameters(), model.parameters(), strict=True)
        return max(float((a - b).detach().abs().max()) for a, b in pairs)


def train(
    c: Compressor,
    optimizer: torch.optim.Optimizer,
    data: list[tuple[Tensor, Tensor]],
    joined: Joined | None = None,
) -> list[float]:
    losses = []
    for step, (x, y) in enumerate(data, 1):
        value = F.cross_entropy(c.network(x), y)
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
        if c.step() and joined is not None:
            joined.begin(c, optimizer, step)
        losses.append(float(value.detach()))
    return losses


def report(c: Compressor, optimizer: torch.optim.Optimizer, **more: Any) -> dict[str, Any]:
    state = {n: v for n, p in c.model.named_parameters() for n, v in _named(n, optimizer.state[p])}
    return {
        "fingerprint": fingerprint(c.model),
        "weights": {n: p.detach() for n, p in c.model.named_parameters()},
        "optimizer": state,
        "events": [(e.step, e.group, e.kind, e.channels_after, e.accepted, e.measured) for e in c.events],
        "reasons": [e.reason for e in c.events],
        "frozen": sorted(c.frozen),
        **more,
    }


def _named(name: str, state: dict[str, Any]) -> list[tuple[str, Any]]:
    return [(f"{name}.{key}", value) for key, value in state.items()]


def data_parallel(fold: Fold, rank: int, folder: Path, **settings: Any) -> dict[str, Any]:
    first = DistributedDataParallel(net(), bucket_cap_mb=0.001, gradient_as_bucket_view=True)
    optimizer = adam(first.module)
    c = compressor(first, fold, rank, folder, **settings)
    c.prepare(optimizer)
    data = batches(STEPS, rank)
    joined = Joined()
    losses = train(c, optimizer, data, joined)
    off = joined.difference(c.model)
    fresh = c.network is not first and isinstance(c.network, DistributedDataParallel)
    same_settings = fresh and c.network.gradient_as_bucket_view  # pyright: ignore
    stale = ""
    if fresh:
        try:
            first(data[0][0])
        except EditError as error:
            stale = str(error)
    c.convert()
    return report(c, optimizer, fresh=fresh, same_settings=same_settings, stale=stale, losses=losses, off=off)


# what the tests start -------------------------------------------------------------------------------------------------


def widths_given(rank: int, folder: Path) -> dict[str, Any]:
    return data_parallel(Fold(keep=0.5, at=0.25, stats_batches=4), rank, folder)


def dialled(rank: int, folder: Path) -> dict[str, Any]:
    """Any kept set counts as settled: the first rank decides at its third look of eleven."""
    fold = Fold(max_accuracy_loss=5.0, latency=TABLE, stats_batches=4, earliest=0.1, latest=0.6)
    with patch("weightfold.methods.fold.STABLE", 0.0):
        return data_parallel(fold, rank, folder) | {"looks": fold.looks(STEPS), "done": fold._done}


def refused(rank: int, folder: Path) -> dict[str, Any]:
    """A gate that nothing passes on the first rank, and everything on the other."""
    fold = Fold(keep=0.25, at=0.25, stats_batches=4)
    return data_parallel(fold, rank, folder, max_increase=-1e9 if rank == 0 else 1e9)


def unfolded(rank: int, folder: Path) -> dict[str, Any]:
    """A gate that everything passes, and a loss that never comes back."""
    fold = Fold(max_accuracy_loss=50.0, latency=TABLE, stats_batches=4, earliest=0.1, latest=0.2)
    return data_parallel(fold, rank, folder, max_increase=1e9, loss=Rising())


class Rising:
    """A loss that is higher at every call."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
        self.calls += 1
        return F.cross_entropy(outputs, targets) + self.calls


def first_rank_fails(rank: int, folder: Path) -> dict[str, Any]:
    class Broken(Fold):
        def step(self, moment: Any) -> Any:
            raise RuntimeError("out of luck")

    first = DistributedDataParallel(net())
    c = compressor(first, Broken(keep=0.5, at=0.25, stats_batches=4), rank, folder)
    c.prepare(optimizer := adam(c.model))
    try:
        train(c, optimizer, batches(STEPS, rank))
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}
    return {"error": ""}


def each_for_itself(rank: int, folder: Path) -> dict[str, Any]:
    """No wrapper: two networks of their own, which fold at different times."""
    c = compressor(net(), Fold(keep=0.5, at=0.25 + rank / 4, stats_batches=4), rank, folder, record=True)
    c.prepare(optimizer := adam(c.model))
    losses = train(c, optimizer, batches(STEPS, rank))
    c.convert()
    return report(c, optimizer, losses=losses)


def at_once(rank: int, folder: Path) -> dict[str, Any]:
    first = DistributedDataParallel(net())
    c = compressor(first, Fold(keep=0.5), rank, folder, max_increase=1e9)
    c.prepare(optimizer := adam(c.model))
    c.once([x for x, _ in batches(4, rank, 64)] if rank == 0 else ())
    folded = fingerprint(c.model)
    train(c, optimizer, batches(3, rank))
    narrow = report(c, optimizer, folded=folded)
    c.undo()
    train(c, optimizer, batches(3, rank))
    return narrow | {"undone": fingerprint(c.model)}


class Normed(nn.Module):
    """With buffers, and a group of parameters that does not decay."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one, self.norm, self.two = nn.Linear(6, 32), nn.BatchNorm1d(32), nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.two(F.relu(self.norm(self.one(x))))


def grouped(model: Any) -> torch.optim.Optimizer:
    decaying = {"params": [model.one.weight, model.two.weight], "weight_decay": 0.1}
    rest = {"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0.0}
    return torch.optim.AdamW([decaying, rest], lr=1e-2)


def shard(model: Any) -> None:
    fully_shard(model.one)
    fully_shard(model)


def halve(model: nn.Module, optimizer: torch.optim.Optimizer, ranks: Ranks | None = None) -> None:
    c = Compressor(model, EXAMPLE, [Fold(keep=0.5)], ranks=ranks)
    c.prepare(optimizer)
    c.once([x for x, _ in batches(4, 9, 64)])
    c.convert()


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, data: list[tuple[Tensor, Tensor]]) -> list[float]:
    """On the same batches everywhere, so that one process does the same."""
    losses = []
    for x, y in data:
        value = F.cross_entropy(model(x), y)
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(value.detach()))
    return losses


def sharded(rank: int, folder: Path) -> dict[str, Any]:
    """The same run sharded and whole, folded in the middle."""
    data, world = batches(24, 7), Ranks(dist.group.WORLD)
    model: nn.Module = Normed()
    shard(model)
    optimizer = grouped(model)
    try:
        compressor(model, Fold(), rank, folder).prepare(optimizer)
        refusal = ""
    except ConfigError as error:
        refusal = str(error)
    losses = steps(model, optimizer, data[:8])
    optimizer.param_groups[0]["lr"] = 5e-3
    model, optimizer = change_sharded(
        model, optimizer, build=Normed, optimize=grouped, shard=shard,
        change=lambda whole, own: halve(whole, own, world),
    )  # fmt: skip
    losses += steps(model, optimizer, data[8:])

    twin = Normed()
    own = grouped(twin)
    expected = steps(twin, own, data[:8])
    own.param_groups[0]["lr"] = 5e-3
    halve(twin, own)
    expected += steps(twin, own, data[8:])
    options = StateDictOptions(full_state_dict=True)
    return {
        "refusal": refusal,
        "losses": losses,
        "expected": expected,
        "weights": get_model_state_dict(model, options=options),
        "twin": twin.state_dict(),
        "sharded": all(isinstance(p, DTensor) for p in model.parameters()),
        "local": [tuple(p.to_local().shape) for p in model.parameters()],  # pyright: ignore
        "rates": [g["lr"] for g in optimizer.param_groups],
        "decays": [g["weight_decay"] for g in optimizer.param_groups],
        "moments": all(isinstance(s["exp_avg"], DTensor) for s in optimizer.state.values()),
    }


def resumed(rank: int, folder: Path) -> dict[str, Any]:
    """Interrupted while an event is watched; the average was made of the wrapped network."""

    def begin() -> tuple[Compressor, torch.optim.Optimizer, AveragedModel]:
        first = DistributedDataParallel(net())
        average = AveragedModel(first)
        fold = Fold(max_accuracy_loss=50.0, latency=TABLE, stats_batches=4, earliest=0.1, latest=0.2)

        def loss(outputs: Tensor, targets: Tensor) -> Tensor:
            return F.cross_entropy(outputs, targets) + 32 - first.module[0].out_features  # pyright: ignore

        c = compressor(first, fold, rank, folder, max_increase=1e9, loss=loss, record=False)
        c.prepare(optimizer := adam(c.model), [average])
        return c, optimizer, average

    c, optimizer, average = begin()
    data = batches(STEPS, rank)
    train(c, optimizer, data[:10])
    average.update_parameters(c.network)
    parts = [part.state_dict() for part in (c, c.model, optimizer, average)]
    box = [copy.deepcopy(parts)]
    dist.broadcast_object_list(box, src=0)
    watched = c._watch is not None
    train(c, optimizer, data[10:])
    average.update_parameters(c.network)
    whole = fingerprint(c.model), fingerprint(average)

    c, optimizer, average = begin()
    for part, state in zip((c, c.model, optimizer, average), box[0], strict=True):
        part.load_state_dict(state)
    train(c, optimizer, data[10:])
    average.update_parameters(c.network)
    again = fingerprint(c.model), fingerprint(average)
    return report(c, optimizer, whole=whole, again=again, watched=watched)


def compiled(rank: int, folder: Path) -> dict[str, Any]:
    """The wrapper itself is compiled: statistics come from the probe, and the new wrapper is compiled again."""
    first: Any = torch.compile(DistributedDataParallel(net()), backend="eager")
    c = compressor(first, Fold(keep=0.5, at=0.25, stats_batches=4), rank, folder)
    c.prepare(optimizer := adam(c.model))
    losses = train(c, optimizer, batches(16, rank))
    inside = getattr(c.network, "_orig_mod", None)
    fresh = isinstance(inside, DistributedDataParallel) and c.network is not first
    return report(c, optimizer, losses=losses, fresh=fresh)


def main(rank: int, folder: Path, names: list[str]) -> None:
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", store=dist.FileStore(str(folder / "store"), WORLD), rank=rank, world_size=WORLD,
        timeout=timedelta(seconds=60),
    )  # fmt: skip
    for name in names:
        worker: Callable[[int, Path], dict[str, Any]] = globals()[name]
        (folder / name).mkdir(exist_ok=True)
        torch.save(worker(rank, folder / name), folder / name / f"{rank}.pt")
        dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
