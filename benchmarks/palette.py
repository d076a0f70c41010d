"""Clustered weights: unique values and bytes against accuracy, a trained ResNet-20 on CIFAR-10, beside other libraries.

    python benchmarks/palette.py --shared ../shared/data [--peer-python PATH ...] [--steps 200] [--seeds 3] [--out FILE]

At once, k = 2 to 256 values a codebook (1 to 8 bits an index), no training:

    palette              exact k-means of each tensor
    palette, Fisher      the same, weighted by squared gradients of labelled training images
    palette, groups      a codebook for every 8 output channels
    uniform grid         k equally wide steps from least to largest value of each tensor: the control

In training, from the same trained network, a few hundred steps: dkm, ste, and the dense network with the same steps
(the images are JPEG copies: a dense network gains from them too). Bytes are those of the file written, norms and biases
included: packed indices, and entropy-coded ones. Sharing values saves bytes, not time.

Peers (coremltools, torchao) run in interpreters of their own, named by --peer-python. What they give is written to our
file, and measured from there, where a codebook can hold it; else indices and scales are counted. The last line is JSON.
"""

from __future__ import annotations

import argparse
import copy
import importlib.metadata
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))

import weightfold as wf
from weightfold.data import load, load_weights_
from weightfold.methods.palette import Palette, Palettized, fisher, palettize
from weightfold.models import build
from weightfold.size import size_bytes, unique_values

MEAN, STD = (torch.tensor(v)[:, None, None] for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
BITS = range(1, 9)
TRAINED_BITS = (1, 2)
PEER_JOBS: dict[str, list[dict[str, Any]]] = {
    "coremltools": [
        *({"kind": "coremltools_kmeans", "bits": bits} for bits in BITS),
        *({"kind": "coremltools_kmeans", "bits": bits, "group_size": 8} for bits in (2, 3, 4)),
        *({"kind": "coremltools_sensitive", "bits": bits} for bits in (2, 3, 4)),
    ],
    "torchao": [
        *({"kind": "torchao_intx", "bits": bits} for bits in BITS),
        *({"kind": "torchao_codebook", "bits": bits} for bits in (3, 4)),
    ],
}


@dataclass
class Bench:
    """The dense network, test images, and the rows found so far."""

    dense: nn.Module
    test: tuple[Tensor, Tensor]
    train: tuple[Tensor, Tensor]
    args: argparse.Namespace
    rows: list[dict[str, Any]] = field(default_factory=list)

    def row(self, name: str, bits: int, model: nn.Module, palettized: Palettized | None = None, **more: Any) -> None:
        """Measure one network."""
        found = {
            "name": name,
            "bits": bits,
            "accuracy": round(accuracy(model, *self.test), 2),
            "unique_values": palettized.unique_values() if palettized else values_of_weights(model),
            **(file_sizes(model, palettized) if palettized else {}),
            **more,
        }
        self.rows.append(found)
        print("  ".join(f"{k} {v}" for k, v in found.items()), flush=True)

    def images(self, seed: int, n: int, *, flip: bool) -> tuple[Tensor, Tensor]:
        """Training images and labels drawn by a seed, every second one mirrored if asked for."""
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(self.train[0]), generator=generator)[:n]
        x = normalised(self.train[0][order])
        mirrored = torch.rand(n, generator=generator) < 0.5
        if flip:
            x[mirrored] = x[mirrored].flip(-1)
        return x, self.train[1][order]


def normalised(images: Tensor) -> Tensor:
    return (images / 255 - MEAN) / STD


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    model.eval()
    found = torch.cat([model(normalised(x)).argmax(1) for x in images.split(500)])
    return 100 * float((found == labels).double().mean())


def file_sizes(model: nn.Module, palettized: Palettized) -> dict[str, int]:
    """Bytes of the two files, written and counted."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "m.safetensors")
        return {
            "packed_bytes": palettized.save(path, model),
            "deflated_bytes": palettized.save(path, model, coding="deflated"),
        }


def values_of_weights(model: nn.Module) -> int:
    """Distinct values of the tensors that palettes cluster, each tensor's added up."""
    return sum(int(p.detach().unique().numel()) for p in model.parameters() if p.ndim > 1)


# at once --------------------------------------------------------------------------------------------------------------


def one_shot(bench: Bench) -> None:
    x, y = bench.images(0, 1024, flip=False)
    importance = fisher(bench.dense, zip(x.split(4), y.split(4), strict=True), F.cross_entropy)
    arms: dict[str, dict[str, Any]] = {
        "palette": {},
        "palette, Fisher": {"importance": importance},
        "palette, groups": {"group_size": 8},
    }
    for bits in BITS:
        for name, settings in arms.items():
            if "group_size" in settings and bits > 4:
                continue  # codebooks in fp16 eat up what the groups gain
            model = copy.deepcopy(bench.dense)
            start = time.perf_counter()
            palettized = palettize(model, k=2**bits, **settings)
            bench.row(name, bits, model, palettized, seconds=round(time.perf_counter() - start, 2))
        bench.row("uniform grid", bits, gridded(bench.dense, 2**bits))


@torch.no_grad()
def gridded(dense: nn.Module, k: int) -> nn.Module:
    model = copy.deepcopy(dense)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            low, high = parameter.min(), parameter.max()
            step = (high - low) / (k - 1)
            parameter.copy_(((parameter - low) / step).round() * step + low)
    return model


# in training ----------------------------------------------------------------------------------------------------------


def trained(bench: Bench) -> None:
    for seed in range(bench.args.seeds):
        model, seconds = fine_tuned(bench, seed, None)
        bench.row("dense, trained on", 32, model, seed=seed, seconds=seconds)
        for bits in TRAINED_BITS:
            for mode in ("dkm", "ste"):
                palette = Palette(k=2**bits, mode=mode)
                model, seconds = fine_tuned(bench, seed, palette)
                bench.row(mode, bits, model, palette.convert(), seed=seed, seconds=seconds)


def fine_tuned(bench: Bench, seed: int, palette: Palette | None) -> tuple[nn.Module, float]:
    """The same batches, steps and schedule for every arm of a seed."""
    args, model = bench.args, copy.deepcopy(bench.dense)
    x, y = bench.images(seed, args.steps * args.batch, flip=True)
    start = time.perf_counter()
    optimizer = torch.optim.SGD(model.parameters(), lr=args.lr, momentum=0.9)
    if palette is not None:
        palette.attach(model, optimizer, total_steps=args.steps)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.steps)
    model.train()
    for xs, ys in zip(x.split(args.batch), y.split(args.batch), strict=True):
        optimizer.zero_grad()
        F.cross_entropy(model(xs), ys).backward()
        optimizer.step()
        schedule.step()
        if palette is not None:
            palette.step()
    return model, round(time.perf_counter() - start, 1)


# peers ----------------------------------------------------------------------------------------------------------------


def peers(bench: Bench) -> dict[str, str]:
    """Run what the given interpreters have; say of every peer with which version it ran, or that it is absent."""
    found: dict[str, str] = {}
    for python in bench.args.peer_python:
        for name, jobs in PEER_JOBS.items():
            code = f"import importlib.metadata as m; print(m.version({name!r}))"
            asked = subprocess.run([python, "-c", code], capture_output=True, text=True)
            if asked.returncode == 0 and name not in found:
                found[name] = asked.stdout.strip()
                run_peer(bench, python, jobs + training_jobs(bench, name))
    for name in PEER_JOBS:
        if name not in found:
            found[name] = "absent: no --peer-python has it"
            print(f"{name}: {found[name]}", flush=True)
    return found


def training_jobs(bench: Bench, name: str) -> list[dict[str, Any]]:
    if name != "coremltools":
        return []
    args = bench.args
    common = {"kind": "coremltools_dkm", "steps": args.steps, "batch": args.batch, "lr": args.lr}
    return [{**common, "bits": bits, "seed": seed} for seed in range(args.seeds) for bits in TRAINED_BITS]


def run_peer(bench: Bench, python: str, jobs: list[dict[str, Any]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        plan = {
            "weights": f"{folder}/weights.safetensors",
            "images": f"{folder}/images.safetensors",
            "out": folder,
            "jobs": jobs,
            "threads": bench.args.threads,
        }
        save_file(bench.dense.state_dict(), plan["weights"])
        save_file(dict(peer_images(bench)), plan["images"])
        Path(folder, "plan.json").write_text(json.dumps(plan))
        script = Path(__file__).with_name("palette_peers.py")
        done = subprocess.run([python, script, f"{folder}/plan.json"], capture_output=True, text=True)
        if done.returncode:
            print(f"{python} failed: {done.stderr.strip().splitlines()[-1]}", flush=True)
            return
        outcomes = json.loads(done.stdout.strip().splitlines()[-1])["done"]
        for number, (job, outcome) in enumerate(zip(jobs, outcomes, strict=True)):
            take(bench, job, outcome, Path(folder, f"{number}.safetensors"))


def peer_images(bench: Bench) -> Iterator[tuple[str, Tensor]]:
    x, y = bench.images(0, 1024, flip=False)
    yield from {"sensitive_x": x, "sensitive_y": y}.items()
    for seed in range(bench.args.seeds):
        x, y = bench.images(seed, bench.args.steps * bench.args.batch, flip=True)
        yield from {f"train_x_{seed}": x, f"train_y_{seed}": y}.items()


def take(bench: Bench, job: dict[str, Any], outcome: dict[str, Any], path: Path) -> None:
    """Measure what a peer made, in the same way as our own."""
    name = job["kind"].replace("_", " ") + (", groups" if job.get("group_size") else "")
    if "error" in outcome:
        bench.rows.append({"name": name, "bits": job["bits"], "error": outcome["error"]})
        print(f"{name} {job['bits']} bits: {outcome['error']}", flush=True)
        return
    model = copy.deepcopy(bench.dense)
    model.load_state_dict(load_file(path), strict=False)
    more: dict[str, Any] = {"seconds": round(outcome["seconds"], 1)}
    if "seed" in job:
        more["seed"] = job["seed"]
    if job["kind"].startswith("torchao"):  # scales beside the codes: more values than a codebook of this width holds
        counted = {"packed_bytes": counted_bytes(model, job["bits"])} if job["kind"] == "torchao_intx" else {}
        bench.row(name, job["bits"], model, **more, **counted)
        return
    again = palettize(model, k=2 ** job["bits"], group_size=job.get("group_size"))
    bench.row(name, job["bits"], model, again, **more)


def counted_bytes(model: nn.Module, bits: int) -> int:
    """The dense file with its weights replaced by packed numbers and a half-precision scale a row."""
    weights = [p for p in model.parameters() if p.ndim > 1]
    packed = sum(math.ceil(p.numel() * bits / 8) + 2 * p.shape[0] for p in weights)
    return size_bytes(model) - 4 * sum(p.numel() for p in weights) + packed


# the run --------------------------------------------------------------------------------------------------------------


def summary(rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Mean and spread over seeds of each arm."""
    out: dict[str, dict[str, Any]] = {}
    for row in rows:
        if "error" not in row:
            out.setdefault(f"{row['name']}, {row['bits']} bits", {"all": []})["all"].append(row)
    for entry in out.values():
        mine = entry.pop("all")
        entry |= {k: mine[0][k] for k in ("unique_values", "packed_bytes", "deflated_bytes") if k in mine[0]}
        found = [r["accuracy"] for r in mine]
        entry |= {"accuracy_mean": round(statistics.mean(found), 2), "runs": len(found)}
        if len(found) > 1:
            entry["accuracy_sd"] = round(statistics.stdev(found), 2)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, default=Path(__file__).parents[2] / "shared" / "data")
    parser.add_argument("--peer-python", action="append", default=[], help="an interpreter that has a peer; repeatable")
    parser.add_argument("--steps", type=int, default=200, help="of the arms in training; 0 leaves them out")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=0.01)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--test", type=int, default=10_000, help="test images")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if args.steps == 0:
        args.seeds = 0
    torch.set_num_threads(args.threads)
    data = load(args.shared / "cifar10-jpeg-train.parquet")
    dense = build("resnet20", data.task)
    load_weights_(dense, args.shared / "cifar10-resnets" / "resnet20.safetensors")
    test = data.test.inputs[: args.test], data.test.targets[: args.test]
    bench = Bench(dense.eval(), test, (data.train.inputs, data.train.targets), args)
    bench.row("dense", 32, dense, packed_bytes=size_bytes(dense))
    one_shot(bench)
    found = peers(bench)
    trained(bench)
    result = {
        "summary": summary(bench.rows),
        "rows": bench.rows,
        "peers": found,
        "parameters": sum(p.numel() for p in dense.parameters()),
        "dense_unique_values": unique_values(dense),
        "settings": {k: getattr(args, k) for k in ("steps", "batch", "lr", "seeds", "test", "threads")},
        "cores": os.cpu_count(),
        "machine": platform.machine(),
        "versions": {
            "python": platform.python_version(),
            "weightfold": wf.__version__,
            **{name: importlib.metadata.version(name) for name in ("torch", "numpy", "safetensors")},
        },
    }
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
