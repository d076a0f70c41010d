"""Merging models that were trained apart: naive, matched, repaired, soft; and what matching costs.

    python benchmarks/align.py [--shared ../shared/data] [--beds digits-32,mnist,...] [--pairs N] [--out FILE]

Two parents, of different seeds (initial weights and order of samples), and the model half way between them:

    naive              weights averaged as they are
    matched            the second aligned to the first by weight matching
    balanced           both brought to the scales of least norm first (no batch norms), then the same; and repaired
    repaired           the same, then REPAIR on 1,024 training inputs without labels
    activations        aligned by correlations of activations on the same inputs; and repaired
    soft               the second mapped by optimal transport, both balanced; and repaired
    rotated            (transformers) weight matching that also rotates the residual stream

Numbers are test accuracies (of the next character for char-gpt); ``seconds`` is weight matching, tracing included;
the machine's load is written down beside it. Beds:

    digits-W           64-W-W-10, W of 16, 32, 64, 512, 40 epochs, 5 pairs
    digits-32-64       soft matching only: parents 64 and 32 wide
    mnist              784-128 (six hidden layers)-10 on 20,000 images, 4 epochs
    mnist-512          784-512-512-10, the same
    resnet20, vgg      on cifar10-jpeg, 8,000 images, 6 epochs
    char-gpt           2 blocks of 64 on tiny Shakespeare, 500 steps, head not tied

Published: digits (a preliminary experiment of the same recipe) 16: .41 -> .89 -> .92, 32: .56 -> .94 -> .95, 64: .80 ->
.97 -> .97, 512: .96 -> .98 -> .98 (naive, matched, repaired). MNIST, six layers of 128: 71.7 matched -> 83.0 repaired;
VGG11 on CIFAR-10: 67.3 -> 84.9 (Jordan et al. 2022, arXiv 2211.08403), 86.0 by OTFusion (arXiv 1910.05653). The last
line is one JSON object.
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
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))

from weightfold.data import load
from weightfold.models import build
from weightfold.weights.align import align
from weightfold.weights.canon import balanced
from weightfold.weights.path import between, repair
from weightfold.weights.soft import soft

BEDS = (
    "digits-16",
    "digits-32",
    "digits-64",
    "digits-512",
    "digits-32-64",
    "mnist",
    "mnist-512",
    "char-gpt",
    "resnet20",
)
BEDS += ("vgg",)
SEEN = 1024


@dataclass(frozen=True, eq=False)
class Bed:
    """What two parents are trained on, and how."""

    name: str
    width: int
    make: Callable[[int], nn.Module]
    data: Any
    epochs: int
    batch: int
    lr: float
    limit: int | None = None
    steps: int | None = None
    pairs: int = 1
    other: Callable[[int], nn.Module] | None = None


def mlp(inputs: int, hidden: list[int], seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        layers: list[nn.Module] = [nn.Flatten()]
        for before, after in zip([inputs, *hidden], hidden, strict=False):
            layers += [nn.Linear(before, after), nn.ReLU()]
        return nn.Sequential(*layers, nn.Linear(hidden[-1], 10))


def bed(name: str, shared: Path) -> Bed:
    if name == "digits-32-64":
        data = load("digits")
        wide, narrow = (lambda s: mlp(64, [64, 64], s)), (lambda s: mlp(64, [32, 32], s))
        return Bed(name, 64, wide, data, 40, 128, 3e-3, pairs=5, other=narrow)
    if name.startswith("digits"):
        width = int(name.split("-")[1])
        return Bed(name, width, lambda s: mlp(64, [width] * 2, s), load("digits"), 40, 128, 3e-3, pairs=5)
    if name.startswith("mnist"):
        data = load(shared / "mnist-train.parquet", limit=20000)
        hidden = [512, 512] if name == "mnist-512" else [128] * 6
        return Bed(name, hidden[0], lambda s: mlp(784, hidden, s), data, 4, 128, 1e-3, pairs=2)
    if name == "char-gpt":
        data = load(shared / "text" / "tinyshakespeare.txt", context=64)
        make = lambda s: build("char-gpt", data.task, seed=s, width=64, depth=2, num_heads=4, tied=False)  # noqa: E731
        return Bed(name, 64, make, data, 1, 32, 2e-3, steps=500)
    data = load(shared / "cifar10-jpeg-train.parquet", limit=8000)
    kind = "vgg-small" if name == "vgg" else name
    return Bed(name, 16, lambda s: build(kind, data.task, seed=s), data, 6, 64, 2e-3)


def trained(make: Callable[[int], nn.Module], b: Bed, seed: int) -> nn.Module:
    """One parent: Adam, a linear decay, batches in an order of its own."""
    model = make(seed).train()
    generator = torch.Generator().manual_seed(7919 * (seed + 1))
    per_epoch = -(-len(b.data.train) // b.batch)
    steps = b.steps or per_epoch * b.epochs
    optimizer = torch.optim.Adam(model.parameters(), b.lr)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: max(0.0, 1 - s / steps))
    done = 0
    while done < steps:
        for x, y in b.data.batches("train", b.batch, generator=generator):
            if done == steps:
                break
            optimizer.zero_grad()
            nats(model(x), y).backward()
            optimizer.step()
            schedule.step()
            done += 1
    return model.eval()


def nats(logits: Tensor, targets: Tensor) -> Tensor:
    if logits.ndim == 3:
        logits, targets = logits.flatten(0, 1), targets.flatten()
    return F.cross_entropy(logits, targets.long())


@torch.no_grad()
def scored(model: nn.Module, b: Bed) -> tuple[float, float]:
    """Accuracy and loss on at most 4,000 test samples (256 texts)."""
    model.eval()
    right = total = 0
    loss = 0.0
    for x, y in first(b.data.batches("test", 256), 1 if b.name == "char-gpt" else 16):
        out = model(x)
        right += int((out.argmax(-1) == y).sum())
        loss += float(nats(out, y)) * y.numel()
        total += y.numel()
    return right / total, loss / total


def first(batches: Iterator[Any], n: int) -> Iterator[Any]:
    for (batch), _ in zip(batches, range(n), strict=False):
        yield batch


def pair(b: Bed, number: int) -> dict[str, Any]:
    a, c = trained(b.make, b, 2 * number), trained(b.other or b.make, b, 2 * number + 1)
    size = 32 if b.name == "char-gpt" else 256
    drawn = b.data.batches("train", size, generator=torch.Generator().manual_seed(number))
    seen = [x for x, _ in first(drawn, SEEN // 256)]
    example = seen[0][:2]
    row: dict[str, Any] = {"parents": [scored(m, b) for m in (a, c)]}

    def middle(kind: str, other: nn.Module, one: nn.Module = a) -> None:
        half = between(one, other)
        row[kind] = scored(half, b)
        key = "repaired" if kind == "matched" else f"{kind}_repaired"
        row[key] = scored(repair(half, [one, other], seen), b)

    if b.other is None:
        middle("naive", c)
        start, cpu = time.perf_counter(), time.process_time()
        matched = align(a, c, example, tolerance=1e-3)
        row["seconds"], row["cpu_seconds"] = time.perf_counter() - start, time.process_time() - cpu
        row["cosine"] = [matched.cosine_before, matched.cosine_after]
        middle("matched", matched.model)
        if not any(isinstance(m, nn.BatchNorm2d) for m in a.modules()):
            even = [balanced(m, example) for m in (a, c)]
            middle("balanced", align(*even, example).model, even[0])
        middle("activations", align(a, c, example, method="activations", data=seen).model)
        if b.name == "char-gpt":
            start = time.perf_counter()
            rotated = align(a, c, example, rotate=True)
            row["rotated_seconds"], row["rotated_notes"] = time.perf_counter() - start, list(rotated.notes)
            middle("rotated", rotated.model)
    if b.name != "char-gpt":
        start = time.perf_counter()
        one, two = balanced(a, example), balanced(c, example)
        mapped = soft(one, two, example)
        row["soft_seconds"] = time.perf_counter() - start
        row["mapped"] = scored(mapped, b)
        middle("soft", mapped, one)
    return row


def summary(b: Bed, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Means over pairs: accuracies, and losses beside them."""
    out: dict[str, Any] = {"net": b.name, "width": b.width, "pairs": len(rows), "samples": len(b.data.train)}
    parents = [statistics.mean(score[i] for row in rows for score in row["parents"]) for i in (0, 1)]
    out["parents"], out["parents_loss"] = parents
    for key in rows[0]:
        if key in ("parents", "cosine", "rotated_notes"):
            continue
        if key.endswith("seconds"):
            out[key] = statistics.median(row[key] for row in rows)
        else:
            out[key] = statistics.mean(row[key][0] for row in rows)
            out[f"{key}_loss"] = statistics.mean(row[key][1] for row in rows)
    if "rotated_notes" in rows[0]:
        out["rotated_notes"] = rows[0]["rotated_notes"]
    if "cosine" in rows[0]:
        out["cosine"] = [statistics.mean(row["cosine"][i] for row in rows) for i in (0, 1)]
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, default=Path(__file__).parents[2] / "shared" / "data")
    parser.add_argument("--beds", default=",".join(BEDS))
    parser.add_argument("--pairs", type=int, help="pairs of parents of every bed")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    facts = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, 1 thread",
        "load": os.getloadavg()[0],
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "numpy", "scipy")},
        "rows": [],
    }
    for name in args.beds.split(","):
        start = time.perf_counter()
        b = bed(name, args.shared)
        rows = [pair(b, number) for number in range(args.pairs or b.pairs)]
        facts["rows"].append({**summary(b, rows), "all_seconds": time.perf_counter() - start, "each": rows})
        shown = {k: round(v, 3) for k, v in facts["rows"][-1].items() if isinstance(v, float)}
        print(f"{name}: {shown}", file=sys.stderr, flush=True)
        if args.out:
            args.out.write_text(json.dumps(facts, indent=1) + "\n")
    print(json.dumps(facts))


if __name__ == "__main__":
    main()
