"""A short run of the fuzzer over every format: no crash, no hang, no wrong value, no code of a file."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_damaged_files_of_every_format_are_read_or_refused() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "file_fuzz.py"), "--inputs", "3000", "--seed", "11"],
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )
    result = json.loads(done.stdout.splitlines()[-1])
    assert {kind: result[kind] for kind in ("uncaught", "hangs", "wrong", "executed")} == {
        "uncaught": 0,
        "hangs": 0,
        "wrong": 0,
        "executed": 0,
    }, done.stdout
    assert result["inputs"] == 3000
    assert len(result["formats"]) >= 19
    assert all(one.get("read", 0) + one.get("refused", 0) > 0 for one in result["formats"].values())
