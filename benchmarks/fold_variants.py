"""What helps a fold in mid-training, and what does not: variants of one event, paired by seed.

    python benchmarks/fold_variants.py --bed cifar-vgg-long --seeds 2 [--keep 0.5] [--scale 1.0] [--shared DIR]
        [--out FILE]

All variants end at the same widths (`need`: the same multiply-accumulates) and take the same number of steps; seconds
of processor time tell what they cost.

    dense        no event
    fold         one event at 6 % of the steps
    unbalanced   the same without evening out writers and readers
    late         the same at 25 %
    two          to the square root of the share at 6 %, the rest at 25 %
    many         five events between 4 and 20 %
    attract      near-duplicates are pulled together from 2 % on and merged at 6 %
    rewarm       after the event the learning rate rises from 0 again over 3 % of the steps
    distil       for a fifth of the steps after the event the network before it, averaged over its last steps, is a
                 teacher (weight 0.5, temperature 2)
    magnitude    one event, the largest weights, compensated
    samples      one event, whom to keep chosen by single samples (`fold_choice.py`)
    fisher       the same by the second-order term alone
    return       folded to two thirds of the widths at 6 %; at 20 % removed channels come back (`fold_unshare.py`)
    need         the same, as many multiply-accumulates as those widths have, given to the groups that need them most
    split        folded to two thirds at 6 %; at 20 % channels split in two
    again        folded to two thirds at 6 %; at 20 % unfolded, with what was learned since, and folded anew
    scratch      the final widths from the start

Judged on training samples held out. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import sys
import time
import warnings
from collections.abc import Mapping
from dataclasses import replace
from datetime import date
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))

import beds
from beds import Bed
from fold_choice import BySamples
from fold_training import scratch
from fold_unshare import Reserve, by_need, split_most

from weightfold.compressor import Compressor
from weightfold.folding import Job
from weightfold.graph.observe import SecondMoment
from weightfold.methods.attract import Attract
from weightfold.methods.base import Key, Method, Moment
from weightfold.methods.fold import Fold
from weightfold.size import MacModel

EVENT, GROW, LATE = 0.06, 0.2, 0.25
LOOK = 8
"""Steps of statistics before an event."""

UNSHARED = ("return", "need", "split", "again")


class Unbalanced(Fold):
    """`Fold` whose readers keep all of the weight that they take over."""

    name = "fold"

    def _jobs(self, moment: Moment, statistics: Mapping[Key, SecondMoment]) -> list[Job]:
        return [replace(job, balance=False) for job in super()._jobs(moment, statistics)]


def methods_of(variant: str, keep: float) -> list[Method]:
    """The events of a variant."""
    one = {"align": 8, "stats_batches": LOOK}
    if variant in ("fold", "rewarm", "distil"):
        return [Fold(keep=keep, at=EVENT, **one)]
    if variant == "unbalanced":
        return [Unbalanced(keep=keep, at=EVENT, **one)]
    if variant == "late":
        return [Fold(keep=keep, at=LATE, **one)]
    if variant == "two":
        return [Fold(keep=math.sqrt(keep), at=EVENT, **one), Fold(keep=math.sqrt(keep), at=LATE, **one)]
    if variant == "many":
        times = (0.04, 0.08, 0.12, 0.16, 0.2)
        return [Fold(keep=keep**0.2, at=at, stats_batches=LOOK, align=2) for at in times]
    if variant == "attract":
        return [Attract(keep=keep, start=0.02, at=EVENT, strength=1.0, align=8)]
    if variant in UNSHARED:
        later = [Fold(keep=keep, at=GROW, **one)] if variant == "again" else []
        return [Fold(keep=keep * 2 / 3, at=EVENT, **one), *later]
    if variant in ("samples", "fisher"):
        return [BySamples(variant == "samples", keep=keep, at=EVENT, **one)]
    if variant == "magnitude":
        return [Fold(keep=keep, at=EVENT, choice="magnitude", **one)]
    return []


class Teacher:
    """The network before the event, averaged over the steps before it."""

    def __init__(self, model: nn.Module, steps: int) -> None:
        self.average = torch.optim.swa_utils.AveragedModel(
            copy.deepcopy(model), multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.95), use_buffers=True
        )
        self.left = steps

    def loss(self, logits: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            target = F.softmax(self.average(x).float() / 2, 1)
        self.left -= 1
        return 2.0 * F.kl_div(F.log_softmax(logits.float() / 2, 1), target, reduction="batchmean")


def run(bed: Bed, seed: int, variant: str, keep: float, widths: dict[str, int]) -> dict[str, Any]:
    """Train one variant."""
    start = time.process_time()
    model = scratch(bed, seed, widths) if variant == "scratch" else bed.make(seed)
    model = model.to(bed.device).train()
    optimizer = bed.optimizer(model)
    methods = methods_of(variant, keep)
    compressor = Compressor(
        model, bed.example(), methods, loss=bed.loss, total_steps=bed.steps, seed=seed, keep_undo=False,
        probe=bed.probe() if variant in ("samples", "fisher") else (), max_increase=math.inf,
    )  # fmt: skip
    if methods:
        compressor.prepare(optimizer)
    first = round(EVENT * bed.steps)
    reserve: Reserve | None = None
    teacher: Teacher | None = None
    for step, (x, y) in enumerate(bed.batches(seed, bed.steps)):
        for group in optimizer.param_groups:
            group["lr"] = beds.rate(beds.PEAK[bed.name], step, bed.steps) * rewarmed(variant, step - first, bed.steps)
        with bed.autocast():
            logits = model(x)
            loss = bed.loss(logits, y) + compressor.penalty()
        if variant == "distil" and teacher is not None and step >= first and teacher.left > 0:
            loss = 0.5 * loss + 0.5 * teacher.loss(logits, x)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if variant == "distil" and first // 2 <= step < first:
            teacher = teacher or Teacher(model, bed.steps // 5)
            teacher.average.update_parameters(model)
        if variant in ("return", "need", "split") and step + 1 == first:
            reserve = Reserve(compressor)
        if variant == "again" and step + 1 == round(GROW * bed.steps) - LOOK:
            compressor.unfold(len(compressor.events))
        if methods:
            compressor.step()
        if reserve is not None and step + 1 == first:
            reserve.close()
        if reserve is not None and step + 1 == round(GROW * bed.steps):
            grow(bed, variant, compressor, reserve, widths)
    seconds = time.process_time() - start
    found = {g.name: g.n_channels for g in compressor.graph} if methods else {}
    if variant in ("return", "split", "again"):
        assert found == widths, f"{variant} ends at {found}, not {widths}"
    return {"accuracy": bed.accuracy(model), "cpu_seconds": seconds, "widths": found}


def grow(bed: Bed, variant: str, compressor: Compressor, reserve: Reserve, widths: dict[str, int]) -> None:
    """Give width back, up to the widths of the plain fold."""
    if variant == "split":
        split_most(compressor, widths, bed.probe(), bed.loss)
        return
    scores = reserve.scores(bed.probe(4), bed.loss)
    if variant == "need":
        dense = MacModel.of(bed.make(0), reserve.graph, bed.example())
        widths = by_need(reserve, scores, dense.at(widths), bed.example())
    reserve.reopen(widths, scores)


def rewarmed(variant: str, since: int, steps: int) -> float:
    span = max(1, round(0.03 * steps))
    return min(1.0, (since + 1) / span) if variant == "rewarm" and since >= 0 else 1.0


VARIANTS = (
    "dense", "fold", "unbalanced", "late", "two", "many", "attract", "rewarm", "distil", "magnitude", "samples",
    "fisher", *UNSHARED, "scratch",
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bed", choices=beds.NAMES, default="cifar-vgg-long")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--keep", type=float, default=0.5)
    parser.add_argument("--scale", type=float, default=1.0, help="share of the usual steps")
    parser.add_argument("--variants", default=",".join(VARIANTS))
    parser.add_argument("--shared", type=Path, default=Path(__file__).parents[2] / "shared" / "data")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    bed = beds.open_bed(args.bed, args.shared, tune=True, scale=args.scale)
    found: dict[str, list[dict[str, Any]]] = {}
    for seed in range(args.seeds):
        widths: dict[str, int] = {}
        for variant in args.variants.split(","):
            result = run(bed, seed, variant, args.keep, widths)
            widths = result["widths"] if variant == "fold" else widths
            found.setdefault(variant, []).append(result)
            print(f"seed {seed} {variant:10}{result['accuracy']:8.2f} %{result['cpu_seconds']:8.1f} s", flush=True)
    result = {
        "bed": args.bed,
        "keep": args.keep,
        "steps": bed.steps,
        "seeds": args.seeds,
        "variants": {name: account(runs, found["dense"]) for name, runs in found.items()},
        "date": date.today().isoformat(),
        "torch": torch.__version__,
    }
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


def account(runs: list[dict[str, Any]], dense: list[dict[str, Any]]) -> dict[str, Any]:
    accuracies = [run["accuracy"] for run in runs]
    return {
        "accuracy_mean": round(mean(accuracies), 3),
        "accuracy_sd": round(stdev(accuracies), 3) if len(runs) > 1 else None,
        "against_dense": round(mean(r["accuracy"] - d["accuracy"] for r, d in zip(runs, dense, strict=True)), 3),
        "cpu_seconds_mean": round(mean(run["cpu_seconds"] for run in runs), 1),
    }


if __name__ == "__main__":
    main()
