"""The zoo: semantic hash, families and parents, search, adds a second, and what packing saves.

    python benchmarks/zoo.py [--parts hash,tree,search,adds,pack] [--quick] [--load FILE...] [--packed FILE]
                             [--out FILE]

hash      Six architectures (`zoo_hash`), 20 networks each, float32: pairs of a network and its disguise (permutations,
          scales e^N(0,1), signs, mixtures of linear blocks, shifted logits, then every number times 1 + 6e-8 U(-1, 1)),
          of networks of other seeds, and of a network and itself after one step of training.
tree      Families of digits networks whose parents are known (`zoo_families`), seeds 0 and 1, that `zoo_fit.py` has not
          seen, both architectures, both recipes, every network permuted and rescaled; beside them the baseline on the
          same networks, plain and disguised: raw l2, single linkage at the largest gap, the smallest norm of the true
          family as its root, minimum spanning tree. Confidence: expected calibration error over ten bins.
search    10^6 vectors of 256 numbers, which no one can train: each is an embedding of a real zoo's root (families of
          `zoo_families`) plus noise of the measured covariance of roots, shrunk to e^-1 a family, plus noise of the
          measured covariance within families (4 families of each architecture, recipe mixed). Queries: 100 further
          draws. And 2 10^5 uniform vectors, a hard case.
adds      784-128-10 networks added from state dicts, hash and embedding included, to a new zoo in a temporary folder.
pack      `zoo_pack.rows`, digits; larger networks are in its own results. `bits_per_parameter`: of the worst disguise.

Times are medians on one core (`OMP_NUM_THREADS=1`): of the processor (`time.process_time`), which neighbours do not
stretch, and of the clock; the machine's load is written down beside them. The last line is
one JSON object.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import resource
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))

import zoo_families
import zoo_hash
from zoo_families import Grown

from weightfold.weights.canon import hashes_of
from weightfold.weights.symmetry import Symmetries, symmetries
from weightfold.zoo.find.embed import DIM, described
from weightfold.zoo.find.index import Index
from weightfold.zoo.kin.families import Item, families
from weightfold.zoo.kin.tree import Edge, tree
from weightfold.zoo.store import Zoo

PARTS = ("hash", "tree", "search", "adds", "pack")
SEEDS = 2
Facts = dict[str, Any]


# families and parents -------------------------------------------------------------------------------------------------


def items(grown: list[Grown], found: Symmetries) -> list[Item]:
    """Networks as the zoo sees them, without their history."""
    states = [{n: t.detach() for n, t in g.model.state_dict().items()} for g in grown]
    hashes, _, vectors = described(found, states)
    rows = zip(states, hashes, vectors, strict=True)
    return [Item(f"{i}", f"{i}", "k", v, h, lambda s=s: s, found) for i, (s, h, v) in enumerate(rows)]


def pairs_right(groups: list[list[int]], grown: list[Grown]) -> float:
    """Share of families that are exactly one group."""
    true = {frozenset(i for i, g in enumerate(grown) if g.family == f) for f in {g.family for g in grown}}
    return len(true & {frozenset(g) for g in groups}) / len(true)


def baseline(grown: list[Grown]) -> Facts:
    """Raw l2: single linkage at the largest gap; in the true families minimum spanning tree from the least norm."""
    from scipy.cluster.hierarchy import fcluster, linkage
    from scipy.sparse.csgraph import breadth_first_order, minimum_spanning_tree

    flat = np.stack([torch.cat([t.flatten() for t in g.model.state_dict().values()]).numpy() for g in grown])
    joins = linkage(flat.astype(np.float64), "single")
    gap = int(np.diff(joins[:, 2]).argmax())
    labels = fcluster(joins, (joins[gap, 2] + joins[gap + 1, 2]) / 2, "distance")
    groups = [np.flatnonzero(labels == label).tolist() for label in np.unique(labels)]
    right = total = roots = 0
    for family in sorted({g.family for g in grown}):
        mine = [i for i, g in enumerate(grown) if g.family == family]
        far = np.linalg.norm(flat[mine][:, None] - flat[mine], axis=2)
        root = int(np.linalg.norm(flat[mine], axis=1).argmin())
        _, before = breadth_first_order(minimum_spanning_tree(far), root, directed=False)
        roots += grown[mine[root]].parent is None
        for x, i in enumerate(mine):
            if grown[i].parent is not None:
                total += 1
                right += before[x] >= 0 and mine[before[x]] == grown[i].parent
    n = len({g.family for g in grown})
    return {"families": pairs_right(groups, grown), "parents": right / total, "roots": roots / n}


def calibration(edges: list[tuple[float, bool]]) -> Facts:
    """Expected calibration error, and the share right by confidence."""
    table, error = [], 0.0
    for low in np.arange(0.0, 1.0, 0.1):
        mine = [(c, r) for c, r in edges if low <= c < low + 0.1 or (low > 0.85 and c == 1.0)]
        if mine:
            said, right = (float(np.mean([m[k] for m in mine])) for k in (0, 1))
            error += len(mine) / len(edges) * abs(said - right)
            table.append({"confidence": round(said, 3), "right": round(right, 3), "edges": len(mine)})
    return {"expected_calibration_error": round(error, 4), "bins": table}


def tree_row(kind: str, recipe: str, seed: int) -> tuple[Facts, list[tuple[float, bool]]]:
    """One zoo: what is told of it disguised; and of each edge its confidence and whether it is right."""
    found = symmetries(zoo_families.made(kind, 0), zoo_families.example(kind))
    plain = zoo_families.zoo(kind, recipe, seed)
    grown = zoo_families.disguised(plain, kind, found, seed)
    listed = items(grown, found)
    start = time.process_time()
    groups, told = families(listed), tree(listed)
    seconds = time.process_time() - start
    edges = [e for family in told for e in family.edges]
    right = [(e.confidence, _is_right(e, grown)) for e in edges if e.parent is not None]
    roots = [e for e in edges if e.parent is None]
    row = {
        "kind": kind,
        "recipe": recipe,
        "seed": seed,
        "accuracy": round(float(np.mean([g.accuracy for g in grown])), 4),
        "families": pairs_right(groups, grown),
        "parents": sum(r for _, r in right) / sum(g.parent is not None for g in grown),
        "roots": sum(grown[int(e.child)].parent is None for e in roots) / len(roots),
        "seconds": round(seconds, 2),
        "l2_plain": baseline(plain),
        "l2_disguised": baseline(grown),
    }
    print(json.dumps(row), flush=True)
    return row, right


def part_tree(quick: bool) -> Facts:
    rows, told_edges = [], []
    for seed in range(1 if quick else SEEDS):
        for recipe in reversed(zoo_families.RECIPES):
            for kind in zoo_families.KINDS:
                row, edges = tree_row(kind, recipe, seed)
                rows.append(row)
                told_edges += edges
    mean = {}
    for kind in zoo_families.KINDS:
        for recipe in zoo_families.RECIPES:
            mine = [r for r in rows if r["kind"] == kind and r["recipe"] == recipe]
            mean[f"{kind} {recipe}"] = {
                "parents": round(float(np.mean([r["parents"] for r in mine])), 4),
                "least": round(min(r["parents"] for r in mine), 4),
                "l2_plain": round(float(np.mean([r["l2_plain"]["parents"] for r in mine])), 4),
                "l2_disguised": round(float(np.mean([r["l2_disguised"]["parents"] for r in mine])), 4),
            }
    return {
        "family_accuracy": float(np.mean([r["families"] for r in rows])),
        "parent_accuracy": round(float(np.mean([r["parents"] for r in rows])), 4),
        "parent_accuracy_by_zoo": mean,
        "calibration": calibration(told_edges),
        "tree_rows": rows,
    }


def _is_right(edge: Edge, grown: list[Grown]) -> bool:
    return edge.parent == str(grown[int(edge.child)].parent)


# search ---------------------------------------------------------------------------------------------------------------


def drawn(n: int, generator: np.random.Generator) -> tuple[np.ndarray, float, float]:
    """Vectors around the embeddings of a real zoo; and the mean spread of roots and within families."""
    tables = []
    for kind in zoo_families.KINDS:
        found = symmetries(zoo_families.made(kind, 0), zoo_families.example(kind))
        grown = zoo_families.zoo(kind, "mixed", 0, roots=4)
        vectors = np.stack([item.vector for item in items(grown, found)])  # type: ignore[arg-type]
        roots = {g.family: vectors[i] for i, g in enumerate(grown) if g.parent is None}
        inside = np.stack([vectors[i] - roots[g.family] for i, g in enumerate(grown) if g.parent is not None])
        tables.append((np.stack(list(roots.values())), inside))
    n_families = max(1, n // 100)
    centres = np.zeros((n_families, DIM), np.float32)
    pick = generator.integers(len(tables), size=n_families)
    out = np.zeros((n, DIM), np.float32)
    family = generator.integers(n_families, size=n)
    for number, (roots, inside) in enumerate(tables):
        mine = np.flatnonzero(pick == number)
        spread = roots - roots.mean(0)
        noise = generator.normal(size=(len(mine), len(roots))) @ spread / np.sqrt(len(roots) - 1)
        centres[mine] = roots[generator.integers(len(roots), size=len(mine))] + np.exp(-1) * noise
        ours = np.flatnonzero(pick[family] == number)
        for first in range(0, len(ours), 50_000):
            part = ours[first : first + 50_000]
            mix = generator.normal(size=(len(part), len(inside))).astype(np.float32) / np.sqrt(len(inside))
            out[part] = centres[family[part]] + mix @ inside.astype(np.float32)
    sizes = [np.linalg.norm(t - t.mean(0), axis=1).mean() for t, _ in tables]
    return out, float(np.mean(sizes)), float(np.mean([np.linalg.norm(i, axis=1).mean() for _, i in tables]))


def measured_search(vectors: np.ndarray, queries: np.ndarray) -> Facts:
    start = time.perf_counter()
    index = Index(DIM)
    index.add([str(i) for i in range(len(vectors))], vectors)
    build = time.perf_counter() - start
    squares = np.einsum("nd,nd->n", vectors, vectors)
    took, clock, hits = [], [], 0
    truths = np.concatenate([_truth(vectors, squares, queries[i : i + 10]) for i in range(0, len(queries), 10)])
    for query, true in zip(queries, truths, strict=True):
        start, since = time.process_time(), time.perf_counter()
        found = index.search(query, 10)
        took.append(1e3 * (time.process_time() - start))
        clock.append(1e3 * (time.perf_counter() - since))
        hits += len({str(i) for i in true} & {name for name, _ in found})
    return {
        "vectors": len(vectors),
        "search_ms": round(float(np.median(took)), 3),
        "p95_ms": round(float(np.quantile(took, 0.95)), 3),
        "clock_ms": round(float(np.median(clock)), 3),
        "recall_at_10": round(hits / 10 / len(queries), 4),
        "cells": index.n_cells,
        "probes": index.n_probes,
        "build_s": round(build, 1),
        "index_bytes": index.size_bytes,
    }


def _truth(vectors: np.ndarray, squares: np.ndarray, queries: np.ndarray) -> np.ndarray:
    return np.argpartition(squares - 2 * (queries @ vectors.T), 10, 1)[:, :10]


def part_search(quick: bool) -> Facts:
    generator = np.random.default_rng(0)
    n, n_queries = (200_000, 50) if quick else (1_000_000, 100)
    vectors, between, within = drawn(n + n_queries, generator)
    family = measured_search(vectors[:n], vectors[n:])
    del vectors
    hard = generator.random((n // 5 + 50, DIM), np.float32)
    uniform = measured_search(hard[: n // 5], hard[n // 5 :])
    family |= {"spread_between_roots": round(between, 3), "spread_within_families": round(within, 3)}
    return {
        "search_ms": family["search_ms"],
        "search_recall": family["recall_at_10"],
        "search_rows": {"families": family, "uniform": uniform},
    }


# adds -----------------------------------------------------------------------------------------------------------------


def part_adds(quick: bool) -> Facts:
    n = 100 if quick else 600
    nets: list[dict[str, Tensor]] = []
    for seed in range(n):
        torch.manual_seed(seed)
        nets.append(nn.Sequential(nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 10)).state_dict())
    model = nn.Sequential(nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 10))
    found = symmetries(model, torch.zeros(1, 784))
    start = time.process_time()
    hashes_of(found, nets[:100])
    hashing = time.process_time() - start
    start = time.process_time()
    described(found, nets[:100])
    describing = time.process_time() - start
    rates, clock = [], []
    for _ in range(3):
        with tempfile.TemporaryDirectory() as folder, Zoo.open(Path(folder) / "zoo") as zoo:
            zoo.add(nets[0], name="first", model=model, example=torch.zeros(1, 784))  # traces the architecture
            names = [f"m{i}" for i in range(1, n)]
            start, since = time.process_time(), time.perf_counter()
            cards = zoo.add_many(nets[1:], names=names, model=model, example=torch.zeros(1, 784))
            rates.append((n - 1) / (time.process_time() - start))
            clock.append((n - 1) / (time.perf_counter() - since))
            assert all(card.semantic_hash and card.embedding is not None for card in cards)
    return {
        "adds_per_second": round(float(np.median(rates)), 1),
        "adds_rows": {
            "models": n - 1,
            "rates": [round(r, 1) for r in rates],
            "clock_rates": [round(r, 1) for r in clock],
            "hash_ms": round(10 * hashing, 2),
            "hash_and_embedding_ms": round(10 * describing, 2),
        },
    }


def part_hash(quick: bool) -> Facts:
    return zoo_hash.measured(4 if quick else 20)


def part_pack(quick: bool) -> Facts:
    import zoo_pack

    return packed(zoo_pack.rows(Path(), beds=("digits",), roots=2 if quick else 10))


def packed(found: Facts) -> Facts:
    """What counts of a result of `zoo_pack`, whose own file holds the rest."""
    bits = found["bits_per_parameter"]
    return {"bits_per_parameter": max(bits.values()), "bits_per_parameter_by_disguise": bits}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default=",".join(PARTS), help=f"of {', '.join(PARTS)}")
    parser.add_argument("--quick", action="store_true", help="fewer of everything")
    parser.add_argument("--load", type=Path, nargs="*", default=[], help="results whose other parts are kept")
    parser.add_argument("--packed", type=Path, help="a result of zoo_pack.py, instead of running it")
    parser.add_argument("--out", type=Path, help="write the JSON here too")
    options = parser.parse_args()
    torch.set_num_threads(1)
    parts = [part for part in options.parts.split(",") if part]
    unknown = set(parts) - set(PARTS)
    if unknown:
        parser.error(f"there is no part {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    result: Facts = {"parts": {}}
    for file in options.load:
        loaded = json.loads(file.read_text())
        result |= {**loaded, "parts": {**result["parts"], **loaded.get("parts", {})}}
    if options.packed:
        result |= packed(json.loads(options.packed.read_text()))
    result["machine"] = {
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": importlib.metadata.version("numpy"),
    }
    for part in parts:
        start = time.perf_counter()
        load = os.getloadavg()[0]
        result |= globals()[f"part_{part}"](options.quick)
        took = {
            "seconds": round(time.perf_counter() - start, 1),
            "load": [round(load, 2), round(os.getloadavg()[0], 2)],
        }
        result["parts"][part] = took
        if options.out:
            options.out.write_text(json.dumps(result, indent=1) + "\n")
    result["peak_bytes"] = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
