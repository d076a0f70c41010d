"""Seconds and memory to trace a Llama-style network of 7 billion parameters on the meta device; the cost of a layer.

    python benchmarks/trace_scale.py [--layers 2 4 8 16 32] [--profile N]

Every depth runs in a fresh process, so that peak memory and warm-up are its own: the peak is the largest resident set
of that process, and the time is that of `weightfold.trace` alone (building the model and importing are not in it). No
weight is ever allocated. ``--profile N`` prints where the time goes at N layers. The last line is one JSON object;
"seconds" and "peak_gib" in it are those of the deepest network.
"""

from __future__ import annotations

import argparse
import cProfile
import datetime
import json
import os
import platform
import pstats
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

LAYERS = (2, 4, 8, 16, 32)
WIDTHS = {"hidden_size": 4096, "num_attention_heads": 32, "intermediate_size": 11008, "vocab_size": 32000}
N_TOKENS = 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--layers", type=int, nargs="+", default=LAYERS)
    parser.add_argument("--one", type=int, help="measure one depth in this process")
    parser.add_argument("--profile", type=int, metavar="N")
    chosen = parser.parse_args()
    if chosen.profile is not None:
        profile(chosen.profile)
    elif chosen.one is not None:
        print(json.dumps(measure(chosen.one)))
    else:
        report(sorted(chosen.layers))


def report(layers: list[int]) -> None:
    """Measure every depth in its own process and print the table."""
    runs = [in_own_process(n) for n in layers]
    for run in runs:
        print(
            f"{run['layers']:>3} layers: {run['seconds']:6.2f} s ({run['seconds'] / run['layers']:.3f} s per layer), "
            f"peak {run['peak_gib']:.2f} GiB, {run['groups']} groups, {run['parameters'] / 1e9:.2f}e9 parameters"
        )
    print(
        json.dumps(
            {
                "seconds": runs[-1]["seconds"],
                "peak_gib": runs[-1]["peak_gib"],
                "per_layer": {str(r["layers"]): round(r["seconds"] / r["layers"], 4) for r in runs},
                "runs": runs,
                "n_tokens": N_TOKENS,
                **WIDTHS,
                "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
                "n_cores": os.cpu_count(),
                "load_1min": round(os.getloadavg()[0], 2),
                "versions": versions(),
            }
        )
    )


def in_own_process(n_layers: int) -> dict[str, Any]:
    command = [sys.executable, str(Path(__file__)), "--one", str(n_layers)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def build(n_layers: int) -> tuple[Any, Any]:
    """The network and its example on the meta device."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):
        net = LlamaForCausalLM(LlamaConfig(num_hidden_layers=n_layers, use_cache=False, **WIDTHS))
        return net.eval(), torch.zeros(1, N_TOKENS, dtype=torch.long)


def measure(n_layers: int) -> dict[str, Any]:
    import weightfold as wf

    net, tokens = build(n_layers)
    started = time.perf_counter()
    cpu = time.process_time()
    graph = wf.trace(net, tokens)
    seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
    peak_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "layers": n_layers,
        "seconds": round(seconds, 3),
        "cpu_seconds": round(cpu, 3),
        "peak_gib": round(peak_kib / 2**20, 3),
        "groups": len(graph),
        "parameters": sum(p.numel() for p in net.parameters()),
    }


def profile(n_layers: int) -> None:
    """Print where the time of one trace goes."""
    import weightfold as wf

    net, tokens = build(n_layers)
    recorder = cProfile.Profile()
    recorder.runcall(wf.trace, net, tokens)
    for key in ("cumulative", "tottime"):
        pstats.Stats(recorder).sort_stats(key).print_stats(45)


def versions() -> dict[str, str]:
    import torch
    import transformers

    import weightfold

    return {
        "weightfold": weightfold.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "system": platform.system(),
    }


if __name__ == "__main__":
    main()
