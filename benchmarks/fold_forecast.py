"""What the forecast of a fold's final price is fitted to: finished runs, folded at several widths.

    python benchmarks/fold_forecast.py --bed mnist-mlp --seeds 2 [--at 0.06] [--shares 0.5,0.25,0.125] [--scale 1.0]
        [--shared DIR] [--out FILE]

Each run folds once, at `--at` of its steps, to the candidate of one share as `Fold` would plan it (attention heads and
idle branches included), without gate and second look; the price is the dense run's accuracy less the folded one's, same
seed. Noted besides: E (per cent wrong on the probe at the event), R (mean lost energy), p (share of the run that is
over), how the initial weights stand out of noise, how far they have moved, the predicted and the measured change of the
probe loss.
Judged on training samples held out. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))

import beds
from beds import Bed

from weightfold.compressor import Compressor
from weightfold.gate import losses
from weightfold.methods.base import Moment, Proposal
from weightfold.methods.fold import Fold
from weightfold.plan import AnyJob, Decision, ladder
from weightfold.planner import Planner


@dataclass(eq=False)
class Told(Planner):
    """A planner that takes the rung of the ladder nearest to a share, whatever it costs."""

    share: float = 1.0

    def decide(self) -> Decision:
        steps = ladder(self.jobs, self.grid)
        whole = sum(job.group.n_channels for job in self.jobs)
        like = self._priced(min(steps, key=lambda widths: abs(sum(widths.values()) / whole - self.share)))
        for narrower in (self._by_energy, self._without_idle):
            like = self._priced(narrower(like))
        return Decision(like, "as told")


class FoldTo(Fold):
    """`Fold` to one share at one step."""

    name = "fold"

    def __init__(self, share: float, at: float) -> None:
        super().__init__(max_accuracy_loss=100.0, earliest=at, latest=at)
        self.share = share
        self.noted: dict[str, Any] = {}
        self.first: dict[str, Tensor] = {}

    def _planner(self, moment: Moment, jobs: Sequence[AnyJob], started: float) -> Planner:
        self.told = Told(
            moment, self.config, jobs, self._grid(moment), started, self._trained_before, share=self.share
        )  # fmt: skip
        return self.told

    def _by_dial(self, moment: Moment) -> list[Proposal]:
        proposals = super()._by_dial(moment)
        chosen = self.told.weighed[-1]
        self.noted = {
            "p": moment.step / moment.total_steps,
            "E": self.told.trails.error_percent,
            "R": chosen.lost_energy,
            "macs": round(chosen.macs, 4),
            "kept": round(chosen.share, 4),
            "predicted": chosen.predicted,
            "forecast": chosen.price,
            "probe_loss": sum(losses(moment.model, moment.probe, moment.loss)) / len(moment.probe),
        }
        now = dict(moment.model.named_parameters())
        moved = [float((now[name].detach() - p).norm() / p.norm()) for name, p in self.first.items() if p.ndim > 1]
        self.noted["moved"] = median(moved)
        return proposals

    def watch(self, total_steps: int) -> int:
        return 0 * total_steps


@torch.no_grad()
def beyond_noise(model: nn.Module) -> float:
    """Median over weight matrices of the largest singular value over that of equal independent entries, s(√O + √I)."""
    found = []
    for weight in (p.flatten(1).float() for p in model.parameters() if p.ndim > 1 and min(p.flatten(1).shape) >= 8):
        edge = float(weight.square().mean().sqrt()) * sum(n**0.5 for n in weight.shape)
        found.append(float(torch.linalg.matrix_norm(weight, 2)) / edge)
    return median(found)


def run(bed: Bed, seed: int, share: float, at: float) -> dict[str, Any]:
    """Train once; share 1 is the dense run."""
    start = time.process_time()
    model = bed.make(seed).to(bed.device).train()
    optimizer = bed.optimizer(model)
    method = FoldTo(share, at)
    method.first = {name: p.detach().clone() for name, p in model.named_parameters()}
    stands_out = beyond_noise(model)
    compressor = Compressor(
        model, bed.example(), [method], loss=bed.loss, probe=bed.probe(), total_steps=bed.steps, seed=seed,
        keep_undo=False, max_increase=math.inf,
    )  # fmt: skip
    if share < 1:
        compressor.prepare(optimizer)
    measured = None
    for step, (x, y) in enumerate(bed.batches(seed, bed.steps)):
        for group in optimizer.param_groups:
            group["lr"] = beds.rate(beds.PEAK[bed.name], step, bed.steps)
        with bed.autocast():
            loss = bed.loss(model(x), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if share < 1 and (events := compressor.step()):
            measured = events[0].measured
            assert events[0].accepted, events[0].reason
    accuracy = bed.accuracy(model)
    return {
        **method.noted,
        "stands_out": stands_out,
        "measured": measured,
        "accuracy": accuracy,
        "cpu_seconds": time.process_time() - start,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bed", choices=beds.NAMES, default="mnist-mlp")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--at", type=float, default=0.06)
    parser.add_argument("--shares", default="0.5,0.25,0.125")
    parser.add_argument("--scale", type=float, default=1.0, help="share of the usual steps")
    parser.add_argument("--shared", type=Path, default=Path(__file__).parents[2] / "shared" / "data")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    bed = beds.open_bed(args.bed, args.shared, tune=True, scale=args.scale)
    rows = []
    for seed in range(args.first_seed, args.first_seed + args.seeds):
        dense = run(bed, seed, 1.0, args.at)["accuracy"]
        print(f"seed {seed} dense {dense:.2f} %", flush=True)
        for share in map(float, args.shares.split(",")):
            row = {"seed": seed, "share": share, **run(bed, seed, share, args.at), "dense": dense}
            row["price"] = round(dense - row["accuracy"], 3)
            rows.append(row)
            print(json.dumps(row), flush=True)
    result = {
        "bed": args.bed,
        "at": args.at,
        "steps": bed.steps,
        "seeds": args.seeds,
        "rows": rows,
        "date": date.today().isoformat(),
        "torch": torch.__version__,
        "cores": os.cpu_count(),
    }
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
