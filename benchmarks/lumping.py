"""Lumping against its rivals: four public tables, four dynamical systems, four networks, four budgets.

    python benchmarks/lumping.py --seeds 5 --out benchmarks/results/lumping_HARDWARE_DATE.json

Each network is trained, then cut by every method to a share of its parameters (entries of weights that are not zero,
and biases). Stages, on the same 1,024 unlabelled training inputs (or all there are), topped up to 1,536 with jittered
copies:

    none     as the method leaves it
    refit    every layer but the first solved anew, in order, for what the dense network computes there (closed form)
    repair   that, and Gauss-Newton on all weights to the dense network's outputs (of the rivals: magnitude alone)
    tuned    the refit, and 5 epochs on labelled samples

Methods:

    lump               `weightfold.methods.lump` by target with the inputs; its default is stage "repair"
    lump, data-free    the same with standard normal numbers as inputs
    forward lumping    columns within ε (L1), single linkage as ERODE, rows added up; one ε for all layers, by bisection
    backward lumping   rows and biases within ε (L1), complete linkage, rows averaged; one ε for all layers
    magnitude          single weights, the smallest of all layers
    magnitude, units   whole units by |w|, the same share of each layer
    wanda              single weights by |w| |x|, the same share of each row (uses the inputs)
    model folding      Ward clusters of rows, averaged, columns added up
    srinivas-babu      pairs of units by saliency, columns added up
    neuron merging     units of the largest |w| stay, the others are added to the most similar of cosine >= 0.45

The last line is one JSON object. ``worst_gap_at_25``: the largest dense_r2 - r2_mean of "lump" at stage "repair".
"""

from __future__ import annotations

import argparse
import copy
import importlib.metadata
import itertools
import json
import os
import platform
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.cluster.hierarchy import fcluster, linkage, ward
from scipy.spatial.distance import pdist
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))
if __package__:
    from benchmarks.lumping_data import BATCH, DATA, NETS, Regression, r2, trained
else:
    from lumping_data import BATCH, DATA, NETS, Regression, r2, trained

import weightfold as wf
from weightfold.graph.apply import apply
from weightfold.methods.base import Moment
from weightfold.methods.lump import Lump
from weightfold.repair import gauss_newton_, jittered

BUDGETS = (0.75, 0.5, 0.25, 0.1)
STAGES = ("none", "refit", "repair", "tuned")
DEFAULT = ("lump", "repair")
N_INPUTS, N_JITTERED = 1024, 1536
ROUNDS, ITERATIONS, ENOUGH = 10, 30, 1e-5
EPOCHS = 5


@dataclass(frozen=True, eq=False)
class Cut:
    """A cut network, float64.

    Args:
        layers: (W, b) of each layer.
        wish: A of shape (K, C) for each layer: what unit k is asked to give of what the dense layer's units give.
        mask: for single weights: which stay, by layer; None where whole units went.
    """

    layers: list[tuple[Tensor, Tensor]]
    wish: list[Tensor]
    mask: list[Tensor] | None = None

    def size(self) -> int:
        """Parameters that are kept."""
        kept = [w.numel() for w, _ in self.layers] if self.mask is None else [int(m.sum()) for m in self.mask]
        return sum(kept) + sum(len(b) for _, b in self.layers)

    def masks(self) -> list[Tensor]:
        return self.mask or [torch.ones_like(w) for w, _ in self.layers]


@dataclass(frozen=True, eq=False)
class Bench:
    """A trained network as layers, its activation, and unlabelled inputs."""

    model: nn.Sequential
    layers: list[tuple[Tensor, Tensor]]
    act: nn.Module
    x: Tensor
    seed: int

    @property
    def widths(self) -> list[int]:
        return [self.layers[0][0].shape[1], *(len(b) for _, b in self.layers)]

    def full(self) -> int:
        return count(self.widths)

    def pre(self, layers: list[tuple[Tensor, Tensor]]) -> list[Tensor]:
        """Pre-activations of every layer on the inputs."""
        h, out = self.x, []
        for w, b in layers:
            out.append(h @ w.T + b)
            h = self.act(out[-1])
        return out

    def dense_cut(self) -> Cut:
        return Cut(list(self.layers), [torch.eye(len(b), dtype=torch.float64) for _, b in self.layers])

    def module(self, cut: Cut) -> nn.Sequential:
        out: list[nn.Module] = []
        for w, b in cut.layers:
            layer = nn.Linear(w.shape[1], w.shape[0])
            layer.weight.data, layer.bias.data = w.float(), b.float()
            out += [layer, copy.deepcopy(self.act)]
        return nn.Sequential(*out[:-1])


def count(widths: Sequence[int]) -> int:
    return sum(i * o + o for i, o in itertools.pairwise(widths))


def bench_of(model: nn.Sequential, data: Regression, seed: int) -> Bench:
    layers = [(m.weight.detach().double(), m.bias.detach().double()) for m in model if isinstance(m, nn.Linear)]
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randperm(len(data.x), generator=generator)[:N_INPUTS]
    return Bench(model, layers, model[1], jittered(data.x[rows].double(), N_JITTERED, generator), seed)


# whole units ----------------------------------------------------------------------------------------------------------


def uniform(bench: Bench, share: float) -> list[int]:
    """The same share of every hidden layer, as large as the budget allows."""
    widths = bench.widths
    for kept in range(4 * max(widths), 0, -1):
        inner = [max(1, round(kept / (4 * max(widths)) * w)) for w in widths[1:-1]]
        if count([widths[0], *inner, widths[-1]]) <= share * bench.full():
            return inner
    raise ValueError("no width meets the budget")


def kept_units(bench: Bench, keep: list[Tensor]) -> Cut:
    """Keep some units of each hidden layer, drop the others."""
    merges = [torch.eye(len(b), dtype=torch.float64)[k] for (_, b), k in zip(bench.layers[:-1], keep, strict=True)]
    return merged(bench, merges, merges)


def merged(bench: Bench, rows: list[Tensor], columns: list[Tensor]) -> Cut:
    """Mix the rows of each hidden layer by A (K, C), and what reads them by the transpose of (K, C)."""
    layers, wish = [], []
    before = torch.eye(bench.widths[0], dtype=torch.float64)
    last = torch.eye(bench.widths[-1], dtype=torch.float64)
    for (w, b), a, r in zip(bench.layers, [*rows, last], [*columns, last], strict=True):
        layers.append((a @ w @ before.T, a @ b))
        wish.append(a)
        before = r
    return Cut(layers, wish)


def membership(labels: np.ndarray) -> Tensor:
    number = np.unique(labels, return_inverse=True)[1]
    return torch.eye(int(number.max()) + 1, dtype=torch.float64)[torch.from_numpy(number)].T


def averaged(members: list[Tensor]) -> list[Tensor]:
    return [m / m.sum(1, keepdim=True) for m in members]


def magnitude_units(bench: Bench, share: float) -> Cut:
    rows = [torch.cat([w, b[:, None]], 1).norm(dim=1) for w, b in bench.layers[:-1]]
    keep = [torch.argsort(-r, stable=True)[:k].sort().values for r, k in zip(rows, uniform(bench, share), strict=True)]
    return kept_units(bench, keep)


def model_folding(bench: Bench, share: float) -> Cut:
    members = []
    for (w, b), k in zip(bench.layers[:-1], uniform(bench, share), strict=True):
        tree = ward(torch.cat([w, b[:, None]], 1).numpy())
        members.append(membership(fcluster(tree, k, "maxclust")))
    return merged(bench, averaged(members), members)


def srinivas_babu(bench: Bench, share: float) -> Cut:
    """Remove unit j into i where mean(v_j²) |[w_i, b_i] - [w_j, b_j]|² is least, again and again."""
    rows, columns = [], []
    for k, ((w, b), width) in enumerate(zip(bench.layers[:-1], uniform(bench, share), strict=True)):
        own = torch.cat([w, b[:, None]], 1)
        apart = torch.cdist(own, own).square()
        apart.fill_diagonal_(float("inf"))
        out = bench.layers[k + 1][0].clone()
        place = torch.eye(len(b), dtype=torch.float64)
        alive = torch.ones(len(b), dtype=torch.bool)
        for _ in range(len(b) - width):
            cost = out.square().mean(0)[None, :] * apart
            i, j = divmod(int(cost.argmin()), len(b))
            out[:, i] += out[:, j]
            place[i] += place[j]
            apart[j, :] = apart[:, j] = float("inf")
            alive[j] = False
        rows.append(torch.eye(len(b), dtype=torch.float64)[alive])
        columns.append(place[alive])
    return merged(bench, rows, columns)


def neuron_merging(bench: Bench, share: float, threshold: float = 0.45) -> Cut:
    rows, columns = [], []
    for (w, b), width in zip(bench.layers[:-1], uniform(bench, share), strict=True):
        own = torch.cat([w, b[:, None]], 1)
        keep = torch.argsort(-own.abs().sum(1), stable=True)[:width].sort().values
        norm = own.norm(dim=1).clamp_min(1e-12)
        cosine = (own @ own[keep].T) / norm[:, None] / norm[keep]
        best, to = cosine.max(1)
        place = torch.zeros(width, len(b), dtype=torch.float64)
        place[to, torch.arange(len(b))] = torch.where(best >= threshold, norm / norm[keep][to], 0.0)
        place[:, keep] = torch.eye(width, dtype=torch.float64)
        rows.append(torch.eye(len(b), dtype=torch.float64)[keep])
        columns.append(place)
    return merged(bench, rows, columns)


# lumping by one tolerance -------------------------------------------------------------------------------------------


def by_eps(bench: Bench, share: float, cut_at: Callable[[float], Cut]) -> Cut:
    """The smallest ε, found by bisection, that meets the budget."""
    low, high = 0.0, 1.0
    while cut_at(high).size() > share * bench.full():
        high *= 2
    for _ in range(24):
        middle = (low + high) / 2
        low, high = (low, middle) if cut_at(middle).size() <= share * bench.full() else (middle, high)
    return cut_at(high)


def backward_at(bench: Bench, eps: float) -> Cut:
    members: list[Tensor] = []
    before = torch.eye(bench.widths[0], dtype=torch.float64)
    for w, b in bench.layers[:-1]:
        rows = torch.cat([w @ before.T, b[:, None]], 1).numpy()
        members.append(membership(fcluster(linkage(pdist(rows, "cityblock"), "complete"), eps, "distance")))
        before = members[-1]
    return merged(bench, averaged(members), members)


def forward_at(bench: Bench, eps: float) -> Cut:
    members: list[Tensor] = []
    after = torch.eye(bench.widths[-1], dtype=torch.float64)
    for w, _ in reversed(bench.layers[1:]):
        columns = (after @ w).T.numpy()
        members.insert(0, membership(fcluster(linkage(pdist(columns, "cityblock"), "single"), eps, "distance")))
        after = members[0]
    return merged(bench, members, averaged(members))


# single weights -------------------------------------------------------------------------------------------------------


def masked(bench: Bench, mask: list[Tensor]) -> Cut:
    cut = bench.dense_cut()
    return replace(cut, layers=[(w * m, b) for (w, b), m in zip(cut.layers, mask, strict=True)], mask=mask)


def weights_left(bench: Bench, share: float) -> int:
    return int(share * bench.full()) - sum(len(b) for _, b in bench.layers)


def magnitude(bench: Bench, share: float) -> Cut:
    every = torch.cat([w.abs().flatten() for w, _ in bench.layers])
    left = max(weights_left(bench, share), 1)
    least = every.sort(descending=True).values[left - 1]
    return masked(bench, [(w.abs() >= least).double() for w, _ in bench.layers])


def wanda(bench: Bench, share: float) -> Cut:
    kept = weights_left(bench, share) / sum(w.numel() for w, _ in bench.layers)
    h, mask = bench.x, []
    for w, b in bench.layers:
        score = w.abs() * h.square().sum(0).sqrt()
        k = int(kept * w.shape[1])
        chosen = torch.zeros_like(w)
        if k:
            chosen.scatter_(1, score.topk(k, dim=1).indices, 1.0)
        else:  # less than one weight a row: the best of the layer
            chosen.view(-1)[score.flatten().topk(int(kept * w.numel())).indices] = 1.0
        mask.append(chosen)
        h = bench.act(h @ w.T + b)
    return masked(bench, mask)


# ours -----------------------------------------------------------------------------------------------------------------


def lump(bench: Bench, share: float, inputs: Sequence[Tensor]) -> Cut:
    model = copy.deepcopy(bench.model).double()
    example = torch.zeros(1, bench.widths[0], dtype=torch.float64)
    graph = wf.trace(model, example)
    generator = torch.Generator().manual_seed(bench.seed)
    wish = [torch.eye(len(b), dtype=torch.float64) for _, b in bench.layers]
    method = Lump(target=share, inputs=inputs, samples=N_INPUTS)
    for proposal in method.step(Moment(model, graph, 0, 0, {}, example, generator)):
        graph, _ = apply(model, graph, proposal.edit)
        number = [name for name, m in model.named_modules() if isinstance(m, nn.Linear)].index(proposal.edit.group)
        wish[number] = proposal.edit.A
    layers = [(m.weight.detach(), m.bias.detach()) for m in model if isinstance(m, nn.Linear)]
    return Cut(layers, wish)


METHODS: dict[str, Callable[[Bench, float], Cut]] = {
    "lump": lambda bench, share: lump(bench, share, [bench.x]),
    "lump, data-free": lambda bench, share: lump(bench, share, []),
    "forward lumping": lambda bench, share: by_eps(bench, share, lambda eps: forward_at(bench, eps)),
    "backward lumping": lambda bench, share: by_eps(bench, share, lambda eps: backward_at(bench, eps)),
    "magnitude": magnitude,
    "magnitude, units": magnitude_units,
    "wanda": wanda,
    "model folding": model_folding,
    "srinivas-babu": srinivas_babu,
    "neuron merging": neuron_merging,
}
REPAIRED = ("lump", "magnitude")
DATA_FREE_RIVALS = ("magnitude", "magnitude, units", "wanda")


# stages ---------------------------------------------------------------------------------------------------------------


def refit(bench: Bench, cut: Cut, ridge: float = 1e-6) -> Cut:
    """Solve every layer but the first for what the dense network computes there; single weights within their mask."""
    wished = [z @ a.T for z, a in zip(bench.pre(bench.layers), cut.wish, strict=True)]
    layers, h = [cut.layers[0]], bench.act(bench.x @ cut.layers[0][0].T + cut.layers[0][1])
    for (w, b), z, mask in zip(cut.layers[1:], wished[1:], cut.masks()[1:], strict=True):
        mean = h.mean(0)
        rest = z - (h @ w.T + b)
        left = rest.mean(0)
        inner, cross = (h - mean).T @ (h - mean) / len(h), (h - mean).T @ (rest - left) / len(h)
        jitter = ridge * float(inner.diagonal().mean().clamp_min(1e-12))
        if cut.mask is None:
            step = torch.linalg.solve(inner + jitter * torch.eye(len(inner), dtype=torch.float64), cross).T
        else:
            pairs = mask[:, :, None] * mask[:, None, :]
            blocks = pairs * inner + torch.diag_embed(jitter * mask + (1 - mask))
            step = torch.linalg.solve(blocks, cross.T * mask)
        layers.append((w + step, b + left - step @ mean))
        h = bench.act(h @ layers[-1][0].T + layers[-1][1])
    return replace(cut, layers=layers)


def mask_names(cut: Cut) -> dict[str, Tensor]:
    return {} if cut.mask is None else {f"{2 * k}.weight": m for k, m in enumerate(cut.mask)}


def repair(bench: Bench, cut: Cut) -> nn.Sequential:
    model = bench.module(cut)
    masks = mask_names(cut)
    wished = bench.pre(bench.layers)[-1]
    settings: dict[str, Any] = {"rounds": ROUNDS, "iterations": ITERATIONS, "enough": ENOUGH, "dtype": torch.float32}
    gauss_newton_(model, bench.x, wished, masks=masks, **settings)
    return model


def tuned(bench: Bench, cut: Cut, data: Regression) -> nn.Sequential:
    """Five epochs of Adam, learning rate 1e-3 falling to 0, on labelled samples."""
    model = bench.module(cut)
    masks = mask_names(cut)
    batch = BATCH if len(data.x) < 10_000 else 4 * BATCH
    steps = EPOCHS * -(-len(data.x) // batch)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    generator = torch.Generator().manual_seed(bench.seed)
    named = [(p, masks[name].float()) for name, p in model.named_parameters() if name in masks]
    for _ in range(EPOCHS):
        for rows in torch.randperm(len(data.x), generator=generator).split(batch):
            loss = (model(data.x[rows]) - data.y[rows]).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            for parameter, mask in named:
                parameter.data *= mask
    return model


def stages(bench: Bench, name: str, cut: Cut, data: Regression) -> Iterator[tuple[str, float]]:
    if name != "lump":
        yield "none", r2(bench.module(cut), data)
    solved = cut if name == "lump" else refit(bench, cut)
    yield "refit", r2(bench.module(solved), data)
    if name in REPAIRED:
        yield "repair", r2(repair(bench, solved), data)
    yield "tuned", r2(tuned(bench, solved, data), data)


# the run --------------------------------------------------------------------------------------------------------------


def one(data: Regression, net: str, seed: int) -> list[dict[str, Any]]:
    model = trained(data, net, seed)
    bench = bench_of(model, data, seed)
    dense, out = r2(model, data), []
    for share in BUDGETS:
        for name, method in METHODS.items():
            cut = method(bench, share)
            limit = max(share * bench.full(), sum(bench.widths[1:])) + 1
            assert cut.size() <= limit, (name, share, cut.size(), limit)
            for stage, value in stages(bench, name, cut, data):
                key = {"data": data.name, "net": net, "kept": share, "method": name, "stage": stage, "seed": seed}
                out.append({**key, "r2": value, "dense": dense})
    return out


def table(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Means over seeds."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for run in runs:
        groups.setdefault(tuple(run[k] for k in ("data", "net", "kept", "method", "stage")), []).append(run)
    rows = []
    for (data, net, kept, method, stage), mine in groups.items():
        values = [run["r2"] for run in mine]
        row = {"data": data, "net": net, "kept": kept, "method": method, "stage": stage}
        row |= {"r2_mean": round(statistics.mean(values), 5)}
        row |= {"r2_sd": round(statistics.stdev(values), 5) if len(values) > 1 else 0.0}
        rows.append(row | {"dense_r2": round(statistics.mean(run["dense"] for run in mine), 5), "seeds": len(values)})
    return rows


def findings(rows: list[dict[str, Any]], margin: float = 0.002) -> dict[str, Any]:
    """The largest gap at 25 %, and how often the default is ahead, level (within a margin) or behind."""
    at = {tuple(r[k] for k in ("data", "net", "kept", "method", "stage")): r for r in rows}
    cells = sorted({key[:3] for key in at})
    gaps = {c: at[*c, *DEFAULT]["dense_r2"] - at[*c, *DEFAULT]["r2_mean"] for c in cells}
    quarter = {f"{c[0]}, {c[1]}": round(g, 5) for c, g in gaps.items() if c[2] == 0.25}

    def against(own: tuple[str, str], stage: str, rivals: Sequence[str], budgets: Sequence[float]) -> dict[str, Any]:
        counts = {"ahead": 0, "level": 0, "behind": 0}
        worst = ("", 0.0)
        for cell in cells:
            if cell[2] not in budgets:
                continue
            for rival in (r for r in rivals if (*cell, r, stage) in at):
                lead = at[*cell, *own]["r2_mean"] - at[*cell, rival, stage]["r2_mean"]
                counts["ahead" if lead > margin else "behind" if lead < -margin else "level"] += 1
                if lead < worst[1]:
                    worst = (f"{', '.join(map(str, cell))}: {rival}", round(lead, 5))
        return {**counts, "worst": worst[0], "worst_lead": worst[1]}

    rivals = [m for m in METHODS if not m.startswith("lump")]
    own = ("lump, data-free", "none")
    return {
        "worst_gap_at_25": round(max(g for c, g in gaps.items() if c[2] == 0.25), 5) if quarter else None,
        "gap_at_25": quarter,
        "default_against_rivals": {stage: against(DEFAULT, stage, rivals, BUDGETS) for stage in STAGES},
        "data_free_against_magnitude_and_wanda": against(
            own, "none", DATA_FREE_RIVALS, [b for b in BUDGETS if b <= 0.5]
        ),
        "data_free_against_all": against(own, "none", rivals, BUDGETS),
        "margin": margin,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, default=Path(__file__).parents[2] / "shared" / "data" / "uci")
    parser.add_argument("--data", nargs="*", default=list(DATA), choices=list(DATA))
    parser.add_argument("--nets", nargs="*", default=list(NETS), choices=list(NETS))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument(
        "--runs",
        type=Path,
        help="file of single results, one JSON line each: what it holds is not run again, what is run is appended",
    )
    parser.add_argument("--merge", type=Path, nargs="*", help="make the table of such files, and run nothing")
    parser.add_argument("--plots", type=Path, help="folder for one plot per data set (SVG)")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    start = time.perf_counter()
    runs: list[dict[str, Any]] = []
    for path in args.merge or ([args.runs] if args.runs is not None and args.runs.is_file() else []):
        runs += [json.loads(line) for line in path.read_text().splitlines()]
    for seed in range(args.first_seed, args.first_seed + args.seeds) if args.merge is None else ():
        for name in args.data:
            data = DATA[name](args.shared, seed)
            for net in args.nets:
                began = time.perf_counter()
                if any((r["data"], r["net"], r["seed"]) == (name, net, seed) for r in runs):
                    continue
                found = one(data, net, seed)
                runs += found
                own = {r["kept"]: r for r in found if (r["method"], r["stage"]) == DEFAULT}
                leads = "  ".join(f"{k:.2f}: {r['r2']:.4f}" for k, r in own.items())
                print(f"seed {seed} {name:15s}{net:18s}dense {own[0.25]['dense']:.4f}  {leads}", end="  ")
                print(f"{time.perf_counter() - began:.0f} s", flush=True)
                if args.runs:
                    with args.runs.open("a") as file:
                        file.writelines(json.dumps(r) + "\n" for r in found)
    rows = table(runs)
    result = {
        **findings(rows),
        "rows": rows,
        "seeds": len({r["seed"] for r in runs}),
        "inputs": N_INPUTS,
        "seconds": round(time.perf_counter() - start, 1),
        "cores": os.cpu_count(),
        "machine": platform.machine(),
        "versions": {n: importlib.metadata.version(n) for n in ("torch", "scipy", "numpy")} | {"wf": wf.__version__},
    }
    if args.plots:
        write_plots(args.plots, rows)
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


SHOWN = {
    ("lump", "repair"): "lump, repaired (default)",
    ("lump, data-free", "none"): "lump, data-free",
    ("forward lumping", "none"): "forward lumping",
    ("backward lumping", "none"): "backward lumping",
    ("magnitude", "none"): "magnitude",
    ("wanda", "none"): "Wanda",
    ("model folding", "none"): "Model Folding",
    ("srinivas-babu", "none"): "Srinivas-Babu",
}


def write_plots(folder: Path, rows: list[dict[str, Any]]) -> None:
    """One file per data set: R² over the kept share, a panel for each network."""
    from weightfold.report.curves import Curve, panels

    folder.mkdir(parents=True, exist_ok=True)
    for data in dict.fromkeys(r["data"] for r in rows):
        parts = []
        for net in NETS:
            mine = [r for r in rows if r["data"] == data and r["net"] == net]
            curves = []
            for (method, stage), label in SHOWN.items():
                points = [(r["kept"], r["r2_mean"]) for r in mine if (r["method"], r["stage"]) == (method, stage)]
                if points:
                    curves.append(Curve(label, sorted(points)))
            if mine:
                parts.append((net, curves, mine[0]["dense_r2"]))
        (folder / f"{data}.svg").write_text(panels(data, parts, "share of parameters kept", "test R²"))


if __name__ == "__main__":
    main()
