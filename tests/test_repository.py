"""What the repository holds: no traces of one machine, no large files, modules short enough to read."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MACHINE_PATH = re.compile(r"(?<![\w.~-])/(?:(?:work|root|home)/|tmp/venv\b)")
MAX_BYTES = 2**20
MAY_BE_LARGE = ("benchmarks/results/", "docs/images/")
MAX_LINES = 600


@pytest.fixture(scope="module")
def tracked() -> list[Path]:
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True, text=True).stdout
    files = [ROOT / name for name in listed.split("\0") if name]
    assert len(files) > 10
    return [file for file in files if file.is_file()]


def test_no_text_names_a_path_of_one_machine(tracked: list[Path]) -> None:
    found = [f"{file.relative_to(ROOT)}: {path}" for file in tracked for path in machine_paths(text_of(file))]
    assert not found, "\n".join(found)


def test_no_file_is_large(tracked: list[Path]) -> None:
    large = {
        name: file.stat().st_size
        for file in tracked
        if not (name := file.relative_to(ROOT).as_posix()).startswith(MAY_BE_LARGE) and file.stat().st_size > MAX_BYTES
    }
    assert not large


def test_no_module_of_the_package_is_long() -> None:
    lengths = {
        path.relative_to(ROOT).as_posix(): len(path.read_text(encoding="utf-8").splitlines())
        for path in (ROOT / "weightfold").rglob("*.py")
    }
    assert lengths
    assert not {name: length for name, length in lengths.items() if length > MAX_LINES}


def test_the_search_for_machine_paths_finds_and_spares() -> None:
    top = "/"
    for planted in (f"open('{top}work/data.csv')", f"cd {top}root/x", f"{top}home/ann/x", f"{top}tmp/venv/bin/python"):
        assert machine_paths(planted), planted
    for harmless in ("docs/work/plan.md", "https://example.org/home", "the workshop/rootstock", f"{top}tmp/other"):
        assert not machine_paths(harmless), harmless


def machine_paths(text: str) -> list[str]:
    return [match.group() for match in MACHINE_PATH.finditer(text)]


def text_of(file: Path) -> str:
    """Read a text file, or nothing from one that is not text."""
    data = file.read_bytes()
    try:
        return "" if b"\0" in data else data.decode("utf-8")
    except UnicodeDecodeError:
        return ""
