"""Layers tied while they train: unique parameters against loss, a small character transformer on tiny Shakespeare.

    python benchmarks/tie.py --shared ../shared/data [--steps 600] [--seeds 3] [--arms ARM,ARM] [--out FILE]

Paired by seed: same initial weights, same batches.

    dense               every block its own
    tied at the start   all blocks share their weights from the first step (ALBERT), norms and biases their own
    untied at S         the same, until a share S of the steps; from then on every block its own (Yang et al.,
                        2021, arXiv 2110.03848)
    tie, gate G         `Tie` on whole blocks: every 30 steps the most alike pair, if the probe loss rises by no more
                        than G nats, interval included; watched, untied if it hurts
    tie, rank 4         the same at the tighter gate, copies may keep a correction of rank 4
    likeness            what `Tie` sees with its default threshold: do blocks become alike by themselves?

Parameters are counted before corrections are written out. Training seconds show what ties do not save. The last line is
one JSON object.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))

import weightfold as wf
from weightfold.data import load
from weightfold.methods.tie import Tie
from weightfold.models import build
from weightfold.sharing.pairs import pairs
from weightfold.sharing.ties import Link, Ties
from weightfold.size import parameters

BLOCKS = "blocks.?"
GATES = (0.02, 0.1)
UNTIED = (0.1, 0.3)


def nats(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten().long())


def start(data: Any, seed: int, args: argparse.Namespace) -> nn.Module:
    return build("char-gpt", data.task, seed=seed, width=args.width, depth=args.depth, num_heads=4)


def tied(model: nn.Module, optimizers: tuple[torch.optim.Optimizer, ...] = ()) -> tuple[Ties, list[Link]]:
    """All blocks share the weights of the first."""
    ties = Ties(model, optimizers)
    every = [pair for pair in pairs(model, BLOCKS) if pair.kept == "blocks.0"]
    return ties, [ties.tie(kept, copy, "first") for pair in every for kept, copy in pair.tensors]


def arm(data: Any, seed: int, args: argparse.Namespace, name: str, settings: dict[str, Any] | None) -> dict[str, Any]:
    """Train one network and measure it on the test split."""
    model = start(data, seed, args)
    if name == "tied at the start":
        tied(model)[0].close()
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr)
    ties, links = tied(model, (optimizer,)) if name.startswith("untied") else (None, [])
    untie_at = round(float(name.split()[-1]) * args.steps) if ties is not None else -1
    generator = torch.Generator().manual_seed(seed)
    order = torch.randint(len(data.train), (args.steps + 8, args.batch), generator=generator)
    probe = [(data.train.inputs[rows], data.train.targets[rows]) for rows in order[-8:]]
    tie = None
    begun = time.process_time()
    if settings is not None:
        tie = Tie(layers=BLOCKS, every=30, watch=60, start=0.05, until=0.8, **settings)
        tie.prepare(model, optimizer, loss=nats, probe=probe, example=probe[0][0], total_steps=args.steps)
    model.train()
    for step, rows in enumerate(order[: args.steps]):
        if ties is not None and step == untie_at:
            for link in reversed(links):
                ties.untie(link)
            ties.close()
        optimizer.zero_grad()
        nats(model(data.train.inputs[rows]), data.train.targets[rows]).backward()
        optimizer.step()
        if tie is not None:
            tie.step()
    seconds = time.process_time() - begun
    n = parameters(model)
    found = {"name": name, "seed": seed, "parameters": n, "cpu_seconds": round(seconds, 1)}
    if tie is not None:
        kinds = [event.kind for event in tie.events]
        found |= {kind: kinds.count(kind) for kind in ("tie", "refusal", "untie")}
        tie.convert()
    else:
        best = pairs(model, BLOCKS)
        found |= {"most_alike": round(best[0].similarity, 3)} if best else {}
    found["loss"] = round(test_loss(model, data), 4)
    print("  ".join(f"{k} {v}" for k, v in found.items()), flush=True)
    return found


@torch.no_grad()
def test_loss(model: nn.Module, data: Any) -> float:
    model.eval()
    parts = zip(data.test.inputs.split(64), data.test.targets.split(64), strict=True)
    values = [(float(nats(model(x), y)), len(x)) for x, y in parts]
    return sum(v * n for v, n in values) / sum(n for _, n in values)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, default=Path(__file__).parents[2] / "shared" / "data")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--arms", help="names, separated by commas; all by default")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    data = load(args.shared / "text" / "tinyshakespeare.txt", context=64)
    arms: dict[str, dict[str, Any] | None] = {
        "dense": None,
        "tied at the start": None,
        **{f"untied at {share}": None for share in UNTIED},
        **{f"tie, gate {gate}": {"max_increase": gate, "similarity": -1} for gate in GATES},
        f"tie, rank 4, gate {GATES[0]}": {"max_increase": GATES[0], "similarity": -1, "rank": 4},
        "likeness": {"max_increase": GATES[1]},
    }
    if args.arms:
        arms = {name: arms[name] for name in args.arms.split(",")}
    rows = [arm(data, seed, args, name, settings) for seed in range(args.seeds) for name, settings in arms.items()]
    summary = {}
    for name in arms:
        mine = [row for row in rows if row["name"] == name]
        losses = [row["loss"] for row in mine]
        summary[name] = {
            "loss_mean": round(statistics.mean(losses), 4),
            "loss_sd": round(statistics.stdev(losses), 4) if len(losses) > 1 else 0.0,
            "parameters_mean": round(statistics.mean(row["parameters"] for row in mine)),
            "cpu_seconds_mean": round(statistics.mean(row["cpu_seconds"] for row in mine), 1),
        }
    result = {
        "summary": summary,
        "rows": rows,
        "settings": {k: getattr(args, k) for k in ("steps", "seeds", "batch", "lr", "width", "depth", "threads")},
        "cores": os.cpu_count(),
        "machine": platform.machine(),
        "versions": {
            "python": platform.python_version(),
            "weightfold": wf.__version__,
            "torch": importlib.metadata.version("torch"),
        },
    }
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
