"""The rooms of the zoo stand on each other: none imports one above it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import weightfold.zoo

ROOT = Path(weightfold.zoo.__file__).parent
ORDER = ("card", "cache", "distance", "delta", "storage", "find", "exchange", "kin", "store", "forest", "pack")
"""Lowest first."""
ABOVE = {"find/search.py": {"exchange", "store"}, "kin/families.py": {"store"}}
"""What looks above its own room: for the type of a zoo, and inside a function that reads a file of weights."""


def imports_of(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("weightfold.zoo"):
            rest = str(node.module).split(".")[2:]
            yield from rest[:1] or [name.name for name in node.names]


def test_every_room_imports_only_lower_ones() -> None:
    files = [path for path in sorted(ROOT.rglob("*.py")) if path.name != "__init__.py"]
    rooms = {path.relative_to(ROOT).parts[0].removesuffix(".py") for path in files}
    assert rooms == set(ORDER), "a new room is entered in ORDER"
    found = []
    for path in files:
        place = path.relative_to(ROOT)
        room = place.parts[0].removesuffix(".py")
        lower = {*ORDER[: ORDER.index(room) + 1], *ABOVE.get(place.as_posix(), ())}
        found += [f"{place} imports {name}" for name in imports_of(path) if name not in lower]
    assert not found, "\n".join(found)
