"""Speed and memory of refinement and of lumping by a tolerance, on one thread.

    python benchmarks/lump_speed.py --out benchmarks/results/lump_speed_HARDWARE_DATE.json

    refinement    phosphorylation of 5 to 8 sites (forward), H-trees of 14 to 18 levels (backward), sparse random
                  systems (both), a path whose blocks peel off one by one (backward)
    a layer       16,384 units of 784 inputs, a tenth of them near-duplicates, at eps 0.3: seconds, largest memory

Seconds are those of the processor, which other work on the machine prolongs less than those of the clock.
The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.sparse import coo_array
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))

from weightfold.ode.equivalence import backward, forward
from weightfold.ode.system import PolynomialSystem
from weightfold.ode.systems import h_tree, phosphorylation


def sparse_random(n_variables: int, n_monomials: int, seed: int = 0) -> PolynomialSystem:
    """Quadratic monomials in random variables, with coefficients of four kinds."""
    generator = np.random.default_rng(seed)
    equation = generator.integers(0, n_variables, n_monomials)
    factors = generator.integers(0, n_variables, 2 * n_monomials)
    rows = np.repeat(np.arange(n_monomials), 2)
    powers = coo_array((np.ones(2 * n_monomials, np.int32), (rows, factors)), shape=(n_monomials, n_variables))
    coefficient = generator.choice([-1.0, 1.0, 0.5, 2.0], n_monomials)
    return PolynomialSystem.of_arrays([f"x{i}" for i in range(n_variables)], equation, coefficient, powers)


def path(n_variables: int) -> PolynomialSystem:
    """Diffusion along a path that leaks at its ends: what differs there moves inwards by one variable a round."""
    i = np.arange(n_variables)
    equation, column = np.r_[i[1:], i[:-1], i], np.r_[i[:-1], i[1:], i]
    value = np.r_[np.ones(2 * n_variables - 2), np.full(n_variables, -2.0)]
    powers = coo_array((np.ones(len(equation), np.int32), (np.arange(len(equation)), column)))
    powers.resize((len(equation), n_variables))
    return PolynomialSystem.of_arrays([f"x{k}" for k in range(n_variables)], equation, value, powers)


SYSTEMS: tuple[tuple[str, str, Callable[[], PolynomialSystem]], ...] = (
    *((f"phosphorylation, {n} sites", "forward", lambda n=n: phosphorylation(n)) for n in (5, 6, 7, 8)),
    *((f"H-tree, {n} levels", "backward", lambda n=n: h_tree(n)) for n in (14, 16, 18, 19)),
    *((f"random, {m:,} monomials", kind, lambda m=m: sparse_random(m // 4, m)) for m in (10**5, 10**6)
      for kind in ("forward", "backward")),
    *((f"path, {n:,} variables", "backward", lambda n=n: path(n)) for n in (1_000, 10_000)),
)  # fmt: skip


def refinement() -> list[dict[str, Any]]:
    rows = []
    for name, kind, make in SYSTEMS:
        system = make()
        start = time.process_time()
        labels = (forward if kind == "forward" else backward)(system)
        seconds = time.process_time() - start
        row = {"system": name, "kind": kind, "variables": system.n_variables, "monomials": system.n_monomials}
        rows.append({**row, "blocks": int(labels.max()) + 1, "seconds": round(seconds, 3)})
        print(rows[-1], flush=True)
    return rows


def layer(n_units: int = 16_384, n_inputs: int = 784, eps: float = 0.3) -> dict[str, Any]:
    """Lump one wide layer, and say how long it took and how much memory the process held at most."""
    import weightfold as wf
    from weightfold.graph.apply import apply
    from weightfold.methods.base import Moment
    from weightfold.methods.lump import Lump

    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(n_inputs, n_units), nn.ReLU(), nn.Linear(n_units, 10))
    with torch.no_grad():
        copies = torch.randperm(n_units)[: n_units // 10]
        source = torch.randint(0, n_units, (len(copies),))
        net[0].weight[copies] = net[0].weight[source] * 1.5 + 1e-3 * torch.randn(len(copies), n_inputs)
        net[0].bias[copies] = net[0].bias[source] * 1.5
    example = torch.zeros(1, n_inputs)
    graph = wf.trace(net, example)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.process_time()
    [proposal] = Lump(eps=eps).step(Moment(net, graph, 0, 0, {}, example, torch.Generator().manual_seed(0)))
    planned = time.process_time() - start
    apply(net, graph, proposal.edit)
    seconds = time.process_time() - start
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    row = {"units": n_units, "inputs": n_inputs, "eps": eps, "left": proposal.edit.n_after}
    return {**row, "plan_seconds": round(planned, 1), "seconds": round(seconds, 1), "max_gib": round(most / 2**20, 2),
            "before_gib": round(before / 2**20, 2)}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layer", action="store_true", help="the layer alone (run in a process of its own)")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.layer:
        print(json.dumps(layer()))
        return
    rows = refinement()
    done = subprocess.run([sys.executable, __file__, "--layer"], capture_output=True, text=True, check=True)
    wide = json.loads(done.stdout.splitlines()[-1])
    large = [row["seconds"] for row in rows if row["monomials"] >= 10**6]
    result = {
        "worst_seconds_at_1e6_monomials": max(large),
        "layer": wide,
        "rows": rows,
        "threads": 1,
        "cores": os.cpu_count(),
        "machine": platform.machine(),
        "versions": {"numpy": np.__version__, "torch": torch.__version__, "python": platform.python_version()},
    }
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
