"""The arrows point one way: every import inside the package goes to a lower layer.

The walk reads the source, so it sees imports inside functions and under `if TYPE_CHECKING` too.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

PACKAGE = "weightfold"
ROOT = Path(__file__).parent.parent / PACKAGE

# Lowest layer first. A part (a module or folder of the package) may import every part of the layers above its line,
# and of its own layer the parts named beside it. A new part is entered here, as low as it can live.
LAYERS: tuple[dict[str, tuple[str, ...]], ...] = (
    {
        "errors": (),
        "config": ("errors",),
        "ledger": ("errors", "config"),
        "artifact": ("errors", "config"),
        "audit": ("errors", "config", "ledger", "artifact"),
    },
    {
        "graph": (),
        "ode": (),
        "stats": ("graph",),
        "models": (),
        "size": ("graph",),
        "widths": ("graph", "size"),
        "kernels": (),
        "blueprint": ("graph",),
        "redundancy": ("graph",),
        "sharing": ("graph", "size"),
        "fingerprint": ("graph",),
        "gate": ("stats",),
        "latency": ("gate", "graph", "stats", "widths"),
        "price": ("gate", "graph", "stats"),
        "forecast": (),
        "collapse": ("graph",),
        "bounds": ("graph", "stats"),
        "lumping": ("graph", "redundancy"),
        "repair": ("graph", "stats"),
        "standin": ("graph", "redundancy", "stats"),
        "folding": ("graph", "price", "redundancy"),
        "heads": ("graph", "price", "redundancy"),
        "plan": ("folding", "forecast", "heads", "latency", "price", "size", "widths"),
        "planner": ("forecast", "gate", "graph", "heads", "latency", "plan", "price", "size", "stats", "widths"),
        "ranks": (),
        "quant": ("blueprint", "gate", "graph", "ranks", "size", "stats"),
        "sharded": (),
        "watching": ("graph", "ranks", "stats"),
        "data": ("models",),
    },
    {
        "methods": (),
        "weights": (),
    },
    {
        "history": (),
        "surgeon": ("history",),
        "engine": ("history", "surgeon"),
        "compressor": ("engine", "history", "surgeon"),
        "replay": ("compressor",),
        "runtime": (),
        "export": ("runtime",),
        "bench": ("runtime", "export"),
        "zoo": ("runtime", "export"),
        "uses": (),
        "training": ("compressor", "replay", "export", "bench"),
        "report": ("compressor", "replay", "export"),
    },
    {
        "integrations": (),
        "cli": (),
        "dashboard": (),
        "__main__": ("cli",),
    },
)
LEVEL = {part: level for level, layer in enumerate(LAYERS) for part in layer}
WHERE = "LAYERS in tests/test_layers.py"


class Import(NamedTuple):
    """One import of something in the package: `target` is what is imported, as path below the package."""

    module: tuple[str, ...]
    target: tuple[str, ...]
    where: str


def test_every_import_goes_to_a_lower_layer() -> None:
    imports = list(imports_of(ROOT))
    assert len(list(modules_of(ROOT))) > 2, f"found no modules to check in {ROOT.name}/"
    assert imports, "found no import between modules: the walk is broken"
    found = violations(ROOT)
    assert not found, "\n".join(found)


def test_the_table_is_sound() -> None:
    assert len(LEVEL) == sum(len(layer) for layer in LAYERS), "a part stands in two layers"
    for layer in LAYERS:
        seen: list[str] = []
        for part, allowed in layer.items():
            assert set(allowed) <= set(seen), f"'{part}' names a part that does not stand before it in its layer"
            seen.append(part)


@pytest.mark.parametrize(
    ("path", "source", "complaint"),
    [
        ("graph/trace.py", "from weightfold.methods.fold import Fold", "graph (layer 1) imports methods (layer 2)"),
        ("graph/trace.py", "def late():\n    import weightfold.compressor", "graph (layer 1) imports compressor"),
        ("size.py", "if TYPE_CHECKING:\n    from .quant import pack", "imports quant"),
        ("ledger/log.py", "from ..artifact import format", "ledger (layer 0) imports artifact (layer 0)"),
        ("config.py", "from weightfold import training", "config (layer 0) imports training (layer 3)"),
        ("cli/main.py", "import importlib\nimportlib.import_module('weightfold.dashboard')", "cli (layer 4) imports"),
        ("methods/fold.py", "from weightfold.methods import lump", "a method imports only methods.base"),
        ("methods/fold.py", "from .lump import Lump", "a method imports only methods.base"),
        ("uses/federated.py", "from weightfold import Compressor", "imports 'Compressor' from the package's face"),
        ("uses/federated.py", "import weightfold", "imports the package's face"),
        ("novelty/thing.py", "X = 1", "'novelty' is in no layer"),
        ("graph/trace.py", "from weightfold.novelty import X", "'novelty' is in no layer"),
    ],
)
def test_a_planted_violation_is_found(tmp_path: Path, path: str, source: str, complaint: str) -> None:
    root = plant(tmp_path, {path: source, "methods/lump.py": "", "methods/base.py": ""})
    found = violations(root)
    assert len(found) == 1
    assert complaint in found[0]
    assert path in found[0]


def test_what_is_allowed_passes(tmp_path: Path) -> None:
    root = plant(
        tmp_path,
        {
            "__init__.py": "def __getattr__(name):\n    from weightfold.compressor import Compressor",
            "size.py": "import os\nfrom weightfold.graph import trace\nfrom weightfold import __version__",
            "graph/trace.py": "from . import rules\nfrom .rules import RULES\nfrom ..errors import GraphError",
            "graph/rules.py": "import torch",
            "methods/__init__.py": "from weightfold.methods import fold",
            "methods/base.py": "",
            "methods/fold.py": "from weightfold.methods.base import Method\nfrom .base import Context",
            "training/loop.py": "from weightfold.export import onnx",
            "cli/main.py": "def main():\n    from weightfold import training",
        },
    )
    assert not violations(root)


def plant(folder: Path, sources: dict[str, str]) -> Path:
    """Write a small package with these modules and return its root."""
    root = folder / PACKAGE
    for path, source in sources.items():
        file = root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(source)
    return root


def violations(root: Path) -> list[str]:
    """Say of every module and import what is wrong with it, sorted by file."""
    unknown = [
        f"{'/'.join(module)}: '{module[0]}' is in no layer; enter it in {WHERE}"
        for module in ((*path.relative_to(root).parts,) for path in modules_of(root))
        if module != ("__init__.py",) and module[0].removesuffix(".py") not in LEVEL
    ]
    found = (f"{item.where}: {reason}" for item in imports_of(root) if (reason := objection(item)))
    return sorted([*unknown, *found])


def objection(item: Import) -> str | None:
    """Say why an import is not allowed, or None."""
    if not item.module or item.module[0] not in LEVEL:
        return None  # the package's lazy face may name anything; an unknown part is reported once, by its file
    source = item.module[0]
    if not item.target:
        return "imports the package's face, which hides what it needs; import from the part itself"
    target = item.target[0]
    if target.startswith("__") and target != "__main__":
        return None
    if target not in LEVEL:
        if target[0].isupper():
            return f"imports '{target}' from the package's face; import it from its own part"
        return f"imports '{target}', and '{target}' is in no layer; enter it in {WHERE}"
    if target == source:
        return _objection_between_methods(item)
    if LEVEL[target] < LEVEL[source] or target in LAYERS[LEVEL[source]][source]:
        return None
    return f"{source} (layer {LEVEL[source]}) imports {target} (layer {LEVEL[target]}); see {WHERE}"


def _objection_between_methods(item: Import) -> str | None:
    between_methods = item.module[0] == "methods" and len(item.module) > 1
    if between_methods and item.target[:2] not in {("methods", "base"), item.module[:2]}:
        return f"a method imports only methods.base of its siblings, not {'.'.join(item.target)}"
    return None


def modules_of(root: Path) -> Iterator[Path]:
    return (path for path in sorted(root.rglob("*.py")) if "__pycache__" not in path.parts)


def imports_of(root: Path) -> Iterator[Import]:
    """Yield every import of the package within it, absolute or relative, at any depth of the source."""
    for path in modules_of(root):
        inner = path.relative_to(root)
        folder = inner.parent.parts
        module = folder if path.stem == "__init__" else (*folder, path.stem)
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), filename=str(inner))):
            for target in _targets(node, folder):
                yield Import(module, target, f"{inner.as_posix()}:{node.lineno}")


def _targets(node: ast.AST, folder: tuple[str, ...]) -> list[tuple[str, ...]]:
    """List what one node imports from the package, as paths below it."""
    match node:
        case ast.Import(names=names):
            dotted = [name.name for name in names]
        case ast.ImportFrom(module=base, names=names, level=0):
            dotted = [f"{base}.{name.name}" for name in names]
        case ast.ImportFrom(module=base, names=names, level=level):
            above = ".".join((PACKAGE, *folder[: len(folder) + 1 - level]))
            dotted = [f"{above}.{base}.{name.name}" if base else f"{above}.{name.name}" for name in names]
        case ast.Call(func=ast.Attribute(attr="import_module") | ast.Name(id="import_module" | "__import__")):
            dotted = [arg.value for arg in node.args[:1] if isinstance(arg, ast.Constant)]
        case _:
            return []
    paths = [tuple(str(name).split(".")) for name in dotted]
    return [path[1:] for path in paths if path[0] == PACKAGE]
