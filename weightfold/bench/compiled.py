"""`python -m weightfold.bench.compiled JOB.json`: `torch.compile` in a process of its own, for it may crash it.

The job names PyTorch programs and a batch; they are compiled, run once, and timed in turns.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

from weightfold.bench.timing import Times, interleaved
from weightfold.errors import ExportError


def time_compiled(
    programs: dict[str, Path], inputs: Path, folder: Path, *, threads: int, seconds: float, timeout: float = 300.0
) -> dict[str, Times]:
    """Compile programs in one fresh process and time them in turns.

    Args:
        programs: `.pt2` files by name.
        inputs: a `.npy` with one batch.
        folder: where the job and its result go.
        timeout: seconds for all of it.
    Raises:
        ExportError: the process crashed or took too long; says which.
    """
    job = {
        "programs": {name: str(path) for name, path in programs.items()},
        "inputs": str(inputs),
        "threads": threads,
        "seconds": seconds,
        "out": str(folder / "compiled.json"),
    }
    Path(folder, "job.json").write_text(json.dumps(job), encoding="utf-8")
    command = [sys.executable, "-m", "weightfold.bench.compiled", str(folder / "job.json")]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "TORCHINDUCTOR_CACHE_DIR": str(folder / "cache")}
    try:
        done = subprocess.run(command, capture_output=True, timeout=timeout, check=False, env=environment)
    except subprocess.TimeoutExpired:
        raise ExportError(f"torch.compile took longer than {timeout:g} seconds.") from None
    if done.returncode != 0:
        last = done.stderr.decode(errors="replace").strip().splitlines()[-1:] or ["no message"]
        how = f"signal {-done.returncode}" if done.returncode < 0 else f"exit code {done.returncode}"
        raise ExportError(f"torch.compile failed in its process ({how}): {last[0][:200]}")
    found = json.loads(Path(job["out"]).read_text(encoding="utf-8"))
    return {name: Times(np.array(values)) for name, values in found.items()}


def _main(path: str) -> None:
    import torch

    from weightfold.runtime import load_file

    job: dict[str, Any] = json.loads(Path(path).read_text(encoding="utf-8"))
    torch.set_num_threads(job["threads"])
    values = torch.from_numpy(np.load(job["inputs"]))
    compiled = {name: torch.compile(load_file(file)) for name, file in job["programs"].items()}
    with torch.inference_mode():
        calls = {name: (lambda model=model: model(values)) for name, model in compiled.items()}
        times = interleaved(calls, seconds=job["seconds"])
    Path(job["out"]).write_text(json.dumps({name: one.ms.tolist() for name, one in times.items()}), encoding="utf-8")


if __name__ == "__main__":
    _main(sys.argv[1])
