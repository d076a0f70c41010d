"""Two processes that train one network."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

Pair = Callable[..., Path]


@pytest.fixture(scope="session")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """Runs a script of this folder in two processes, to the end, and gives the folder that they wrote into."""

    def run(script: str, arguments: Sequence[str] = ()) -> Path:
        folder, here = tmp_path_factory.mktemp("ranks"), Path(__file__).parent
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(here.parents[1])}
        processes = [
            subprocess.Popen(
                [sys.executable, str(here / script), str(rank), str(folder), *arguments],
                env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            )
            for rank in range(2)
        ]  # fmt: skip
        try:
            said = [process.communicate(timeout=180)[0] for process in processes]
        finally:
            for process in processes:
                process.kill()
                process.wait()
        assert [process.returncode for process in processes] == [0, 0], "\n".join(said)
        return folder

    return run
