"""Importing does nothing: no torch behind the light faces, no process state changed by any module, no output.

Each check runs in a fresh interpreter and reports as JSON: this process has long imported everything.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
PROBE = Path(__file__).parent / "import_probe.py"
WITHOUT_TORCH = tuple(f"weightfold.{part}" for part in ("errors", "config", "ledger", "artifact", "cli"))
PLANTED = (
    ("import os\nos.environ['WEIGHTFOLD_PLANTED'] = '1'", "environment"),
    ("import warnings\nwarnings.filterwarnings('ignore', message='x')", "warning filters"),
    ("import logging\nlogging.getLogger('weightfold').addHandler(logging.StreamHandler())", "log handlers"),
    ("import torch\ntorch.set_default_dtype(torch.float64)", "torch settings"),
    ("import torch\ntorch.use_deterministic_algorithms(True)", "torch settings"),
    ("import torch\ntorch.manual_seed(1)", "random state"),
    ("import numpy\nnumpy.random.rand()", "random state"),
    ("print('hello')", "output"),
    ("import warnings\nwarnings.warn('hello')", "error"),
    ("1 / 0", "error"),
)


def test_the_light_faces_do_not_import_torch() -> None:
    light = [name for name in modules(ROOT) if name == "weightfold" or name.startswith(WITHOUT_TORCH)]
    assert {"weightfold", "weightfold.errors", "weightfold.config"} <= set(light)
    heavy = probe("torch", ROOT, light)
    assert not heavy, f"these import torch: {heavy}"


def test_importing_any_module_changes_nothing() -> None:
    names = modules(ROOT)
    assert len(names) > 2
    changes = probe("state", ROOT, names)
    assert not changes, json.dumps(changes, indent=2)


def test_planted_effects_are_found_and_blamed_on_their_modules(tmp_path: Path) -> None:
    package = tmp_path / "weightfold"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "quiet.py").write_text("import torch\nimport logging\nLOG = logging.getLogger(__name__)\n")
    for n, (source, _) in enumerate(PLANTED):
        (package / f"loud{n}.py").write_text(source)
    changes = probe("state", tmp_path, modules(tmp_path))
    assert set(changes) == {f"weightfold.loud{n}" for n in range(len(PLANTED))}
    for n, (_, changed) in enumerate(PLANTED):
        assert changed in changes[f"weightfold.loud{n}"]
    assert probe("torch", tmp_path, ["weightfold.loud0", "weightfold.quiet"]) == {"weightfold.quiet": ["torch"]}


def modules(root: Path) -> list[str]:
    """List the modules of the package below root, each package before what it holds."""
    inner = [path.relative_to(root).with_suffix("").parts for path in (root / "weightfold").rglob("*.py")]
    return sorted(".".join(parts[:-1] if parts[-1] == "__init__" else parts) for parts in inner)


def probe(what: str, root: Path, names: list[str]) -> dict[str, list[str]]:
    """Import the modules one by one in a fresh interpreter; return what each of them did."""
    done = subprocess.run(
        [sys.executable, str(PROBE), what, str(root), *names],
        capture_output=True,
        text=True,
        check=False,
        cwd=root,
        env={key: value for key, value in os.environ.items() if not key.startswith(("PYTEST", "COV_"))},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1])
