"""One shot at half the MACs: a trained ResNet-20 on CIFAR-10, no labels, no gradients, no fine-tuning.

    python benchmarks/one_shot.py --shared ../shared/data [--images 1024] [--seeds 3] [--share 0.5] [--out FILE]

Every method narrows the inner channels of the nine residual blocks to the same share of multiply-accumulates, and may
use the same unlabelled training images, another draw for each seed. Accuracy is on the full test set, before and after
the running statistics of batch norm are measured anew on the same images. Labels serve the final count alone.

    fold              least squares, one share for all groups
    fold + refit      then each convolution and the head are solved anew, in order, against the dense network
    fold + refit, measured widths
                      widths by what narrowing each block alone does to the outputs (KL to the dense network)
    magnitude, random, wanda
                      channels removed, one share for all groups; "same widths": those of the line above;
                      "+ refit": with the same refit, so that the choice alone differs
    averaging         Ward clusters of the filters, averaged, readers added up (Model Folding)
    Torch-Pruning     its own GroupMagnitudeImportance, the same layers

The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import copy
import importlib.metadata
import json
import os
import platform
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import scipy.cluster.hierarchy as hierarchy
import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))

import weightfold as wf
from weightfold.data import load, load_weights_
from weightfold.graph.apply import apply
from weightfold.graph.edit import Edit, merge
from weightfold.graph.group import ChannelGraph, ChannelGroup
from weightfold.graph.observe import Observer, gather
from weightfold.methods.base import Moment
from weightfold.methods.fold import Fold
from weightfold.methods.prune import Prune
from weightfold.methods.refit import refit
from weightfold.models import build
from weightfold.models.resnet20 import option_a
from weightfold.size import MacModel, macs
from weightfold.widths import Grid, Widths, by_cost, uniform_for_macs

MEAN, STD = (torch.tensor(v)[:, None, None] for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
INNER = "layer*.conv1"
SHARES = (0.75, 0.5, 0.375, 0.25, 0.125)
"""Widths at which each block is measured alone."""
TILTS = (0.0, 3.0, 6.0)
"""How much dearer the last block is than the first: what an early block loses, later refits mend in part."""
BATCH = 128


@dataclass(frozen=True, eq=False)
class Bench:
    """What all methods share: the dense network, its graph, images, and what one seed observed."""

    dense: nn.Module
    graph: ChannelGraph
    macs: MacModel
    example: Tensor
    images: Tensor
    moment: Moment
    share: float

    @property
    def groups(self) -> list[ChannelGroup]:
        return [g for g in self.graph if g.name.startswith("layer") and g.name.endswith("conv1")]

    def edited(self, edits: list[Edit]) -> nn.Module:
        """A copy of the dense network under some edits."""
        model, graph = copy.deepcopy(self.dense), self.graph
        for edit in edits:
            graph, _ = apply(model, graph, edit)
        return model

    def proposed(self, method: Fold | Prune) -> list[Edit]:
        return [proposal.edit for proposal in method.step(self.moment)]

    def uniform(self) -> Widths:
        return uniform_for_macs(self.macs, self.groups, self.share, Grid())


def batches(images: Tensor, size: int = BATCH) -> Iterator[Tensor]:
    """Images (S, 3, H, W) uint8, normalised as the network was trained."""
    return ((batch / 255 - MEAN) / STD for batch in images.split(size))


@torch.no_grad()
def logits(model: nn.Module, images: Tensor) -> Tensor:
    return torch.cat([model.eval()(x) for x in batches(images, 500)])


def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    return 100 * float((logits(model, images).argmax(1) == labels).double().mean())


def divergence(model: nn.Module, images: Tensor, reference: Tensor) -> float:
    """KL from the dense network's predictions, in nats a sample."""
    found = F.log_softmax(logits(model, images), 1)
    return float(F.kl_div(found, F.log_softmax(reference, 1), log_target=True, reduction="batchmean"))


@torch.no_grad()
def renormed(model: nn.Module, images: Tensor) -> nn.Module:
    """A copy whose batch norms have measured their running statistics anew."""
    model = copy.deepcopy(model)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
            module.momentum = None
    model.train()
    for x in batches(images, 256):
        model(x)
    return model.eval()


# refit in order -------------------------------------------------------------------------------------------------------


def each(function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """Run a function batch by batch."""
    return torch.cat([function(*parts) for parts in zip(*(x.split(BATCH) for x in inputs), strict=True)])


def renew_(layer: nn.Module, x: Tensor, wished: Tensor) -> None:
    """Solve a layer anew and put the solution in."""
    new = refit(layer, zip(x.split(BATCH), wished.split(BATCH), strict=True), ridge=1e-3)
    layer.load_state_dict(new)


@torch.no_grad()
def refitted(bench: Bench, edits: list[Edit]) -> nn.Module:
    """Fold, then solve each layer behind a fold anew: block by block, against what the dense network computes there.

    A block's second convolution is asked for what its sum with the shortcut lacks, so it also corrects the stream.
    """
    model: Any = bench.edited(edits)
    dense: Any = bench.dense
    kept = {edit.group: edit.carry for edit in edits}
    stem = lambda x: F.relu(dense.bn1(dense.conv1(x)))  # noqa: E731
    x_dense = x = torch.cat([stem(batch) for batch in batches(bench.images)])
    for path in (f"layer{stage}.{number}" for stage in (1, 2, 3) for number in range(3)):
        teacher, block = dense.get_submodule(path), model.get_submodule(path)
        inner = each(teacher.conv1, x_dense)
        renew_(block.conv1, x, inner[:, kept.get(f"{path}.conv1", slice(None))])
        y_dense = each(lambda x, t=teacher: t.bn2(t.conv2(F.relu(t.bn1(t.conv1(x))))) + shortcut(t, x), x_dense)
        hidden = each(lambda x, b=block: F.relu(b.bn1(b.conv1(x))), x)
        renew_(block.conv2, hidden, before_norm(block.bn2, y_dense - shortcut(block, x)))
        x_dense, x = F.relu(y_dense), each(block, x)
    renew_(model.linear, x.mean((2, 3)), dense.linear(x_dense.mean((2, 3))))
    return model


def shortcut(block: Any, x: Tensor) -> Tensor:
    """What a block adds to its output."""
    if not block.widens:
        return x
    like = x.new_empty(len(x), block.conv2.out_channels, 1, 1)
    return option_a(x, like, block.stride)


def before_norm(norm: nn.BatchNorm2d, y: Tensor) -> Tensor:
    """The input for which a batch norm in evaluation mode gives y."""
    scale = norm.weight / torch.sqrt(norm.running_var + norm.eps)
    return (y - norm.bias[:, None, None]) / scale[:, None, None] + norm.running_mean[:, None, None]


# widths by measurement ------------------------------------------------------------------------------------------------


def measured_costs(bench: Bench) -> dict[str, Callable[[int], float]]:
    """For each group what its folding alone does to the outputs, at any width: measured at a few, linear between."""
    reference = logits(bench.dense, bench.images)
    found = {}
    for group in bench.groups:
        widths = [Grid().nearest(group, s * group.n_channels) for s in SHARES]
        edits = [bench.proposed(Fold(widths={group.name: w}, groups=group.name)) for w in widths]
        costs = [divergence(bench.edited(e), bench.images, reference) for e in edits]
        xs, ys = [0, *widths[::-1], group.n_channels], [4 * costs[-1], *costs[::-1], 0.0]
        found[group.name] = lambda width, xs=xs, ys=ys: float(np.interp(width, xs, ys))
    return found


def measured_widths(bench: Bench) -> list[Widths]:
    """Candidate widths: those by the measured costs, with later blocks ever dearer."""
    costs = measured_costs(bench)
    late = {name: k / (len(costs) - 1) for k, name in enumerate(sorted(costs))}

    def tilted(name: str, tilt: float) -> Callable[[int], float]:
        return lambda width: costs[name](width) * (1 + tilt * late[name])

    tables = [{name: tilted(name, tilt) for name in costs} for tilt in TILTS]
    return [by_cost(bench.macs, bench.groups, table, bench.share, Grid(floor=0.1)) for table in tables]


def fold_measured(bench: Bench) -> tuple[nn.Module, Widths]:
    """Refit at each of the candidate widths; keep what is nearest to the dense network on the same images."""
    reference = logits(bench.dense, bench.images)
    tried = []
    for widths in measured_widths(bench):
        model = refitted(bench, bench.proposed(Fold(widths=widths, groups=INNER)))
        tried.append((divergence(model, bench.images, reference), model, widths))
    _, model, widths = min(tried, key=lambda entry: entry[0])
    return model, widths


# others ---------------------------------------------------------------------------------------------------------------


def averaged(bench: Bench, widths: Widths) -> nn.Module:
    """Ward clusters of filters, averaged; readers added up."""
    edits = []
    for group in bench.groups:
        tree = hierarchy.ward(gather(bench.dense, group, ("write",)).numpy())
        labels = hierarchy.fcluster(tree, widths[group.name], "maxclust")
        edits.append(merge(group, torch.from_numpy(labels.astype(np.int64))))
    return bench.edited(edits)


def torch_pruned(bench: Bench) -> nn.Module:
    """Torch-Pruning with its group importance, on the same layers; the ratio is found by bisection."""
    import torch_pruning as tp

    def pruned(ratio: float) -> nn.Module:
        model = copy.deepcopy(bench.dense)
        own = {model.get_submodule(group.name) for group in bench.groups}
        ignored = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear) and m not in own]
        importance = tp.importance.GroupMagnitudeImportance(p=2)
        pruner = tp.pruner.BasePruner(
            model,
            bench.example,
            importance=importance,
            pruning_ratio=ratio,
            ignored_layers=ignored,
            global_pruning=True,
        )
        pruner.step()
        return model

    low, high = 0.0, 0.95
    for _ in range(9):
        middle = (low + high) / 2
        fits = macs(pruned(middle), bench.example) <= bench.share * bench.macs.total
        low, high = (low, middle) if fits else (middle, high)
    return pruned(high)


def methods(bench: Bench) -> Iterator[tuple[str, nn.Module]]:
    """Every method's network, by name."""
    uniform = bench.uniform()
    plain = bench.proposed(Fold(widths=uniform, groups=INNER))
    yield "fold", bench.edited(plain)
    yield "fold + refit", refitted(bench, plain)
    best, widths = fold_measured(bench)
    yield "fold + refit, measured widths", best
    for criterion in ("magnitude", "random", "wanda"):
        yield criterion, bench.edited(bench.proposed(Prune(criterion=criterion, widths=uniform, groups=INNER)))
        same = bench.proposed(Prune(criterion=criterion, widths=widths, groups=INNER))
        yield f"{criterion}, same widths", bench.edited(same)
        yield f"{criterion} + refit, same widths", refitted(bench, same)
    yield "averaging", averaged(bench, uniform)
    yield "averaging, same widths", averaged(bench, widths)
    yield "Torch-Pruning", torch_pruned(bench)


# the run --------------------------------------------------------------------------------------------------------------


def prepared(dense: nn.Module, graph: ChannelGraph, example: Tensor, images: Tensor, share: float, seed: int) -> Bench:
    with Observer(dense, graph, max_samples_per_batch=None) as observer, torch.no_grad():
        for x in batches(images):
            dense(x)
    generator = torch.Generator().manual_seed(seed)
    moment = Moment(dense, graph, 0, 0, observer.statistics(), example, generator)
    return Bench(dense, graph, MacModel.of(dense, graph, example), example, images, moment, share)


def versions() -> dict[str, str]:
    found = {name: importlib.metadata.version(name) for name in ("torch", "torch-pruning", "scipy", "numpy")}
    return {"python": platform.python_version(), "weightfold": wf.__version__, **found}


def summary(values: Mapping[str, list[dict[str, float]]]) -> dict[str, dict[str, float]]:
    out = {}
    for name, runs in values.items():
        row: dict[str, float] = {"macs_share": round(statistics.mean(r["macs_share"] for r in runs), 4)}
        for key in ("without_bn", "with_bn"):
            found = [r[key] for r in runs]
            row[f"{key}_mean"] = round(statistics.mean(found), 2)
            row[f"{key}_sd"] = round(statistics.stdev(found), 2) if len(found) > 1 else 0.0
        out[name] = row
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, default=Path(__file__).parents[2] / "shared" / "data")
    parser.add_argument("--images", type=int, default=1024)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--share", type=float, default=0.5)
    parser.add_argument("--test", type=int, default=10_000, help="test images")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    warnings.filterwarnings("ignore", category=UserWarning)
    data = load(args.shared / "cifar10-jpeg-train.parquet")
    dense = build("resnet20", data.task)
    load_weights_(dense, args.shared / "cifar10-resnets" / "resnet20.safetensors")
    dense.eval()
    example = data.task.example(1)
    graph = wf.trace(dense, example)
    test, labels = data.test.inputs[: args.test], data.test.targets[: args.test]
    dense_accuracy = accuracy(dense, test, labels)
    print(f"dense {dense_accuracy:.2f}", flush=True)
    values: dict[str, list[dict[str, float]]] = {}
    for seed in range(args.seeds):
        order = torch.randperm(len(data.train), generator=torch.Generator().manual_seed(seed))[: args.images]
        bench = prepared(dense, graph, example, data.train.inputs[order], args.share, seed)
        start = time.perf_counter()
        for name, model in methods(bench):
            row = {
                "macs_share": macs(model, example) / bench.macs.total,
                "seconds": time.perf_counter() - start,
                "without_bn": accuracy(model, test, labels),
                "with_bn": accuracy(renormed(model, bench.images), test, labels),
            }
            values.setdefault(name, []).append(row)
            print(f"seed {seed}  {name:32s}" + "  ".join(f"{k} {v:.3f}" for k, v in row.items()), flush=True)
            start = time.perf_counter()
    result = {
        "accuracy": summary(values),
        "runs": values,
        "dense_accuracy": round(dense_accuracy, 2),
        "seeds": args.seeds,
        "images": args.images,
        "test_images": len(labels),
        "threads": args.threads,
        "cores": os.cpu_count(),
        "machine": platform.machine(),
        "versions": versions(),
    }
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
