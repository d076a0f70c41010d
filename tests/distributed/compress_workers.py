"""What these processes run: ``python compress_workers.py RANK FOLDER``; results go to ``FOLDER/RANK.pt``."""

from __future__ import annotations

import sys
import warnings
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from weightfold.compressor import Compressor
from weightfold.errors import ConfigError
from weightfold.fingerprint import fingerprint
from weightfold.ledger import Ledger
from weightfold.methods.fold import Fold
from weightfold.methods.self_compress import SelfCompress

STEPS, EXAMPLE = 60, torch.zeros(2, 6)


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 24), nn.ReLU(), nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 4))


def batches(n: int, seed: int) -> list[tuple[Tensor, Tensor]]:
    g = torch.Generator().manual_seed(seed)
    xs = [torch.randn(32, 6, generator=g) for _ in range(n)]
    return [(x, (x[:, 0] > 0).long() + 2 * (x[:, 1] > 0).long()) for x in xs]


def trained(rank: int, folder: Path, name: str, *methods: Any) -> dict[str, Any]:
    """Each rank has batches and a probe of its own."""
    ledger = Ledger.create(folder / f"{name}.ledger", run={}) if rank == 0 else None
    c = Compressor(
        DistributedDataParallel(net()), EXAMPLE, methods, loss=F.cross_entropy, probe=batches(3, 50 + rank),
        ledger=ledger, total_steps=STEPS, max_increase=1e9,
    )  # fmt: skip
    optimizer = torch.optim.AdamW(c.model.parameters(), lr=1e-2)
    c.prepare(optimizer)
    losses, chosen = [], methods[-1]
    for x, y in batches(STEPS, rank):
        value = F.cross_entropy(c.network(x), y)
        (value + c.penalty()).backward()
        optimizer.step()
        optimizer.zero_grad()
        c.step()
        losses.append(float(value.detach()))
    values = {n: [v.detach().clone() for v in pair] for n, pair in chosen._learner.values().items()}
    moments = [s["exp_avg"].clone() for o in c._hands.own for s in o.state.values() if "exp_avg" in s]
    model = c.convert()
    return {
        "losses": losses,
        "events": [(e.step, e.group, e.kind, e.channels_after, e.accepted) for e in c.events],
        "fingerprint": fingerprint(model),
        "quantisers": values,
        "moments": moments,
        "history": [[h["step"], h["bytes"], h["price"]] for h in chosen.history],
        "size": chosen._size,
    }


def chosen(**settings: Any) -> SelfCompress:
    given = {"at": 0.1, "reach": 0.6, "check": 0.1, "refresh": 3, "dwell": 1, "resolution": 1.0}
    return SelfCompress(**{**given, **settings})


def averaged(rank: int) -> list[float]:
    """Gradients of steps and widths are the mean over ranks: against one process on both batches."""
    from weightfold.quant.learner import Learner
    from weightfold.ranks import Ranks

    ranks = Ranks(dist.group.WORLD)
    off = []
    for scale in (1.0, 64.0):
        both, mine = net(), net()
        values = lambda m: {n: (torch.full((len(p),), -2.5), torch.full((len(p),), 4.0)) for n, p in m.named_parameters() if p.ndim > 1}  # noqa: E731, E501  # fmt: skip
        learners = [Learner(m, values(m), 0.1, 0.1) for m in (both, mine)]
        parts = [batches(1, r)[0] for r in range(2)]
        x, y = torch.cat([x for x, _ in parts]), torch.cat([y for _, y in parts])
        (F.cross_entropy(both(x), y) + learners[0].penalty(1e-4)).backward()
        (scale * (F.cross_entropy(mine(parts[rank][0]), parts[rank][1]) + learners[1].penalty(1e-4))).backward()
        learners[0].learn(Ranks(), 1e-4, 1.0, 1)
        learners[1].learn(ranks, 1e-4, 1.0, 1)
        pairs = zip(learners[0].values().values(), learners[1].values().values(), strict=True)
        off.append(
            max(float((a - b).detach().abs().max()) for one, two in pairs for a, b in zip(one, two, strict=True))
        )
    return off


def sharded() -> str:
    model = net()
    fully_shard(model)
    try:
        Compressor(model, EXAMPLE, [chosen(strength=1e-4)], total_steps=STEPS).prepare()
    except ConfigError as error:
        return str(error)
    return ""


def main(rank: int, folder: Path) -> None:
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=timedelta(seconds=60))
    fold = Fold(keep=0.5, at=0.4, stats_batches=3)
    results = {
        "strength": trained(rank, folder, "strength", chosen(strength=1e-3)),
        "target": trained(rank, folder, "target", chosen(target=300)),
        "accuracy": trained(rank, folder, "accuracy", chosen(max_accuracy_loss=5.0, pareto=2, guard=0.5)),
        "fold": trained(rank, folder, "fold", fold, chosen(strength=3e-4)),
        "averaged": averaged(rank),
        "sharded": sharded(),
    }
    torch.save(results, folder / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
