"""The wheel: the whole package, and nothing else."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
def test_the_wheel_holds_the_package_and_nothing_else(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "build", "--no-isolation", "--wheel", "--outdir", str(tmp_path), str(ROOT)]
    built = subprocess.run(command, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stdout + built.stderr
    (wheel,) = tmp_path.glob("*.whl")
    inside = set(zipfile.ZipFile(wheel).namelist())

    package = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "weightfold").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert "weightfold/py.typed" in package
    assert not package - inside, "files of the package that the wheel leaves out"
    foreign = {name for name in inside - package if ".dist-info/" not in name}
    assert not foreign, "files in the wheel that are not the package's"
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in inside)
    entry_points = next(name for name in inside if name.endswith(".dist-info/entry_points.txt"))
    assert "weightfold = weightfold.cli.main:main" in zipfile.ZipFile(wheel).read(entry_points).decode()
