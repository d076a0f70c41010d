"""The picture of bits by layer: valid, true to the numbers, and part of the report of such a run."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from weightfold.audit.bits import Bits, Layer, read_bits
from weightfold.errors import ConfigError
from weightfold.report import write_report
from weightfold.report.bits import BITS_AXIS, MAX_ROWS, WEIGHTS_AXIS, bits_picture
from weightfold.training import TrainConfig, train

from ..training.conftest import TINY
from .test_report import Page

SVG = "{http://www.w3.org/2000/svg}"
POINT = st.tuples(
    st.integers(1, 1000), st.floats(0, 16), st.integers(0, 64), st.integers(0, 4096), st.floats(0, 1e9)
)  # fmt: skip


def layer(name: str = "fc1", weights: int = 64) -> Layer:
    return Layer(name, 8, weights, ((10, 4.0, 8, 48, 40.0), (90, 2.0, 3, 16, 6.5)))


def bits(n: int = 1, **changes: Any) -> Bits:
    made = Bits("net", tuple(layer(f"fc{k}", 64 + k) for k in range(n)), 100, ((10, 60.0), (90, 30.0)), 300.0, 32.0)
    return replace(made, **changes)


@given(
    st.lists(POINT, min_size=1, max_size=8, unique_by=lambda point: point[0]),
    st.lists(st.floats(1, 1e9), min_size=1, max_size=8),
    st.one_of(st.none(), st.floats(1, 1e9)),
    st.booleans(),
)
@settings(deadline=None)
def test_any_run_makes_a_valid_drawing(points: list, sizes: list[float], target: float | None, alone: bool) -> None:
    found = Bits("<b>", (Layer("<&>", 64, 4096, tuple(sorted(points))),), 1000.0, (), 1e9, target)
    svg = bits_picture(replace(found, sizes=tuple((n + 1.0, size) for n, size in enumerate(sizes))), alone=alone)
    ElementTree.fromstring(svg)
    assert not re.search(r"\bnan\b|\binf\b", svg)


def test_heights_are_those_of_the_numbers() -> None:
    """At 4 of 4 bits a row is full; at 2 it is half full; at 48 of 64 weights three quarters."""
    tree = ElementTree.fromstring(bits_picture(bits(), alone=True))
    lines = [node for node in tree.iter(f"{SVG}polyline") if node.get("class") == "t-edge"]
    boxes = [node for node in tree.iter(f"{SVG}rect") if node.get("class") == "t-gone"]
    for line, box, axis, shares in zip(
        lines, boxes, (BITS_AXIS, WEIGHTS_AXIS), ((1.0, 0.5), (48 / 64, 16 / 64)), strict=True
    ):
        corners = [tuple(map(float, pair.split(","))) for pair in str(line.get("points")).split()]
        top, height = float(str(box.get("y"))), float(str(box.get("height")))
        width = axis.end - axis.start
        assert [x for x, _ in corners] == pytest.approx([axis.start + width * at for at in (0.1, 0.9)], abs=0.06)
        assert [y for _, y in corners] == pytest.approx([top + height * (1 - share) for share in shares], abs=0.06)


def test_it_says_the_numbers_in_words() -> None:
    svg = bits_picture(bits(), alone=True)
    text = "".join(ElementTree.fromstring(svg).itertext())
    for words in ("4.0 → 2.0 bits", "16 of 64, 25 %", "32 B asked for", "300 B as floats", "30 bytes, 10 %"):
        assert words in text
    assert "3 of 8 channels" in text
    assert "asked for" not in "".join(ElementTree.fromstring(bits_picture(bits(target=None))).itertext())


def test_a_picture_alone_has_both_looks_and_needs_nothing_else() -> None:
    svg = bits_picture(bits(), alone=True)
    assert "prefers-color-scheme: dark" in svg
    assert "var(" not in svg
    assert not re.search(r"url\(|<script|href", svg)


def test_small_layers_are_left_out_where_there_are_too_many() -> None:
    text = "".join(ElementTree.fromstring(bits_picture(bits(MAX_ROWS + 7))).itertext())
    assert "and 7 smaller layers" in text
    assert f"fc{MAX_ROWS + 6}" in text
    assert "fc3:" not in text


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("runs") / "small"
    return out, train(TrainConfig(**{**TINY, "method": "self_compress", "target": "15%", "at": 0.1, "epochs": 6}), out)


def test_the_report_tells_of_the_file(run: tuple[Path, dict[str, Any]]) -> None:
    arm = run[1]["results"]["arms"]["folded"]
    page = Page(write_report(run[0]).read_text(encoding="utf-8"))
    assert not page.open
    for words in ("Bits by layer", "compressed", f"{arm['size_bytes']:,} bytes", f"{arm['packed']['packed_bytes']:,}"):
        assert words in page.text
    for found in arm["layers"]:
        assert found["name"] in page.text


def test_a_run_without_bits_is_told_apart(tmp_path: Path) -> None:
    train(TrainConfig(**{**TINY, "epochs": 1, "method": "none"}), tmp_path / "run")
    with pytest.raises(ConfigError, match="holds no bits by layer"):
        read_bits(tmp_path / "run")
