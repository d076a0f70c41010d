"""Run as a script by test_import.py: import modules one by one and print, as JSON, what each import changed.

    python import_probe.py torch|state ROOT MODULE ...

Other libraries may change the process when they are imported, and that is not ours to answer for. So the `state` probe
first executes the third-party import statements of all modules, as these spell them, and only then takes its snapshot.
"""

from __future__ import annotations

import ast
import contextlib
import importlib
import importlib.util
import io
import json
import logging
import os
import random
import sys
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PACKAGE = "weightfold"


def main(what: str, root: str, *names: str) -> None:
    sys.path[0] = root  # in place of this script's folder
    found = who_imports_torch(names) if what == "torch" else who_changes_state(names)
    print(json.dumps(found))


def who_imports_torch(names: tuple[str, ...]) -> dict[str, list[str]]:
    """Name the first module whose import brings torch along; those after it can no longer be told."""
    for name in names:
        importlib.import_module(name)
        if "torch" in sys.modules:
            return {name: ["torch"]}
    return {}


def who_changes_state(names: tuple[str, ...]) -> dict[str, list[str]]:
    import numpy as np  # noqa: F401
    import torch  # noqa: F401

    for name in names:
        preload(name)
    warnings.simplefilter("error")
    found: dict[str, list[str]] = {}
    for name in names:
        before, output = snapshot(), io.StringIO()
        try:
            with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
                importlib.import_module(name)
            error = {}
        except Exception as caught:
            error = {"error": f"{type(caught).__name__}: {caught}"}
        after = snapshot()
        changed = [key for key in before if before[key] != after[key]]
        if changed or error or output.getvalue():
            found[name] = [*changed, *error, *error.values(), *(["output"] if output.getvalue() else [])]
    return found


def preload(name: str) -> None:
    """Execute the third-party imports at the top level of a module, without the module."""
    path = file_of(name)
    for node in top_level_imports(ast.parse(path.read_text(encoding="utf-8")).body):
        with contextlib.suppress(ImportError):
            exec(compile(ast.Module([node], []), str(path), "exec"), {"__name__": "__preload__"})


def file_of(name: str) -> Path:
    inner = Path(sys.path[0], *name.split("."))
    return inner / "__init__.py" if inner.is_dir() else inner.with_suffix(".py")


def top_level_imports(body: list[ast.stmt]) -> Iterator[ast.Import | ast.ImportFrom]:
    """Yield the imports that run on import and are not the package's own; those under TYPE_CHECKING do not run."""
    for node in body:
        match node:
            case ast.Import(names=names) if not any(name.name.split(".")[0] == PACKAGE for name in names):
                yield node
            case ast.ImportFrom(module=str(module), level=0) if module.split(".")[0] != PACKAGE:
                yield node
            case ast.Try(body=inner) | ast.With(body=inner):
                yield from top_level_imports(inner)
            case ast.If(test=test, body=inner, orelse=other):
                yield from top_level_imports(other if "TYPE_CHECKING" in ast.unparse(test) else [*inner, *other])


def snapshot() -> dict[str, Any]:
    """Take down the state of the process that an import could change, in comparable values."""
    import numpy as np
    import torch

    loggers = {"root": logging.root, **logging.root.manager.loggerDict}
    return {
        "environment": dict(os.environ),
        "working directory": Path.cwd(),
        "import path": list(sys.path),
        "threads": threading.active_count(),
        "exception hook": sys.excepthook,
        "warning filters": list(warnings.filters),
        "log handlers": {
            name: (list(logger.handlers), logger.level, logger.propagate)
            for name, logger in loggers.items()
            if isinstance(logger, logging.Logger) and (logger.handlers or logger.level or not logger.propagate)
        },
        "log threshold": logging.root.manager.disable,
        "numpy settings": (np.geterr(), str(np.get_printoptions())),
        "torch settings": (
            torch.get_default_dtype(),
            torch.get_default_device(),
            torch.get_num_threads(),
            torch.get_num_interop_threads(),
            torch.is_grad_enabled(),
            torch.are_deterministic_algorithms_enabled(),
            torch.get_float32_matmul_precision(),
            torch.backends.cudnn.deterministic,
            torch.backends.cudnn.benchmark,
        ),
        "random state": (random.getstate(), str(np.random.get_state()), torch.get_rng_state().tolist()),  # noqa: NPY002
    }


if __name__ == "__main__":
    main(*sys.argv[1:])
