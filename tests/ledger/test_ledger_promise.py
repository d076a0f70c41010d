"""Promise A (same run, same head) and the promise to open at once (no torch, no numpy)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

RUN = """
import sys
from weightfold.ledger import Ledger
names = {"alpha", "beta", "gamma", "delta", "epsilon", "zeta"}  # a set's order depends on PYTHONHASHSEED
with Ledger.create(sys.argv[1], run={name: len(name) for name in names}) as log:
    for step in range(20):
        facts = {name: {"cost": step / 7, "pair": (step, name)} for name in names}
        log.append("edit", facts, aside={"seconds": float(sys.argv[2]), "order": list(names)})
        log.log_metrics(step, {name: step / 3 for name in names})
    print(log.head, ",".join(names))
"""


def test_the_same_run_has_the_same_head_under_any_hash_seed(tmp_path: Path, run: Callable[..., str]) -> None:
    outputs = [
        run(RUN, tmp_path / f"{seed}.ledger", seconds, PYTHONHASHSEED=seed).split()
        for seed, seconds in (("0", 0.1), ("1", 2.5), ("42", 7.0))
    ]
    assert len({head for head, _ in outputs}) == 1
    assert len({order for _, order in outputs}) > 1, "the hash seeds made no difference: the test shows nothing"


def test_importing_the_ledger_brings_no_heavy_library_along(run: Callable[..., str]) -> None:
    code = "import sys, weightfold.ledger; print(*{name.partition('.')[0] for name in sys.modules})"
    assert not {"torch", "numpy", "pydantic", "scipy"} & set(run(code).split())


def test_an_entry_in_use_imports_no_heavy_library_either(path: Path, run: Callable[..., str]) -> None:
    code = RUN + "log = Ledger.open(sys.argv[1]); log.verify(); log.close(); print('torch' in sys.modules)"
    assert run(code, path, 1.0).split()[-1] == "False"
