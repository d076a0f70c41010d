"""Remedies of what is wrong with data are tried."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from weightfold.data import load
from weightfold.errors import WeightfoldError

ROWS = [f"{i},{i % 7},{'cat' if i % 2 else 'dog'}" for i in range(60)]
TABLE = "\n".join(["a,b,label", *ROWS])
Data = dict[str, Any]


def _file(name: str, text: str, **options: Any) -> Callable[[Path], Any]:
    """Load a file of some text."""

    def loaded(folder: Path) -> Any:
        (folder / name).write_text(text, encoding="utf-8")
        return load(folder / name, **options)

    return loaded


CASES: dict[str, tuple[Callable[[Path], Any], str, list[Callable[[Path], Any]]]] = {
    "a name that is misspelt": (
        lambda _: load("digit"),
        "Did you mean 'digits'?",
        [lambda _: load("digits", limit=100)],
    ),
    "an ending that is not known": (
        _file("t.xlsx", TABLE),
        "Convert the data to one of these.",
        [_file("t.csv", TABLE)],
    ),
    "an empty table": (_file("t.csv", ""), "at least a few rows", [_file("t.csv", TABLE)]),
    "a header alone": (_file("t.csv", "a,b,label\n"), "at least a few rows", [_file("t.csv", TABLE)]),
    "cells that nothing divides": (
        _file("t.csv", TABLE.replace(",", "|")),
        "commas, semicolons, tabs or blanks",
        [_file("t.csv", TABLE.replace(",", divider)) for divider in (",", ";", "\t", " ")],
    ),
    "a row that is too short": (
        _file("t.csv", TABLE + "\n1,cat"),
        "Correct that row",
        [_file("t.csv", TABLE + "\n1,2,cat")],
    ),
    "a value that is missing": (
        _file("t.csv", TABLE + "\n1,,cat"),
        "leave the column out with drop=",
        [_file("t.csv", TABLE + "\n1,0,cat"), _file("t.csv", TABLE), _file("t.csv", TABLE + "\n1,,cat", drop=("b",))],
    ),
    "a text among numbers": (
        _file("t.csv", TABLE + "\n1,x,cat"),
        "leave the column out with drop=",
        [_file("t.csv", TABLE), _file("t.csv", TABLE + "\n1,x,cat", drop=("b",))],
    ),
    "a target that is not there": (
        _file("t.csv", TABLE, target="labl"),
        "Did you mean 'label'?",
        [_file("t.csv", TABLE, target="label")],
    ),
    "a regression on texts": (
        _file("t.csv", TABLE, output="regression"),
        "target=, or output='classes'",
        [
            _file("t.csv", TABLE, output="regression", target="a", drop=("label",)),
            _file("t.csv", TABLE, output="classes"),
        ],
    ),
    "all columns dropped": (
        _file("t.csv", TABLE, drop=("a", "b")),
        "Drop fewer columns.",
        [_file("t.csv", TABLE, drop=("a",))],
    ),
    "one class": (
        _file("t.csv", TABLE.replace("dog", "cat")),
        "samples of at least two classes",
        [_file("t.csv", TABLE)],
    ),
    "a text shorter than its context": (
        _file("t.txt", "the quick brown fox jumps. " * 8),
        "a smaller context=",
        [_file("t.txt", "the quick brown fox jumps. " * 8, context=8), _file("t.txt", "the quick brown fox. " * 200)],
    ),
    "a text of one character": (
        _file("t.txt", "a" * 4000),
        "Pass a real text.",
        [_file("t.txt", "the quick brown fox. " * 200)],
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_a_remedy_works(name: str, tmp_path: Path) -> None:
    wrong, says, right = CASES[name]
    with pytest.raises(WeightfoldError) as caught:
        wrong(tmp_path)
    assert says in (caught.value.remedy or ""), caught.value
    for load_it in right:
        assert len(load_it(tmp_path).train) > 0


@pytest.mark.parametrize("sizes", [(8, 12)])
def test_images_of_two_sizes_are_resized_while_loading(sizes: tuple[int, ...], tmp_path: Path) -> None:
    from PIL import Image

    for kind in ("cat", "dog"):
        (tmp_path / kind).mkdir()
        for number in range(20):
            size = sizes[number % 2]
            Image.new("L", (size, size), number * 10).save(tmp_path / kind / f"{number}.png")
    with pytest.raises(WeightfoldError) as caught:
        load(tmp_path)
    says = caught.value.remedy or ""
    size = int(says.partition("size=")[2].rstrip("."))
    assert size in sizes
    assert load(tmp_path, size=size).task.input.height == size
