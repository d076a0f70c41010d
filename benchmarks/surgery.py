"""After a fold in mid-training, the optimiser goes on as if the wide network's duplicates had been tied all along.

    python benchmarks/surgery.py [--nets mlp ...] [--optimizers adamw ...]

A network is trained for some steps in float64, exact duplicates are planted (weights, statistics, optimiser state),
and then two roads are taken:

1. ours: `apply(merge)`, or `apply(fold)` with one-hot maps, on the live network, then steps of its own optimiser;
2. the reference, which knows nothing of weightfold: the wide network as a function of small leaf tensors through the
   lumping matrix (`torch.func.functional_call`: a tied row is a copy of the leaf's row, a reading column the leaf's
   column times its share, even or uneven), and an optimiser over the leaves. Where every channel stands is written down
   by hand for every network. The leaves' state is the pull-back of the wide one: gradients are covectors, so first
   moments of tied rows are summed and those of readers weighted by their shares; second moments of c equal copies are
   (sum of roots)^2; Adafactor's factors are multiplied out, pulled back and factored again.

``step_error`` is the largest difference after one step over the largest change that the step made, over all small
tensors; ``later_error`` the largest relative difference of the tensors after 6 more steps; ``state_error`` that of the
optimiser's state right after the edit. Also checked: the undo is exact to the bit, the optimiser holds exactly the live
parameters after every edit, averaged models follow, ties survive.
The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from surgery_reference import NETS, Batch, Lump, Make, Net, Part, Reference
from torch import Tensor, nn, optim
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

sys.path.insert(0, str(Path(__file__).parents[1]))

import weightfold as wf
from weightfold.graph import edit as edits
from weightfold.graph.apply import Companion, Undo, apply
from weightfold.graph.group import ChannelGraph
from weightfold.graph.resize import with_sizes

WARM_UP = 7
LATER = 6

# optimisers -----------------------------------------------------------------------------------------------------------


def _muon(parameters: Sequence[nn.Parameter]) -> list[optim.Optimizer]:
    flat, rest = [p for p in parameters if p.ndim == 2], [p for p in parameters if p.ndim != 2]
    return [optim.Muon(flat, lr=5e-3, weight_decay=0.1), optim.AdamW(rest, lr=3e-3)]


def one(cls: type[optim.Optimizer], **settings: Any) -> Make:
    return lambda parameters: [cls(parameters, **settings)]


OPTIMIZERS: dict[str, Make] = {
    "sgd": one(optim.SGD, lr=0.05, weight_decay=1e-3, foreach=False),
    "sgd_momentum": one(optim.SGD, lr=0.05, momentum=0.9, weight_decay=1e-3, foreach=False),
    "sgd_nesterov": one(optim.SGD, lr=0.05, momentum=0.9, nesterov=True, foreach=True),
    "sgd_fused": one(optim.SGD, lr=0.05, momentum=0.9, fused=True),
    "adam": one(optim.Adam, lr=3e-3, weight_decay=1e-3, foreach=False),
    "adamw": one(optim.AdamW, lr=3e-3, foreach=False),
    "adamw_amsgrad": one(optim.AdamW, lr=3e-3, amsgrad=True, foreach=False),
    "adamw_foreach": one(optim.AdamW, lr=3e-3, foreach=True),
    "adamw_fused": one(optim.AdamW, lr=3e-3, fused=True),
    "adafactor": one(optim.Adafactor, lr=0.01, weight_decay=1e-2),
    "rmsprop": one(optim.RMSprop, lr=1e-3, momentum=0.9, centered=True, foreach=False),
    "rmsprop_plain": one(optim.RMSprop, lr=1e-3, foreach=True),
    "adagrad": one(optim.Adagrad, lr=0.02, foreach=False),
    "adamax": one(optim.Adamax, lr=3e-3, foreach=False),
    "nadam": one(optim.NAdam, lr=3e-3, foreach=False),
    "radam": one(optim.RAdam, lr=3e-3, foreach=False),
    "adadelta": one(optim.Adadelta, lr=0.5, foreach=False),
    "asgd": one(optim.ASGD, lr=0.02, t0=0, foreach=False),
    "rprop": one(optim.Rprop, lr=1e-3, foreach=False),
}
if hasattr(optim, "Muon"):
    OPTIMIZERS["muon"] = _muon

# training and planting ------------------------------------------------------------------------------------------------


def batches(net: Net, n: int, seed: int) -> list[Batch]:
    generator = torch.Generator().manual_seed(seed)
    draw = partial(torch.randn, net.shape, generator=generator, dtype=torch.float64)
    return [(draw(), torch.randint(0, 4, net.shape[:1], generator=generator)) for _ in range(n)]


def step(model: nn.Module, optimizers: Sequence[optim.Optimizer], batch: Batch) -> None:
    loss = F.cross_entropy(model(batch[0]), batch[1])
    for optimizer in optimizers:
        optimizer.zero_grad()
    loss.backward()
    for optimizer in optimizers:
        optimizer.step()


@torch.no_grad()
def equalise(tensor: Tensor, part: Part, labels: Tensor) -> None:
    """Make the rows of all copies equal along a part, in place."""
    if part.dim >= tensor.ndim or tensor.shape[part.dim] < part.positions.numel():
        return
    source = torch.arange(tensor.shape[part.dim])
    source[part.positions] = part.positions[labels]
    tensor.copy_(tensor.index_select(part.dim, source))


def plant(net: Net, model: nn.Module, optimizers: Sequence[optim.Optimizer], averaged: AveragedModel) -> None:
    """Exact duplicates: weights and statistics of what writes them, and the state of everything."""
    tensors, means = model.state_dict(), averaged.module.state_dict()
    parameters = dict(model.named_parameters())
    for item in net.lumps:
        for part in item.parts:
            if not part.reads:
                equalise(tensors[part.tensor], part, item.labels)
                equalise(means[part.tensor], part, item.labels)
            for optimizer in optimizers:
                for key, value in optimizer.state.get(parameters.get(part.tensor, torch.zeros(())), {}).items():
                    if isinstance(value, Tensor) and not (key == "ax" and part.reads):
                        equalise(value, part, item.labels)


def edit_of(graph: ChannelGraph, item: Lump, kind: str) -> edits.Edit:
    group = graph[item.group]
    if kind == "merge":
        return edits.merge(group, item.labels)
    keep = torch.unique(item.labels)
    dropped = torch.tensor([c for c in range(group.n_channels) if c not in set(keep.tolist())])
    onehot = (item.labels[dropped][:, None] == keep[None, :]).double()
    return edits.fold(group, keep, {axis.key: onehot for axis in group.role("read")})


def fold_all(
    net: Net,
    model: nn.Module,
    graph: ChannelGraph,
    optimizers: Sequence[optim.Optimizer],
    companions: Sequence[Companion],
    kind: str,
) -> tuple[ChannelGraph, list[Undo]]:
    undos = []
    for item in net.lumps:
        graph, undo = apply(model, graph, edit_of(graph, item, kind), optimizers, companions)
        check_live(model, optimizers)
        undos.append(undo)
    return graph, undos


def check_live(model: nn.Module, optimizers: Sequence[optim.Optimizer]) -> None:
    """The optimisers hold exactly the live parameters, and keep state for no others."""
    live = sorted(id(p) for p in model.parameters())
    held = sorted(id(p) for o in optimizers for g in o.param_groups for p in g["params"])
    assert held == live, "the optimiser does not hold exactly the live parameters"
    for optimizer in optimizers:
        assert {id(p) for p in optimizer.state} <= set(live), "the optimiser keeps state of dead parameters"


# comparing ------------------------------------------------------------------------------------------------------------


def change_error(before: Mapping[str, Tensor], ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> float:
    """Largest difference over the largest change of the reference, over tensors."""
    worst = 0.0
    for name, value in theirs.items():
        if value.is_floating_point() and value.numel():
            moved = (value - before[name]).abs().max().clamp_min(1e-300)
            worst = max(worst, float((ours[name] - value).abs().max() / moved) if moved > 1e-300 else 0.0)
    return worst


def tensor_error(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> float:
    worst = 0.0
    for name, value in theirs.items():
        if value.is_floating_point() and value.numel():
            worst = max(worst, float((ours[name] - value).abs().max() / value.abs().max().clamp_min(1e-300)))
    return worst


def state_error(ours: Mapping[str, Any], reference: Reference, optimizers: Sequence[optim.Optimizer]) -> float:
    """Largest relative difference of the optimisers' state."""
    names, worst = {id(p): name for name, p in ours.items()}, 0.0
    for mine, theirs in zip(optimizers, reference.optimizers, strict=True):
        for p, state in mine.state.items():
            other = theirs.state[reference.leaves[names[id(p)]]]
            assert state.keys() == other.keys(), "the optimiser's state has other entries than the reference's"
            pairs = {k: (torch.as_tensor(v).double(), torch.as_tensor(other[k]).double()) for k, v in state.items()}
            worst = max(
                worst, tensor_error({k: a for k, (a, _) in pairs.items()}, {k: b for k, (_, b) in pairs.items()})
            )
    return worst


def snapshot(
    model: nn.Module, averaged: AveragedModel, shadow: Mapping[str, Tensor], optimizers: Sequence[optim.Optimizer]
) -> dict[str, Any]:
    """Everything that an undo must bring back, identities included."""
    out: dict[str, Any] = {}
    for who, module in (("model", model), ("averaged", averaged)):
        for name, value in (*module.named_parameters(remove_duplicate=False), *module.named_buffers()):
            out[f"{who}:{name}"] = value.detach().clone()
            out[f"{who}:{name}:id"] = id(value)
        for path, part in module.named_modules():
            out |= {f"{who}:{path}.{k}": v for k, v in vars(part).items() if isinstance(v, (int, float, tuple, str))}
    out |= {f"shadow:{name}": value.clone() for name, value in shadow.items()}
    names = {id(p): name for name, p in model.named_parameters()}
    for number, optimizer in enumerate(optimizers):
        out[f"groups:{number}"] = [[id(p) for p in g["params"]] for g in optimizer.param_groups]
        for p, state in optimizer.state.items():
            for key, value in state.items():
                kept = value.clone() if isinstance(value, Tensor) else value
                out[f"state:{number}:{names[id(p)]}:{key}"] = kept
    return out


def same(a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
    if a.keys() != b.keys():
        return False
    return all(torch.equal(v, b[k]) if isinstance(v, Tensor) else v == b[k] for k, v in a.items())


# one case -------------------------------------------------------------------------------------------------------------


@dataclass
class Start:
    """A network in mid-training with planted duplicates, its optimisers and its averages."""

    model: nn.Module
    optimizers: list[optim.Optimizer]
    averaged: AveragedModel
    shadow: dict[str, Tensor]


def start(net: Net, make: Make) -> Start:
    torch.manual_seed(3)
    model = net.build().double()
    optimizers = make(list(model.parameters()))
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
    for batch in batches(net, WARM_UP, seed=1):
        step(model, optimizers, batch)
        averaged.update_parameters(model)
    plant(net, model, optimizers, averaged)
    shadow = {name: value.detach().clone() for name, value in averaged.module.state_dict().items()}
    return Start(model, optimizers, averaged, shadow)


def run(net: Net, make: Make, kind: str, *, uneven: bool) -> dict[str, Any]:
    """Both roads, once."""
    s = start(net, make)
    example = batches(net, 1, seed=1)[0][0]
    graph = with_sizes(s.model, example, wf.trace(s.model, example))
    reference = Reference(net, s.model, s.optimizers, make, uneven=uneven)
    companions = [s.averaged, s.shadow]

    before = snapshot(s.model, s.averaged, s.shadow, s.optimizers)
    _, undos = fold_all(net, s.model, graph, s.optimizers, companions, kind)
    for undo in reversed(undos):
        undo.restore()
    undo_exact = same(before, snapshot(s.model, s.averaged, s.shadow, s.optimizers))
    check_live(s.model, s.optimizers)

    averages = {k: reference.value(k, v) for k, v in s.averaged.module.state_dict().items() if k in reference.ties}
    fold_all(net, s.model, graph, s.optimizers, companions, kind)
    average_error = max(tensor_error(s.averaged.module.state_dict(), averages), tensor_error(s.shadow, averages))
    moment_error = state_error(dict(s.model.named_parameters()), reference, s.optimizers)
    small = {k: v.detach().clone() for k, v in s.model.state_dict().items()}
    first, *rest = batches(net, 1 + LATER, seed=2)
    step(s.model, s.optimizers, first)
    s.averaged.update_parameters(s.model)
    reference.step(first)
    step_error = change_error(small, s.model.state_dict(), reference.state())
    for batch in rest:
        step(s.model, s.optimizers, batch)
        s.averaged.update_parameters(s.model)
        reference.step(batch)
    return {
        "step_error": step_error,
        "later_error": tensor_error(s.model.state_dict(), reference.state()),
        "state_error": moment_error,
        "average_error": average_error,
        "undo_exact": undo_exact,
    }


class Tied(nn.Module):
    """A language model whose head is its embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.up, self.down = nn.Embedding(11, 8), nn.Linear(8, 12), nn.Linear(12, 8)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        return self.head(x + self.down(torch.tanh(self.up(x))))


def ties_survive(make: Make) -> bool:
    """A tied embedding stays one parameter through edits of its own channels, training and the undo."""
    torch.manual_seed(5)
    model = Tied().double()
    optimizers = make(list(model.parameters()))
    ids = torch.randint(0, 11, (6, 7))
    graph = wf.trace(model, ids)
    group = graph.containing("embed.weight", 1)
    assert group is not None, "the tied channels are in no group"
    assert group.role("both"), "the tied tensor does not both write and read"
    assert "merge" not in group.admits, "merging tied channels is not exact"

    def train() -> None:
        for optimizer in optimizers:
            optimizer.zero_grad()
        F.cross_entropy(model(ids).flatten(0, 1), ids.flatten()).backward()
        for optimizer in optimizers:
            optimizer.step()

    def tied() -> bool:
        check_live(model, optimizers)
        return model.head.weight is model.embed.weight

    train()
    fine, before, undos = tied(), snapshot(model, AveragedModel(Tied()), {}, optimizers), []
    for edit in (
        edits.permute(group, torch.randperm(8)),
        edits.remove(group, torch.tensor([0, 2, 3, 5, 7])),
    ):
        graph, undo = apply(model, graph, edit, optimizers)
        undos.append(undo)
        fine &= tied()
        group = graph[group.name]
    for undo in reversed(undos):
        undo.restore()
    after = snapshot(model, AveragedModel(Tied()), {}, optimizers)
    mine = lambda s: {k: v for k, v in s.items() if not k.startswith("averaged")}  # noqa: E731
    fine &= tied() and same(mine(before), mine(after))
    train()
    return fine and tied()


CASES = (("merge", False), ("merge", True), ("fold", False), ("fold", True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--nets", nargs="+", choices=NETS, default=list(NETS))
    parser.add_argument("--optimizers", nargs="+", choices=OPTIMIZERS, default=list(OPTIMIZERS))
    chosen = parser.parse_args()
    started = time.perf_counter()
    table: dict[str, dict[str, float]] = {}
    undo_exact, ties, worst = (
        True,
        True,
        {"step_error": 0.0, "later_error": 0.0, "state_error": 0.0, "average_error": 0.0},
    )
    for name in chosen.optimizers:
        table[name] = {}
        for net in chosen.nets:
            results = [run(NETS[net], OPTIMIZERS[name], kind, uneven=uneven) for kind, uneven in CASES]
            table[name][net] = max(r["step_error"] for r in results)
            undo_exact &= all(r["undo_exact"] for r in results)
            worst = {key: max([value, *(r[key] for r in results)]) for key, value in worst.items()}
            later = max(r["later_error"] for r in results)
            average = max(r["average_error"] for r in results)
            exact = all(r["undo_exact"] for r in results)
            print(
                f"{name:14} {net:16} step {table[name][net]:.1e}  later {later:.1e}  "
                f"average {average:.1e}  undo {exact}"
            )
        ties &= ties_survive(OPTIMIZERS[name])
    print(
        json.dumps(
            {
                "max_step_error": worst["step_error"],
                "undo_exact": undo_exact,
                "optimizers": {name: max(errors.values()) for name, errors in table.items()},
                "max_later_error": worst["later_error"],
                "max_state_error": worst["state_error"],
                "max_average_error": worst["average_error"],
                "ties_survive": ties,
                "by_net": table,
                "edits": [f"{kind}, {'uneven' if uneven else 'even'} shares" for kind, uneven in CASES],
                "warm_up_steps": WARM_UP,
                "later_steps": LATER,
                "seconds": round(time.perf_counter() - started, 1),
                "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
                "n_cores": os.cpu_count(),
                "versions": {
                    "weightfold": wf.__version__,
                    "python": platform.python_version(),
                    "torch": torch.__version__,
                    "system": platform.system(),
                },
            }
        )
    )


if __name__ == "__main__":
    main()
