"""`python -m weightfold.bench.memory FILE INPUT.npy THREADS`: what a file takes of memory in its runtime, as JSON.

Runs in a process of its own: the growth of its resident memory from before the file is loaded until it has run, and
nothing else was loaded there. The growth holds what the runtime itself needs with the first model, too.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

N_RUNS = 5


def resident_bytes() -> int | None:
    """Resident memory of this process; None where the system does not say."""
    status = Path("/proc/self/status")
    if not status.is_file():
        return None
    line = next(line for line in status.read_text().splitlines() if line.startswith("VmRSS"))
    return 1024 * int(line.split()[1])


def measure_bytes(path: Path, inputs: Path, *, threads: int, timeout: float = 120.0) -> int | None:
    """Have a fresh process load a file and run it; None where that fails, or the system does not say.

    Args:
        path: `.onnx`, `.xml` or `.pt2`.
        inputs: a `.npy` with one batch.
    """
    command = [sys.executable, "-m", "weightfold.bench.memory", str(path), str(inputs), str(threads)]
    try:
        done = subprocess.run(command, capture_output=True, timeout=timeout, check=False)
        return json.loads(done.stdout)["bytes"] if done.returncode == 0 else None
    except (subprocess.TimeoutExpired, ValueError, KeyError):
        return None


def _main(path: str, inputs: str, threads: str) -> None:
    from weightfold.runtime import load_file, require

    values: Any = np.load(inputs)
    if path.endswith(".pt2"):
        import torch

        torch.set_num_threads(int(threads))
        values = torch.from_numpy(values)
    else:
        require("onnxruntime" if path.endswith(".onnx") else "openvino")
    before = resident_bytes()
    loaded = load_file(path, threads=int(threads))
    for _ in range(N_RUNS):
        loaded(values)
    after = resident_bytes()
    print(json.dumps({"bytes": None if before is None or after is None else after - before}))


if __name__ == "__main__":
    _main(*sys.argv[1:4])
