"""Folding in mid-training against its controls: six arms, paired by seed, wall clock with everything included.

    python benchmarks/fold_training.py --bed mnist-mlp --seeds 5 [--shared ../shared/data] [--jobs 2] [--out FILE]
        [--max-accuracy-loss 0.2 | --time-goal 0.4] [--tune]

    dense         the whole network, the whole schedule
    ours          `Fold` with one dial
    same time     `Fold`, and the saved time spent on more steps (the schedule is stretched after the event)
    shortened     dense, its whole schedule shortened to the wall clock of ours
    scratch       the final widths from the start, as many steps as the wall clock of ours allows; on minilm-sst2 the
                  pretrained encoder cut by magnitude before the first step
    magnitude     the same event, channels of smallest weights removed, no repair
    random        the same event, a random choice, repaired

Beds are described in `beds.py`. One process a seed, `--threads` threads each; the arms of a seed run one after the
other. FLOPs count two per multiply-accumulate and three passes a training step; what ours spends beside steps is
counted at the dense rate, but for `prepare`, which computes nothing on data. Seconds count everything. The gate looks
but does not refuse (`max_increase` is infinite), so that what is forecast is done. A seed whose event is
refused has no further arms. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import platform
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

import torch
from scipy import stats
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))

import beds
from beds import Bed

from weightfold.compressor import Compressor
from weightfold.gate import losses
from weightfold.graph.apply import apply
from weightfold.history import Event
from weightfold.latency import cut
from weightfold.methods.base import Method, Moment, Proposal
from weightfold.methods.fold import Fold
from weightfold.methods.prune import Prune
from weightfold.plan import SHARES
from weightfold.price import predict, trails
from weightfold.size import macs, parameters

ARMS = ("dense", "ours", "same time", "shortened", "scratch", "magnitude", "random")


@dataclass
class Run:
    """One arm of one seed."""

    accuracy: float
    seconds: float
    cpu_seconds: float
    flops: float
    unique_parameters: int
    steps: int
    widths: dict[str, int] = field(default_factory=dict)
    seconds_a_step: float = 0.0
    overhead: dict[str, float] = field(default_factory=dict)
    event: dict[str, Any] = field(default_factory=dict)


class Spied(Fold):
    """`Fold` that keeps a copy of the network as it was when it decided."""

    name = "fold"

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.moment: Moment | None = None
        self.twin: nn.Module | None = None
        self.seconds = 0.0

    def _by_dial(self, moment: Moment) -> list[Proposal]:
        start = time.perf_counter()
        self.moment, self.twin = moment, copy.deepcopy(moment.model)
        self.statistics = dict(self._since(moment, 2))
        self.seconds = time.perf_counter() - start
        return super()._by_dial(moment)


class Meter:
    """Counts what a run costs, step by step; begins when it is made."""

    def __init__(self, bed: Bed, model: nn.Module) -> None:
        self.bed, self.model = bed, model
        self.start, self.cpu = time.perf_counter(), time.process_time()
        self.unit = macs_a_sample(bed, model)
        self.steps, self.flops = 0, 0.0
        self.ticks: list[float] = []
        self.rate_before = 0.0
        self.event: dict[str, Any] = {}

    def step(self, x: Tensor, seconds: float) -> None:
        """One training step on a batch."""
        self.flops += 6 * self.unit * tokens(self.bed, x)
        self.steps += 1
        self.ticks.append(seconds)

    def folded(self, events: Sequence[Event]) -> bool:
        """Take note of what happened after a step; whether it was the fold."""
        if not events:
            return False
        self.unit = macs_a_sample(self.bed, self.model)
        accepted = [e for e in events if e.accepted]
        if self.event or not accepted or accepted[0].kind == "unfold":
            return False
        self.rate_before = self.flops / max(sum(self.ticks), 1e-9)
        self.event = {"step": self.steps, "measured": accepted[0].measured, "groups": len(accepted)}
        self.ticks.clear()
        return True

    def run(self, compressor: Compressor | None, method: Method | None) -> Run:
        """The account of the finished run; what was done beside steps counts at the rate of dense ones."""
        if self.bed.device.type == "cuda":
            torch.cuda.synchronize()
        seconds, cpu = time.perf_counter() - self.start, time.process_time() - self.cpu
        spy = method.seconds if isinstance(method, Spied) else 0.0
        overhead, widths = {}, {}
        if compressor is not None:
            overhead = dict(compressor.seconds)
            widths = {g.name: g.n_channels for g in compressor.graph}
            self.event["kinds"] = sorted({e.kind for e in compressor.events})
            self.event["refusals"] = [e.reason for e in compressor.events if not e.accepted]
        beside = sum(v for k, v in overhead.items() if k != "prepare")
        return Run(
            self.bed.accuracy(self.model), seconds - spy, cpu - spy, self.flops + beside * self.rate_before,
            parameters(self.model), self.steps, widths, median(self.ticks) if self.ticks else 0.0, overhead, self.event,
        )  # fmt: skip


def train(
    bed: Bed,
    seed: int,
    steps: int,
    model: nn.Module,
    method: Method | None = None,
    *,
    stretch: Callable[[int], int] | None = None,
    max_increase: float = math.inf,
) -> Run:
    """Train one arm.

    Args:
        stretch: new number of steps after the fold, from the step at which it happened.
    """
    model = model.to(bed.device).train()
    meter = Meter(bed, model)
    optimizer = bed.optimizer(model)
    compressor = None
    if method is not None:
        compressor = Compressor(
            model, bed.example(), [method], loss=bed.loss, probe=bed.probe(), total_steps=steps, seed=seed,
            keep_undo=False, max_increase=max_increase,
        )  # fmt: skip
        compressor.prepare(optimizer)
    total, began = steps, time.perf_counter()
    for x, y in bed.batches(seed, 10**9):
        if meter.steps == total:
            break
        for group in optimizer.param_groups:
            group["lr"] = beds.rate(beds.PEAK[bed.name], meter.steps, total)
        with bed.autocast():
            loss = bed.loss(bed_model(compressor, model)(x), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        meter.step(x, time.perf_counter() - began)
        if compressor is not None and meter.folded(compressor.step()) and stretch is not None:
            total = stretch(meter.steps)
        began = time.perf_counter()
    if compressor is not None:
        compressor.convert()
    return meter.run(compressor, method)


def bed_model(compressor: Compressor | None, model: nn.Module) -> nn.Module:
    return model if compressor is None else compressor.network


def macs_a_sample(bed: Bed, model: nn.Module) -> float:
    """Multiply-accumulates a sample; a token, where samples are sentences."""
    example = bed.example()
    return macs(model, example) / (example.numel() if bed.name == "minilm-sst2" else len(example))


def tokens(bed: Bed, x: Tensor) -> int:
    return x.numel() if bed.name == "minilm-sst2" else len(x)


def scratch(bed: Bed, seed: int, widths: Mapping[str, int]) -> nn.Module:
    """A network of the final widths, fresh; of a pretrained one the largest channels."""
    model = bed.make(seed)
    fresh = Compressor(model, bed.example(), [Prune(criterion="magnitude", widths=dict(widths))])
    if bed.name == "minilm-sst2":
        fresh.prepare()
        fresh.once()
        return fresh.convert()
    graph = fresh.prepare()
    model = cut(model, graph, dict(widths))
    torch.manual_seed(seed)
    for module in model.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    return model


def run_seed(bed: Bed, seed: int, dial: Mapping[str, float], arms: tuple[str, ...]) -> dict[str, Any]:
    """All arms of one seed, and what was predicted and measured at the event."""
    warm(bed)
    found: dict[str, Run] = {}
    found["dense"] = train(bed, seed, bed.steps, bed.make(seed))
    fold = Spied(**dial)
    found["ours"] = ours = train(bed, seed, bed.steps, bed.make(seed), fold)
    report: dict[str, Any] = {"plan": plan_of(fold)}
    step = ours.event.get("step")
    if step:
        at, widths = step / bed.steps, ours.widths
        faster = ours.seconds_a_step or 1.0
        if "same time" in arms:
            budget = found["dense"].seconds

            def stretch(done: int) -> int:
                spent = ours.seconds - (bed.steps - step) * faster
                return done + max(bed.steps - done, round((budget - spent) / faster))

            found["same time"] = train(bed, seed, bed.steps, bed.make(seed), Fold(**dial), stretch=stretch)
        if "shortened" in arms:
            steps = max(1, round(bed.steps * ours.seconds / found["dense"].seconds))
            found["shortened"] = train(bed, seed, steps, bed.make(seed))
        if "scratch" in arms:
            small = {n: w for n, w in widths.items() if w < dense_widths(fold)[n]}
            found["scratch"] = train(bed, seed, max(1, round(ours.seconds / faster)), scratch(bed, seed, small))
        small = {n: w for n, w in widths.items() if w < dense_widths(fold)[n]}
        if "magnitude" in arms:
            method: Method = Prune(criterion="magnitude", widths=small, at=at)
            found["magnitude"] = train(bed, seed, bed.steps, bed.make(seed), method)
        if "random" in arms:
            found["random"] = train(bed, seed, bed.steps, bed.make(seed), Fold(choice="random", widths=small, at=at))
    report["events"] = compared(fold)
    return {"seed": seed, **report, "arms": {name: vars(run) for name, run in found.items()}}


def warm(bed: Bed) -> None:
    """A few steps that nobody counts: what the first step of a process costs is nobody's."""
    model = bed.make(0).to(bed.device).train()
    optimizer = bed.optimizer(model)
    for x, y in bed.batches(0, 3):
        with bed.autocast():
            loss = bed.loss(model(x), y)
        loss.backward()
        optimizer.step()


def dense_widths(fold: Spied) -> dict[str, int]:
    assert fold.moment is not None
    return {g.name: g.n_channels for g in fold.moment.graph}


def plan_of(fold: Fold) -> dict[str, Any]:
    decision = fold.decision
    if decision is None:
        return {}
    chosen = None if decision.chosen is None else decision.chosen.to_record()
    return {"why": decision.reason, "chosen": chosen, "ratio": decision.ratio}


def compared(fold: Spied) -> list[list[float]]:
    """Predicted and measured change of the probe loss: each group alone and all together, at every share."""
    moment = fold.moment
    if moment is None or fold.twin is None or moment.loss is None:
        return []
    model = fold.twin
    moment = Moment(
        model, moment.graph, moment.step, moment.total_steps, fold.statistics, moment.example,
        torch.Generator().manual_seed(0), moment.probe, moment.loss,
    )  # fmt: skip
    jobs = fold._jobs(moment, fold.statistics)
    found = trails(model, [j.group for j in jobs], moment.probe[:4], moment.loss)
    base = mean(losses(model, moment.probe, moment.loss))
    pairs = []
    for share in SHARES:
        chosen = [(job, fold._grid(moment).nearest(job.group, share * job.group.n_channels)) for job in jobs]
        sets = [[one] for one in chosen[:: max(1, len(chosen) // 6)]] + ([chosen] if len(chosen) > 1 else [])
        for members in sets:
            members = [(job, width) for job, width in members if width < job.group.n_channels]
            parts = [job.residual(found, width) for job, width in members]
            if not members or any(part is None for part in parts):
                continue
            graph, undos = moment.graph, []
            for job, width in members:
                graph, undo = apply(model, graph, job.edit(job.kept(width)))
                undos.append(undo)
            after = mean(losses(model, moment.probe, moment.loss))
            for undo in reversed(undos):
                undo.restore()
            pairs.append([predict(torch.stack([p for p in parts if p is not None]).sum(0)), after - base])
    return pairs


# all seeds ------------------------------------------------------------------------------------------------------------


def summary(bed: str, dial: Mapping[str, float], seeds: list[dict[str, Any]]) -> dict[str, Any]:
    """Means over seeds, paired differences, and the keys that were asked for."""
    runs = {name: [s["arms"][name] for s in seeds if name in s["arms"]] for name in ARMS}
    arms = {name: arm_summary(found) for name, found in runs.items() if found}
    delta = differences(seeds, "ours", "dense")
    prices = [(s["plan"].get("chosen") or {}).get("forecast_points") for s in seeds]
    known = [price for price in prices if price is not None]
    errors = [-d - price for d, price in zip(delta, prices, strict=True) if price is not None]
    pairs = [pair for s in seeds for pair in s["events"]]
    big = [(p, m) for p, m in pairs if p > 1e-3]
    overheads = [sum(v for k, v in s["arms"]["ours"]["overhead"].items() if k != "prepare") for s in seeds]
    prepares = [s["arms"]["ours"]["overhead"].get("prepare", 0.0) for s in seeds]
    dense = [s["arms"]["dense"]["seconds"] for s in seeds]
    return {
        "bed": bed,
        "dial": dict(dial),
        "seeds": len(seeds),
        "arms": arms,
        "time_saved": round(1 - mean(s["arms"]["ours"]["seconds"] / s["arms"]["dense"]["seconds"] for s in seeds), 4),
        "cpu_time_saved": round(
            1 - mean(s["arms"]["ours"]["cpu_seconds"] / s["arms"]["dense"]["cpu_seconds"] for s in seeds), 4
        ),
        "parameters_saved": round(1 - arms["ours"]["unique_parameters"] / arms["dense"]["unique_parameters"], 4),
        "accuracy_delta": round(mean(delta), 3),
        "accuracy_delta_low95": low95(delta),
        "vs_shortened": paired(seeds, "ours", "shortened"),
        "vs_scratch": paired(seeds, "ours", "scratch"),
        "vs_magnitude": paired(seeds, "ours", "magnitude"),
        "vs_random": paired(seeds, "ours", "random"),
        "same_time_vs_dense": paired(seeds, "same time", "dense"),
        "forecast_points": round(mean(known), 3) if known else None,
        "forecast_error": round(mean(errors), 3) if errors else None,
        "folded_seeds": len(known),
        "overhead_share": round(mean(o / d for o, d in zip(overheads, dense, strict=True)), 4),
        "prepare_share": round(mean(p / d for p, d in zip(prepares, dense, strict=True)), 4),
        "rank_correlation": round(float(stats.spearmanr(*zip(*pairs, strict=True)).statistic), 3) if pairs else None,
        "measured_over_predicted": round(median(m / p for p, m in big), 3) if big else None,
        "by_seed": [{"seed": s["seed"], **{n: run["accuracy"] for n, run in s["arms"].items()}} for s in seeds],
        "plans": [s["plan"] for s in seeds],
    }


def arm_summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    accuracies = [run["accuracy"] for run in runs]
    return {
        "seeds": len(runs),
        "accuracy_mean": round(mean(accuracies), 3),
        "accuracy_sd": round(stdev(accuracies), 3) if len(runs) > 1 else None,
        "seconds_mean": round(mean(run["seconds"] for run in runs), 2),
        "cpu_seconds_mean": round(mean(run["cpu_seconds"] for run in runs), 2),
        "flops": round(mean(run["flops"] for run in runs)),
        "unique_parameters": round(mean(run["unique_parameters"] for run in runs)),
        "steps": round(mean(run["steps"] for run in runs)),
    }


def differences(seeds: list[dict[str, Any]], one: str, other: str) -> list[float]:
    both = [s["arms"] for s in seeds if one in s["arms"] and other in s["arms"]]
    return [arms[one]["accuracy"] - arms[other]["accuracy"] for arms in both]


def paired(seeds: list[dict[str, Any]], one: str, other: str) -> dict[str, Any] | None:
    found = differences(seeds, one, other)
    return {"points": round(mean(found), 3), "low95": low95(found), "seeds": len(found)} if found else None


def low95(values: list[float]) -> float | None:
    """One-sided lower 95 % bound of the mean, Student's t."""
    if len(values) < 2:
        return None
    return round(mean(values) - float(stats.t.ppf(0.95, len(values) - 1)) * stdev(values) / len(values) ** 0.5, 3)


def table(result: dict[str, Any]) -> str:
    lines = [
        f"{result['bed']}, {result['seeds']} seeds",
        f"{'':12}{'accuracy':>16}{'seconds':>10}{'TFLOPs':>10}{'parameters':>12}",
    ]
    for name, arm in result["arms"].items():
        spread = "" if arm["accuracy_sd"] is None else f" ± {arm['accuracy_sd']:.2f}"
        lines.append(
            f"{name:12}{arm['accuracy_mean']:>9.2f}{spread:>7}{arm['seconds_mean']:>10.1f}"
            f"{arm['flops'] / 1e12:>10.2f}{arm['unique_parameters']:>12,}"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bed", choices=beds.NAMES, default="mnist-mlp")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--shared", type=Path, default=Path(__file__).parents[2] / "shared" / "data")
    parser.add_argument("--max-accuracy-loss", type=float)
    parser.add_argument("--time-goal", type=float)
    parser.add_argument("--arms", default=",".join(ARMS))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=1, help="seeds at once")
    parser.add_argument("--scale", type=float, default=1.0, help="share of the usual steps")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--tune", action="store_true", help="judge on training samples held out")
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    dial = {"time_goal": args.time_goal} if args.time_goal else {"max_accuracy_loss": args.max_accuracy_loss or 0.2}
    if args.one is not None:
        warnings.filterwarnings("ignore")
        torch.set_num_threads(args.threads)
        bed = beds.open_bed(args.bed, args.shared, tune=args.tune, scale=args.scale, device=args.device)
        print(json.dumps(run_seed(bed, args.one, dial, tuple(args.arms.split(",")))))
        return
    result = summary(args.bed, dial, all_seeds(args))
    result |= {
        "date": date.today().isoformat(),
        "torch": torch.__version__,
        "threads": args.threads,
        "jobs": args.jobs,
        "cores": os.cpu_count(),
        "machine": platform.machine(),
        "device": args.device,
        "judged_on": "training samples held out" if args.tune else "test set",
    }
    print(table(result))
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


def all_seeds(args: argparse.Namespace) -> list[dict[str, Any]]:
    """One process a seed, `--jobs` at once."""
    command = [sys.executable, __file__, *sys.argv[1:], "--one"]
    env = {**os.environ, "OMP_NUM_THREADS": str(args.threads)}
    seeds = list(range(args.first_seed, args.first_seed + args.seeds))
    found = []
    for at in range(0, len(seeds), args.jobs):
        running = [
            subprocess.Popen([*command, str(seed)], stdout=subprocess.PIPE, text=True, env=env)
            for seed in seeds[at : at + args.jobs]
        ]
        for process in running:
            out, _ = process.communicate()
            if process.returncode:
                raise SystemExit(f"A run failed with exit status {process.returncode}.")
            found.append(json.loads(out.strip().splitlines()[-1]))
            arms = found[-1]["arms"]
            print(f"seed {found[-1]['seed']}:", {k: round(v["accuracy"], 2) for k, v in arms.items()}, flush=True)
    return found


if __name__ == "__main__":
    main()
