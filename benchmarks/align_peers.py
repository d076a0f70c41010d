"""Weight matching beside a rival's own code: Git Re-Basin as the package `rebasin` ports it to PyTorch.

    pip install --no-deps rebasin==0.0.47 torchview graphviz tqdm
    python benchmarks/align_peers.py [--shared ../shared/data] [--beds digits-16,mnist] [--pairs N] [--out FILE]

The parents, their data and the scores are those of `align.py`; both methods see the same two networks in the same
process. Test accuracies half way: `matched` as aligned, `repaired` with our REPAIR on the same 1,024 inputs; `seconds`
are medians over pairs. `sinkhorn-rebasin` is not run: it needs torchvision, which does not import beside the CPU build
of torch. The original Git Re-Basin (JAX) and OTFusion are no packages. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))

import align as beds

from weightfold.weights.align import align
from weightfold.weights.path import between, repair

BEDS = ("digits-16", "digits-32", "digits-64", "digits-512", "mnist", "mnist-512")


def theirs(a: nn.Module, c: nn.Module, example: Tensor) -> nn.Module:
    """The second network in the first one's order, by the rival."""
    from rebasin import PermutationCoordinateDescent  # type: ignore[import-not-found]

    moved = copy.deepcopy(c)
    PermutationCoordinateDescent(a, moved, example).rebasin()
    return moved


def ours(a: nn.Module, c: nn.Module, example: Tensor) -> nn.Module:
    return align(a, c, example, tolerance=1e-3).model


METHODS: dict[str, Callable[[nn.Module, nn.Module, Tensor], nn.Module]] = {"ours": ours, "rebasin": theirs}


def pair(b: beds.Bed, number: int) -> dict[str, dict[str, float]]:
    """Both methods on one pair of parents."""
    a, c = (beds.trained(b.make, b, 2 * number + k) for k in range(2))
    drawn = b.data.batches("train", 256, generator=torch.Generator().manual_seed(number))
    seen = [x for x, _ in beds.first(drawn, beds.SEEN // 256)]
    found = {"parents": {"accuracy": statistics.mean(beds.scored(m, b)[0] for m in (a, c))}}
    found["naive"] = {"matched": beds.scored(between(a, c), b)[0]}
    for name, method in METHODS.items():
        start = time.perf_counter()
        moved = method(a, c, seen[0][:2])
        seconds = time.perf_counter() - start
        half = between(a, moved)
        row = {"seconds": seconds, "matched": beds.scored(half, b)[0]}
        found[name] = row | {"repaired": beds.scored(repair(half, [a, moved], seen), b)[0]}
    return found


def summary(name: str, pairs: list[dict[str, dict[str, float]]]) -> dict[str, Any]:
    """Means over pairs, medians of seconds, and the accuracies of every pair."""
    row: dict[str, Any] = {"net": name, "pairs": len(pairs)}
    for who in pairs[0]:
        row[who] = {
            key: (statistics.median if key == "seconds" else statistics.mean)(p[who][key] for p in pairs)
            for key in pairs[0][who]
        }
    return {**row, "each": pairs}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, default=Path(__file__).parents[2] / "shared" / "data")
    parser.add_argument("--beds", default=",".join(BEDS))
    parser.add_argument("--pairs", type=int, help="pairs of parents of every bed")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    result: dict[str, Any] = {"torch": torch.__version__, "rebasin": "0.0.47", "threads": 1, "rows": []}
    for name in args.beds.split(","):
        b = beds.bed(name, args.shared)
        result["rows"].append(summary(name, [pair(b, number) for number in range(args.pairs or b.pairs)]))
        print({k: v for k, v in result["rows"][-1].items() if k != "each"}, file=sys.stderr, flush=True)
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
