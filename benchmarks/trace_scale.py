"""Seconds and memory to trace and to prepare: a language model of 7 billion parameters on `meta`, one of 135 million.

    python benchmarks/trace_scale.py [--layers 2 4 8 16 32] [--real-layers 30] [--profile N]

The 7 billion stand on the meta device: no weight is ever allocated, sizes are checked by tracing cut copies, and the
proof says that it is left out. The 135 million have weights: every edit that `Fold` may make is tried on a copy. Every
network runs in a fresh process, so that peak memory and warm-up are its own. "seconds" is `weightfold.trace`,
"prepare_seconds" all that `Compressor.prepare` does, that trace among it; building and importing are in neither.
``--profile N`` prints where the time of a trace goes at N layers. The last line is one JSON object; "seconds",
"prepare_seconds" and "peak_gib" in it are those of the deepest network on `meta`, "real" those of the other.
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
REAL_LAYERS = 30
WIDTHS = {"hidden_size": 4096, "num_attention_heads": 32, "intermediate_size": 11008, "vocab_size": 32000}
REAL_WIDTHS = {
    "hidden_size": 576, "num_attention_heads": 9, "num_key_value_heads": 3, "intermediate_size": 1536,
    "vocab_size": 49152, "tie_word_embeddings": True,
}  # fmt: skip
N_TOKENS = 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--layers", type=int, nargs="+", default=LAYERS)
    parser.add_argument(
        "--real-layers", type=int, default=REAL_LAYERS, help="depth of the network with weights; 0: none"
    )
    parser.add_argument("--one", type=int, help="measure one depth in this process")
    parser.add_argument("--real", action="store_true", help="with --one: the network with weights")
    parser.add_argument("--profile", type=int, metavar="N")
    chosen = parser.parse_args()
    if chosen.profile is not None:
        profile(chosen.profile)
    elif chosen.one is not None:
        print(json.dumps(measure(chosen.one, real=chosen.real)))
    else:
        report(sorted(chosen.layers), chosen.real_layers)


def report(layers: list[int], real_layers: int) -> None:
    """Measure every depth in its own process and print the table."""
    runs = [in_own_process(n) for n in layers]
    real = in_own_process(real_layers, "--real") if real_layers else None
    for run in [*runs, *([real] if real else [])]:
        print(
            f"{run['layers']:>3} layers, {run['parameters'] / 1e9:.2f}e9 parameters, {run['groups']} groups: "
            f"trace {run['seconds']:6.2f} s ({run['seconds'] / run['layers']:.3f} s a layer), "
            f"prepare {run['prepare_seconds']:6.2f} s, peak {run['peak_gib']:.2f} GiB; {run['proved']}"
        )
    print(
        json.dumps(
            {
                "seconds": runs[-1]["seconds"],
                "prepare_seconds": runs[-1]["prepare_seconds"],
                "prepare_over_trace": [round(r["prepare_seconds"] / r["seconds"], 2) for r in runs],
                "real": real,
                "real_prepare_over_trace": real and round(real["prepare_seconds"] / real["seconds"], 2),
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


def in_own_process(n_layers: int, *options: str) -> dict[str, Any]:
    command = [sys.executable, str(Path(__file__)), "--one", str(n_layers), *options]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def build(n_layers: int, *, real: bool = False) -> tuple[Any, Any]:
    """The network and its example; without storage unless ``real``."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    if real:
        torch.manual_seed(0)
        net = LlamaForCausalLM(LlamaConfig(num_hidden_layers=n_layers, use_cache=False, **REAL_WIDTHS))
        return net.eval(), torch.randint(0, REAL_WIDTHS["vocab_size"], (1, N_TOKENS))
    with torch.device("meta"):
        net = LlamaForCausalLM(LlamaConfig(num_hidden_layers=n_layers, use_cache=False, **WIDTHS))
        return net.eval(), torch.zeros(1, N_TOKENS, dtype=torch.long)


def measure(n_layers: int, *, real: bool = False) -> dict[str, Any]:
    import weightfold as wf
    from weightfold.graph.proof import prepared
    from weightfold.methods.base import touched_groups

    net, tokens = build(n_layers, real=real)
    fold = wf.Fold(keep=0.5)
    started, cpu = time.perf_counter(), time.process_time()
    graph = wf.trace(net, tokens)
    seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - cpu
    graph = prepared(net, tokens, graph=graph, names=touched_groups(graph, [fold]))
    prepare_seconds, prepare_cpu_seconds = time.perf_counter() - started, time.process_time() - cpu
    peak_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "layers": n_layers,
        "seconds": round(seconds, 3),
        "cpu_seconds": round(cpu_seconds, 3),
        "prepare_seconds": round(prepare_seconds, 3),
        "prepare_cpu_seconds": round(prepare_cpu_seconds, 3),
        "proved": str(graph.proved),
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
