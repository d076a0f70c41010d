"""Self-compression against the dense network on the same schedule, and against the published recipe.

    python benchmarks/self_compress.py --bed lenet-300-100 --target "6.9 kB" --seeds 3 --paper

Beds and their schedules are in `compress_beds.py`. For each seed a dense network is trained, and one that compresses
itself (on the same schedule, unless --steps, --batch or --flat say otherwise); the file is written, read back and
compared bit for bit, and its bytes are those of the file system. `--paper` adds the recipe of Cséfalvay & Imber at the
accuracy that ours has reached (the largest γ that keeps it, by bisection on the first seed, then all seeds with it).
`--variants` adds runs with one part left out, and one with all.

Sizes: `coded_bytes` is the file, entropy-coded; `packed_bytes` the same with codes packed end to end; both with all
side information. `weights_kept` is the share of the original weights that are not zero. Seconds are of the processor.

The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.baselines import paper_self_compression as paper
from benchmarks.compress_beds import NAMES, SHARED, Bed, open_bed, train_dense
from weightfold.artifact import Builder
from weightfold.blueprint import Blueprint
from weightfold.compressor import Compressor
from weightfold.export.packed import load_packed, save_packed
from weightfold.export.source import Source
from weightfold.ledger import Ledger
from weightfold.methods.self_compress import SelfCompress

Row = dict[str, Any]

VARIANTS: dict[str, Mapping[str, Any]] = {
    "all of it": {},
    "bit widths not learned": {"bits_lr": 0.0},
    "nothing is cut out": {"remove": False},
    "cut at the first look": {"dwell": 1},
    "cut after ten looks": {"dwell": 10},
    "no way back": {"regrowth": False},
    "guard batches, 0.02 nats": {"guard": 0.02},
    "late pressure": {"reach": 0.7},
    "coarse steps": {"resolution": 1.0},
    "fine steps": {"resolution": 0.25},
}


def train_compressed(
    bed: Bed, seed: int, steps: int, settings: Mapping[str, Any]
) -> tuple[Source, SelfCompress, float]:
    """A network that compresses itself on the bed's schedule, and the CPU seconds that took."""
    start = time.process_time()
    model = bed.make(seed).train()
    before = Blueprint.of(model)
    optimizer = bed.optimizer(model.parameters())
    method = SelfCompress(**settings)
    folder = tempfile.TemporaryDirectory()
    ledger = Ledger.create(Path(folder.name, "ledger.db"), run={"bed": bed.name, "seed": seed, "steps": steps})
    compressor = Compressor(
        model,
        bed.example(),
        [method],
        loss=bed.loss,
        probe=bed.probe(),
        ledger=ledger,
        total_steps=steps,
        seed=seed,
        keep_undo=False,
    )
    compressor.prepare(optimizer)
    for step, (x, y) in enumerate(bed.batches(seed, steps)):
        for group in optimizer.param_groups:
            group["lr"] = bed.schedule.lr * bed.schedule.rate(step, steps)
        optimizer.zero_grad()
        (bed.loss(model(x), y) + compressor.penalty()).backward()
        optimizer.step()
        compressor.step()
    network = compressor.convert().eval()
    builder = bed.builder if bed.builder.kind == "built-in" else Builder(kind="instance", name=bed.name)
    head = ledger.head
    ledger.close()
    folder.cleanup()
    return Source(network, (), before, builder, head), method, time.process_time() - start


def compressed_row(bed: Bed, seed: int, steps: int, settings: Mapping[str, Any]) -> Row:
    """Train, write the file, read it back, measure what was read."""
    source, method, seconds = train_compressed(bed, seed, steps, settings)
    assert method.result is not None
    coded = method.result.coded
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "net.wfp")
        packed_bytes = save_packed(source, coded, path, coding="packed").total_bytes
        sizes = save_packed(source, coded, path)
        file_bytes = path.stat().st_size
        twin = load_packed(path, None if bed.builder.kind == "built-in" else bed.make(seed))
    for name, value in source.model.state_dict().items():
        assert torch.equal(value, twin.state_dict()[name]), name
    n_live, _ = method.result.n_weights()
    assert abs(method.promised_bytes - file_bytes) <= 0.01 * file_bytes, (method.promised_bytes, file_bytes)
    return {
        "seed": seed,
        "accuracy": bed.accuracy(twin),
        "coded_bytes": file_bytes,
        "header_bytes": sizes.header_bytes,
        "packed_bytes": packed_bytes,
        "promised_bytes": method.promised_bytes,
        "weights_kept": n_live / bed.parameters,
        "parameters_kept": sum(p.numel() for p in twin.parameters()) / bed.parameters,
        "shapes": {n: list(p.shape) for n, p in twin.named_parameters() if p.ndim > 1},
        "bits": {n: round(float(t.bits_R[t.bits_R > 0].mean()), 2) for n, t in coded.items() if t.bits_R.any()},
        "seconds": seconds,
    }


def dense_row(bed: Bed, seed: int, steps: int) -> Row:
    model, seconds = train_dense(bed, seed, steps)
    return {"seed": seed, "accuracy": bed.accuracy(model), "seconds": seconds}


def summary(rows: Sequence[Row]) -> Row:
    """Means, and the deviation of the accuracy over seeds."""
    accuracy = [row["accuracy"] for row in rows]
    out: Row = {
        "seeds": [row["seed"] for row in rows],
        "accuracy_mean": statistics.mean(accuracy),
        "accuracy_sd": statistics.stdev(accuracy) if len(rows) > 1 else None,
    }
    for key in ("packed_bytes", "coded_bytes", "weights_kept", "parameters_kept", "seconds"):
        if all(key in row for row in rows):
            out[key] = statistics.mean(row[key] for row in rows)
    return out


def say(what: str, row: Row) -> None:
    """Tell how far it is."""
    size = (
        f", {row['coded_bytes']:,} bytes, {100 * row['weights_kept']:.1f} % of the weights"
        if "coded_bytes" in row
        else ""
    )
    print(
        f"{what}, seed {row['seed']}: {row['accuracy']:.2f}{size}, {row['seconds']:.0f} s", file=sys.stderr, flush=True
    )


def account(ours: Sequence[Row], dense: Sequence[Row], fp32_bytes: int) -> Row:
    """All seeds together."""
    return {
        **summary(ours),
        "share_of_fp32": statistics.mean(row["coded_bytes"] for row in ours) / fp32_bytes,
        "rows": list(ours),
        "dense_accuracy_mean": statistics.mean(row["accuracy"] for row in dense) if dense else None,
        "dense": list(dense),
    }


def joined(files: Sequence[Path]) -> Row:
    """Results of the same settings on several seeds as one."""
    found = [json.loads(path.read_text()) for path in files]
    assert all(one["settings"] == found[0]["settings"] and one["steps"] == found[0]["steps"] for one in found)
    ours = [row for one in found for row in one["rows"]]
    dense = [row for one in found for row in one["dense"]]
    more = {name: one[name] for one in found for name in ("variants", "paper_recipe") if one.get(name)}
    return {**found[0], **account(ours, dense, found[0]["fp32_bytes"]), **more}


def own_schedule(bed: Bed, args: argparse.Namespace) -> Bed:
    """The bed with the batches, steps and course of the learning rate that were asked for; of the same samples."""
    plan = paper.batched(bed, args.batch).schedule if args.batch else bed.schedule
    changed = {name: value for name in ("steps", "flat") if (value := getattr(args, name)) is not None}
    return replace(bed, schedule=replace(plan, **changed))


def run(args: argparse.Namespace) -> Row:
    dense_bed = open_bed(args.bed, args.shared, tune=args.tune, cache=args.cache)
    bed = own_schedule(dense_bed, args)
    steps = bed.schedule.steps
    settings = {
        name: value
        for name in ("target", "strength", "max_accuracy_loss", "at", "reach")
        if (value := getattr(args, name)) is not None
    }
    dense, ours = [], []
    for seed in range(args.first_seed, args.first_seed + args.seeds):
        if not args.no_dense:
            dense.append(dense_row(dense_bed, seed, args.dense_steps or dense_bed.schedule.steps))
            say("dense", dense[-1])
        ours.append(compressed_row(bed, seed, steps, settings))
        say("ours", ours[-1])
    result: Row = {
        "bed": bed.name,
        "unit": bed.unit,
        "on": "held-out training samples" if args.tune else "test",
        "steps": steps,
        "batch": bed.schedule.batch,
        "flat": bed.schedule.flat,
        "settings": settings,
        "fp32_bytes": bed.fp32_bytes,
        **account(ours, dense, bed.fp32_bytes),
        "paper_recipe": None,
    }
    return result


def with_more(result: Row, args: argparse.Namespace) -> Row:
    """The variants and the published recipe beside a result, if they were asked for."""
    dense_bed = open_bed(args.bed, args.shared, tune=args.tune, cache=args.cache)
    bed = own_schedule(dense_bed, args)
    if args.variants:
        result["variants"] = {"steps": bed.schedule.steps}
        for name, changed in VARIANTS.items():
            settings = {**result["settings"], **changed}
            rows = [compressed_row(bed, seed, bed.schedule.steps, settings) for seed in range(args.variants)]
            for row in rows:
                say(name, row)
            result["variants"][name] = {**summary(rows), "settings": dict(changed)}
    if args.paper:
        result["paper_recipe"] = paper_recipe(dense_bed, args, result)
    return result


def paper_recipe(bed: Bed, args: argparse.Namespace, ours: Row) -> Row:
    """The published recipe at the accuracy that ours has reached: γ found on the first seed."""
    steps = paper.batched(bed, 512 if bed.unit == "%" else bed.schedule.batch).schedule.steps
    search = paper.find(bed, accuracy=ours["accuracy_mean"], steps=steps, seed=0, tries=args.tries)
    found = search[0]
    rows = [found, *(paper.run(bed, found["gamma"], steps, seed) for seed in range(1, args.seeds))]
    for seed, row in enumerate(rows):
        say("paper's recipe", {"seed": seed, **row})
    mean = summary([{"seed": seed, **row} for seed, row in enumerate(rows)])
    return {"gamma": found["gamma"], **mean, "rows": rows, "search": search}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bed", choices=NAMES, default=NAMES[0])
    aim = parser.add_mutually_exclusive_group()
    aim.add_argument("--target", help="bytes of the file, such as '6.9 kB' or '1.5%%'")
    aim.add_argument("--strength", type=float, help="nats a bit")
    aim.add_argument("--max-accuracy-loss", type=float, help="points")
    parser.add_argument("--at", type=float, help="share of the steps at which compression begins")
    parser.add_argument("--reach", type=float, help="share of the steps at which the target is met")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--join", type=Path, nargs="+", help="make one result of such files")
    parser.add_argument("--steps", type=int, help="of the compressed network; the bed's own by default")
    parser.add_argument("--batch", type=int, help="of the compressed network, with as many samples in all")
    parser.add_argument("--flat", type=float, help="share of its steps up to which the learning rate stays")
    parser.add_argument("--dense-steps", type=int, help="of the dense network; the bed's own by default")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--variants", type=int, default=0, help="seeds of runs with one part left out")
    parser.add_argument("--paper", action="store_true", help="add the published recipe")
    parser.add_argument("--tries", type=int, default=5, help="runs that look for the recipe's γ")
    parser.add_argument("--no-dense", action="store_true")
    parser.add_argument("--tune", action="store_true", help="measure on training samples held out")
    parser.add_argument("--shared", type=Path, default=SHARED)
    parser.add_argument("--cache", type=Path, help="folder that keeps decoded images for the next time")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    result = with_more(joined(args.join) if args.join else run(args), args)
    result["machine"] = {
        "cores": os.cpu_count(),
        "threads": args.threads,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
